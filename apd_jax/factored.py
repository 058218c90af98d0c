"""A weight that is a sum of factored components, chosen anew for every example: what a network sees in the place of its own.

κ(x_b) = base + Σ_c s_c P_c is an array-like value that knows how to meet activations in a matrix product, a convolution or a
lookup without being formed, and how to be transposed, reshaped, sliced, cast and scaled. In any other operation it is
materialised, for that leaf only. The unmodified network runs on such values through quax.

Shapes: B examples, C components, m rank, p positions with a mask of their own (1 for masks per example), r rows that share
one mask in a matrix product, d inputs, e outputs.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import quax
from jax import lax
from jax.extend.core.primitives import remat_p
from jaxtyping import Array, ArrayLike

from apd_jax import layout
from apd_jax.components import Factors
from apd_jax.dispatch import Plan, is_lookup, kept_product, read, read_all
from apd_jax.errors import InputError


class NotFactorableError(Exception):
    """A `lax.scan` slices the axis of components of this leaf (its layout was not known): materialise the leaf."""


class Kappa(quax.ArrayValue):
    """One leaf for one example.

    `sides` says of every axis whether it belongs to the inputs (i), the outputs (o) or counts matrices (b). A scan over the
    first b axis slices all arrays along their first axis, so the b axes that are left are read off the arrays.

    flavor:  kept         Σ_c s_c P_c
             dense        the same with κ formed wherever it is used: the oracle for masks per position
             gradient     base + Σ_c s_c P_c at s = 0, with its derivative in s
             activation   base, with Σ ‖rows · P_c‖² over all uses in the place of the derivative in s
    """

    U: Array  # [*b, C, *ins, m]
    V: Array  # [*b, C, m, *outs]
    weights: Array  # s: [*b, p, C]
    plan: Plan | None  # with leading *b
    base: Array | None  # of the value's own shape
    sides: str = eqx.field(static=True)
    kind: Any = eqx.field(static=True)
    name: str = eqx.field(static=True)
    flavor: str = eqx.field(static=True)
    per_position: bool = eqx.field(static=True)

    @property
    def num_batch(self) -> int:
        n = self.U.ndim - 2 - self.sides.count("i")
        if n < 0:
            raise NotFactorableError(self.name)
        return n

    @property
    def current(self) -> str:
        """`sides` without the b axes that a scan has taken."""
        return self.sides.replace("b", "", self.sides.count("b") - self.num_batch)

    @property
    def shape(self) -> tuple[int, ...]:
        n = self.num_batch
        sizes = {"b": iter(self.U.shape[:n]), "i": iter(self.U.shape[n + 1 : -1]), "o": iter(self.V.shape[n + 2 :])}
        return tuple(next(sizes[side]) for side in self.current)

    def aval(self):
        return jax.core.ShapedArray(self.shape, self.kind)

    def replace(self, **changes: Any) -> Kappa:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__} | {"sides": self.current}
        return Kappa(**(fields | changes))

    def map_base(self, fn: Any) -> Array | None:
        return None if self.base is None else fn(self.base)

    def matrices(self, reading: str, ins: Sequence[int] | None = None) -> tuple[Array, Array]:
        """([*b, C, d, m], [*b, C, m, e]) with the `reading` side as inputs, its axes in the given order."""
        n = self.num_batch
        U, V = (self.U, self.V) if reading == "i" else (jnp.moveaxis(self.V, n + 1, -1), jnp.moveaxis(self.U, -1, n + 1))
        if ins is not None:
            U = jnp.transpose(U, (*range(n + 1), *(n + 1 + i for i in ins), U.ndim - 1))
        d, e = math.prod(U.shape[n + 1 : -1]), math.prod(V.shape[n + 2 :])
        return U.reshape(*U.shape[: n + 1], d, U.shape[-1]), V.reshape(*V.shape[: n + 2], e)

    def _in_order(self, canonical: Array) -> Array:
        """[*b, *ins, *outs] -> the value's own order of axes."""
        axes = {side: iter([i for i, s in enumerate(sorted(self.current, key="bio".index)) if s == side]) for side in "bio"}
        return jnp.transpose(canonical, [next(axes[side]) for side in self.current])

    def materialise(self):
        U, V = self.matrices("i")
        if self.per_position:
            raise InputError(
                f"params leaf {self.name!r} is used by more than matrix products and lookups, so it cannot differ between positions; "
                "leave it out of select, or use mask_per = 'example'."
            )
        s = self.weights[..., 0, :].astype(U.dtype)
        kept = jnp.moveaxis(U * s[..., None, None], -3, -2)  # [*b, d, C, m]
        joint = kept.reshape(*kept.shape[:-2], -1) @ V.reshape(*V.shape[:-3], -1, V.shape[-1])
        n = self.num_batch
        value = self._in_order(joint.reshape(*U.shape[:n], *self.U.shape[n + 1 : -1], *self.V.shape[n + 2 :]))
        if self.flavor == "activation":
            value = lax.stop_gradient(value)
        return (value if self.base is None else self.base + value).astype(self.kind)

    def product(self, rows: Array, reading: str, dtype: Any, ins: Sequence[int] | None = None) -> Array:
        """rows [*b, *free, d], or integers [*b, *free] to look up -> [*b, *free, *outs]."""
        n, looked_up = self.num_batch, is_lookup(rows)
        free = rows.shape[n : rows.ndim if looked_up else -1]
        at = self._position_axis(free)
        if at is not None:
            rows = jnp.moveaxis(rows, n + at, n)
        kept = rows.shape[n : n + len(free)]
        num_positions = self.weights.shape[-2]
        rows = rows.reshape(*rows.shape[:n], num_positions, math.prod(free) // num_positions, *rows.shape[n + len(free) :])
        U, V = self.matrices(reading, ins)
        if self.flavor == "kept":
            fn, more = kept_product, self.plan
        elif self.flavor == "dense":
            fn, more = _dense_product, None
        else:
            rest = "o" if reading == "i" else "i"
            order = [i for side in ("b", reading, rest) for i, s in enumerate(self.current) if s == side]
            if ins is not None:
                order[n : n + len(ins)] = [order[n + i] for i in ins]
            fn = functools.partial(_at_zero, self.flavor == "activation")
            more = jnp.transpose(self.base, order).reshape(*U.shape[:n], U.shape[-2], V.shape[-1])
        for _ in range(n):
            fn = jax.vmap(fn)
        out = fn(rows, U, V, self.weights, more).astype(dtype)
        outs = self.V.shape[n + 2 :] if reading == "i" else self.U.shape[n + 1 : -1]
        out = out.reshape(*out.shape[:n], *kept, *outs)
        return out if at is None else jnp.moveaxis(out, n, n + at)

    def _position_axis(self, free: tuple[int, ...]) -> int | None:
        """Which of the rows' axes are the positions: the one after the batch of one, or the only one of that size."""
        if not self.per_position:
            return None
        T = self.weights.shape[-2]
        hits = [1] if free[1:2] == (T,) else [i for i, size in enumerate(free) if size == T]
        if len(hits) != 1:
            raise InputError(
                f"params leaf {self.name!r} meets activations of shape {free} without an axis of the {T} positions, so it cannot "
                "differ between them; leave it out of select, or use mask_per = 'example'."
            )
        return hits[0]


def kappa(factors: Factors, weights: Array, plan: Plan | None, *, like: Array, name: str, flavor: str, per_position: bool) -> Kappa:
    """The value for one leaf and one example. weights: s, [C] or [p, C]."""
    axes, shape = factors.axes, factors.shape
    b, ins, outs = (tuple(shape[axis] for axis in group) for group in (axes.batch, axes.ins, axes.outs))
    n, (C, m) = len(b), (factors.U.shape[0], factors.U.shape[-1])

    def stacked(a):
        return jnp.broadcast_to(a, (*b, *a.shape))

    value = Kappa(
        U=jnp.moveaxis(factors.U, 0, n).reshape(*b, C, *ins, m),
        V=jnp.moveaxis(factors.V, 0, n).reshape(*b, C, m, *outs),
        weights=stacked(weights if per_position else weights[None]),
        plan=None if plan is None else jax.tree.map(stacked, plan),
        base=None,
        sides="b" * n + "i" * len(ins) + "o" * len(outs),
        kind=like.dtype,
        name=name,
        flavor=flavor,
        per_position=per_position,
    )
    if flavor in ("gradient", "activation"):
        value = value.replace(base=layout.unfold(like, axes).reshape(value.shape))
    return value if axes.order == tuple(range(len(shape))) else _transpose(value, [axes.order.index(i) for i in range(len(shape))])


def _dense_product(x, U, V, s, _):
    """The same as `kept_product`, with every position's own weight formed."""
    return jax.vmap(read)(x, jnp.einsum("pc,cde->pde", s.astype(U.dtype), U @ V))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _at_zero(activation: bool, x, U, V, s, base):
    """x·(base + Σ_c s_c U_c V_c) at s = 0. x [p, r, d] or integers [p, r]; s [p, C]."""
    return read(x, base)


def _at_zero_fwd(activation, x, U, V, s, base):
    return read(x, base), (x, U, V, s, base)


def _at_zero_bwd(activation, residuals, g):
    x, U, V, s, base = residuals
    inner = read_all(x, U)
    if activation:
        gram = jnp.einsum("cme,cne->cmn", V, V)
        ds = jnp.einsum("prcm,cmn,prcn->pc", inner, gram, inner)
    else:
        ds = jnp.sum(inner * jnp.einsum("pre,cme->prcm", g, V), axis=(1, 3))
    dx = None if is_lookup(x) else (g @ base.T).astype(x.dtype)
    return dx, jnp.zeros_like(U), jnp.zeros_like(V), ds.astype(s.dtype), jnp.zeros_like(base)


_at_zero.defvjp(_at_zero_fwd, _at_zero_bwd)


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


def _transpose(value: Kappa, permutation: Sequence[int]) -> Kappa:
    sides, n = value.current, value.num_batch
    order = {side: [sum(s == side for s in sides[:i]) for i in permutation if sides[i] == side] for side in "bio"}
    b, ins, outs = order["b"], order["i"], order["o"]
    lead = lambda a: jnp.transpose(a, (*b, *range(n, a.ndim)))  # noqa: E731
    U, V = lead(value.U), lead(value.V)
    return value.replace(
        U=jnp.transpose(U, (*range(n + 1), *(n + 1 + i for i in ins), U.ndim - 1)),
        V=jnp.transpose(V, (*range(n + 2), *(n + 2 + i for i in outs))),
        weights=lead(value.weights),
        plan=jax.tree.map(lead, value.plan),
        base=value.map_base(lambda a: jnp.transpose(a, permutation)),
        sides="".join(sides[i] for i in permutation),
    )


@quax.register(lax.transpose_p)
def _(value: Kappa, *, permutation):
    return _transpose(value, permutation)


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
