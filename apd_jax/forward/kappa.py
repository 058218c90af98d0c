"""A weight that is a sum of pieces, chosen anew for every example: what a network sees instead.

    κ(x_b) = β(x_b) θ* + Σ_j w_j(x_b) U_j V_j

is an array-like value that knows how to meet activations in a matrix product, a convolution or a
lookup without being formed, and how to be transposed, reshaped, sliced, cast and scaled. In any
other operation it is materialised, for that leaf only. `interpret` runs the unmodified network on
such values.

Shapes: n pieces, m rank, p positions with weights of their own (1 for weights per example), r rows
that share them in a matrix product, d inputs, e outputs, *b axes that count matrices.
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
from apd_jax.forward.at_zero import AT_ZERO, at_zero, moved_from_zero
from apd_jax.forward.dispatch import Plan, is_lookup, kept_product, masked, read

_FORMING = 3  # a multiplication that forms κ costs so many of a product: it waits for memory (CPU)


_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kappa:
    """One leaf for one example.

    `sides` says of every axis whether it belongs to the inputs (i), the outputs (o) or counts
    matrices (b). A scan over the first b axis slices all arrays along their first axis, so the b
    axes that are left are read off the arrays.

    flavor:  kept        β θ* + Σ_j w_j P_j
             dense       the same with κ formed wherever it is used: the oracle for positions
             cheaper     kept or dense, whichever takes fewer operations for the rows of one product
             gradient    θ* + Σ_j w_j P_j at w = 0, with its derivative in w, by reverse mode
             tangent     the same by forward mode
             cut         kept, with no derivative by what it multiplies: only by w and β
             activation  θ*, with Σ ‖rows · P_j‖² over all uses in place of the derivative in w
    """

    U: Array  # [*b, n, *ins, m]
    V: Array  # [*b, n, m, *outs]
    weights: Array  # w: [*b, p, n]
    plan: Plan | None  # with leading *b
    base: Array | None  # θ*, of the value's own shape; None: it takes no part
    base_weights: Array | None  # β: [*b, p]; None: 1
    formed: Array | None  # the value itself, formed before a loop that uses it at every step
    sides: str = dataclasses.field(metadata=_STATIC)
    dtype: Any = dataclasses.field(metadata=_STATIC)
    name: str = dataclasses.field(metadata=_STATIC)
    flavor: str = dataclasses.field(metadata=_STATIC)
    per_position: bool = dataclasses.field(metadata=_STATIC)
    num_examples: int = dataclasses.field(metadata=_STATIC)  # or positions: all that share a plan
    axis: str | None = dataclasses.field(
        metadata=_STATIC
    )  # the mapped one over which the pieces of a sum are split
    uses: int = dataclasses.field(
        default=1, metadata=_STATIC
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

    def axes_of(self, side: str) -> list[int]:
        return [axis for axis, own in enumerate(self.current) if own == side]

    # Other values made of this one

    def replace(self, **changes: Any) -> Kappa:
        return dataclasses.replace(self, **({"sides": self.current} | changes))

    def map_whole(self, fn: Callable[[Array], Array]) -> dict[str, Array | None]:
        """`fn` of the arrays that have the value's own shape, by field."""
        return {"base": jax.tree.map(fn, self.base), "formed": jax.tree.map(fn, self.formed)}

    def map_batch(self, fn: Callable[[Array], Array]) -> dict[str, Any]:
        """`fn` of the other arrays, which begin with the axes that count matrices, by field."""
        names = ("U", "V", "weights", "plan", "base_weights")
        return {name: jax.tree.map(fn, getattr(self, name)) for name in names}

    def before_loop(self, times: int) -> Kappa:
        """For a loop that goes round `times` times.

        The value is formed outside it, and dropped by the compiler where that is not used.
        """
        if self.per_position:
            return self
        formed = self._form() if self.formed is None else self.formed
        return self.replace(formed=formed, uses=self.uses * times)

    def transposed(self, permutation: Sequence[int]) -> Kappa:
        sides, n = self.current, self.num_batch
        order = {
            side: [sides[:i].count(side) for i in permutation if sides[i] == side] for side in "bio"
        }

        def lead(a: Array) -> Array:
            return jnp.transpose(a, (*order["b"], *range(n, a.ndim)))

        moved = self.map_batch(lead)
        U, V = moved["U"], moved["V"]
        moved["U"] = jnp.transpose(U, (*range(n + 1), *(n + 1 + i for i in order["i"]), U.ndim - 1))
        moved["V"] = jnp.transpose(V, (*range(n + 2), *(n + 2 + i for i in order["o"])))
        return self.replace(
            **moved,
            **self.map_whole(lambda a: jnp.transpose(a, permutation)),
            sides="".join(sides[i] for i in permutation),
        )

    # The value itself

    def materialise(self) -> Array:
        return self._form() if self.formed is None else self.formed

    def _form(self) -> Array:
        if self.per_position:
            raise InputError(
                f"params leaf {self.name!r} is used by more than matrix products and lookups, so "
                "it cannot differ between positions; leave it out of select, or use mask_per = "
                "'example'."
            )
        U, V = self.matrices("i")
        weights = self.weights[..., 0, :].astype(U.dtype)
        joint = jnp.einsum("...c,...cde->...de", weights, U @ V)  # P_j once, for all examples
        joint, n = over_components(joint, self.axis), self.num_batch
        ins, outs = self.U.shape[n + 1 : -1], self.V.shape[n + 2 :]
        value = self._in_order(joint.reshape(*U.shape[:n], *ins, *outs))
        if self.flavor == "activation":
            value = lax.stop_gradient(value)
        if self.base is not None:
            value = self._own_share(self.base, value.dtype) + value
        return value.astype(self.dtype)

    def _own_share(self, base: Array, dtype: Any) -> Array:
        """β θ*."""
        if self.base_weights is None:
            return base
        factor = self.base_weights[..., 0]
        spread = factor.reshape(*factor.shape, *[1] * (self.ndim - factor.ndim))
        return self._in_order(spread).astype(dtype) * base

    def _in_order(self, canonical: Array) -> Array:
        """[*b, *ins, *outs] -> the value's own order of axes."""
        sides = sorted(self.current, key="bio".index)
        axes = {side: iter([i for i, s in enumerate(sides) if s == side]) for side in "bio"}
        return jnp.transpose(canonical, [next(axes[side]) for side in self.current])

    # Products

    def matrices(self, reading: str, ins: Sequence[int] | None = None) -> tuple[Array, Array]:
        """([*b, n, d, m], [*b, n, m, e]) with the `reading` side as inputs, in the given order."""
        n, U, V = self.num_batch, self.U, self.V
        if reading == "o":
            U, V = jnp.moveaxis(V, n + 1, -1), jnp.moveaxis(U, -1, n + 1)
        if ins is not None:
            U = jnp.transpose(U, (*range(n + 1), *(n + 1 + i for i in ins), U.ndim - 1))
        d, e = math.prod(U.shape[n + 1 : -1]), math.prod(V.shape[n + 2 :])
        return U.reshape(*U.shape[: n + 1], d, U.shape[-1]), V.reshape(*V.shape[: n + 2], e)

    def product(
        self,
        rows: Array,
        reading: str,
        dtype: Any,
        ins: Sequence[int] | None = None,
        at: int | None = None,
    ) -> Array:
        """rows [*b, *free, d], or integers [*b, *free] to look up -> [*b, *free, *outs].

        Args:
          reading: the side that is read.
          ins: the order of its axes in d, where it is another.
          at: which of the free axes carries the positions, where weights differ between them.
        """
        n, looked_up, p = self.num_batch, is_lookup(rows), self.weights.shape[-2]
        num_free = rows.ndim - n - (0 if looked_up else 1)
        if at is not None:
            rows = jnp.moveaxis(rows, n + at, n)
        free = rows.shape[n : n + num_free]
        rows = rows.reshape(*rows.shape[:n], p, math.prod(free) // p, *rows.shape[n + num_free :])
        out = self._multiplied(rows, reading, ins).astype(dtype)
        outs = self.V.shape[n + 2 :] if reading == "i" else self.U.shape[n + 1 : -1]
        out = out.reshape(*out.shape[:n], *free, *outs)
        return out if at is None else jnp.moveaxis(out, n, n + at)

    def _multiplied(self, rows: Array, reading: str, ins: Sequence[int] | None) -> Array:
        """rows [*b, p, r, d], or integers [*b, p, r] -> [*b, p, r, e]."""
        U, V = self.matrices(reading, ins)
        rows = rows if is_lookup(rows) else rows.astype(jnp.result_type(rows, U))
        flavor = self._cheaper(rows, U, V) if self.flavor == "cheaper" else self.flavor
        rows = lax.stop_gradient(rows) if flavor == "cut" else rows
        base = None if self.base is None else self._matrix(self.base, reading, ins)
        if flavor in AT_ZERO:
            fn = moved_from_zero if flavor == "tangent" else _AT_ZERO[flavor == "activation"]
            return self._over_batch(fn)(rows, U, V, self.weights, base)
        if flavor == "dense" and (formed := self._formed_for_product()) is not None:
            whole = self._matrix(formed, reading, ins)
            return self._over_batch(_dense_product)(rows, U, V, self.weights, whole)
        products = {"kept": (kept_product, self.plan), "cut": (masked, None)}
        fn, more = products.get(flavor, (_dense_product, None))
        meeting = rows if is_lookup(rows) else into_components(rows, self.axis)
        out = self._over_batch(fn)(meeting, U, V, self.weights, more)
        out = over_components(out, self.axis)
        if base is not None:  # after the sum over devices, which all have it
            out = out + self._over_batch(_share)(rows, self.base_weights, base)
        return out

    def _over_batch(self, fn: Callable) -> Callable:
        for _ in range(self.num_batch):
            fn = jax.vmap(fn)
        return fn

    def _matrix(self, whole: Array, reading: str, ins: Sequence[int] | None) -> Array:
        """An array of the value's own shape as [*b, d, e]."""
        b, read_axes, others = (
            self.axes_of(side) for side in ("b", reading, "o" if reading == "i" else "i")
        )
        if ins is not None:
            read_axes = [read_axes[i] for i in ins]
        ordered = jnp.transpose(whole, (*b, *read_axes, *others))
        d = math.prod(whole.shape[axis] for axis in read_axes)
        return ordered.reshape(*(whole.shape[axis] for axis in b), d, -1)

    def _formed_for_product(self) -> Array | None:
        """The value, if it is formed already, or would have to be multiplied twice otherwise."""
        if self.formed is None and self.base is not None and not self.per_position:
            return self._form()
        return self.formed

    def _cheaper(self, rows: Array, U: Array, V: Array) -> str:
        """Many rows that share weights are worth forming the value for."""
        pieces, d, m, e = *U.shape[-3:], V.shape[-1]
        r = rows.shape[self.num_batch + 1]
        slots = 0 if self.plan is None else self.plan.example.shape[-1]
        pairs = pieces if self.plan is None else slots * pieces / self.num_examples
        formed = _FORMING * pieces * d * e / self.uses + r * d * e
        kept = pairs * r * m * (d + e) + (0 if self.base is None else r * d * e)
        return "dense" if not is_lookup(rows) and formed < kept else "kept"

    def position_among(
        self, free: Sequence[int], shape: tuple[int, ...], positions: frozenset[int] | None
    ) -> int | None:
        """Which of the `free` axes of activations carries the positions; None if none need to.

        positions: the axes of the activations that are known to carry them.
        """
        T = self.weights.shape[-2]
        if T == 1:
            return None
        hits = [i for i, axis in enumerate(free) if axis in (positions or ())]
        if len(hits) == 1:
            return hits[0]
        said = "several do" if hits else "none is known to"
        raise InputError(
            f"params leaf {self.name!r} meets activations of shape {shape}, and it cannot be told "
            f"which of their axes carries the {T} positions ({said}); leave it out of select, or "
            "use mask_per = 'example'."
        )


def kappa(
    factors: Factors,
    weights: Array,
    plan: Plan | None,
    *,
    like: Array,
    name: str,
    flavor: str,
    num_examples: int,
    target: Array | None = None,
) -> Kappa:
    """The value for one leaf `like` and one example.

    Args:
      weights: w of the site's pieces, [n] or [p, n].
      target: β, a number or [p]; None where the leaf's own weight takes no part.
    """
    axes, shape = factors.axes, factors.shape
    b, ins, outs = (
        tuple(shape[axis] for axis in group) for group in (axes.batch, axes.ins, axes.outs)
    )
    at_zero_too = flavor in AT_ZERO
    n, (pieces, m) = len(b), (factors.U.shape[0], factors.U.shape[-1])

    def stacked(a: Array) -> Array:
        return jnp.broadcast_to(a, (*b, *a.shape))

    value = Kappa(
        U=jnp.moveaxis(factors.U, 0, n).reshape(*b, pieces, *ins, m),
        V=jnp.moveaxis(factors.V, 0, n).reshape(*b, pieces, m, *outs),
        weights=stacked(weights if weights.ndim == 2 else weights[None]),
        plan=None if plan is None else jax.tree.map(stacked, plan),
        base=None,
        base_weights=None if target is None else stacked(jnp.atleast_1d(target)),
        formed=None,
        sides="b" * n + "i" * len(ins) + "o" * len(outs),
        dtype=like.dtype,
        name=name,
        flavor=flavor,
        per_position=weights.ndim == 2 and weights.shape[0] > 1,
        num_examples=num_examples,
        axis=None if at_zero_too else factors.axis,  # no sum there: a derivative for every piece
    )
    if at_zero_too or target is not None:
        value = value.replace(base=layout.unfold(like, axes).reshape(value.shape))
    if axes.order == tuple(range(len(shape))):
        return value
    return value.transposed([axes.order.index(i) for i in range(len(shape))])


_AT_ZERO = {activation: functools.partial(at_zero, activation) for activation in (False, True)}


def _dense_product(x, U, V, s, formed):
    """`kept_product` with every position's own weight formed (before, if all share one)."""
    if formed is None:
        weights = jnp.einsum("pc,cde->pde", s.astype(U.dtype), U @ V)
    else:
        weights = formed[None]
    return jax.vmap(read)(x, weights)


def _share(x, s, base):
    """β x·θ*. x [p, r, d] or integers [p, r]; s [p] -> [p, r, e]."""
    out = read(x, base)
    return s[:, None, None].astype(out.dtype) * out
