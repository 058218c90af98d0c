r"""What leaves read on every example, whatever it needs: as behind a layer with biases.

Where examples that need nothing at all read c, and others x = c + Σ_i s_i a_i, directions of x are
no directions of mechanisms. But examples that need nothing are all the same, and no others are as
many: c is what they read. Mechanisms are looked for in x - c, and by how far outputs are from
those of these examples; what reads one is to be blind to the x of all examples without it. What
no mechanism reads, c among it, is held by components that are always on.

Shapes: N examples, b matrices of a leaf (1 unless stacked).
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from apd_jax import components as components_lib
from apd_jax.network.outputs import outputs
from apd_jax.network.problem import Problem
from apd_jax.recipe.alike import LEAST_COUNT
from apd_jax.recipe.directions import inputs
from apd_jax.recipe.modes import Rows, unit_rows

_SAME = 1e-3  # of the deviation: what differs by less is the same
_DOMINANT = 3  # times as many as there are of any other
_READ = 1e-3  # of the squares of what is read: less is no constant


def read(
    problem: Problem, batches: Iterable[PyTree]
) -> tuple[Rows, Float[np.ndarray, " N"], Rows, Rows] | None:
    """(x - c)/|x - c| of every leaf, the effect, x - c, and x/|x|; None without a c.

    None, too, where a leaf reads no single row of numbers of an example.

    Cost: two forward passes of every example.
    """
    names = set(problem.site_names)
    # As an argument: see `positions`.
    zeros = {name: jnp.zeros_like(leaf) for name, leaf in problem.sites.items()}
    without = components_lib.replace_leaves(problem.params, zeros)
    of_batch = jax.jit(lambda params, without, x: _read(problem.with_params(params), without, x))
    drawn = []
    for x in batches:
        drawn.append(jax.device_get(of_batch(problem.params, without, x)))
        if set(drawn[0][0]) != names:
            return None
    rows, change = jax.tree.map(lambda *a: np.concatenate(a), *drawn)
    nothing = idle(rows)
    if nothing is None:
        return None
    constant = {name: x[nothing].mean(0) for name, x in rows.items()}
    sizes = [
        np.sum(c**2) / max(np.mean(np.sum(rows[n] ** 2, (1, 2))), 1e-30)
        for n, c in constant.items()
    ]
    if max(sizes) < _READ:
        return None
    left = {name: x - constant[name] for name, x in rows.items()}
    effect = np.mean((change - change[nothing].mean(0)) ** 2, axis=1)
    return unit_rows(left), effect, left, unit_rows(rows)


def idle(rows: Rows) -> Bool[np.ndarray, " N"] | None:
    """The examples that read the same, if these are far more than others that do."""
    N = len(next(iter(rows.values())))
    drawn, codes = np.random.default_rng(0), []
    for x in rows.values():
        on = x.reshape(N, -1).astype(np.float64)
        code = on @ drawn.normal(size=on.shape[1])
        codes.append(np.round(code / max(_SAME * float(code.std()), 1e-30)))
    _, which, count = np.unique(np.stack(codes, 1), axis=0, return_inverse=True, return_counts=True)
    most = int(np.argmax(count))
    others = np.delete(count, most)
    if count[most] < max(LEAST_COUNT, _DOMINANT * others.max(initial=0)):
        return None
    return which.reshape(-1) == most


def _read(
    problem: Problem, without: PyTree, x: PyTree
) -> tuple[dict[str, Array], Float[Array, "N O"]]:
    fn = problem.attribution_fn or problem.apply_fn
    change = outputs(fn(problem.params, x)) - outputs(fn(without, x))
    return inputs(problem, x), change.reshape(len(change), -1).astype(jnp.float32)
