"""Direct effects: what every site reads, as a function of the weights of all others in one pass.

In κ = β θ* + Σ_j w_j P_j a piece adds w_j h_j V_j to what its site hands on, with h_j = a·U_j of
what it reads. Here no derivative flows through what a site reads, so ∂/∂w_j is all that follows
from h_j V_j by a way that meets no other decomposed matrix: through residual streams, norms,
activation functions, attention patterns, and matrices that are not decomposed.

Shapes: T positions, n pieces of a site.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from apd_jax.components import Components, named_leaves
from apd_jax.forward import capture, meetings, positions
from apd_jax.forward.harvest import harvest
from apd_jax.forward.interpret import arrays
from apd_jax.forward.kappa import kappa
from apd_jax.forward.sparse import Weights


def reads(
    apply_fn: Callable, params: PyTree, components: Components, weights: Weights, x: PyTree
) -> tuple[Any, dict[str, capture.Reading]]:
    """The outputs on one example, and what every site reads there: see above.

    Args:
      weights: {site: SiteWeights} of all sites, pieces [T, n] and target [T] or None.
      x: one example, a pytree of arrays [T, ...].
    Returns: what apply_fn returns, without the axis of examples, and {site: Reading}, [T, ...].
    Raises:
      InputError: as `capture.inputs` and `sparse.run`.
    Cost: the sparse pass of all pieces, T·n·m·(d_in + d_out) per site.
    """
    batch = jax.tree.map(lambda a: a[None], x)
    leaves = {name: leaf for name, leaf in named_leaves(params).items() if leaf is not None}
    layouts = {name: f.axes for name, f in components.factors.items()}
    known = meetings.Sites({name: tuple(a.shape) for name, a in leaves.items()}, layouts)
    inputs, T = jax.tree.leaves(batch), capture.num_positions_of(batch)
    closed, result = jax.make_jaxpr(apply_fn, return_shape=True)(params, batch)
    found = meetings.find(closed.jaxpr, known, inputs, T)
    values = {
        name: kappa(
            f,
            weights[name].pieces,
            None,
            like=leaves[name],
            name=name,
            flavor="cut",
            num_examples=1,
            target=weights[name].target,
        )
        for name, f in components.factors.items()
    }
    scope = positions.track(closed.jaxpr, [()] * len(leaves) + positions.of_inputs(inputs, T))
    args = [*(values.get(name, leaf) for name, leaf in leaves.items()), *inputs]
    outs, seen = harvest(closed.jaxpr, closed.consts, args, found.watch, scope)
    out = jax.tree.unflatten(jax.tree.structure(result), arrays(outs))
    return jax.tree.map(lambda a: a[0], out), capture.readings(found, seen, known, T)
