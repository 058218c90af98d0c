"""What the page needs to run a small network itself: layers, weights, components as short factors.

Shapes: C components, a site [a, b], r_c the singular values that component c keeps there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from apd_jax import components as components_lib
from apd_jax.decomposition import Decomposition
from apd_jax.targets import chain
from apd_jax.targets.base import Target

TOLERANCES = (1e-4, 1e-5, 1e-6, 1e-7)  # of the leaf's largest singular value
UNCHANGED = 1e-6  # largest change of an output by what is left out, over max(1, largest output)
NUM_CHECKED = 64  # examples on which that is checked, each with random factors of all components
# The batch kept what lies at the cut, and the page, in double precision, may find a bit less there.
_BELOW = 1 - 1e-5


def build(
    target: Target, decomposition: Decomposition, x: Float[Array, "B F"], cut: float
) -> dict[str, Any]:
    """The network as data: layers by name, its leaves, and P_c = U_c V_c.

    With as few singular values as leave the outputs unchanged.

    Args:
      target: one with `layers`.
      x: inputs, on which the change is checked.
      cut: the attribution from which on a component was kept on these inputs, where only their
        batch decided it.
    Cost: one SVD per component and leaf, and up to 5 passes of NUM_CHECKED examples with a weight
      of their own each.
    """
    factors = components_lib.aligned(decomposition.components).factors
    named = jax.tree_util.tree_flatten_with_path(decomposition.problem.params)[0]
    used = {layer.leaf for layer in target.layers}
    leaves = {
        name: leaf for path, leaf in named if (name := components_lib.path_name(path)) in used
    }
    layers, leaves, sides = chain.fold(target.layers, leaves, set(factors))
    largest = max(1.0, float(jnp.max(jnp.abs(x))))
    svds = {name: _svd(f.U, f.V, *sides.get(name, (None, None))) for name, f in factors.items()}
    short = _shortest(layers, leaves, svds, x[:NUM_CHECKED])
    return {
        "layers": [dataclasses.asdict(layer) for layer in layers],
        "leaves": leaves,
        "factors": {name: _packed(*svd) for name, svd in short.items()},
        "num_inputs": x.shape[1],
        "lowest": -largest if bool((x < 0).any()) else 0.0,  # where the sliders end
        "highest": largest,
        "start": _example(np.asarray(x)),
        "rule": mask_rule(decomposition, cut),
    }


def mask_rule(decomposition: Decomposition, cut: float) -> dict[str, Any] | None:
    """How the gate chooses one input's components on the page; see `gates.base.Rule`.

    Of an input alone it keeps the `topk` largest, or every component above its cut.

    Args:
      cut: of `components_view.behaviour`; for a gate that is decided by the batch.
    Returns: None where the page cannot tell: for attributions of another kind, or gates that read
      more.
    """
    d = decomposition
    at, rule = d.method.gradients_at, d.method.gate(d.gate, d.problem).rule()
    if at is None or rule is None:
        return None
    cuts = cut * _BELOW if rule.cuts is None else rule.cuts
    cuts = np.broadcast_to(np.asarray(cuts, np.float64), (d.components.num_components,))
    return {
        "at": at,
        "num_always_on": rule.always_on,
        "all": rule.everything,
        "cuts": [float(c) if np.isfinite(c) else None for c in cuts],
        **({} if rule.top is None else {"topk": rule.top}),
    }


def _example(x: Float[np.ndarray, "B F"]) -> Float[np.ndarray, " F"]:
    """The input with the fewest nonzero entries, but some; of those the largest."""
    active = np.where((x != 0).any(axis=1), (x != 0).sum(axis=1), x.shape[1] + 1)
    return x[np.lexsort((-np.abs(x).max(axis=1), active))[0]]


@jax.jit
def _svd(U: Array, V: Array, left: Array | None, right: Array | None) -> tuple[Array, Array, Array]:
    """Of every (L U_c)(V_c R)."""
    product = (U if left is None else left @ U) @ (V if right is None else V @ right)
    u, s, vt = jnp.linalg.svd(product, full_matrices=False)
    return u, s, vt


Svds = dict[str, tuple[Array, Array, Array]]  # {leaf: (u [C, a, r], s [C, r], vt [C, r, b])}


def _shortest(
    layers: tuple[chain.Layer, ...], leaves: Mapping[str, Array], svds: Svds, x: Float[Array, "B F"]
) -> Svds:
    """Without small singular values, at the largest tolerance at which no output changes."""
    C = next(iter(svds.values()))[1].shape[0]
    scales = jax.random.uniform(jax.random.key(0), (x.shape[0], C)).at[0].set(1.0)

    @jax.jit
    def outputs(svds: Svds) -> Float[Array, "B O"]:
        def one(pair):
            scale, example = pair
            sums = {name: jnp.einsum("c,car,cr,crb->ab", scale, *svd) for name, svd in svds.items()}
            return chain.run(layers, {**leaves, **sums}, example[None])[0]

        return jax.lax.map(one, (scales, x))

    def cut(tolerance: float) -> Svds:
        return {
            name: (u, s * (s > tolerance * jnp.max(s)), vt) for name, (u, s, vt) in svds.items()
        }

    exact = outputs(svds)
    allowed = UNCHANGED * jnp.maximum(1.0, jnp.max(jnp.abs(exact)))
    return next(
        (
            short
            for short in map(cut, TOLERANCES)
            if jnp.max(jnp.abs(outputs(short) - exact)) < allowed
        ),
        svds,
    )


def _packed(u: Array, s: Array, vt: Array) -> dict[str, Any]:
    """ranks [C], and the factors of all components in turn: every U_c [a, r_c], V_c [r_c, b]."""
    U, V, ranks = np.asarray(u * s[:, None, :]), np.asarray(vt), np.asarray(jnp.sum(s > 0, axis=1))
    return {
        "ranks": ranks.tolist(),
        "U": np.concatenate([U[c, :, :r].ravel() for c, r in enumerate(ranks)]),
        "V": np.concatenate([V[c, :r].ravel() for c, r in enumerate(ranks)]),
    }
