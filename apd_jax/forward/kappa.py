"""A weight that is a sum of factored components, chosen anew for every example: what a network sees in the place of its own.

κ(x_b) = base + Σ_c s_c P_c is an array-like value that knows how to meet activations in a matrix product, a convolution or a
lookup without being formed, and how to be transposed, reshaped, sliced, cast and scaled. In any other operation it is
materialised, for that leaf only. `apd_jax.interpret` runs the unmodified network on such values.

Shapes: B examples, C components, m rank, p positions with a mask of their own (1 for masks per example), r rows that share
one mask in a matrix product, d inputs, e outputs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from apd_jax.collectives import into_components, over_components
from apd_jax.components import Factors, layout
from apd_jax.errors import InputError
from apd_jax.forward.dispatch import Plan, is_lookup, kept_product, read, read_all

AT_ZERO = (
    "gradient",
    "tangent",
    "activation",
)  # flavors that are the target's own weight, and differ in their derivative
_FORMING = 3  # a multiplication that forms κ costs so many of those in a product: it waits for memory (measured on CPU)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kappa:
    """One leaf for one example.

    `sides` says of every axis whether it belongs to the inputs (i), the outputs (o) or counts matrices (b). A scan over the
    first b axis slices all arrays along their first axis, so the b axes that are left are read off the arrays.

    flavor:  kept         Σ_c s_c P_c
             dense        the same with κ formed wherever it is used: the oracle for masks per position
             cheaper      kept or dense, whichever takes fewer operations for the rows of one product
             gradient     base + Σ_c s_c P_c at s = 0, with its derivative in s, by reverse mode
             tangent      the same by forward mode
             activation   base, with Σ ‖rows · P_c‖² over all uses in the place of the derivative in s
    """

    U: Array  # [*b, C, *ins, m]
    V: Array  # [*b, C, m, *outs]
    weights: Array  # s: [*b, p, C]
    plan: Plan | None  # with leading *b
    base: Array | None  # of the value's own shape
    formed: Array | None  # the value itself, formed before a loop that uses it at every step
    sides: str = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(metadata={"static": True})
    flavor: str = dataclasses.field(metadata={"static": True})
    per_position: bool = dataclasses.field(metadata={"static": True})
    num_examples: int = dataclasses.field(
        metadata={"static": True}
    )  # or positions: all that share a plan
    axis: str | None = dataclasses.field(
        metadata={"static": True}
    )  # the mapped one over which the components of a sum are split
    uses: int = dataclasses.field(
        default=1, metadata={"static": True}
    )  # how often a loop goes round with `formed`

    @property
    def num_batch(self) -> int:
        return self.U.ndim - 2 - self.sides.count("i")

    @property
    def current(self) -> str:
        """`sides` without the b axes that a scan has taken."""
        return self.sides.replace("b", "", self.sides.count("b") - self.num_batch)

    @property
    def shape(self) -> tuple[int, ...]:
        n = self.num_batch
        sizes = {
            "b": iter(self.U.shape[:n]),
            "i": iter(self.U.shape[n + 1 : -1]),
            "o": iter(self.V.shape[n + 2 :]),
        }
        return tuple(next(sizes[side]) for side in self.current)

    @property
    def ndim(self) -> int:
        return len(self.current)

    def replace(self, **changes: Any) -> Kappa:
        return dataclasses.replace(self, **({"sides": self.current} | changes))

    def map_whole(self, fn: Callable[[Array], Array]) -> dict[str, Array | None]:
        """`fn` of the arrays that have the value's own shape, by field."""
        return {"base": jax.tree.map(fn, self.base), "formed": jax.tree.map(fn, self.formed)}

    def before_loop(self, times: int) -> Kappa:
        """For a loop that goes round `times` times: formed outside, and dropped by the compiler where that is not used."""
        return (
            self
            if self.per_position
            else self.replace(
                formed=self._form() if self.formed is None else self.formed, uses=self.uses * times
            )
        )

    def matrices(self, reading: str, ins: Sequence[int] | None = None) -> tuple[Array, Array]:
        """([*b, C, d, m], [*b, C, m, e]) with the `reading` side as inputs, its axes in the given order."""
        n = self.num_batch
        U, V = (
            (self.U, self.V)
            if reading == "i"
            else (jnp.moveaxis(self.V, n + 1, -1), jnp.moveaxis(self.U, -1, n + 1))
        )
        if ins is not None:
            U = jnp.transpose(U, (*range(n + 1), *(n + 1 + i for i in ins), U.ndim - 1))
        d, e = math.prod(U.shape[n + 1 : -1]), math.prod(V.shape[n + 2 :])
        return U.reshape(*U.shape[: n + 1], d, U.shape[-1]), V.reshape(*V.shape[: n + 2], e)

    def transposed(self, permutation: Sequence[int]) -> Kappa:
        sides, n = self.current, self.num_batch
        order = {
            side: [sum(s == side for s in sides[:i]) for i in permutation if sides[i] == side]
            for side in "bio"
        }
        b, ins, outs = order["b"], order["i"], order["o"]
        lead = lambda a: jnp.transpose(a, (*b, *range(n, a.ndim)))  # noqa: E731
        U, V = lead(self.U), lead(self.V)
        return self.replace(
            U=jnp.transpose(U, (*range(n + 1), *(n + 1 + i for i in ins), U.ndim - 1)),
            V=jnp.transpose(V, (*range(n + 2), *(n + 2 + i for i in outs))),
            weights=lead(self.weights),
            plan=jax.tree.map(lead, self.plan),
            **self.map_whole(lambda a: jnp.transpose(a, permutation)),
            sides="".join(sides[i] for i in permutation),
        )

    def _in_order(self, canonical: Array) -> Array:
        """[*b, *ins, *outs] -> the value's own order of axes."""
        axes = {
            side: iter(
                [i for i, s in enumerate(sorted(self.current, key="bio".index)) if s == side]
            )
            for side in "bio"
        }
        return jnp.transpose(canonical, [next(axes[side]) for side in self.current])

    def materialise(self) -> Array:
        return self._form() if self.formed is None else self.formed

    def _form(self) -> Array:
        U, V = self.matrices("i")
        if self.per_position:
            raise InputError(
                f"params leaf {self.name!r} is used by more than matrix products and lookups, so it cannot differ between positions; "
                "leave it out of select, or use mask_per = 'example'."
            )
        joint = jnp.einsum(
            "...c,...cde->...de", self.weights[..., 0, :].astype(U.dtype), U @ V
        )  # every P_c once, for all examples
        joint, n = over_components(joint, self.axis), self.num_batch
        value = self._in_order(
            joint.reshape(*U.shape[:n], *self.U.shape[n + 1 : -1], *self.V.shape[n + 2 :])
        )
        if self.flavor == "activation":
            value = lax.stop_gradient(value)
        return (value if self.base is None else self.base + value).astype(self.dtype)

    def product(
        self, rows: Array, reading: str, dtype: Any, ins: Sequence[int] | None = None
    ) -> Array:
        """rows [*b, *free, d], or integers [*b, *free] to look up -> [*b, *free, *outs]."""
        n, looked_up = self.num_batch, is_lookup(rows)
        free = rows.shape[n : rows.ndim if looked_up else -1]
        at = self._position_axis(free)
        if at is not None:
            rows = jnp.moveaxis(rows, n + at, n)
        kept = rows.shape[n : n + len(free)]
        num_positions = self.weights.shape[-2]
        rows = rows.reshape(
            *rows.shape[:n],
            num_positions,
            math.prod(free) // num_positions,
            *rows.shape[n + len(free) :],
        )
        U, V = self.matrices(reading, ins)
        rows = rows if looked_up else rows.astype(jnp.result_type(rows, U))
        flavor = self._cheaper(rows, U, V) if self.flavor == "cheaper" else self.flavor

        def matrix(whole):  # [*b, d, e]
            order = [
                i
                for side in ("b", reading, "o" if reading == "i" else "i")
                for i, s in enumerate(self.current)
                if s == side
            ]
            if ins is not None:
                order[n : n + len(ins)] = [order[n + i] for i in ins]
            return jnp.transpose(whole, order).reshape(*U.shape[:n], U.shape[-2], V.shape[-1])

        if flavor == "kept":
            fn, more = kept_product, self.plan
        elif flavor == "dense":
            fn, more = _dense_product, jax.tree.map(matrix, self.formed)
        elif flavor == "tangent":
            fn, more = _moved_from_zero, matrix(self.base)
        else:
            fn, more = functools.partial(_at_zero, self.flavor == "activation"), matrix(self.base)
        for _ in range(n):
            fn = jax.vmap(fn)
        axis = (
            None if flavor == "dense" and more is not None else self.axis
        )  # what was formed before is the sum of all devices
        rows = rows if looked_up else into_components(rows, axis)
        out = over_components(fn(rows, U, V, self.weights, more), axis).astype(dtype)
        outs = self.V.shape[n + 2 :] if reading == "i" else self.U.shape[n + 1 : -1]
        out = out.reshape(*out.shape[:n], *kept, *outs)
        return out if at is None else jnp.moveaxis(out, n, n + at)

    def _cheaper(self, rows: Array, U: Array, V: Array) -> str:
        """Many rows that share a mask are worth forming its weight for."""
        C, d, m, e = *U.shape[-3:], V.shape[-1]
        r = rows.shape[self.num_batch + 1]
        pairs = C if self.plan is None else self.plan.example.shape[-1] * C / self.num_examples
        formed = _FORMING * C * d * e / self.uses + r * d * e
        return "dense" if not is_lookup(rows) and formed < pairs * r * m * (d + e) else "kept"

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


def kappa(
    factors: Factors,
    weights: Array,
    plan: Plan | None,
    *,
    like: Array,
    name: str,
    flavor: str,
    per_position: bool,
    num_examples: int,
) -> Kappa:
    """The value for one leaf and one example. weights: s, [C] or [p, C]."""
    axes, shape = factors.axes, factors.shape
    b, ins, outs = (
        tuple(shape[axis] for axis in group) for group in (axes.batch, axes.ins, axes.outs)
    )
    n, (C, m) = len(b), (factors.U.shape[0], factors.U.shape[-1])

    def stacked(a):
        return jnp.broadcast_to(a, (*b, *a.shape))

    value = Kappa(
        U=jnp.moveaxis(factors.U, 0, n).reshape(*b, C, *ins, m),
        V=jnp.moveaxis(factors.V, 0, n).reshape(*b, C, m, *outs),
        weights=stacked(weights if per_position else weights[None]),
        plan=None if plan is None else jax.tree.map(stacked, plan),
        base=None,
        formed=None,
        sides="b" * n + "i" * len(ins) + "o" * len(outs),
        dtype=like.dtype,
        name=name,
        flavor=flavor,
        per_position=per_position,
        num_examples=num_examples,
        axis=None
        if flavor in AT_ZERO
        else factors.axis,  # those have no sum: a derivative for every s_c
    )
    if flavor in AT_ZERO:
        value = value.replace(base=layout.unfold(like, axes).reshape(value.shape))
    return (
        value
        if axes.order == tuple(range(len(shape)))
        else value.transposed([axes.order.index(i) for i in range(len(shape))])
    )


def _dense_product(x, U, V, s, formed):
    """The same as `kept_product`, with every position's own weight formed (before, if all share one)."""
    weights = (
        jnp.einsum("pc,cde->pde", s.astype(U.dtype), U @ V) if formed is None else formed[None]
    )
    return jax.vmap(read)(x, weights)


@jax.custom_jvp
def _moved_from_zero(x, U, V, s, base):
    """x·(base + Σ_c s_c U_c V_c) at s = 0. x [p, r, d] or integers [p, r]; s [p, C]. Only x and s have tangents."""
    return read(x, base)


@_moved_from_zero.defjvp
def _(primals, tangents):
    x, U, V, _, base = primals
    dx, _, _, ds, _ = tangents
    moved = jnp.einsum("prcm,pc,cme->pre", read_all(x, U), ds, V)
    out = read(x, base)
    return out, (moved if is_lookup(x) else moved + dx @ base).astype(out.dtype)


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
