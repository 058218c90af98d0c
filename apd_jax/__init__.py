"""Parameter decomposition in JAX: splits a trained network's parameters into components that sum to it."""

from apd_jax import attributions, components, data, losses, masks, sparse
from apd_jax.components import Components
from apd_jax.config import default_config
from apd_jax.decomposition import Decomposition, decompose
from apd_jax.recipe import default_recipe

__all__ = [
    "Components",
    "Decomposition",
    "attributions",
    "components",
    "data",
    "decompose",
    "default_config",
    "default_recipe",
    "losses",
    "masks",
    "sparse",
]
