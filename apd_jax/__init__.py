"""Parameter decomposition in JAX: splits a trained network's parameters into components that sum to it."""

from apd_jax import attributions, components, losses, masks, sparse
from apd_jax.components import Components
from apd_jax.decomposition import Decomposition, decompose
from apd_jax.methods.config import default_config
from apd_jax.network import data
from apd_jax.recipe.stages import default_recipe

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
