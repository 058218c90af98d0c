"""The path of integrated gradients: the decomposed weights grow from 0 to θ."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from apd_jax import components as components_lib
from apd_jax.components import Components
from apd_jax.network.outputs import outputs

INTEGRATION_STEPS = 16  # of the midpoint rule


def averaged(apply_fn: Callable, params: PyTree, components: Components) -> Callable:
    """A function whose gradient at params is the mean of apply_fn's over the path."""
    fixed = components_lib.decomposed_leaves(components, params)

    def fn(p: PyTree, x: PyTree) -> Array:
        moving = components_lib.decomposed_leaves(components, p)

        def at(alpha: Array) -> Array:
            leaves = {name: moving[name] - (1 - alpha) * fixed[name] for name in moving}
            return outputs(apply_fn(components_lib.replace_leaves(p, leaves), x))

        midpoints = (jnp.arange(INTEGRATION_STEPS) + 0.5) / INTEGRATION_STEPS
        return jnp.mean(jax.lax.map(at, midpoints), axis=0)

    return fn
