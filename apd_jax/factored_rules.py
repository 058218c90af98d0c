"""What every operation of a network does to a `factored.Kappa`: quax rules.

Products, convolutions and lookups multiply by the factors. Views (transpose, reshape, slice, split, squeeze, cast, scaling by a
number) give another Kappa. Everything else works on the materialised weight, of this leaf only.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import quax
from jax import lax
from jax.extend.core.primitives import remat_p
from jaxtyping import Array, ArrayLike

from apd_jax import layout
from apd_jax.factored import Kappa


def _other(primitive: Any, *args: Any, **params: Any) -> Any:
    """The operation on the materialised weight."""
    return primitive.bind(*(a.materialise() if isinstance(a, Kappa) else a for a in args), **params)


def _dot(value: Kappa, x: Array, dimension_numbers: Any, kappa_first: bool, dtype: Any) -> Array | None:
    """dot_general of an array with κ, or None where neither all its inputs nor all its outputs are contracted."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    k_contract, x_contract = (lhs_contract, rhs_contract) if kappa_first else (rhs_contract, lhs_contract)
    k_batch, x_batch = (lhs_batch, rhs_batch) if kappa_first else (rhs_batch, lhs_batch)
    of_side = {side: [i for i, s in enumerate(value.current) if s == side] for side in "bio"}
    reading = next((side for side in "io" if k_contract and sorted(k_contract) == of_side[side]), None)
    if reading is None or sorted(k_batch) != of_side["b"]:
        return None
    x_batch = [x_batch[k_batch.index(axis)] for axis in of_side["b"]]
    x_contract = [x_contract[k_contract.index(axis)] for axis in of_side[reading]]
    free = [axis for axis in range(x.ndim) if axis not in x_batch and axis not in x_contract]
    n, f = len(x_batch), len(free)
    rows = jnp.transpose(x, (*x_batch, *free, *x_contract)).reshape(*(x.shape[axis] for axis in (*x_batch, *free)), -1)
    out = value.product(rows, reading, dtype)
    batch = [of_side["b"].index(axis) for axis in k_batch]  # dot_general's order of the batch axes
    rest, outs = list(range(n, n + f)), list(range(n + f, out.ndim))
    return jnp.transpose(out, (*batch, *outs, *rest) if kappa_first else (*batch, *rest, *outs))


@quax.register(lax.dot_general_p)
def _(lhs: ArrayLike, rhs: Kappa, **params):
    dtype = params["preferred_element_type"] or jnp.result_type(lhs, rhs.kind)
    out = _dot(rhs, jnp.asarray(lhs), params["dimension_numbers"], False, dtype)
    return _other(lax.dot_general_p, lhs, rhs, **params) if out is None else out


@quax.register(lax.dot_general_p)
def _(lhs: Kappa, rhs: ArrayLike, **params):
    dtype = params["preferred_element_type"] or jnp.result_type(lhs.kind, rhs)
    out = _dot(lhs, jnp.asarray(rhs), params["dimension_numbers"], True, dtype)
    return _other(lax.dot_general_p, lhs, rhs, **params) if out is None else out


@quax.register(lax.conv_general_dilated_p)
def _(lhs: ArrayLike, rhs: Kappa, **params):
    """A convolution as a matrix product with the patches that it sees."""
    numbers, sides = params["dimension_numbers"], rhs.current
    out_axis, in_axis, *window = numbers.rhs_spec
    reading = sides[in_axis]
    simple = params["feature_group_count"] == params["batch_group_count"] == 1 and not rhs.per_position
    others = {side for i, side in enumerate(sides) if i != out_axis}
    if not simple or "b" in sides or others != {reading} or sides[out_axis] == reading:
        return _other(lax.conv_general_dilated_p, lhs, rhs, **params)
    patches = lax.conv_general_dilated_patches(
        jnp.asarray(lhs),
        [rhs.shape[axis] for axis in window],
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        dimension_numbers=numbers,
    )
    batch_axis, feature_axis, *spatial = numbers.out_spec
    rows = jnp.transpose(patches, (batch_axis, *spatial, feature_axis))  # features ordered (channel, *window)
    of_reading = [axis for axis, side in enumerate(sides) if side == reading]
    dtype = params["preferred_element_type"] or jnp.result_type(lhs, rhs.kind)
    out = rhs.product(rows, reading, dtype, ins=[of_reading.index(axis) for axis in (in_axis, *window)])
    order = (batch_axis, *spatial, feature_axis)
    return jnp.transpose(out, [order.index(axis) for axis in range(out.ndim)])


@quax.register(lax.gather_p)
def _(operand: Kappa, indices: ArrayLike, **params):
    """A lookup of rows."""
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
        return _other(lax.gather_p, operand, indices, **params)
    rows = jnp.asarray(indices)[..., 0]
    filled = params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    size = shape[looked_up[0]]
    out = operand.product(jnp.clip(rows, 0, size - 1), sides[looked_up[0]], operand.kind)
    if filled:
        outside = ((rows < 0) | (rows >= size)).reshape(*rows.shape, *[1] * len(whole))
        out = jnp.where(outside, jnp.nan if params["fill_value"] is None else params["fill_value"], out)
    return jnp.moveaxis(out, range(rows.ndim, out.ndim), numbers.offset_dims)


@quax.register(lax.transpose_p)
def _(value: Kappa, *, permutation):
    return value.transposed(permutation)


@quax.register(lax.convert_element_type_p)
def _(value: Kappa, *, new_dtype, **params):
    if not jnp.issubdtype(new_dtype, jnp.floating):
        return _other(lax.convert_element_type_p, value, new_dtype=new_dtype, **params)
    U, V = value.U.astype(new_dtype), value.V.astype(new_dtype)
    return value.replace(U=U, V=V, base=value.map_base(lambda a: a.astype(new_dtype)), kind=jnp.dtype(new_dtype))


@quax.register(lax.reshape_p)
def _(value: Kappa, *, new_sizes, **params):
    """Splits and merges axes that belong to the same side; others mix inputs with outputs and materialise."""
    sides, n = value.current, value.num_batch
    groups = layout.regroup(value.shape, tuple(new_sizes)) or [(list(range(len(sides))), [])]
    new = []
    for old, made in groups:
        kinds = {sides[i] for i in old}
        if len(kinds) != 1 or not made or (kinds == {"b"} and len(old) + len(made) > 2):
            return _other(lax.reshape_p, value, new_sizes=new_sizes, **params)
        new += [(kinds.copy().pop(), new_sizes[i]) for i in made]
    ins, outs = ([size for side, size in new if side == which] for which in "io")
    return value.replace(
        U=value.U.reshape(*value.U.shape[: n + 1], *ins, value.U.shape[-1]),
        V=value.V.reshape(*value.V.shape[: n + 2], *outs),
        base=value.map_base(lambda a: a.reshape(new_sizes)),
        sides="".join(side for side, _ in new),
    )


def _cut(value: Kappa, axis: int, fn: Any) -> Kappa:
    """One axis cut by fn(array, axis of the array)."""
    side, n = value.current[axis], value.num_batch
    place = value.current[:axis].count(side)
    arrays: dict[str, Any] = {"base": value.map_base(lambda a: fn(a, axis))}
    if side == "b":
        arrays |= {name: fn(getattr(value, name), place) for name in ("U", "V", "weights")}
        arrays["plan"] = jax.tree.map(lambda a: fn(a, place), value.plan)
    elif side == "i":
        arrays["U"] = fn(value.U, n + 1 + place)
    else:
        arrays["V"] = fn(value.V, n + 2 + place)
    return value.replace(**arrays)


@quax.register(lax.slice_p)
def _(value: Kappa, *, start_indices, limit_indices, strides):
    for axis, (start, limit) in enumerate(zip(start_indices, limit_indices, strict=True)):
        if (start, limit) != (0, value.shape[axis]) or strides:
            step = strides[axis] if strides else 1
            value = _cut(value, axis, lambda a, i, s=start, e=limit, step=step: lax.slice_in_dim(a, s, e, step, axis=i))
    return value


@quax.register(lax.dynamic_slice_p)
def _(value: Kappa, *starts: ArrayLike, slice_sizes):
    for axis, (start, size) in enumerate(zip(starts, slice_sizes, strict=True)):
        if size != value.shape[axis]:
            value = _cut(value, axis, lambda a, i, start=start, size=size: lax.dynamic_slice_in_dim(a, start, size, axis=i))
    return value


@quax.register(lax.split_p)
def _(value: Kappa, *, sizes, axis):
    starts = np.cumsum([0, *sizes])
    return [_cut(value, axis, lambda a, i, s=s, e=e: lax.slice_in_dim(a, s, e, axis=i)) for s, e in itertools.pairwise(starts.tolist())]


@quax.register(lax.squeeze_p)
def _(value: Kappa, *, dimensions):
    for axis in sorted(dimensions, reverse=True):
        sides = value.current
        if sides[axis] != "b" and sides.count(sides[axis]) == 1:
            return lax.squeeze(value.materialise(), tuple(d for d in dimensions if d <= axis))
        value = _cut(value, axis, lambda a, i: jnp.squeeze(a, i))
        value = value.replace(sides=sides[:axis] + sides[axis + 1 :])
    return value


@quax.register(lax.mul_p)
def _(value: Kappa, scale: ArrayLike, **params):
    if jnp.ndim(scale):
        return _other(lax.mul_p, value, scale, **params)
    return value.replace(V=value.V * scale, base=value.map_base(lambda a: a * scale))


@quax.register(lax.mul_p)
def _(scale: ArrayLike, value: Kappa, **params):
    if jnp.ndim(scale):
        return _other(lax.mul_p, scale, value, **params)
    return value.replace(V=value.V * scale, base=value.map_base(lambda a: a * scale))


@quax.register(remat_p)
def _(*args: ArrayLike | Kappa, jaxpr, prevent_cse, differentiated, policy):
    leaves, tree = jax.tree.flatten(args)
    inner = quax.quaxify(lambda *values: jax.core.eval_jaxpr(jaxpr, (), *values))
    again = jax.checkpoint(lambda *leaves: inner(*tree.unflatten(leaves)), policy=policy, prevent_cse=bool(np.any(prevent_cse)))
    return again(*leaves)
