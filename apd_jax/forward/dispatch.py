"""Products of activations with the kept components only.

masked    all B·n pairs, the dropped ones multiplied by 0: the route for weights of any value.
dispatch  a mixture of experts: every piece gathers the rows that keep it into S slots. Cost follows
          the number of kept pairs, not B·n. If a piece is kept by more rows than it has slots,
          further rounds take the rest, so every mask is exact.

Shapes: n examples (or positions) with a mask of their own, C pieces, S slots, r rows per example,
d inputs, m rank, e outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree


class Plan(NamedTuple):
    """The mask turned round: the examples that keep each component, in order, padded with n."""

    example: Int[Array, "R C S"]  # by round
    rounds: Int[Array, ""]  # how many of the R rounds hold any example, at least 1


def make_plan(mask: Bool[Array, "n C"], slots: int) -> Plan:
    n, C = mask.shape
    R = math.ceil(n / slots)
    place = jnp.cumsum(mask, axis=0, dtype=jnp.int32) - 1  # of an example among those that keep c
    component = jnp.arange(C, dtype=jnp.int32)[None]
    position = (place // slots) * (C * slots) + component * slots + place % slots
    example = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[:, None], (n, C))
    flat = (
        jnp.full((R * C * slots,), n, jnp.int32)
        .at[jnp.where(mask, position, R * C * slots)]
        .set(example, mode="drop")
    )
    return Plan(flat.reshape(R, C, slots), 1 + jnp.maximum(jnp.max(place[-1]), 0) // slots)


def slots_for(k: float, num_examples: int, num_components: int) -> int:
    """S such that components kept by Poisson-many examples hardly ever need a second round.

    Mean + 6 deviations, to 8 rows.
    """
    mean = k * num_examples / num_components
    return min(num_examples, 8 * math.ceil((mean + 6 * math.sqrt(mean) + 2) / 8))


def is_lookup(x: Array) -> bool:
    """Whether x names rows of a matrix instead of multiplying it."""
    return bool(jnp.issubdtype(x.dtype, jnp.integer))


def read(x: Array, U: Float[Array, "d m"]) -> Array:
    """x U for x [..., d], or the rows U[x] for integers [...]."""
    return jnp.take(U, x, axis=0, mode="clip") if is_lookup(x) else x @ U


def read_all(x: Array, U: Float[Array, "C d m"]) -> Float[Array, "n r C m"]:
    """`read` of every component. x [n, r, d] or integers [n, r]."""
    return (
        jnp.moveaxis(jnp.take(U, x, axis=1, mode="clip"), 0, 2)
        if is_lookup(x)
        else jnp.einsum("nrd,cdm->nrcm", x, U)
    )


@jax.custom_batching.custom_vmap
def kept_product(x: Array, U: Array, V: Array, mask: Array, plan: Plan | None) -> Array:
    """Σ_c mask_nc (x_n U_c) V_c.

    x [n, r, d] or integers [n, r]; U [C, d, m]; V [C, m, e]; mask [n, C] -> [n, r, e]. Under a vmap
    over examples (x, mask batched; the others not) all of them are taken together; `plan` is for
    all of them.
    """
    return masked(x, U, V, mask)


@kept_product.def_vmap
def _(axis_size, in_batched, x, U, V, mask, plan):
    x_batched, U_batched, V_batched, mask_batched, _ = in_batched
    # Not the axis of examples: nothing to gain, and the plan is not for it.
    if U_batched or V_batched or not mask_batched:
        axes = [
            0 if batched else None for batched in (x_batched, U_batched, V_batched, mask_batched)
        ]
        return jax.vmap(masked, in_axes=axes)(x, U, V, mask), True
    if not x_batched:
        x = jnp.broadcast_to(x, (axis_size, *x.shape))
    merged, flags = x.reshape(-1, *x.shape[2:]), mask.reshape(-1, mask.shape[-1])
    out = masked(merged, U, V, flags) if plan is None else _dispatched(merged, U, V, plan)
    return out.reshape(*x.shape[:3], -1), True


def masked(x, U, V, mask, plan=None):
    """The same for all pairs, whatever the plan; with derivatives of every kind."""
    inner = read_all(x, U) * mask[:, None, :, None].astype(U.dtype)
    return (
        inner.reshape(-1, inner.shape[2] * inner.shape[3]) @ V.reshape(-1, V.shape[-1])
    ).reshape(*x.shape[:2], -1)


@jax.custom_vjp
def _dispatched(
    x: Array, U: Float[Array, "C d m"], V: Float[Array, "C m e"], plan: Plan
) -> Float[Array, "n r e"]:
    """Σ_{c kept by n} (x_n U_c) V_c.

    It has its own derivative, because the number of rounds is only known at run time.
    """
    return _sum_rounds(
        plan, lambda example: _scatter(_experts(_gather(x, example), U, V), example, x.shape[:2])
    )


def _dispatched_fwd(x, U, V, plan):
    return _dispatched(x, U, V, plan), (x, U, V, plan)


def _dispatched_bwd(residuals, g):
    x, U, V, plan = residuals

    def weights(example):
        rows, g_rows = _gather(x, example), _gather(g, example)
        inner, pull = jax.vjp(lambda U: jax.vmap(read)(rows, U), U)
        return pull(_times_transposed(g_rows, V))[0], jnp.einsum("csm,cse->cme", inner, g_rows)

    def inputs(example):
        return _scatter(
            _times_transposed(_times_transposed(_gather(g, example), V), U), example, x.shape[:2]
        )

    # Two loops: the one for x vanishes where x does not depend on components (the first layer).
    dU, dV = _sum_rounds(plan, weights)
    return (None if is_lookup(x) else _sum_rounds(plan, inputs)), dU, dV, None


_dispatched.defvjp(_dispatched_fwd, _dispatched_bwd)


def _times_transposed(
    rows: Float[Array, "C Sr e"], V: Float[Array, "C m e"]
) -> Float[Array, "C Sr m"]:
    """rows Vᵀ, as (V rowsᵀ)ᵀ.

    A CPU copies the second factor of a product into an order of its own, and the rows are the
    smaller one: three times faster for 16 rows. The barrier keeps XLA from putting it back.
    """
    return jnp.swapaxes(lax.optimization_barrier(V @ jnp.swapaxes(rows, 1, 2)), 1, 2)


def _experts(
    rows: Array, U: Float[Array, "C d m"], V: Float[Array, "C m e"]
) -> Float[Array, "C Sr e"]:
    """Every component on its own rows [C, Sr, d], or integers [C, Sr]."""
    return jax.vmap(read)(rows, U) @ V


def _gather(x: Array, example: Int[Array, "C S"]) -> Array:
    rows = jnp.take(x, example, axis=0, mode="fill", fill_value=0)  # [C, S, r, ...]
    return rows.reshape(example.shape[0], -1, *x.shape[2:])


def _scatter(
    rows: Float[Array, "C Sr e"], example: Int[Array, "C S"], shape: tuple[int, ...]
) -> Float[Array, "n r e"]:
    n, r = shape
    return (
        jnp.zeros((n, r, rows.shape[-1]), rows.dtype)
        .at[example.reshape(-1)]
        .add(rows.reshape(example.size, r, -1), mode="drop")
    )


def _sum_rounds(plan: Plan, one_round: Callable[[Int[Array, "C S"]], PyTree]) -> PyTree:
    def body(state):
        i, total = state
        return i + 1, jax.tree.map(jnp.add, total, one_round(plan.example[i]))

    return lax.while_loop(
        lambda state: state[0] < plan.rounds, body, (1, one_round(plan.example[0]))
    )[1]
