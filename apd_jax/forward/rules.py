"""What the operations of a network do to a `Kappa`.

Products, convolutions and lookups multiply by the factors (MEETINGS). Views (transpose, reshape,
slice, split, squeeze, flip, cast, scaling by a number) give another Kappa (VIEWS). Everything else
works on the materialised weight, of this leaf only: it has no rule, or its rule returns None.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike

from apd_jax.components import layout
from apd_jax.forward.kappa import Kappa
from apd_jax.forward.primitives import ints

Positions = Sequence[frozenset[int]] | None  # of every operand, the axes that carry the positions

# The rule of a primitive takes its operands, some of them a Kappa, and its parameters, and gives
# its result, or None. That of a meeting is told where the operands' positions are.
MEETINGS: dict[str, Callable] = {}
VIEWS: dict[str, Callable] = {}


def _meeting(primitive: str) -> Callable[[Callable], Callable]:
    def register(fn: Callable) -> Callable:
        MEETINGS[primitive] = fn
        return fn

    return register


def _view(*primitives: str) -> Callable[[Callable], Callable]:
    def register(fn: Callable) -> Callable:
        VIEWS.update(dict.fromkeys(primitives, fn))
        return fn

    return register


# Meetings with activations


@_meeting("dot_general")
def _(positions: Positions, lhs: Any, rhs: Any, *, dimension_numbers, preferred_element_type, **_):
    dtype = preferred_element_type or jnp.result_type(lhs.dtype, rhs.dtype)
    if isinstance(lhs, Kappa) and isinstance(rhs, Kappa):
        return None
    first = isinstance(lhs, Kappa)
    value, x = (lhs, jnp.asarray(rhs)) if first else (rhs, jnp.asarray(lhs))
    carrying = None if positions is None else positions[1 if first else 0]
    return _dot(value, x, dimension_numbers, first, dtype, carrying)


def _dot(
    value: Kappa,
    x: Array,
    dimension_numbers: Any,
    kappa_first: bool,
    dtype: Any,
    positions: frozenset[int] | None,
) -> Array | None:
    """dot_general with κ, or None where neither all its inputs nor all its outputs are met."""
    contract, batch = dimension_numbers
    k_contract, x_contract = contract if kappa_first else contract[::-1]
    k_batch, x_batch = batch if kappa_first else batch[::-1]
    reading = next(
        (side for side in "io" if k_contract and sorted(k_contract) == value.axes_of(side)), None
    )
    of_batch = value.axes_of("b")
    if reading is None or sorted(k_batch) != of_batch:
        return None
    x_batch = [x_batch[k_batch.index(axis)] for axis in of_batch]
    x_contract = [x_contract[k_contract.index(axis)] for axis in value.axes_of(reading)]
    free = [axis for axis in range(x.ndim) if axis not in x_batch and axis not in x_contract]
    n, f = len(x_batch), len(free)
    lead = [x.shape[axis] for axis in (*x_batch, *free)]
    rows = jnp.transpose(x, (*x_batch, *free, *x_contract)).reshape(*lead, -1)
    at = value.position_among(free, x.shape, positions)
    out = value.product(rows, reading, dtype, at=at)
    order = [of_batch.index(axis) for axis in k_batch]  # dot_general's order of the batch axes
    rest, outs = list(range(n, n + f)), list(range(n + f, out.ndim))
    return jnp.transpose(out, (*order, *outs, *rest) if kappa_first else (*order, *rest, *outs))


@_meeting("conv_general_dilated")
def _(positions: Positions, lhs: ArrayLike | Kappa, rhs: ArrayLike | Kappa, **params):
    """A convolution as a matrix product with the patches that it sees."""
    if isinstance(lhs, Kappa) or not isinstance(rhs, Kappa):
        return None
    numbers, sides = params["dimension_numbers"], rhs.current
    out_axis, in_axis, *window = numbers.rhs_spec
    reading = sides[in_axis]
    simple = (
        params["feature_group_count"] == params["batch_group_count"] == 1 and not rhs.per_position
    )
    others = {side for i, side in enumerate(sides) if i != out_axis}
    if not simple or "b" in sides or others != {reading} or sides[out_axis] == reading:
        return None
    rows = conv_patches(jnp.asarray(lhs), [rhs.shape[axis] for axis in window], params)
    of_reading = rhs.axes_of(reading)
    dtype = params["preferred_element_type"] or jnp.result_type(lhs, rhs.dtype)
    ins = [of_reading.index(axis) for axis in (in_axis, *window)]
    out = rhs.product(rows, reading, dtype, ins=ins)
    batch_axis, feature_axis, *spatial = numbers.out_spec
    order = (batch_axis, *spatial, feature_axis)
    return jnp.transpose(out, [order.index(axis) for axis in range(out.ndim)])


def conv_patches(lhs: Array, window: Sequence[int], params: Mapping[str, Any]) -> Array:
    """What a convolution sees: [batch, *spatial, features], features ordered (channel, *window)."""
    numbers = params["dimension_numbers"]
    patches = lax.conv_general_dilated_patches(
        lhs,
        window,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        dimension_numbers=numbers,
    )
    batch_axis, feature_axis, *spatial = numbers.out_spec
    return jnp.transpose(patches, (batch_axis, *spatial, feature_axis))


@_meeting("gather")
def _(positions: Positions, operand: Any, indices: ArrayLike, **params):
    """A lookup of rows."""
    if not isinstance(operand, Kappa):
        return None
    numbers, sides, shape = params["dimension_numbers"], operand.current, operand.shape
    looked_up = numbers.start_index_map
    whole = [size for i, size in enumerate(shape) if i not in looked_up]
    fits = (
        len(looked_up) == 1
        and tuple(numbers.collapsed_slice_dims) == tuple(looked_up)
        and not numbers.operand_batching_dims
        and [params["slice_sizes"][i] for i in range(len(shape)) if i not in looked_up] == whole
        and "b" not in sides
        and sides.count(sides[looked_up[0]]) == 1
    )
    if not fits:
        return None
    rows = jnp.asarray(indices)[..., 0]
    carrying = None if positions is None else positions[1]
    at = operand.position_among(range(rows.ndim), rows.shape, carrying)
    filled = params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    size = shape[looked_up[0]]
    rows_inside, side = jnp.clip(rows, 0, size - 1), sides[looked_up[0]]
    out = operand.product(rows_inside, side, operand.dtype, at=at)
    if filled:
        outside = ((rows < 0) | (rows >= size)).reshape(*rows.shape, *[1] * len(whole))
        out = jnp.where(
            outside, jnp.nan if params["fill_value"] is None else params["fill_value"], out
        )
    return jnp.moveaxis(out, range(rows.ndim, out.ndim), numbers.offset_dims)


# Views


@_view("transpose")
def _(value: Kappa, *, permutation):
    return value.transposed(ints(permutation))


@_view("convert_element_type")
def _(value: Kappa, *, new_dtype, **_):
    if not jnp.issubdtype(new_dtype, jnp.floating):
        return None
    U, V = value.U.astype(new_dtype), value.V.astype(new_dtype)
    return value.replace(
        U=U, V=V, dtype=jnp.dtype(new_dtype), **value.map_whole(lambda a: a.astype(new_dtype))
    )


@_view("reshape")
def _(value: Kappa, *, new_sizes, **_):
    """Splits and merges axes that belong to the same side.

    Others mix inputs with outputs and materialise.
    """
    sides, n = value.current, value.num_batch
    groups = layout.regroup(value.shape, tuple(new_sizes)) or [(list(range(len(sides))), [])]
    new = []
    for old, made in groups:
        kinds = {sides[i] for i in old}
        if len(kinds) != 1 or not made or (kinds == {"b"} and len(old) + len(made) > 2):
            return None
        new += [(kinds.copy().pop(), new_sizes[i]) for i in made]
    ins, outs = ([size for side, size in new if side == which] for which in "io")
    return value.replace(
        U=value.U.reshape(*value.U.shape[: n + 1], *ins, value.U.shape[-1]),
        V=value.V.reshape(*value.V.shape[: n + 2], *outs),
        **value.map_whole(lambda a: a.reshape(new_sizes)),
        sides="".join(side for side, _ in new),
    )


def _cut(value: Kappa, axis: int, fn: Any) -> Kappa:
    """One axis cut by fn(array, axis of the array)."""
    side, n = value.current[axis], value.num_batch
    place = value.current[:axis].count(side)
    arrays: dict[str, Any] = value.map_whole(lambda a: fn(a, axis))
    if side == "b":
        arrays |= value.map_batch(lambda a: fn(a, place))
    elif side == "i":
        arrays["U"] = fn(value.U, n + 1 + place)
    else:
        arrays["V"] = fn(value.V, n + 2 + place)
    return value.replace(**arrays)


@_view("slice")
def _(value: Kappa, *, start_indices, limit_indices, strides):
    for axis, (start, limit) in enumerate(zip(start_indices, limit_indices, strict=True)):
        if (start, limit) != (0, value.shape[axis]) or strides:
            step = strides[axis] if strides else 1
            value = _cut(
                value,
                axis,
                lambda a, i, s=start, e=limit, step=step: lax.slice_in_dim(a, s, e, step, axis=i),
            )
    return value


@_view("dynamic_slice")
def _(value: Kappa, *starts: ArrayLike, slice_sizes):
    for axis, (start, size) in enumerate(zip(starts, slice_sizes, strict=True)):
        if size != value.shape[axis]:
            value = _cut(
                value,
                axis,
                lambda a, i, start=start, size=size: lax.dynamic_slice_in_dim(
                    a, start, size, axis=i
                ),
            )
    return value


@_view("split")
def _(value: Kappa, *, sizes, axis):
    starts = np.cumsum([0, *sizes])
    return [
        _cut(value, axis, lambda a, i, s=s, e=e: lax.slice_in_dim(a, s, e, axis=i))
        for s, e in itertools.pairwise(starts.tolist())
    ]


@_view("unstack")
def _(value: Kappa, *, axis, **_):
    """One matrix of a stack after the other."""
    parts = [
        _cut(value, axis, lambda a, i, k=k: lax.slice_in_dim(a, k, k + 1, axis=i))
        for k in range(value.shape[axis])
    ]
    return [_squeezed(part, (axis,)) for part in parts]


@_view("squeeze")
def _(value: Kappa, *, dimensions):
    return _squeezed(value, ints(dimensions))


def _squeezed(value: Kappa, dimensions: Sequence[int]) -> Kappa | Array:
    for axis in sorted(dimensions, reverse=True):
        sides = value.current
        if sides[axis] != "b" and sides.count(sides[axis]) == 1:
            return lax.squeeze(value.materialise(), tuple(d for d in dimensions if d <= axis))
        value = _cut(value, axis, lambda a, i: jnp.squeeze(a, i))
        value = value.replace(sides=sides[:axis] + sides[axis + 1 :])
    return value


@_view("rev")
def _(value: Kappa, *, dimensions):
    for axis in ints(dimensions):
        value = _cut(value, axis, lambda a, i: jnp.flip(a, i))
    return value


@_view("copy", "copy_p")
def _(value: Kappa, **_):
    return value


@_view("mul")
def _(x: ArrayLike | Kappa, y: ArrayLike | Kappa, **_):
    value, scale = (x, y) if isinstance(x, Kappa) else (y, x)
    return None if isinstance(scale, Kappa) or jnp.ndim(scale) else _scaled(value, scale)


@_view("div")
def _(x: ArrayLike | Kappa, y: ArrayLike | Kappa, **_):
    return None if isinstance(y, Kappa) or jnp.ndim(y) else _scaled(x, 1 / y)


@_view("neg")
def _(value: Kappa, **_):
    return _scaled(value, -1)


def _scaled(value: Kappa, scale: Any) -> Kappa:
    return value.replace(V=value.V * scale, **value.map_whole(lambda a: a * scale))
