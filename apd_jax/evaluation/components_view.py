"""What every single component does.

Where its weights are, which inputs need it, and what the outputs are without it.

Shapes: B examples, T positions, C components, n examples shown per component, O outputs; a matrix
[a, b], of which r x s are shown.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import wadler_lindig as wl
from jaxtyping import Array, Bool, Float, Int, PyTree

from apd_jax import components as components_lib
from apd_jax import losses
from apd_jax.components import Components
from apd_jax.components.layout import unfold
from apd_jax.decomposition import Decomposition
from apd_jax.evaluation.general import fired
from apd_jax.methods import observe
from apd_jax.methods.base import Method
from apd_jax.methods.optimizers import Trained
from apd_jax.network.outputs import outputs, position_weights
from apd_jax.network.problem import Problem


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """How the components act on one batch. See `behaviour`."""

    attributions: Float[np.ndarray, "B *T C"]  # in units of the output
    mask: Bool[np.ndarray, "B *T C"]  # as in training
    # the smallest score above 0 that the mask kept, of what is not always on; infinite if none
    cut: float
    cuts: Float[np.ndarray, " C"]  # the same of every component
    firing_rates: Float[np.ndarray, " C"]  # share of examples (or positions) on which it fires
    damage: Float[np.ndarray, " C"]  # in units of the minimality loss
    examples: Int[np.ndarray, "C n"]  # indices into the batch
    change: Float[np.ndarray, "C O"]  # in units of the output

    def __repr__(self) -> str:
        return wl.pformat(self)


def behaviour(decomposition: Decomposition, x: PyTree, *, num_examples: int = 6) -> Behaviour:
    """Attributions and mask of a batch, and what the outputs lose without each component.

    With f(ΣP) all components on and f(ΣP - P_c) all but one:
      damage_c = D( f(ΣP, x), f(ΣP - P_c, x) ), averaged over the batch, D the minimality loss.
      examples_c: the n examples with the largest score (at their strongest position) first.
      change_c = f(ΣP, x) - f(ΣP - P_c, x), averaged over those examples (and positions): what the
        component adds to every output.

    Cost: the gate, and C forward passes of the batch, one after the other.
    """
    method, problem = decomposition.method, decomposition.problem
    C = decomposition.components.num_components

    @jax.jit
    def measure(trained: Trained, params: PyTree, x: PyTree) -> tuple[Array, ...]:
        activity = observe.activity(method, problem, trained, params, x)
        scores = activity.scores
        strongest = jnp.max(scores.reshape(scores.shape[0], -1, C), axis=1)
        _, examples = jax.lax.top_k(strongest.T, min(num_examples, strongest.shape[0]))
        damage, change = _without_each(method, problem, trained.components, params, x, examples)
        fires = fired(activity)
        cuts = jnp.min(jnp.where(fires, scores, jnp.inf).reshape(-1, C), axis=0)
        cut = jnp.min(cuts[method.always_on :])
        rates = jnp.mean(fires, axis=range(fires.ndim - 1), dtype=jnp.float32)
        return scores, activity.active, cut, cuts, rates, damage, examples, change

    found = jax.device_get(measure(decomposition.trained, problem.params, x))
    scores, mask, cut, *rest = found
    return Behaviour(scores, mask, float(cut), *rest)


def _without_each(
    method: Method,
    problem: Problem,
    components: Components,
    params: PyTree,
    x: PyTree,
    examples: Int[Array, "C n"],
) -> tuple[Float[Array, " C"], Float[Array, "C O"]]:
    """Damage and change of the outputs without each component; see `behaviour`."""
    every, total = components_lib.aligned(components), components_lib.total(components, params)
    leaves = components_lib.decomposed_leaves(components, total)
    whole = _output(problem.apply_fn, total, x)
    weights = position_weights(problem.valid(x))[0]

    def one(c: Array) -> tuple[Array, Array]:
        parts = {n: jax.tree.map(lambda a: a[c], f).weights for n, f in every.factors.items()}
        less = {
            name: (leaves[name] - part).astype(leaves[name].dtype) for name, part in parts.items()
        }
        without = _output(problem.apply_fn, components_lib.replace_leaves(total, less), x)
        change = (whole - without)[examples[c]].reshape(-1, whole.shape[-1])
        damage = losses.minimality(without, whole, method.distance, weights)
        return damage, jnp.mean(change, axis=0)

    return jax.lax.map(one, jnp.arange(components.num_components))


def _output(apply_fn: Callable, params: PyTree, x: PyTree) -> Float[Array, "B ..."]:
    out = outputs(apply_fn(params, x))
    return out.reshape(-1, 1) if out.ndim == 1 else out


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One matrix in the target, in the sum, and in every component.

    Of each the r rows and s columns of the largest norm are shown, in their own order. C: as many
    components as are shown.
    """

    name: str
    shape: tuple[int, int]
    rows: Int[np.ndarray, "C r"]
    columns: Int[np.ndarray, "C s"]
    values: Float[np.ndarray, "C r s"]
    # over all columns: how strongly the component reads each input
    row_norms: Float[np.ndarray, "C r"]
    column_norms: Float[np.ndarray, "C s"]  # over all rows: how strongly it writes each output
    target_rows: Int[np.ndarray, " r"]
    target_columns: Int[np.ndarray, " s"]
    target: Float[np.ndarray, "r s"]
    total: Float[np.ndarray, "r s"]  # of the sum of components

    def __repr__(self) -> str:
        return wl.pformat(self)


def matrices(
    decomposition: Decomposition, side: int, numbers: Int[np.ndarray, " n"] | None = None
) -> list[Matrix]:
    """Every decomposed leaf as matrices [d_in, d_out]; stacked ones one by one.

    Args:
      side: how many rows and columns are shown at most.
      numbers: the components to show; None: all.
    Cost: every P_c of one leaf that is shown is formed once, one after the other.
    """
    components = components_lib.aligned(decomposition.components)
    if numbers is None:
        numbers = np.arange(components.num_components)
    params = decomposition.problem.params
    leaves = components_lib.decomposed_leaves(components, params)
    found = []
    for name, f in components.factors.items():
        target, total = (
            _stack(unfold(leaf[None], f.axes)[0])
            for leaf in (leaves[name], components_lib.leaf_total(f))
        )
        U, V = (a.reshape(len(a), -1, *a.shape[-2:])[numbers] for a in (f.U, f.V))
        for k in range(len(target)):
            label = name if len(target) == 1 else f"{name}[{k}]"
            found.append(shown(label, (U[:, k], V[:, k]), _product, target[k], total[k], side))
    return found


def _product(pair: tuple[Array, Array]) -> Array:
    return pair[0] @ pair[1]


def shown(
    name: str, parts: PyTree, form: Callable, target: Array, total: Array, side: int
) -> Matrix:
    """The strongest `side` rows and columns of a matrix.

    parts: arrays with a leading C, of which `form` makes one P_c [a, b]; a program for each form.
    """
    (rows, columns, values, row_norms, column_norms), (i, j, kept, *_) = jax.device_get(
        _cut_out(parts, target, form, side)
    )
    shape = (target.shape[0], target.shape[1])
    return Matrix(
        name,
        shape,
        rows,
        columns,
        values,
        row_norms,
        column_norms,
        i,
        j,
        kept,
        np.asarray(total)[np.ix_(i, j)],
    )


@functools.partial(jax.jit, static_argnames=("form", "side"))
def _cut_out(parts: PyTree, target: Array, form: Callable, side: int) -> tuple[Any, Any]:
    each = jax.lax.map(lambda one: _strongest(form(one), side), parts)
    return each, _strongest(target, side)


def _strongest(matrix: Float[Array, "a b"], side: int) -> tuple[Array, ...]:
    norms = [jnp.linalg.norm(matrix, axis=axis) for axis in (1, 0)]
    rows, columns = (jnp.sort(jax.lax.top_k(norm, min(side, len(norm)))[1]) for norm in norms)
    return rows, columns, matrix[rows][:, columns], norms[0][rows], norms[1][columns]


def _stack(matrix: Float[Array, "..."]) -> Float[Array, "k a b"]:
    return matrix.reshape(-1, *matrix.shape[-2:])
