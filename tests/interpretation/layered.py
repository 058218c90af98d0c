"""A network of three matrices with positions, and its decomposition by SPD, untrained.

  x0 = E[tokens],  x1 = x0 + mean_{s <= t} tanh(x0 W1) W2,  logits = 2 (x1 + tanh(x1 W3) W4) Eᵀ

W4 is not decomposed. The components' sum misses a part of each matrix.
"""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import make_problem

from apd_jax.components import Components, map_sites
from apd_jax.decomposition import Decomposition
from apd_jax.language.tokens import predicting
from apd_jax.methods.spd import SPD

V, D, H, T = 7, 4, 5, 4
SHAPES = {"E": (V, D), "W1": (D, H), "W2": (H, D), "W3": (D, H), "W4": (H, D)}
SITES = ("W1", "W2", "W3")
PER_SITE = 3


def network(params, tokens):
    x = jnp.take(params["E"], tokens, axis=0, mode="clip")
    steps = jnp.arange(1, tokens.shape[1] + 1)[None, :, None]
    x += (jnp.cumsum(jnp.tanh(x @ params["W1"]), axis=1) / steps) @ params["W2"]
    return 2 * (x + jnp.tanh(x @ params["W3"]) @ params["W4"]) @ params["E"].T


def decomposition(**settings) -> Decomposition:
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in SHAPES.items()}
    tokens = jnp.asarray(rng.integers(0, V, (4, T)))
    problem = make_problem(
        network, params, lambda rng, step: tokens, select="W[123]", valid_fn=predicting
    )
    method = SPD(
        num_components=PER_SITE, mask_per="position", minimality_loss="kl", batch_size=4, **settings
    )
    components: Components = map_sites(
        lambda f: jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), f),
        method.make_components(jax.random.key(1), problem),
    )
    gate = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype),
        method.make_gate(jax.random.key(2), problem, components),
    )
    return Decomposition(problem, components, method, (), None, gate)
