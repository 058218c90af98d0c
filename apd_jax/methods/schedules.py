"""Learning-rate schedules of the papers, as optax schedules; coefficients that are annealed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Float

from apd_jax.errors import InputError

Number = float | int | jax.Array  # may be traced: runs that differ in it share a program
KINDS = ("constant", "linear", "cosine", "half_cosine", "exponential")
_HALF_LIFE_STEPS = 300


def learning_rate(
    kind: str, peak: Float[ArrayLike, ""], num_steps: int, warmup_fraction: float = 0.0
) -> optax.Schedule:
    r"""Linear warm-up from 0, then a decay over the remaining T steps, t counted from its end.

    constant: 1      linear: 1 - t/T      cosine: cos(½π t/(T-1))      exponential: 2^(-t/300)
    half_cosine: 0.1 + 0.9 · ½(1 + cos(π t/(T-1)))

    The cosine is a *quarter* wave, as in the released code of APD. The half wave that ends at a
    tenth is VPD's.

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
        if kind == "half_cosine":
            wave = jnp.cos(math.pi * t / max(decay_steps - 1, 1))
            return peak * (0.1 + 0.45 * (1 + wave))
        if kind == "exponential":
            return peak * jnp.exp2(-t / _HALF_LIFE_STEPS)
        return jnp.full_like(t, peak)

    if warmup_steps == 0:
        return decay
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup_steps), decay], [warmup_steps]
    )


@dataclasses.dataclass(frozen=True)
class Annealed:
    """A number that goes from `first` to `last` between two shares of training, then stays.

    shape: "linear" in the step, or "geometric" in equal factors.
    """

    first: Number
    last: Number
    start: float = 0.0
    end: float = 1.0
    shape: str = "linear"

    def at(self, step: Any, num_steps: int) -> Any:
        progress = jnp.asarray(step, jnp.float32) / max(num_steps - 1, 1)
        t = jnp.clip((progress - self.start) / max(self.end - self.start, 1e-9), 0.0, 1.0)
        if self.shape == "geometric":
            return self.first * (self.last / self.first) ** t
        return self.first + (self.last - self.first) * t


Schedule = Number | Annealed


def at(schedule: Schedule, step: Any, num_steps: int) -> Any:
    """The value of a number, or of one that is annealed, at a step."""
    return schedule.at(step, num_steps) if isinstance(schedule, Annealed) else schedule
