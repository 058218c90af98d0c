"""The masks that evaluations ask about: that of training, and others that were not trained on.

Shapes: B examples, T positions, C components.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from apd_jax.ablations import masked
from apd_jax.gates import selection
from apd_jax.gates.base import Activity


def always_on(count: int, C: int) -> Bool[Array, "1 C"]:
    """The mask of none but the first `count` components."""
    return jnp.arange(C)[None, :] < count


def largest(
    scores: Float[Array, "B *T C"], k: Any, count: int = 0, *, each: bool = False, valid: Any = None
) -> Bool[Array, "B *T C"]:
    """The k largest scores over the batch (or of `each` input), beside `count` always on.

    These are not counted in k, which may be traced.
    """
    C = scores.shape[-1]
    rows, on = scores.reshape(-1, C), always_on(count, C)
    shown = jnp.where(on, -jnp.inf, rows) if count else rows
    flat = None if valid is None or scores.ndim == 2 else valid.reshape(-1)
    if each:
        mask = selection.topk(shown, k) | on
    else:
        mask = selection.batch_topk(shown, k, valid=flat) | on
    return (mask if flat is None else mask & flat[:, None]).reshape(scores.shape)


def stochastic(activity: Activity, key: PRNGKeyArray) -> Float[Array, "B *T C"]:
    """g + (1 - g) r with r ~ U(0, 1): what is not needed, ablated in part."""
    return masked(activity.values, jax.random.uniform(key, activity.values.shape))
