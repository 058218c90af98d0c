"""What every site reads: the rows that meet its weight, at its first use, for any function.

One trace finds where each site is first multiplied, convolved or looked up; the function is then
run as it is, and the activations that stand there are handed out beside its result.

Shapes: B examples, T positions, n pieces of a site, m rank, *batch axes that count its matrices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from apd_jax.collectives import into_components
from apd_jax.components import Components, Factors, layout, named_leaves
from apd_jax.components.layout import Layout
from apd_jax.errors import InputError
from apd_jax.forward import meetings
from apd_jax.forward.dispatch import is_lookup
from apd_jax.forward.harvest import Seen, harvest
from apd_jax.forward.meetings import Found, Meeting, Sites
from apd_jax.forward.rules import conv_patches


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reading:
    """What a site reads.

    rows: [B, *rows, *batch, d_in], or integers [B, *rows, *batch] where rows of the matrix are
      looked up; per position [B, T, *rows, *batch, d_in]. d_in is in the order of U, and *batch in
      that of the site's layout; *rows are the other axes, in their own order (the pixels of a
      convolution, whose d_in are patches).
    side: "in", or "out" where the network reads the transposed matrix: the last axis is then d_out.
    """

    rows: Any
    side: str = dataclasses.field(default="in", metadata={"static": True})


def inputs(
    apply_fn: Callable,
    params: PyTree,
    sites: Components | Sequence[str],
    x: PyTree,
    *,
    per_position: bool = False,
    num_positions: int | None = None,
) -> tuple[Any, dict[str, Reading]]:
    """apply_fn(params, x), and what every site reads at its first use.

    A tied weight is recorded once. Of a stack of matrices each is recorded at its own first use: a
    scan over layers gives all of them.

    Args:
      sites: components, or dotted paths of leaves, whose layouts are then inferred.
      x: pytree of arrays with leading B. The function is run with one example at a time, as a batch
        of 1, like the sparse pass.
      per_position: put the axis of the T positions first.
      num_positions: T; None where all inputs with two axes or more agree on it.
    Returns: (result of apply_fn, {site: Reading}).
    Raises:
      InputError: a site that is first used in a branch, or in a loop all steps of which share it;
        that meets no activations in a product, convolution or lookup; or reads activations whose
        positions cannot be told.
    Cost: a forward pass. A site of matrices that are used one by one is stacked.
    """
    leaves = {name: leaf for name, leaf in named_leaves(params).items() if leaf is not None}
    shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    known = Sites(shapes, _layouts(apply_fn, params, sites, x, shapes))
    T = num_positions_of(x, num_positions) if per_position else None

    def one(x_b: PyTree) -> tuple[Any, dict[str, Reading]]:
        batch = jax.tree.map(lambda a: a[None], x_b)
        closed, result = jax.make_jaxpr(apply_fn, return_shape=True)(params, batch)
        found = meetings.find(closed.jaxpr, known, jax.tree.leaves(batch), T)
        args = [*leaves.values(), *jax.tree.leaves(batch)]
        outs, seen = harvest(closed.jaxpr, closed.consts, args, found.watch)
        read = readings(found, seen, known, T)
        out = jax.tree.unflatten(jax.tree.structure(result), outs)
        return jax.tree.map(lambda a: a[0], out), read

    return jax.vmap(one)(x)


def readings(found: Found, seen: Seen, known: Sites, T: int | None) -> dict[str, Reading]:
    """What every site reads of one example, from the activations that were handed out."""
    return {
        name: _reading(name, uses, [seen[use.key] for use in uses], known, T)
        for name, uses in found.uses.items()
    }


def order(apply_fn: Callable, params: PyTree, components: Components, x: PyTree) -> list[str]:
    """The sites in the order in which the network first uses them. Cost: one trace."""
    leaves = {name: leaf for name, leaf in named_leaves(params).items() if leaf is not None}
    layouts = {name: f.axes for name, f in components.factors.items()}
    known = Sites({name: tuple(leaf.shape) for name, leaf in leaves.items()}, layouts)
    one = jax.tree.map(lambda a: a[:1], x)
    closed = jax.make_jaxpr(apply_fn)(params, one)
    return list(meetings.find(closed.jaxpr, known, jax.tree.leaves(one), None).uses)


def inner(f: Factors, reading: Reading) -> Array:
    """h_j = rows · U_j, the inner activations of every piece: [B, *rows, *batch, n, m].

    Where the network reads the transposed matrix they are rows · V_jᵀ. The pieces are those of this
    device, where components are split over several.
    """
    U = f.U if reading.side == "in" else jnp.swapaxes(f.V, -1, -2)  # [n, *batch, d, m]
    rows, b = reading.rows, len(f.axes.batch)
    if is_lookup(rows):
        look = _looked_up
        for k in range(1, b + 1):
            look = jax.vmap(look, in_axes=(-k, 1), out_axes=-2 - k)
        return look(rows, U)
    rows = into_components(rows.astype(jnp.result_type(rows, U)), f.axis)
    letters = "uvwxyz"[:b]
    return jnp.einsum(f"...{letters}d,n{letters}dm->...{letters}nm", rows, U)


def _looked_up(rows: Array, U: Array) -> Array:
    """Integers [...] of U [n, d, m] -> [..., n, m]."""
    return jnp.moveaxis(jnp.take(U, rows, axis=1, mode="clip"), 0, -2)


def _layouts(
    apply_fn: Callable, params: PyTree, sites: Any, x: PyTree, shapes: Mapping[str, tuple]
) -> dict[str, Layout]:
    if isinstance(sites, Components):
        return {name: f.axes for name, f in sites.factors.items()}
    if unknown := sorted(set(sites) - set(shapes)):
        raise InputError(f"params has no leaf {unknown[0]!r}; its leaves: {', '.join(shapes)}.")
    found = layout.infer(apply_fn, params, x)
    return {name: found.get(name, Layout.default(len(shapes[name]))) for name in sites}


def num_positions_of(x: PyTree, told: int | None = None) -> int:
    """T: what is told, or axis 1 of all inputs with two axes or more."""
    sizes = {leaf.shape[1] for leaf in jax.tree.leaves(x) if leaf.ndim > 1}
    if told is None and len(sizes) != 1:
        raise InputError(
            "inputs per position need one number of positions, but axis 1 of the inputs has sizes "
            f"{sorted(sizes)}; give num_positions."
            if sizes
            else "inputs per position need batches [examples, positions, ...]; here is no axis of "
            "positions."
        )
    return sizes.pop() if told is None else told


def _reading(
    name: str, uses: Sequence[Meeting], seen: Sequence[Array], known: Sites, T: int | None
) -> Reading:
    """The rows of all uses of one site, put in order."""
    arranged = [_arranged(use, a, T) for use, a in zip(uses, seen, strict=True)]
    place = -1 if uses[0].kind == "lookup" else -2  # of the axis of matrices
    kinds = {(use.side, use.kind == "lookup") for use in uses}
    shapes = {rows.shape[:place] for rows in arranged}
    if len(kinds) > 1 or len(shapes) > 1:
        raise InputError(
            f"the matrices of params leaf {name!r} read activations of different shapes, so what "
            "they read is no single array; unstack the leaf."
        )
    rows = arranged[0] if len(arranged) == 1 else jnp.concatenate(arranged, axis=place)
    rows = _permuted(rows, meetings.order_of(uses), place)
    batch = [known.shapes[name][axis] for axis in known.layouts[name].batch]
    width = rows.shape[-1:] if place == -2 else ()
    rows = rows.reshape(*rows.shape[:place], *batch, *width)
    return Reading(rows, "in" if uses[0].side == "i" else "out")


def _arranged(use: Meeting, a: Array, T: int | None) -> Array:
    """[*scans, *axes of the activations] -> [(T,) *rows, matrices, d], or without d."""
    s = use.num_scans
    if use.kind == "patches":
        make = functools.partial(conv_patches, window=use.window, params=use.params)
        for _ in range(s):
            make = jax.vmap(make)
        a = make(a)
    elif use.kind == "lookup":
        a = jnp.clip(a[..., 0], 0, len(use.columns) - 1)
        if not _in_order(use.columns):
            a = jnp.asarray(use.columns)[a]
    first = _position_first(use, a.shape[s:], T)
    dropped = _examples(use, a.shape[s:], first)
    lead = [*first, *(i for i in use.free if i not in first and i not in dropped)]
    order = [*lead, *range(-s, 0), *use.batch, *use.contract, *dropped]
    rows = jnp.transpose(a, [s + i for i in order])
    width = [len(use.columns)] if use.contract else []
    rows = rows.reshape(*(a.shape[s + i] for i in lead), len(use.matrices), *width)
    if use.contract:
        rows = _permuted(rows, np.argsort(use.columns), -1)
    return rows[None] if T == 1 and not first else rows


def _position_first(use: Meeting, shape: tuple[int, ...], T: int | None) -> list[int]:
    """The axis of the positions."""
    if T is None or (T == 1 and len(use.carrying) != 1):
        return []
    if len(use.carrying) != 1:
        said = "several do" if use.carrying else "none is known to"
        raise InputError(
            f"params leaf {use.site!r} reads activations of shape {shape}, and it cannot be told "
            f"which of their axes carries the {T} positions ({said}); leave it out of select, or "
            "use mask_per = 'example'."
        )
    return list(use.carrying)


def _examples(use: Meeting, shape: tuple[int, ...], first: Sequence[int]) -> list[int]:
    """The axis of the one example: where it cannot be told, the first axis of size 1."""
    ones = [i for i in use.free if shape[i] == 1 and i not in first]
    return [i for i in ones if i in use.examples] or ones[:1]


def _permuted(a: Array, order: np.ndarray, axis: int) -> Array:
    return a if _in_order(order) else jnp.take(a, order, axis=axis)


def _in_order(numbers: np.ndarray) -> bool:
    return np.array_equal(numbers, np.arange(len(numbers)))
