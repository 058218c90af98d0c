"""Learning-rate schedules of the APD experiments, as optax schedules."""

from __future__ import annotations

import math

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Float

from apd_jax.errors import InputError

KINDS = ("constant", "linear", "cosine", "exponential")
_HALF_LIFE_STEPS = 300


def learning_rate(
    kind: str, peak: Float[ArrayLike, ""], num_steps: int, warmup_fraction: float = 0.0
) -> optax.Schedule:
    r"""Linear warm-up from 0, then a decay over the remaining T steps, t counted from the end of the warm-up.

    constant: 1      linear: 1 - t/T      cosine: cos(½π t/(T-1))      exponential: 2^(-t/300)

    The cosine is a *quarter* wave, as in the released code of APD; `optax.cosine_decay_schedule` is a half wave.

    Raises:
      InputError: unknown kind.
    """
    if kind not in KINDS:
        raise InputError(
            f"unknown learning-rate schedule {kind!r}; choose one of {', '.join(KINDS)}."
        )
    warmup_steps = int(num_steps * warmup_fraction)
    decay_steps = max(num_steps - warmup_steps, 1)

    def decay(step):
        t = jnp.asarray(step, jnp.float32)
        if kind == "linear":
            return peak * (1 - t / decay_steps)
        if kind == "cosine":
            return peak * jnp.cos(0.5 * math.pi * t / max(decay_steps - 1, 1))
        if kind == "exponential":
            return peak * jnp.exp2(-t / _HALF_LIFE_STEPS)
        return jnp.full_like(t, peak)

    if warmup_steps == 0:
        return decay
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup_steps), decay], [warmup_steps]
    )


def geometric(
    first: Float[ArrayLike, ""], last: Float[ArrayLike, ""] | None, num_steps: int
) -> optax.Schedule:
    """From `first` to `last` in equal factors: first^(1-t) · last^t with t = step / (num_steps - 1); `first` throughout if last is None."""
    if last is None:
        return optax.constant_schedule(first)
    return lambda step: (
        first * (last / first) ** (jnp.asarray(step, jnp.float32) / max(num_steps - 1, 1))
    )
