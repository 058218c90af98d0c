r"""Components of what sites read at chosen positions and not at others, without training.

`targeted` may begin there. Where one site tells the positions apart by itself, no more is needed.

With a the input of a site, S = E[a aᵀ] over the chosen positions and R over all others,

  S u = σ (R + λ tr(R)/d I) u      u_1 ... u_n of the largest σ, the chosen over the others
  D = S U (Uᵀ S U)⁻¹               of least error in a ≈ D Uᵀ a at chosen positions
  P_j = u_j ⊗ D_jᵀ W               Σ_j P_j = U Dᵀ W

Without them the site sees a - D Uᵀ a in place of a: nearly nothing at chosen positions and nearly a
at others, as far as n directions can. In a transformer later positions read the chosen ones, so
what the network says there changes too.

Shapes: B examples, T positions, d width of what a site reads, n components of a site.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float, PyTree

from apd_jax import components as components_lib
from apd_jax.components import Components, Factors, Select
from apd_jax.components.layout import unfold
from apd_jax.errors import InputError
from apd_jax.forward import capture
from apd_jax.network.problem import Problem
from apd_jax.recipe.run import as_arrays


def contrast(
    apply_fn: Callable,
    params: PyTree,
    batches: Iterable[PyTree],
    where: Callable[[PyTree], Any],
    *,
    select: Select = None,
    num_components: int = 1,
    ridge: float = 1e-3,
    valid_fn: Callable[[PyTree], Any] | None = None,
) -> Components:
    """Components of what sites read where `where` says so, and not elsewhere.

    To begin with, as `apd_jax.decompose(..., method="targeted", init=found)`. The weights without
    them are `apd_jax.components.without(found, params)`.

    Args:
      apply_fn, params, select, valid_fn: as `apd_jax.decompose` takes them.
      batches: inputs x. A site that reads d numbers wants more than d positions of each kind, or
        a larger ridge.
      where: x -> bool [B, T] or [B], the positions (or examples) that are chosen.
      num_components: n, at every site, which has numbers of its own. The first is the one that
        tells chosen from other positions best.
      ridge: λ. Smaller tells them apart better on these batches, larger on others.
    Raises:
      InputError: no chosen position, or no other; more components than a site's inputs have
        directions at chosen positions; a site that is looked up, or a stack of matrices.
    Cost: a forward pass of every batch; of every site 2·d² numbers, and d³ to solve.
    """
    batches = list(batches)
    if num_components < 1 or not ridge > 0:
        raise InputError(
            "contrast needs at least 1 component and a ridge above 0; got num_components = "
            f"{num_components}, ridge = {ridge}."
        )
    params = as_arrays(params)
    problem = Problem(apply_fn, params, batches, select=select, valid_fn=valid_fn)
    sums, reads = _moments(problem, batches, where)
    names = problem.site_names
    ids = {s: range(i * num_components, (i + 1) * num_components) for i, s in enumerate(names)}
    empty = components_lib.init(
        jax.random.key(0),
        params,
        num_components=num_components * len(names),
        rank=1,
        select=problem.chosen,
        layouts=problem.layouts,
        ids=ids,
    )
    leaves = components_lib.named_leaves(params)
    made = {
        name: _pieces(name, f, unfold(leaves[name], f.axes), sums, reads[name], ridge)
        for name, f in empty.factors.items()
    }
    named = {id(f): made[name] for name, f in empty.factors.items()}
    return components_lib.map_sites(lambda f: named[id(f)], empty)


def _moments(
    problem: Problem, batches: list[PyTree], where: Callable[[PyTree], Any]
) -> tuple[Counter[str], dict[str, str]]:
    """Sums over positions by name, "here" and "elsewhere"; and the side that each site reads."""
    reads: dict[str, str] = {}

    @functools.partial(jax.jit, static_argnames="lead")
    def of(params: PyTree, x: PyTree, on: dict[str, Array], lead: int) -> dict[str, Array]:
        _, seen = capture.inputs(
            problem.apply_fn, params, problem.site_names, x, per_position=lead == 2
        )
        found = {f"count {which}": jnp.sum(mask) for which, mask in on.items()}
        for name, reading in seen.items():
            reads[name] = reading.side
            a = _vectors(name, reading.rows, lead)
            for which, mask in on.items():
                weighted = jnp.where(mask[:, None, None], a, 0)
                found[f"{which} {name}"] = jnp.einsum("nri,nrj->ij", weighted, a)
        return found

    sums: Counter[str] = Counter()
    for x in batches:
        chosen, valid = np.asarray(where(x), bool), problem.valid(x)
        counted = True if valid is None or chosen.ndim == 1 else np.asarray(valid)
        on = {"here": chosen & counted, "elsewhere": ~chosen & counted}
        on = {which: mask.reshape(-1) for which, mask in on.items()}
        found = jax.device_get(of(problem.params, x, on, chosen.ndim))
        sums.update({name: np.float64(value) for name, value in found.items()})
    for which, word in (("here", "is chosen"), ("elsewhere", "is left")):
        if not sums[f"count {which}"]:
            raise InputError(
                f"no position {word} by `where` in these batches; components are told apart by "
                "positions of both kinds."
            )
    return sums, reads


def _vectors(name: str, rows: Array, lead: int) -> Float[Array, "N r d"]:
    """What a site reads, by position."""
    if jnp.issubdtype(rows.dtype, jnp.integer):
        raise InputError(
            f"{name!r} is looked up by whole numbers, which no direction tells apart; leave it out "
            "of `select`."
        )
    count = int(np.prod(rows.shape[:lead]))
    return rows.reshape(count, -1, rows.shape[-1]).astype(jnp.float32)


def _pieces(
    name: str, f: Factors, W: Float[Array, "d_in d_out"], sums: Any, side: str, ridge: float
) -> Factors:
    """The factors of a site."""
    if W.ndim != 2:
        raise InputError(f"{name!r} is a stack of matrices; contrast is for single ones.")
    S, R = (sums[f"{w} {name}"] / sums[f"count {w}"] for w in ("here", "elsewhere"))
    n, d = f.num_pieces, len(S)
    rank = int(np.linalg.matrix_rank(S))
    if n > rank:
        raise InputError(
            f"{name!r} reads {rank} directions at chosen positions; ask for at most as many "
            f"components, not {n}."
        )
    damped = R + ridge * np.trace(R) / d * np.eye(d)
    U = scipy.linalg.eigh(S, damped, subset_by_index=[d - n, d - 1])[1][:, ::-1]
    D = S @ U @ np.linalg.inv(U.T @ S @ U)
    matrix = np.asarray(W, np.float64)
    if side == "out":  # the network reads the transposed matrix
        made = {"U": (matrix @ D).T[..., None], "V": U.T[:, None]}
    else:
        made = {"U": U.T[..., None], "V": (D.T @ matrix)[:, None]}
    return dataclasses.replace(f, **{name: jnp.asarray(a, f.U.dtype) for name, a in made.items()})
