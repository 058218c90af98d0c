"""What the others are worth in a pass: `base` masks from sources, `stochastic`, `adversary`."""

from apd_jax.ablations.adversary import Adversary, PersistentAdversary, Pool
from apd_jax.ablations.base import Ablation, Sources, masked, site_weights
from apd_jax.ablations.stochastic import Drop, Keep, Uniform, subset_of_sites

__all__ = [
    "Ablation",
    "Adversary",
    "Drop",
    "Keep",
    "PersistentAdversary",
    "Pool",
    "Sources",
    "Uniform",
    "masked",
    "site_weights",
    "subset_of_sites",
]
