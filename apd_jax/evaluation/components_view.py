"""What every single component does: where its weights are, which inputs need it, what happens to the outputs without it.

Shapes: B examples, T positions, C components, n examples shown per component, O outputs; a matrix [a, b], of which r x s are shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from apd_jax import components as components_lib
from apd_jax import losses
from apd_jax.components.layout import unfold
from apd_jax.decomposition import Decomposition
from apd_jax.train import step as step_lib


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """How the components act on one batch. See `behaviour`."""

    attributions: Float[np.ndarray, "B *T C"]  # in units of the output
    mask: Bool[np.ndarray, "B *T C"]  # as in training
    cut: float  # the smallest attribution above 0 that the mask kept; infinite if there is none
    firing_rates: Float[
        np.ndarray, " C"
    ]  # share of examples (or positions) on which the component is kept with an attribution above 0
    damage: Float[np.ndarray, " C"]  # in units of the minimality loss
    examples: Int[np.ndarray, "C n"]  # indices into the batch
    change: Float[np.ndarray, "C O"]  # in units of the output


def behaviour(decomposition: Decomposition, x: PyTree, *, num_examples: int = 6) -> Behaviour:
    """Attributions and mask of a batch, and what the outputs lose without each component.

    With f(ΣP) all components on and f(ΣP - P_c) all but one:
      damage_c = D( f(ΣP, x), f(ΣP - P_c, x) ), D the minimality loss of the config, averaged over the batch.
      examples_c: the n examples with the largest attribution (at their strongest position), largest first.
      change_c = f(ΣP, x) - f(ΣP - P_c, x), averaged over those examples (and positions): what the component adds to every output.

    Cost: the attributions, and C forward passes of the batch, one after the other.
    """
    problem, kind = decomposition.problem, decomposition.config.minimality_loss
    C = decomposition.components.num_components

    def measure(components, params, x):
        here = dataclasses.replace(
            decomposition,
            components=components,
            problem=dataclasses.replace(problem, params=params),
        )
        attributions = here.attributions(x)
        mask = here.mask_of(attributions, x)
        strongest = jnp.max(attributions.reshape(attributions.shape[0], -1, C), axis=1)
        _, examples = jax.lax.top_k(strongest.T, min(num_examples, strongest.shape[0]))
        total = components_lib.total(components, params)
        whole = _output(problem.apply_fn, total, x)
        weights = None if problem.valid_fn is None else _mean_one(problem.valid_fn(x))

        def one(c: Array) -> tuple[Array, Array]:
            parts = {
                name: jax.tree.map(lambda a: a[c], f).weights
                for name, f in components.factors.items()
            }
            leaves = components_lib.decomposed_leaves(components, total)
            without = _output(
                problem.apply_fn,
                components_lib.replace_leaves(
                    total, {name: leaves[name] - parts[name] for name in leaves}
                ),
                x,
            )
            change = (whole - without)[examples[c]]
            return losses.minimality(without, whole, kind, weights), jnp.mean(
                change.reshape(-1, change.shape[-1]), axis=0
            )

        damage, change = jax.lax.map(one, jnp.arange(C))
        fires = mask & (attributions > 0)
        cut = jnp.min(jnp.where(fires, attributions, jnp.inf))
        rates = jnp.mean(fires, axis=range(mask.ndim - 1), dtype=jnp.float32)
        return attributions, mask, cut, rates, damage, examples, change

    found = jax.device_get(jax.jit(measure)(decomposition.components, problem.params, x))
    attributions, mask, cut, *rest = found
    return Behaviour(attributions, mask, float(cut), *rest)


def _output(apply_fn: Callable, params: PyTree, x: PyTree) -> Float[Array, "B ..."]:
    out = step_lib.split_result(apply_fn(params, x))[0]
    return out.reshape(-1, 1) if out.ndim == 1 else out


def _mean_one(valid: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    return valid / jnp.maximum(jnp.mean(valid, dtype=jnp.float32), 1e-12)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One matrix in the target, in the sum, and in every component: its r rows and s columns of the largest norm, in their own order."""

    name: str
    shape: tuple[int, int]
    rows: Int[np.ndarray, "C r"]
    columns: Int[np.ndarray, "C s"]
    values: Float[np.ndarray, "C r s"]
    row_norms: Float[
        np.ndarray, "C r"
    ]  # over all columns: how strongly the component reads each input
    column_norms: Float[np.ndarray, "C s"]  # over all rows: how strongly it writes each output
    target_rows: Int[np.ndarray, " r"]
    target_columns: Int[np.ndarray, " s"]
    target: Float[np.ndarray, "r s"]
    total: Float[np.ndarray, "r s"]  # of the sum of components


def matrices(decomposition: Decomposition, side: int) -> list[Matrix]:
    """Every decomposed leaf as matrices [d_in, d_out] of at most `side` shown rows and columns; stacked ones one by one.

    Cost: every P_c of one leaf is formed once, one after the other.
    """
    components, params = decomposition.components, decomposition.problem.params
    leaves = components_lib.decomposed_leaves(components, params)
    found = []
    for name, f in components.factors.items():
        target, total = (
            _stack(unfold(leaf[None], f.axes)[0])
            for leaf in (leaves[name], components_lib.leaf_total(f))
        )
        for k in range(len(target)):
            label = name if len(target) == 1 else f"{name}[{k}]"
            found.append(
                shown(
                    label,
                    (f.U, f.V),
                    lambda pair, k=k: _stack(pair[0] @ pair[1])[k],
                    target[k],
                    total[k],
                    side,
                )
            )
    return found


def shown(
    name: str, parts: PyTree, form: Callable, target: Array, total: Array, side: int
) -> Matrix:
    """The strongest `side` rows and columns of a matrix. parts: arrays with a leading C, of which `form` makes one P_c [a, b]."""
    cut_out = jax.jit(
        lambda parts, target: (
            jax.lax.map(lambda one: _strongest(form(one), side), parts),
            _strongest(target, side),
        )
    )
    (rows, columns, values, row_norms, column_norms), (i, j, kept, *_) = jax.device_get(
        cut_out(parts, target)
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


def _strongest(matrix: Float[Array, "a b"], side: int) -> tuple[Array, ...]:
    norms = [jnp.linalg.norm(matrix, axis=axis) for axis in (1, 0)]
    rows, columns = (jnp.sort(jax.lax.top_k(norm, min(side, len(norm)))[1]) for norm in norms)
    return rows, columns, matrix[rows][:, columns], norms[0][rows], norms[1][columns]


def _stack(matrix: Float[Array, "..."]) -> Float[Array, "k a b"]:
    return matrix.reshape(-1, *matrix.shape[-2:])
