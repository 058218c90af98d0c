"""The k largest scores, per example or of the whole batch.

Shapes: B examples, C components. Exact and sort-free: the K-th largest score is found by bisection
on the float's bit pattern (at most 32 counting passes, about 20 without ties), ties broken by
position. Counting makes the batch top-k of N devices a few tens of scalar psums, and lets k be a
traced value. `lax.top_k` and `sort` over B·C = 102,400 scores took most of a TMS step on CPU.

On several devices each has the scores of its own examples (split over `axis_name`) and components
(split over `component_axis`), in order. Counts run over both axes, and ties are broken by the
position in the whole array, so the mask is that of one device.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from apd_jax.collectives import num_devices, place, psum
from apd_jax.errors import InputError


def num_kept(k: Any, batch_size: Any) -> Any:
    """K = ⌊k·B⌋, where k·B may fall a rounding error short of an integer (0.29·100 is 29).

    A Python number gives a Python int, a traced k a traced int32.
    """
    if isinstance(k, (int, float)):
        return math.floor(k * batch_size * (1 + 1e-12))
    return jnp.floor(k * batch_size * (1 + 2e-7)).astype(jnp.int32)


def _ordered_bits(scores: Float[Array, "*s"]) -> UInt32[Array, "*s"]:
    """uint32 keys in the order of the float32 scores, for either sign.

    -0 equals 0; a NaN with positive sign sorts highest.
    """
    sign = jnp.uint32(1 << 31)
    bits = lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    bits = jnp.where(
        bits == sign, jnp.uint32(0), bits
    )  # -0: not by adding 0.0, which XLA leaves out or flushes denormals with
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _kth_largest(keys, num, count):
    """The largest t with count(keys >= t) >= num, or any t that keeps exactly num."""

    def unfinished(state):
        low, high, reached = state
        return jnp.any((high - low > 1) & (reached != num))

    def halve(state):
        low, high, reached = state
        middle = low + (high - low) // 2
        n = count(keys >= middle)
        # Rows that are done stay as they are; `low` is always a threshold that keeps enough.
        move_low, move_high = (n >= num) & (reached != num), (n < num) & (reached != num)
        return (
            jnp.where(move_low, middle, low),
            jnp.where(move_high, middle, high),
            jnp.where(move_low, n, reached),
        )

    reached = count(keys >= 0)
    low = jnp.zeros_like(reached).astype(jnp.uint32)
    return lax.while_loop(unfinished, halve, (low, ~low, reached))[0]


def _largest(keys, index, num, count):
    """Mask of the `num` largest keys; among equal keys the lowest index wins.

    Args:
      keys: uint32, above 0. index: uint32 like keys, unique over everything that `count` counts.
      num: int32, a scalar or of count's shape.
      count: bool like keys -> int32 number true (summed over devices), broadcastable against keys.
    """
    threshold = _kth_largest(keys, num, count)
    above, tied = keys > threshold, keys == threshold
    place = jnp.where(
        tied, jnp.uint32(2**32 - 2) - index, 0
    )  # unique keys, below the search's upper end
    missing = num - count(above)
    return (num > 0) & (above | (tied & (place >= _kth_largest(place, missing, count))))


def _columns(C: int, component_axis: str | None) -> tuple[Any, int]:
    """The first of this device's components among all, and how many these are."""
    return jnp.uint32(place(component_axis)) * C, C * num_devices(component_axis)


def _count(flags: Bool[Array, "B C"], axis: int) -> Int[Array, "b c"]:
    """How many are true along one axis, which is kept.

    Added up as floats, exact up to 2²⁴: three times faster on CPU than integers.
    """
    return jnp.sum(flags, axis=axis, keepdims=True, dtype=jnp.float32).astype(jnp.int32)


def _check_k(k: Any, C: int) -> None:
    if isinstance(k, int | float) and not 0 <= k <= C:
        raise InputError(
            f"k, the number of active components per example, must lie in [0, C = {C}]; got {k}."
        )


def topk(
    attributions: Float[Array, "B C"], k: Any, *, component_axis: str | None = None
) -> Bool[Array, "B C"]:
    """The k largest of every row.

    Args:
      k: an integer in [0, C], or an integer array [B] (a count per example), which is clipped to C;
        may be traced.
    Returns: mask with exactly k True per row; ties go to the lower component.
    Raises:
      InputError: a Python k below 0 or above C.
    Cost: some tens of counting passes over the scores, no sort; with component_axis as many psums
      of B counts.
    """
    _check_k(k, _columns(attributions.shape[1], component_axis)[1])
    return _topk(attributions, k, component_axis)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def _topk(scores: Float[Array, "B C"], k: Any, component_axis: str | None) -> Bool[Array, "B C"]:
    B, C = scores.shape
    first, num_all = _columns(C, component_axis)
    index = jnp.broadcast_to(first + jnp.arange(C, dtype=jnp.uint32), (B, C))
    num = jnp.minimum(jnp.broadcast_to(jnp.asarray(k, jnp.int32), (B,))[:, None], num_all)

    def count(flags):
        return psum(_count(flags, axis=1), component_axis)

    return _largest(_ordered_bits(scores), index, num, count)


def batch_topk(
    attributions: Float[Array, "B C"],
    k: Any,
    *,
    axis_name: str | None = None,
    component_axis: str | None = None,
    valid: Bool[Array, " B"] | None = None,
) -> Bool[Array, "B C"]:
    """The K = ⌊k·B⌋ largest of the whole batch (APD: "batch top-k"), B counted over all devices.

    Args:
      k: mean number of components kept per example, at most C; may be traced.
      axis_name, component_axis: the mapped device axes that batch and components are split over.
      valid: rows that count (positions that are not padding); the others keep nothing, and B is the
        number of valid ones.
    Returns: mask with exactly K True; ties go to the lower example, then the lower component.
    Raises:
      InputError: a Python k below 0 or above C.
    Cost: some tens of counting passes over the scores, no sort; with axes as many scalar psums.
    """
    B, C = attributions.shape
    _check_k(k, _columns(C, component_axis)[1])
    axes = {"axis_name": axis_name, "component_axis": component_axis}
    if valid is None:
        devices = num_devices(axis_name)
        return batch_largest(attributions, num_kept(k, B * devices), **axes)
    count = psum(jnp.sum(valid, dtype=jnp.int32), axis_name)
    num = num_kept(jnp.asarray(k, jnp.float32), count)
    return (
        batch_largest(jnp.where(valid[:, None], attributions, -jnp.inf), num, **axes)
        & valid[:, None]
    )


@functools.partial(jax.jit, static_argnames=("axis_name", "component_axis"), inline=True)
def batch_largest(
    attributions: Float[Array, "B C"],
    num: Any,
    *,
    axis_name: str | None = None,
    component_axis: str | None = None,
) -> Bool[Array, "B C"]:
    """The `num` largest of the whole batch: `batch_topk` with the count itself given."""
    B, C = attributions.shape
    first, num_all = _columns(C, component_axis)
    row = jnp.uint32(place(axis_name)) * B + jnp.arange(B, dtype=jnp.uint32)
    index = row[:, None] * num_all + (first + jnp.arange(C, dtype=jnp.uint32))[None]

    def count(flags):
        return psum(jnp.sum(_count(flags, axis=0), dtype=jnp.int32), axis_name, component_axis)

    return _largest(_ordered_bits(attributions), index, jnp.asarray(num, jnp.int32), count)
