"""Random numbers of many arrays at once, the same as of one by one.

A program takes longer to compile by the number of its draws than to run, so there is one loop for
all arrays of a size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray


def normals(asked: Mapping[Any, tuple[PRNGKeyArray, tuple[int, ...], Any]]) -> dict[Any, Array]:
    """jax.random.normal(key, shape, dtype) of every {name: (key, shape, dtype)}."""
    alike: dict[tuple[int, Any], list[Any]] = {}
    for name, (_, shape, dtype) in asked.items():
        alike.setdefault((math.prod(shape), dtype), []).append(name)
    found = {}
    for (size, dtype), names in alike.items():
        rows = _normals(jnp.stack([asked[name][0] for name in names]), size, dtype)
        found |= {name: a.reshape(asked[name][1]) for name, a in zip(names, rows, strict=True)}
    return found


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normals(keys: Array, size: int, dtype: Any) -> Array:
    return jax.lax.map(lambda key: jax.random.normal(key, (size,), dtype), keys)


@functools.partial(jax.jit, static_argnums=1)
def pairs_of_keys(rng: PRNGKeyArray, count: int) -> Array:
    """split(fold_in(rng, i)) of i = 0 ... count - 1: [count, 2] keys."""
    return jax.lax.map(lambda i: jax.random.split(jax.random.fold_in(rng, i)), jnp.arange(count))
