"""What can be done with components: sums, norms, ranks, and operations on their numbers."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from apd_jax.collectives import over_components
from apd_jax.components.factors import (
    Components,
    Factors,
    decomposed_leaves,
    is_slot,
    map_sites,
    replace_leaves,
)
from apd_jax.components.layout import fold, path_name, unfold
from apd_jax.errors import InputError

# Sums


@functools.partial(jax.jit, inline=True)
def leaf_total(factors: Factors) -> Float[Array, ...]:
    """Σ_c P_c of one leaf, in the leaf's shape.

    One matmul over the joint (piece, rank) axis; no P_c is formed. All devices have the whole sum
    where the components are split over them.
    """
    U = jnp.moveaxis(factors.U, 0, -2)  # [*batch, d_in, n, m]
    V = jnp.moveaxis(factors.V, 0, -3)  # [*batch, n, m, d_out]
    joint = U.reshape(*U.shape[:-2], -1) @ V.reshape(*V.shape[:-3], -1, V.shape[-1])
    return fold(over_components(joint, factors.axis), factors.shape, factors.axes)


def total(components: Components, params: PyTree) -> PyTree:
    """Σ_c P_c as a pytree like params; leaves that are not decomposed are those of params.

    Cost: one matmul [d_in, n·m] x [n·m, d_out] per leaf.
    """
    leaves = decomposed_leaves(components, params)
    sums = {n: leaf_total(f).astype(leaves[n].dtype) for n, f in components.factors.items()}
    return replace_leaves(params, sums)


def without(components: Components, params: PyTree) -> PyTree:
    """θ* - Σ_c P_c as a pytree like params: the weights without what these components do."""
    leaves = decomposed_leaves(components, params)
    left = {
        n: leaves[n] - leaf_total(f).astype(leaves[n].dtype) for n, f in components.factors.items()
    }
    return replace_leaves(params, left)


def relative_parameter_error(components: Components, params: PyTree) -> Float[Array, ""]:
    """Σ_l ‖θ*_l - Σ_c P_{c,l}‖² / Σ_l ‖θ*_l‖² over the decomposed leaves, in single precision."""
    missing, whole = jnp.zeros(()), jnp.zeros(())
    leaves = decomposed_leaves(components, params)
    for name, f in components.factors.items():
        leaf = leaves[name].astype(jnp.promote_types(leaves[name].dtype, jnp.float32))
        missing += jnp.sum((leaf_total(f) - leaf) ** 2)
        whole += jnp.sum(leaf**2)
    return missing / whole


def materialize(components: Components) -> PyTree:
    """Every P_c: pytree like params, leaves [C, *leaf.shape]; None where not decomposed."""
    C = components.num_components

    def one(f: Factors | None) -> Array | None:
        return None if f is None else f.sums(f.weights, C)

    return jax.tree.map(one, components.tree, is_leaf=is_slot)


def weighted_sum(components: Components, params: PyTree, weights: Float[Array, " C"]) -> PyTree:
    """Σ_c w_c P_c as a pytree like params: scales or switches components for *every* input."""

    def scale(f: Factors) -> Factors:
        factor = f.take(weights).reshape(-1, *[1] * (f.U.ndim - 1)).astype(f.U.dtype)
        return dataclasses.replace(f, U=f.U * factor)

    return total(map_sites(scale, components), params)


# Columns of U


def normalize_U(components: Components) -> Components:
    """Every column U_j[:, k] scaled to unit length over d_in, where it is not 0; V is left."""

    def one(f: Factors) -> Factors:
        length = jnp.linalg.norm(f.U, axis=-2, keepdims=True)
        return dataclasses.replace(f, U=f.U / jnp.where(length > 0, length, 1))

    return map_sites(one, components)


def project_U_gradient(gradient: Components, components: Components) -> Components:
    """g - (g·u)u for every column u of U: without the part that only changes its length."""

    def one(g: Factors, f: Factors) -> Factors:
        along = jnp.sum(g.U * f.U, axis=-2, keepdims=True)
        return dataclasses.replace(g, U=g.U - along * f.U)

    return map_sites(one, gradient, components)


# Norms and ranks


def squared_norms(components: Components) -> dict[str, Float[Array, " C"]]:
    """‖P_c‖²_F per leaf, from the factors: tr(UᵀU · VVᵀ). Cost: C·m²·(d_in + d_out) per leaf."""
    C = components.num_components

    def one(f: Factors) -> Float[Array, " C"]:
        f = _no_number_twice(f, C)
        return f.sums(_squared_norms_of_products(f.U, f.V), C)

    return {name: one(f) for name, f in components.factors.items()}


@functools.partial(jax.jit, inline=True)
def _squared_norms_of_products(
    U: Float[Array, "n *b d_in m"], V: Float[Array, "n *b m d_out"]
) -> Float[Array, " n"]:
    gram_u = jnp.einsum("c...im,c...in->c...mn", U, U)
    gram_v = jnp.einsum("c...mo,c...no->c...mn", V, V)
    return jnp.sum(gram_u * gram_v, axis=tuple(range(1, gram_u.ndim)))


def norms(components: Components) -> Float[Array, " C"]:
    """‖P_c‖ over all leaves."""
    squares = sum(squared_norms(components).values(), jnp.zeros(()))
    return jnp.sqrt(jnp.maximum(squares, 0))


def singular_values(components: Components) -> dict[str, Float[Array, "C r"]]:
    """Singular values of every P_c per leaf, largest first; stacked matrices one after another.

    Of every matrix as many as its pieces have ranks, but no more than it has rows or columns.
    Cost: C·m²·(d_in + d_out) per leaf.
    """
    C = components.num_components

    def one(f: Factors) -> Float[Array, "C r"]:
        f = _no_number_twice(f, C)
        s = _singular_values_of_product(f.U, f.V)
        return f.sums(s.reshape(s.shape[0], -1), C)

    return {name: one(f) for name, f in components.factors.items()}


@functools.partial(jax.jit, inline=True)
def _singular_values_of_product(U: Array, V: Array) -> Array:
    """Of U V [..., d_in, m] [..., m, d_out], by R_U R_Vᵀ [m, m] of their QR where m is small."""
    m = U.shape[-1]
    if m == 1:
        lengths = jnp.linalg.norm(U[..., 0], axis=-1), jnp.linalg.norm(V[..., 0, :], axis=-1)
        return (lengths[0] * lengths[1])[..., None]
    if m >= min(U.shape[-2], V.shape[-1]):
        return jnp.linalg.svd(U @ V, compute_uv=False)
    r_u, r_v = (jnp.linalg.qr(a, mode="r") for a in (U, jnp.swapaxes(V, -1, -2)))
    return jnp.linalg.svd(r_u @ jnp.swapaxes(r_v, -1, -2), compute_uv=False)


def effective_ranks(components: Components, tolerance: float = 1e-2) -> dict[str, Int[Array, " C"]]:
    """Number of singular values above `tolerance` times the leaf's largest over *all* components.

    Relative to the leaf, not to the component: a dead component has rank 0.
    """

    def one(s: Float[Array, "C r"]) -> Int[Array, " C"]:
        return jnp.sum(s > tolerance * jnp.max(s), axis=-1)

    return {name: one(s) for name, s in singular_values(components).items()}


# Numbers


def chosen(components: Components, given: Any) -> np.ndarray:
    """Which of the C components are meant, bool [C]: by their numbers, or by a mask.

    Raises:
      InputError: a mask of another size, no whole numbers, or a component that does not exist.
    """
    C = components.num_components
    try:
        given = np.asarray(given)
    except ValueError:
        raise InputError(
            "components are chosen by one list of numbers; got a ragged one."
        ) from None
    if given.dtype == bool:
        if given.shape != (C,):
            raise InputError(f"a mask of components must have shape ({C},); got {given.shape}.")
        return given
    if given.size and not np.issubdtype(given.dtype, np.integer):
        raise InputError(
            f"components are chosen by whole numbers or by a bool mask; got {given.dtype}."
        )
    numbers = [int(c) for c in given.reshape(-1)]
    if bad := [c for c in numbers if not 0 <= c < C]:
        raise InputError(
            f"component {bad[0]} does not exist; there are {C}, counted from 0 to {C - 1}."
        )
    found = np.zeros(C, bool)
    found[numbers] = True
    return found


def relabel(components: Components, numbers: Sequence[int]) -> Components:
    """Component c becomes component numbers[c]; those that get one number are one from now on.

    No array changes: only which pieces belong together. Numbers that nobody gets disappear.

    Raises:
      InputError: not one new number, of at least 0, for each component.
    """
    numbers = [int(c) for c in numbers]
    if len(numbers) != components.num_components or min(numbers, default=0) < 0:
        raise InputError(
            f"relabel needs one number of at least 0 for each of {components.num_components} "
            f"components; got {len(numbers)}."
        )
    dense = {c: i for i, c in enumerate(sorted(set(numbers)))}

    def one(f: Factors) -> Factors:
        old = range(f.num_pieces) if f.ids is None else f.ids
        new = tuple(dense[numbers[c]] for c in old)
        ids = None if new == tuple(range(len(dense))) else new
        if ids is not None and ids == tuple(range(ids[0], ids[0] + len(ids))):
            ids = range(ids[0], ids[0] + len(ids))
        return dataclasses.replace(f, ids=ids)

    renamed = map_sites(one, components)
    whole = any(f.ids is None for f in renamed.factors.values())
    return dataclasses.replace(renamed, count=None if whole else len(dense))


def merge(components: Components, *groups: Sequence[int]) -> Components:
    """The components of each group become one, at the place of its first; later numbers move up.

    Raises:
      InputError: a component that does not exist, or in two groups.
    """
    C = components.num_components
    numbers = list(range(C))
    seen: set[int] = set()
    for group in groups:
        members = [int(c) for c in group]
        if not members or min(members) < 0 or max(members) >= C or seen & set(members):
            raise InputError(
                f"merge: {members} must be components from 0 to {C - 1}, none in two groups."
            )
        seen |= set(members)
        for c in members:
            numbers[c] = min(members)
    return relabel(components, numbers)


def split(components: Components, component: int) -> Components:
    """Every piece of a component becomes a component of its own; new numbers come at the end.

    The first piece keeps the number. A piece is what one site holds with one number, or one of
    several that a site holds with it.

    Raises:
      InputError: the component does not exist.
    """
    C = components.num_components
    if not 0 <= component < C:
        raise InputError(f"split: component {component} does not exist; there are {C}.")
    count, fresh = C, [component]

    def one(f: Factors) -> Factors:
        nonlocal count
        new = list(range(f.num_pieces) if f.ids is None else f.ids)
        for j, c in enumerate(new):
            if c == component:
                if fresh:
                    fresh.pop()
                else:
                    new[j], count = count, count + 1
        return dataclasses.replace(f, ids=tuple(new))

    tree = map_sites(one, components).tree
    return relabel(Components(tree, count), range(count))


def aligned(components: Components) -> Components:
    """The same components with all numbers at every site, in order: zeros where there is no piece.

    Several pieces of one number become one of the sum of their ranks. For readers that go through
    components one by one. Cost: C·m·(d_in + d_out) numbers per site, whatever it held.
    """
    C = components.num_components
    whole = map_sites(lambda f: _aligned(f, C), components)
    return dataclasses.replace(whole, count=None)


def compact(components: Components, ranks: Mapping[str, int]) -> Components:
    """`aligned`, with every P_c as its best approximation of its site's given rank (by SVD)."""

    def one(path: tuple[Any, ...], f: Factors | None) -> Factors | None:
        if f is None:
            return None
        u, s, vt = svd_of_product(np.asarray(f.U), np.asarray(f.V))
        rank = ranks[path_name(path)]
        m = min(rank, s.shape[-1])
        root = np.sqrt(s[..., :m])
        U = np.zeros((*f.U.shape[:-1], rank), f.U.dtype)
        V = np.zeros((*f.V.shape[:-2], rank, f.V.shape[-1]), f.V.dtype)
        U[..., :m] = u[..., :m] * root[..., None, :]
        V[..., :m, :] = root[..., None] * vt[..., :m, :]
        return dataclasses.replace(f, U=U, V=V)

    whole = aligned(components)
    tree = jax.tree_util.tree_map_with_path(one, whole.tree, is_leaf=is_slot)
    return dataclasses.replace(whole, tree=tree)


def svd_of_product(U: np.ndarray, V: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """u, s, vt of U V [..., d_in, m] [..., m, d_out] without forming it, in double precision."""
    q_in, r_in = np.linalg.qr(U.astype(np.float64))
    q_out, r_out = np.linalg.qr(np.swapaxes(V, -1, -2).astype(np.float64))
    u, s, vt = np.linalg.svd(r_in @ np.swapaxes(r_out, -1, -2), full_matrices=False)
    return q_in @ u, s, vt @ np.swapaxes(q_out, -1, -2)


def _no_number_twice(f: Factors, C: int) -> Factors:
    twice = f.ids is not None and len(set(f.ids)) < len(f.ids)
    return _aligned(f, C) if twice else f


def _aligned(f: Factors, C: int) -> Factors:
    if f.ids is None:
        return f
    pieces: dict[int, list[int]] = defaultdict(list)
    for j, c in enumerate(f.ids):
        pieces[c].append(j)
    most = max(map(len, pieces.values()))
    place = np.full((C, most), f.num_pieces, np.int32)  # one past the last piece: zeros
    for c, own in pieces.items():
        place[c, : len(own)] = own
    U, V = _spread(f.U, f.V, place)
    return dataclasses.replace(f, U=U, V=V, ids=None)


@functools.partial(jax.jit, inline=True)  # one program for all sites of a shape
def _spread(
    U: Float[Array, "n *b d_in m"], V: Float[Array, "n *b m d_out"], place: Int[Array, "C most"]
) -> tuple[Array, Array]:
    U, V = (jnp.concatenate([a, jnp.zeros_like(a[:1])])[place] for a in (U, V))  # [C, most, ...]
    U = jnp.moveaxis(U, 1, -2)  # [C, *batch, d_in, most, m]
    V = jnp.moveaxis(V, 1, -3)  # [C, *batch, most, m, d_out]
    return U.reshape(*U.shape[:-2], -1), V.reshape(*V.shape[:-3], -1, V.shape[-1])


def remainders(components: Components, params: PyTree) -> dict[str, Float[Array, "..."]]:
    """Δ_l = θ*_l - Σ_c P_{c,l} of every site, [*batch, d_in, d_out]."""
    leaves = decomposed_leaves(components, params)
    return {
        name: unfold(leaves[name] - leaf_total(f), f.axes) for name, f in components.factors.items()
    }
