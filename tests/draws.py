"""What the tests' networks draw: B examples, and arrays by seed."""

import jax

B = 5


def draw(i, *shape):
    return jax.random.normal(jax.random.key(i), shape) * 0.7
