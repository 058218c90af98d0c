"""Which axes of a weight are inputs and which outputs: found by looking at how the network uses it.

A weight meets the activations in a matrix product, a convolution or a lookup. What is contracted there (or indexed) are its
inputs, what remains are its outputs, and axes that only choose among several matrices (stacked layers, experts) are batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
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

Axes = tuple[
    frozenset[int], ...
]  # for every axis of a value, the axes of the leaf that it is made of


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a leaf are inputs and which outputs of its matrix; `batch` axes count matrices (stacked layers, experts)."""

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
    """{dotted path: layout} of the leaves that apply_fn(params, x) multiplies, convolves or looks up; by their first such use.

    Rows of a lookup that are multiplied in turn (experts chosen by index) are matrices of a stack.

    Vectors that are stacked for a scan (one bias per layer) have a layout without inputs.

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


def _uses(
    jaxpr: Jaxpr, env: dict[Any, tuple[str, Axes]]
) -> Iterator[tuple[str, set[int], set[int], bool]]:
    """(leaf, axes contracted, axes kept, whether a later use knows better) of every product, convolution, lookup and stack of
    vectors; follows views and inner jaxprs."""
    for eqn in jaxpr.eqns:
        shapes: list[tuple[int, ...]] = [getattr(v.aval, "shape", ()) for v in eqn.invars]
        known = [None if isinstance(v, Literal) or v not in env else env[v] for v in eqn.invars]
        if not any(known):
            continue
        name, p = eqn.primitive.name, eqn.params
        if name == "dot_general":
            contracting, batching = p["dimension_numbers"]
            for operand, contract, batch in zip(known, contracting, batching, strict=True):
                if operand is not None and contract:
                    kept = [
                        axis
                        for axis in range(len(operand[1]))
                        if axis not in contract and axis not in batch
                    ]
                    yield operand[0], _union(operand[1], contract), _union(operand[1], kept), False
        elif name == "conv_general_dilated" and known[1] is not None:
            out = p["dimension_numbers"].rhs_spec[0]
            axes = known[1][1]
            yield (
                known[1][0],
                _union(axes, [i for i in range(len(axes)) if i != out]),
                set(axes[out]),
                False,
            )
        elif name == "gather" and known[0] is not None:
            looked_up, axes = p["dimension_numbers"].start_index_map, known[0][1]
            rest = tuple(a for i, a in enumerate(axes) if i not in looked_up)
            offsets = p["dimension_numbers"].offset_dims
            one = len(shapes[1]) == 1
            if len(offsets) == len(rest) and (
                one or len(rest) > 1
            ):  # a matrix of a stack, or several
                row = dict(zip(offsets, rest, strict=True))
                env[eqn.outvars[0]] = (
                    known[0][0],
                    tuple(row.get(i, frozenset()) for i in range(len(rest) + len(shapes[1]) - 1)),
                )
            if not one:
                yield (
                    known[0][0],
                    _union(axes, looked_up),
                    _union(rest, range(len(rest))),
                    len(rest) > 1,
                )
        elif name == "split" and known[0] is not None:
            env |= dict.fromkeys(eqn.outvars, known[0])
        elif (
            name in ("mul", "div")
            and () in shapes
            and (scaled := [k for k in known if k is not None and k[1]])
        ):  # by a number
            env[eqn.outvars[0]] = scaled[0]
        elif known[0] is not None and (axes := _view(name, p, known[0][1], shapes[0])) is not None:
            env[eqn.outvars[0]] = (known[0][0], axes)
        else:
            if name == "scan":
                yield from (
                    (k[0], set(), set(k[1][1]), False)
                    for k in known[_first_scanned(p) :]
                    if k is not None and len(k[1]) == 2
                )
            for inner, operands in _inner(eqn, known):
                within = {
                    v: k for v, k in zip(inner.invars, operands, strict=True) if k is not None
                }
                yield from _uses(inner, within)
                if name not in ("scan", "while", "cond"):
                    outs = zip(eqn.outvars, inner.outvars, strict=True)
                    env |= {
                        outer: within[v]
                        for outer, v in outs
                        if not isinstance(v, Literal) and v in within
                    }


def _union(axes: Axes, chosen: Any) -> set[int]:
    return set().union(*(axes[i] for i in chosen))


def _view(name: str, p: dict[str, Any], axes: Axes, shape: tuple[int, ...]) -> Axes | None:
    """The axes of a view of a weight; None where the operation makes something else of it."""
    if name in _SAME_AXES:
        return axes
    if name == "transpose":
        return tuple(axes[i] for i in p["permutation"])
    if name == "squeeze":
        return tuple(a for i, a in enumerate(axes) if i not in p["dimensions"])
    if name == "reshape":
        groups = regroup(shape, p["new_sizes"])
        return (
            None
            if groups is None
            else tuple(frozenset(_union(axes, old)) for old, new in groups for _ in new)
        )
    return None


def regroup(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]] | None:
    """The finest runs of axes of equal size that a reshape maps to each other; None for empty arrays."""
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


def _inner(eqn: Any, known: list[Any]) -> Iterator[tuple[Jaxpr, list[Any]]]:
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
    """Which of a scan's operands is the first that it slices: the body sees this one and all after it with one axis less."""
    return p["num_consts"] + p["num_carry"]
