r"""Components scaled or exchanged, everywhere or at chosen positions only.

At a chosen position the weight of every site is θ* + Σ_q Q_q, elsewhere θ*:

  steer   Q_c = (s_c - 1) P_c               component c times s_c
  swap    Q_i = P_i' - P_i, Q_j alike       i reads what it read and writes what j wrote:
            P_i = U_i V_i,  P_i' = ± (‖V_i‖/‖V_j‖) U_i V_j,  and P_j' with i and j exchanged

A position's weights are those that its own activations are multiplied with: where keys and values
are steered at position s, later positions attend to what they are there.

Shapes: B sequences, T positions, n pieces of a site.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import wadler_lindig as wl
from jaxtyping import Array, Bool, PyTree

from apd_jax import components as components_lib
from apd_jax.components import Components, Factors
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.forward import sparse
from apd_jax.forward.sparse import SiteWeights

Where = Any  # None | bool [T] or [B, T] | (tokens [B, T]) -> bool [B, T]


@dataclasses.dataclass(frozen=True)
class Intervention:
    """A changed network, run like the original one: `apply_fn(params, tokens)`.

    weights: θ* + Σ_q Q_q, a pytree like the network's params, for `model.save`; what the network
    has at the chosen positions.
    """

    apply_fn: Callable
    params: PyTree
    weights: PyTree

    def __repr__(self) -> str:
        return wl.pformat(self)


def steer(
    decomposition: Decomposition, scales: Mapping[int, float], where: Where = None
) -> Intervention:
    """The network with component c times scales[c] at the positions `where`.

    Args:
      scales: {component: factor}; 0 takes it out, 1 leaves it as it is.
      where: None: everywhere, which is `decomposition.edit`. Bool [T], or [B, T] with a row for
        each sequence: these positions; longer sequences go on unchanged. A function of the tokens
        [B, T] that returns such an array, e.g. `lambda tokens: tokens == 17`.
    Raises:
      InputError: a component that does not exist, or a scale that is not finite.
    Cost: that of the network, and n·m·(d_in + d_out) per position for the n scaled pieces.
    """
    params = decomposition.edit(scales)  # also refuses what cannot be scaled
    change = np.zeros(decomposition.components.num_components, np.float32)
    change[list(scales)] = [scale - 1 for scale in scales.values()]

    def one(f: Factors) -> Factors:
        factor = f.take(jnp.asarray(change)).reshape(-1, *[1] * (f.U.ndim - 1))
        return dataclasses.replace(f, U=f.U * factor.astype(f.U.dtype))

    moved = components_lib.map_sites(one, decomposition.components)
    return _intervention(decomposition, _only(moved, list(scales)), params, where)


def swapped(decomposition: Decomposition, i: int, j: int, *, sign: int = 1) -> Decomposition:
    """The network, and its components, after i and j have exchanged what they write.

    P_i' = ± (‖V_i‖/‖V_j‖) U_i V_j and P_j' = ± (‖V_j‖/‖V_i‖) U_j V_i; θ' = θ* + Σ (P' - P). Of rank
    one, each keeps its norm, and twice is the identity. Where i and j lie at the same sites each
    site exchanges its own; else each must have one piece, of equal output width.

    Args:
      sign: 1 or -1. Training fixes the product U V, not the sign of each: with 1 it is that of the
        stored factors, which says nothing by itself.
    Raises:
      InputError: the two cannot be exchanged.
    """
    if sign not in (1, -1):
        raise InputError(f"swap takes sign 1 or -1; got {sign}.")
    sites = dict(decomposition.components.factors)
    for (here, a), (there, b) in _pairs(decomposition.components, i, j):
        v, w = sites[here].V[a], sites[there].V[b]
        ratio = sign * float(jnp.linalg.norm(v) / jnp.linalg.norm(w))
        if not np.isfinite(ratio) or ratio == 0:
            raise InputError(f"components {i} and {j} cannot be exchanged: one of them is zero.")
        for name, place, new in ((here, a, ratio * w), (there, b, v / ratio)):
            f = sites[name]
            sites[name] = dataclasses.replace(f, V=f.V.at[place].set(new))
    tree = jax.tree_util.tree_map_with_path(
        lambda path, f: sites.get(components_lib.path_name(path), f),
        decomposition.components.tree,
        is_leaf=components_lib.is_slot,
    )
    after = dataclasses.replace(decomposition.components, tree=tree)
    added = _plus(decomposition.problem.params, _difference(decomposition.components, after, i, j))
    problem = dataclasses.replace(decomposition.problem, params=added)
    return dataclasses.replace(decomposition, problem=problem, components=after)


def swap(
    decomposition: Decomposition, i: int, j: int, where: Where = None, *, sign: int = 1
) -> Intervention:
    """The network in which i and j write what the other wrote, at the positions `where`.

    See `swapped` for the equation, `steer` for `where`.

    Raises:
      InputError: the two cannot be exchanged.
    """
    after = swapped(decomposition, i, j, sign=sign)
    added = _difference(decomposition.components, after.components, i, j)
    return _intervention(decomposition, added, after.problem.params, where)


def _intervention(
    decomposition: Decomposition, added: Components, weights: PyTree, where: Where
) -> Intervention:
    problem = decomposition.problem
    if where is None:
        return Intervention(problem.apply_fn, weights, weights)
    if callable(where):
        run = _AtPositions(problem.apply_fn, where)
        return Intervention(run, (problem.params, added, None), weights)
    mask = np.atleast_2d(np.asarray(where))
    if mask.dtype != bool or mask.ndim != 2:
        raise InputError(
            f"where must be None, a bool array [T] or [B, T], or a function of the tokens; got "
            f"{mask.dtype} of shape {np.shape(where)}."
        )
    run = _AtPositions(problem.apply_fn, None)
    return Intervention(run, (problem.params, added, jnp.asarray(mask)), weights)


@dataclasses.dataclass(frozen=True)
class _AtPositions:
    """((params, added pieces, mask), tokens) -> outputs. Equal ones share a compiled program."""

    apply_fn: Callable
    where: Callable | None

    def __call__(self, given: tuple[PyTree, Components, Any], tokens: Any) -> Any:
        params, added, mask = given
        tokens = jnp.asarray(tokens)
        on = self._chosen(mask, tokens).astype(jnp.float32)
        ones = jnp.ones_like(on)
        weights = {
            name: SiteWeights(jnp.broadcast_to(on[..., None], (*on.shape, f.num_pieces)), ones)
            for name, f in added.factors.items()
        }
        return sparse.run(self.apply_fn, params, added, weights, tokens)

    def _chosen(self, mask: Any, tokens: Array) -> Bool[Array, "B T"]:
        B, T = tokens.shape
        if self.where is not None:
            mask = jnp.asarray(self.where(tokens))
        if mask.ndim != 2 or mask.shape[0] not in (1, B) or mask.shape[1] > T:
            raise InputError(
                f"where chooses positions of shape {mask.shape}, but the tokens have {(B, T)}."
            )
        whole = jnp.broadcast_to(mask, (B, mask.shape[1])).astype(bool)
        return jnp.pad(whole, ((0, 0), (0, T - mask.shape[1])))


# Pieces


def _places(f: Factors, number: int) -> list[int]:
    """Which pieces of a site belong to a component."""
    ids = range(f.num_pieces) if f.ids is None else f.ids
    return [place for place, c in enumerate(ids) if c == number]


def _only(components: Components, numbers: list[int]) -> Components:
    """The pieces of these components alone; sites without one are not decomposed."""

    def one(f: Factors) -> Factors | None:
        places = sorted(place for number in set(numbers) for place in _places(f, number))
        if not places:
            return None
        at = np.asarray(places, np.int32)
        return dataclasses.replace(f, U=f.U[at], V=f.V[at], ids=tuple(range(len(places))))

    found = components_lib.map_sites(one, components)
    most = max((f.num_pieces for f in found.factors.values()), default=0)
    return dataclasses.replace(found, count=most)


def _difference(before: Components, after: Components, i: int, j: int) -> Components:
    """P' - P = U (V' - V) of components i and j."""
    change = components_lib.map_sites(
        lambda f, g: dataclasses.replace(f, V=g.V - f.V), before, after
    )
    return _only(change, [i, j])


@jax.jit
def _plus(params: PyTree, added: Components) -> PyTree:
    """params + Σ_q Q_q."""
    leaves = components_lib.decomposed_leaves(added, params)
    sums = {
        name: leaves[name] + components_lib.leaf_total(f).astype(leaves[name].dtype)
        for name, f in added.factors.items()
    }
    return components_lib.replace_leaves(params, sums)


Place = tuple[str, int]  # a site, and one of its pieces


def _pairs(components: Components, i: int, j: int) -> list[tuple[Place, Place]]:
    """Which piece of i is exchanged with which of j."""
    components_lib.chosen(components, [i, j])
    places = [
        [(name, at) for name, f in components.factors.items() for at in _places(f, number)]
        for number in (i, j)
    ]
    widths = [[components.factors[name].V.shape[1:] for name, _ in own] for own in places]
    same_sites = [name for name, _ in places[0]] == [name for name, _ in places[1]]
    one_each = len(places[0]) == len(places[1]) == 1 and widths[0] == widths[1]
    if i == j or not places[0] or not (same_sites or one_each):
        said = [
            ", ".join(f"{name} {shape}" for (name, _), shape in zip(own, of, strict=True))
            for own, of in zip(places, widths, strict=True)
        ]
        raise InputError(
            f"components {i} and {j} cannot exchange what they write: {i} has pieces at "
            f"{said[0] or 'no site'}, {j} at {said[1] or 'no site'}; choose two at the same sites, "
            "or with one piece each of the same output width."
        )
    return list(zip(*places, strict=True))
