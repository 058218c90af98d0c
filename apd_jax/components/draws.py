"""Random numbers of many arrays at once, the same as of one by one.

A program takes longer to compile by the number of its draws than to run, so there is one loop for
all arrays of a size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray


def normals(
    asked: Mapping[Any, tuple[PRNGKeyArray, tuple[int, ...], Any, Any]],
) -> dict[Any, Array]:
    """scale · jax.random.normal(key, shape, dtype) of every {name: (key, shape, dtype, scale)}."""
    keys, shapes, dtypes, scales = zip(*asked.values(), strict=True)
    drawn = _normals(keys, scales, shapes, dtypes)
    return dict(zip(asked, drawn, strict=True))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _normals(
    keys: Sequence[Array], scales: Sequence[Any], shapes: tuple[Any, ...], dtypes: tuple[Any, ...]
) -> list[Array]:
    alike: dict[tuple[int, Any], list[int]] = {}
    for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
        alike.setdefault((math.prod(shape), dtype), []).append(i)
    found: dict[int, Array] = {}
    for (size, dtype), own in alike.items():
        draw = functools.partial(jax.random.normal, shape=(size,), dtype=dtype)
        rows = jax.lax.map(draw, jnp.stack([keys[i] for i in own]))
        for i, row in zip(own, rows, strict=True):
            found[i] = scales[i] * row.reshape(shapes[i])
    return [found[i] for i in range(len(keys))]


@functools.partial(jax.jit, static_argnums=1)
def pairs_of_keys(rng: PRNGKeyArray, count: int) -> list[tuple[Array, Array]]:
    """split(fold_in(rng, i)) of i = 0 ... count - 1."""
    pairs = jax.lax.map(lambda i: jax.random.split(jax.random.fold_in(rng, i)), jnp.arange(count))
    return [(pair[0], pair[1]) for pair in pairs]


def shuffled(rng: PRNGKeyArray, leaves: Mapping[str, Array]) -> dict[str, Array]:
    """The same arrays with the entries of each in random places."""
    return {
        name: jax.random.permutation(jax.random.fold_in(rng, i), leaf.reshape(-1)).reshape(
            leaf.shape
        )
        for i, (name, leaf) in enumerate(leaves.items())
    }
