"""The smallest decomposition, with something wrong in it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import apd_jax
from apd_jax.methods.apd import APD

B, T = 8, 4
PARAMS = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)}
SETTINGS = APD(num_components=3, rank=1, batch_size=B, num_steps=1, topk=1.0, schedule="constant")


def linear(params, x):
    return x @ params["w"]


def rows(rng, step):
    return jax.random.normal(rng, (B, 4))


def sequences(rng, step):
    return jax.random.normal(rng, (B, T, 4))


def first_three(x):
    """Of T = 4 positions the last is padding."""
    return jnp.tile(jnp.arange(T) < 3, (x.shape[0], 1))


def decompose(
    apply_fn: Any = linear, params: Any = PARAMS, data: Any = rows, *, settings=None, **more: Any
) -> apd_jax.Decomposition:
    """One step."""
    return apd_jax.decompose(apply_fn, params, data, SETTINGS.replace(**settings or {}), **more)
