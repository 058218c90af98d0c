"""What tests draw: B examples, arrays by seed, and components.

By NumPy: JAX would compile a program for every shape, and does so too where it takes over an array
whose type is not said.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from apd_jax import components as components_lib

B = 5


def draw(i, *shape) -> jax.Array:
    values = np.random.default_rng(i).standard_normal(shape, dtype=np.float32)
    return jnp.asarray(values * np.float32(0.7), jnp.float32)


def uniform(i, *shape) -> jax.Array:
    """From -1 to 1.5, so that what is positive is in the majority."""
    values = np.random.default_rng(i).uniform(-1.0, 1.5, shape)
    return jnp.asarray(np.float32(values), jnp.float32)


def drawn_components(
    params: Any, scale: float = 1.0, seed: int = 0, **options: Any
) -> components_lib.Components:
    """What `components.init` makes, with the spread that it gives, of other numbers."""
    shapes = jax.eval_shape(lambda: components_lib.init(jax.random.key(0), params, **options))
    rng = np.random.default_rng(seed)

    def fill(a: Any) -> jax.Array:
        std = scale * math.sqrt(2 / ((shapes.num_components + 1) * math.prod(a.shape[-2:])))
        values = np.asarray(std * rng.standard_normal(a.shape), a.dtype)
        return jnp.asarray(values, a.dtype)

    return jax.tree.map(fill, shapes)
