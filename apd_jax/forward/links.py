"""Which axes an operation lines up, entry by entry: those of its operands with its results'.

A link (k, a, j, b) says that entry t of axis a of operand k goes to entry t of axis b of result j,
and to no other. Where an operation mixes the entries of an axis there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jax.extend.core import JaxprEqn

from apd_jax.components.layout import regroup

Link = tuple[int, int, int, int]
Axes = Iterable[Any]  # int, or numpy's


def links(eqn: JaxprEqn) -> Iterable[Link]:
    """The links of one operation without inner functions, between axes of equal size.

    Operations that are not known link axes of operands and results of equal shape.
    """
    name = eqn.primitive.name
    family = next((rule for start, rule in _FAMILIES.items() if name.startswith(start)), _alike)
    for k, a, j, b in _RULES.get(name, family)(eqn):
        if shape_of(eqn.invars[k])[a] == shape_of(eqn.outvars[j])[b]:
            yield int(k), int(a), int(j), int(b)


def shape_of(var: Any) -> tuple[int, ...]:
    return getattr(var.aval, "shape", ())


def _ndim(var: Any) -> int:
    return len(shape_of(var))


def _alike(eqn: JaxprEqn) -> Iterator[Link]:
    """All axes of operands and results of one shape, up to axes of size 1 that are repeated."""
    for k, x in enumerate(eqn.invars):
        for j, y in enumerate(eqn.outvars):
            own, made = shape_of(x), shape_of(y)
            fits = len(own) == len(made)
            if fits and all(a in (1, b) for a, b in zip(own, made, strict=True)):
                yield from ((k, axis, j, axis) for axis in range(len(own)))


def _kept(eqn: JaxprEqn, gone: Axes, results: Axes = (0,)) -> Iterator[Link]:
    """The axes of the first operand that are left when some go."""
    left = [axis for axis in range(_ndim(eqn.invars[0])) if axis not in tuple(gone)]
    for j in results:
        yield from ((0, axis, j, place) for place, axis in enumerate(left))


def _in_place(eqn: JaxprEqn, operands: Axes, touched: Axes) -> Iterator[Link]:
    """The axes of some operands that all results have at the same place, but those touched."""
    for k in operands:
        for j in range(len(eqn.outvars)):
            axes = set(range(_ndim(eqn.invars[k]))) - set(touched)
            yield from ((k, axis, j, axis) for axis in axes)


def _pairwise(eqn: JaxprEqn, touched: Axes = ()) -> Iterator[Link]:
    """Result j is operand j, but for the axes touched."""
    for k, x in enumerate(eqn.invars[: len(eqn.outvars)]):
        yield from ((k, axis, k, axis) for axis in set(range(_ndim(x))) - set(touched))


def _reduced(eqn: JaxprEqn) -> Iterator[Link]:
    axes = eqn.params.get("axes", eqn.params.get("dimensions", ()))
    return _kept(eqn, axes, range(len(eqn.outvars)))


def _transpose(eqn: JaxprEqn) -> Iterator[Link]:
    return ((0, axis, 0, place) for place, axis in enumerate(eqn.params["permutation"]))


def _broadcast(eqn: JaxprEqn) -> Iterator[Link]:
    return ((0, k, 0, place) for k, place in enumerate(eqn.params["broadcast_dimensions"]))


def _reshape(eqn: JaxprEqn) -> Iterator[Link]:
    """An axis survives alone, or among axes of size 1."""
    old, new = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    first = 0
    while first < min(len(old), len(new)) and old[first] == new[first]:
        yield 0, first, 0, first
        first += 1
    for left, right in regroup(old[first:], new[first:]) or ():
        large = [i for i in left if old[first + i] > 1], [i for i in right if new[first + i] > 1]
        if len(large[0]) == len(large[1]) == 1:
            yield 0, first + large[0][0], 0, first + large[1][0]


def _dot(eqn: JaxprEqn) -> Iterator[Link]:
    contracting, batching = eqn.params["dimension_numbers"]
    place = len(batching[0])
    for k in range(2):
        yield from ((k, axis, 0, i) for i, axis in enumerate(batching[k]))
        for axis in range(_ndim(eqn.invars[k])):
            if axis not in contracting[k] and axis not in batching[k]:
                yield k, axis, 0, place
                place += 1


def _conv(eqn: JaxprEqn) -> Iterator[Link]:
    """The batch axis, output features, and spatial axes that keep their size without strides."""
    p = eqn.params
    (batch, _, *spatial), (out, _, *_), (out_batch, out_feature, *out_spatial) = (
        p["dimension_numbers"].lhs_spec,
        p["dimension_numbers"].rhs_spec,
        p["dimension_numbers"].out_spec,
    )
    if p["batch_group_count"] == 1:
        yield 0, batch, 0, out_batch
    yield 1, out, 0, out_feature
    steps = zip(p["window_strides"], p["lhs_dilation"], strict=True)
    for a, b, step in zip(spatial, out_spatial, steps, strict=True):
        if step == (1, 1):
            yield 0, a, 0, b


def _gather(eqn: JaxprEqn) -> Iterator[Link]:
    """The axes of the indices, and those of the operand that are taken whole."""
    numbers, operand = eqn.params["dimension_numbers"], shape_of(eqn.invars[0])
    result = range(_ndim(eqn.outvars[0]))
    places = [axis for axis in result if axis not in numbers.offset_dims]
    yield from ((1, k, 0, place) for k, place in enumerate(places))
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    left = [axis for axis in range(len(operand)) if axis not in gone]
    for axis, place in zip(left, numbers.offset_dims, strict=True):
        if eqn.params["slice_sizes"][axis] == operand[axis]:
            yield 0, axis, 0, place
    batching = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    yield from ((0, axis, 0, places[k]) for axis, k in batching)


def _concatenate(eqn: JaxprEqn) -> Iterator[Link]:
    return _in_place(eqn, range(len(eqn.invars)), [eqn.params["dimension"]])


def _stack(eqn: JaxprEqn) -> Iterator[Link]:
    new = eqn.params["axis"]
    for k, x in enumerate(eqn.invars):
        yield from ((k, axis, 0, axis + (axis >= new)) for axis in range(_ndim(x)))


def _pad(eqn: JaxprEqn) -> Iterator[Link]:
    config = eqn.params["padding_config"]
    return _in_place(eqn, [0], [i for i, own in enumerate(config) if tuple(own) != (0, 0, 0)])


def _taken(eqn: JaxprEqn) -> Iterator[Link]:
    """Axes of which every entry is taken once: they have the same size before and after."""
    return _in_place(eqn, [0], ())


def _window(eqn: JaxprEqn) -> Iterator[Link]:
    return _in_place(eqn, [0], [i for i, s in enumerate(eqn.params["window_strides"]) if s != 1])


def _before_last(eqn: JaxprEqn, count: int) -> Iterator[Link]:
    """Operations that work on the last axes: only those before them stay."""
    for k, x in enumerate(eqn.invars):
        for j, y in enumerate(eqn.outvars):
            yield from ((k, axis, j, axis) for axis in range(min(_ndim(x) - count, _ndim(y))))


_RULES: dict[str, Callable[[JaxprEqn], Iterable[Link]]] = {
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": lambda eqn: _kept(eqn, eqn.params["dimensions"]),
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "gather": _gather,
    "concatenate": _concatenate,
    "pad": _pad,
    "slice": _taken,
    "dynamic_slice": _taken,
    "tile": _taken,
    "stack": _stack,
    "unstack": lambda eqn: _kept(eqn, [eqn.params["axis"]], range(len(eqn.outvars))),
    "dynamic_update_slice": lambda eqn: _in_place(eqn, [0, 1], ()),
    "rev": lambda eqn: _in_place(eqn, [0], eqn.params["dimensions"]),
    "split": lambda eqn: _in_place(eqn, [0], [eqn.params["axis"]]),
    "sort": lambda eqn: _pairwise(eqn, [eqn.params["dimension"]]),
    "optimization_barrier": _pairwise,
    "iota": lambda eqn: (),
    "fft": lambda eqn: _before_last(eqn, len(eqn.params["fft_lengths"])),
}
_RULES |= dict.fromkeys(("top_k", "approx_top_k"), lambda eqn: _before_last(eqn, 1))
_RULES |= dict.fromkeys(("argmax", "argmin"), _reduced)
_RULES["reduce_precision"] = _alike
_FAMILIES: dict[str, Callable[[JaxprEqn], Iterable[Link]]] = {  # by how a name begins
    "reduce_window": _window,
    "reduce": _reduced,
    "scatter": lambda eqn: _in_place(eqn, [0], ()),
    **dict.fromkeys(
        ("cholesky", "lu", "eig", "svd", "qr", "householder", "schur", "hessenberg", "tri"),
        lambda eqn: _before_last(eqn, 2),
    ),
}
