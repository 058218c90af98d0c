"""Which axes of a weight are inputs and which outputs: found by looking at how it is used.

A weight meets the activations in a matrix product, a convolution or a lookup. What is contracted
there (or indexed) are its inputs, what remains are its outputs, and axes that only choose among
several matrices (stacked layers, experts) are batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jaxtyping import Array, Float, PyTree

_SAME_AXES = (
    "convert_element_type",
    "copy",
    "copy_p",
    "slice",
    "dynamic_slice",
    "rev",
    "neg",
    "reduce_precision",
    "sharding_constraint",
)

Axes = tuple[frozenset[int], ...]  # of every axis of a value, the leaf's axes that it is made of
Seen = tuple[str, Axes]  # a leaf, and the axes of a view of it


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a leaf are inputs and which outputs of its matrix.

    `batch` axes count matrices (stacked layers, experts).
    """

    batch: tuple[int, ...]
    ins: tuple[int, ...]
    outs: tuple[int, ...]

    @staticmethod
    def default(ndim: int) -> Layout:
        """The last axis is the output, all others are inputs; a vector is one row."""
        return Layout((), tuple(range(ndim - 1)), tuple(range(ndim))[-1:])

    @property
    def order(self) -> tuple[int, ...]:
        return (*self.batch, *self.ins, *self.outs)


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's dotted path, e.g. `params.Dense_0.kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def matrix_shape(shape: tuple[int, ...], layout: Layout) -> tuple[int, int]:
    """(d_in, d_out) of a leaf's matrix, or of each of its matrices."""
    return math.prod(shape[axis] for axis in layout.ins), math.prod(
        shape[axis] for axis in layout.outs
    )


def fold(
    matrices: Float[Array, "..."], shape: tuple[int, ...], layout: Layout
) -> Float[Array, "..."]:
    """[..., *batch, d_in, d_out] -> [..., *shape]."""
    lead = matrices.shape[: matrices.ndim - len(layout.batch) - 2]
    apart = matrices.reshape(*lead, *(shape[axis] for axis in layout.order))
    return jnp.transpose(
        apart,
        (*range(len(lead)), *(len(lead) + layout.order.index(axis) for axis in range(len(shape)))),
    )


def unfold(leaf: Float[Array, "..."], layout: Layout) -> Float[Array, "..."]:
    """[..., *shape] -> [..., *batch, d_in, d_out]: the inverse of `fold`."""
    num_lead = leaf.ndim - len(layout.order)
    shape = leaf.shape[num_lead:]
    ordered = jnp.transpose(leaf, (*range(num_lead), *(num_lead + axis for axis in layout.order)))
    return ordered.reshape(
        *leaf.shape[:num_lead],
        *(shape[axis] for axis in layout.batch),
        *matrix_shape(shape, layout),
    )


def infer(apply_fn: Callable, params: PyTree, x: PyTree) -> dict[str, Layout]:
    """{dotted path: layout} of the leaves that apply_fn(params, x) multiplies or looks up.

    By the first product, convolution or lookup of each. Rows of a lookup that are multiplied in
    turn (experts chosen by index) are matrices of a stack. Vectors that are stacked for a scan (one
    bias per layer) have a layout without inputs.

    Cost: one trace; nothing is computed, and x may be abstract.
    """
    closed = jax.make_jaxpr(apply_fn)(params, x)
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    names = [path_name(path) for path, _ in leaves]
    ndims = [jnp.ndim(leaf) for _, leaf in leaves]
    start = {
        var: (name, tuple(frozenset({axis}) for axis in range(ndim)))
        for var, name, ndim in zip(closed.jaxpr.invars, names, ndims, strict=False)
    }
    found: dict[str, Layout] = {}
    tentative: dict[str, Layout] = {}
    for name, ins, outs, is_tentative in _uses(closed.jaxpr, start):
        num_axes = ndims[names.index(name)]
        batch = set(range(num_axes)) - ins - outs
        if not ins & outs:
            (tentative if is_tentative else found).setdefault(
                name, Layout(tuple(sorted(batch)), tuple(sorted(ins)), tuple(sorted(outs)))
            )
    return tentative | found


def _uses(jaxpr: Jaxpr, env: dict[Any, Seen]) -> Iterator[tuple[str, set[int], set[int], bool]]:
    """Every product, convolution, lookup and stack of vectors; follows views and inner jaxprs.

    As (leaf, axes contracted, axes kept, whether a later use knows better).
    """
    for eqn in jaxpr.eqns:
        known = [None if isinstance(v, Literal) else env.get(v) for v in eqn.invars]
        if not any(known):
            continue
        name = eqn.primitive.name
        if name in _MEETINGS:
            yield from _MEETINGS[name](eqn, known)
        views = _views(eqn, known)
        if views is not None:
            env |= zip(eqn.outvars, views, strict=False)
        elif name not in _MEETINGS:
            yield from _uses_inside(eqn, known, env)


def _uses_inside(eqn: JaxprEqn, known: list[Seen | None], env: dict[Any, Seen]) -> Iterator[Any]:
    name = eqn.primitive.name
    if name == "scan":
        stacked = [k for k in known[_first_scanned(eqn.params) :] if k is not None]
        yield from ((leaf, set(), set(axes[1]), False) for leaf, axes in stacked if len(axes) == 2)
    for inner, operands in inner_jaxprs(eqn, known):
        within = {v: k for v, k in zip(inner.invars, operands, strict=True) if k is not None}
        yield from _uses(inner, within)
        if name not in ("scan", "while", "cond"):
            for outer, v in zip(eqn.outvars, inner.outvars, strict=True):
                if not isinstance(v, Literal) and v in within:
                    env[outer] = within[v]


def _of_dot(eqn: JaxprEqn, known: list[Seen | None]) -> Iterator[Any]:
    contracting, batching = eqn.params["dimension_numbers"]
    for operand, contract, batch in zip(known, contracting, batching, strict=True):
        if operand is not None and contract:
            leaf, axes = operand
            kept = [i for i in range(len(axes)) if i not in contract and i not in batch]
            yield leaf, _union(axes, contract), _union(axes, kept), False


def _of_conv(eqn: JaxprEqn, known: list[Seen | None]) -> Iterator[Any]:
    if known[1] is not None:
        leaf, axes = known[1]
        out = eqn.params["dimension_numbers"].rhs_spec[0]
        rest = [i for i in range(len(axes)) if i != out]
        yield leaf, _union(axes, rest), set(axes[out]), False


def _of_gather(eqn: JaxprEqn, known: list[Seen | None]) -> Iterator[Any]:
    """Several rows are a lookup; one is only a matrix of a stack."""
    if known[0] is not None and len(_shape(eqn.invars[1])) > 1:
        leaf, axes = known[0]
        looked_up = eqn.params["dimension_numbers"].start_index_map
        rest = _others(axes, looked_up)
        yield leaf, _union(axes, looked_up), _union(rest, range(len(rest))), len(rest) > 1


_MEETINGS = {"dot_general": _of_dot, "conv_general_dilated": _of_conv, "gather": _of_gather}


def _others(axes: Axes, chosen: Any) -> Axes:
    return tuple(a for i, a in enumerate(axes) if i not in chosen)


def _shape(var: Any) -> tuple[int, ...]:
    return getattr(var.aval, "shape", ())


def _union(axes: Axes, chosen: Any) -> set[int]:
    return set().union(*(axes[i] for i in chosen))


def _views(eqn: JaxprEqn, known: list[Seen | None]) -> list[Seen] | None:
    """What an operation makes of a weight; None where that is no view of it."""
    name, p, count = eqn.primitive.name, eqn.params, len(eqn.outvars)
    if name in ("mul", "div"):  # by a number
        operands = list(zip(known, reversed(eqn.invars), strict=True))[: 2 if name == "mul" else 1]
        return [k for k, x in operands if k is not None and k[1] and not _shape(x)] or None
    if known[0] is None:
        return None
    leaf, axes = known[0]
    if name == "split":
        return [(leaf, axes)] * count
    if name == "unstack":
        return [(leaf, _others(axes, [p["axis"]]))] * count
    found = _rows(eqn, axes) if name == "gather" else _view(name, p, axes, _shape(eqn.invars[0]))
    return None if found is None else [(leaf, found)]


def _rows(eqn: JaxprEqn, axes: Axes) -> Axes | None:
    """The axes of looked up rows that may be matrices of a stack."""
    numbers, indices = eqn.params["dimension_numbers"], _shape(eqn.invars[1])
    rest, offsets = _others(axes, numbers.start_index_map), numbers.offset_dims
    if len(offsets) != len(rest) or (len(indices) > 1 and len(rest) < 2):
        return None
    row = dict(zip(offsets, rest, strict=True))
    return tuple(row.get(i, frozenset()) for i in range(len(rest) + len(indices) - 1))


def _view(name: str, p: dict[str, Any], axes: Axes, shape: tuple[int, ...]) -> Axes | None:
    """The axes of a view of a weight; None where the operation makes something else of it."""
    if name in _SAME_AXES:
        return axes
    if name == "transpose":
        return tuple(axes[i] for i in p["permutation"])
    if name == "squeeze":
        return _others(axes, p["dimensions"])
    if name == "reshape":
        groups = regroup(shape, p["new_sizes"])
        return (
            None
            if groups is None
            else tuple(frozenset(_union(axes, old)) for old, new in groups for _ in new)
        )
    return None


def regroup(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]] | None:
    """The finest runs of axes of equal size that a reshape maps to each other.

    None for empty arrays.
    """
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right, a, b = [], [], 1, 1
        while not (left or right) or a != b:
            if a <= b and i < len(old) and (a < b or not left):
                left, a, i = [*left, i], a * old[i], i + 1
            elif j < len(new):
                right, b, j = [*right, j], b * new[j], j + 1
            elif i < len(old):
                left, a, i = [*left, i], a * old[i], i + 1
            else:
                return None
        groups.append((left, right))
    return groups


def inner_jaxprs(eqn: Any, known: list[Any]) -> Iterator[tuple[Jaxpr, list[Any]]]:
    """The inner jaxprs of an equation, with what is known of their arguments."""
    name, p = eqn.primitive.name, eqn.params
    if name == "scan":
        body = p["jaxpr"].jaxpr
        first_x = _first_scanned(p)
        yield (
            body,
            [*known[:first_x], *(None if k is None else (k[0], k[1][1:]) for k in known[first_x:])],
        )
    elif name == "while":
        n, m = p["cond_nconsts"], p["body_nconsts"]
        yield p["body_jaxpr"].jaxpr, known[n:]
        yield p["cond_jaxpr"].jaxpr, [*known[:n], *known[n + m :]]
    elif name == "cond":
        for branch in p["branches"]:
            yield branch.jaxpr, known[1:]
    else:
        for value in p.values():
            inner = (
                getattr(value, "jaxpr", value) if isinstance(value, (Jaxpr, ClosedJaxpr)) else None
            )
            if isinstance(inner, Jaxpr) and len(inner.invars) == len(known):
                yield inner, known


def _first_scanned(p: dict[str, Any]) -> int:
    """Which of a scan's operands is the first that it slices.

    The body sees this one and all after it with one axis less.
    """
    return p["num_consts"] + p["num_carry"]
