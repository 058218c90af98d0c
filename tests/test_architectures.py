"""The method on networks nobody adapted to it.

Attributions by two modes, sparse passes by three routes, values and gradients.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apd_jax import attributions, components
from apd_jax.forward import sparse
from apd_jax.gates import selection as masks


class Convolution(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.avg_pool(nn.relu(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


class Transformer(nn.Module):
    """Embedding used twice (gather, transposed product), attention by einsum, normalisation."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 8)
        x = embed(tokens) + self.param("position", nn.initializers.normal(0.1), (4, 8))[None]
        normed = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2, qkv_features=8)(normed, normed)
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
        return embed.attend(x)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.RNN(nn.LSTMCell(5))(x)[:, -1])


class Rematerialized(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(nn.Dense)(4)(jnp.tanh(nn.remat(nn.Dense)(8)(x)))


class ScannedLayers(nn.Module):
    """Three layers whose weights are stacked along a first axis."""

    @nn.compact
    def __call__(self, x):
        def layer(module, carry, _):
            return nn.relu(nn.Dense(6, name="layer")(carry)), None

        return nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(
            self, x, None
        )[0]


KEY = jax.random.key(0)
NETWORKS = {
    "convolution": (Convolution(), jax.random.normal(KEY, (5, 6, 6, 1))),
    "transformer": (Transformer(), jax.random.randint(KEY, (5, 4), 0, 7)),
    "recurrent": (Recurrent(), jax.random.normal(KEY, (5, 3, 4))),
    "remat": (Rematerialized(), jax.random.normal(KEY, (5, 4))),
    "scanned layers": (ScannedLayers(), jax.random.normal(KEY, (5, 6))),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_modes_and_routes_agree(name):
    model, x = NETWORKS[name]
    params = jax.jit(model.init)(KEY, x)
    cs = components.init(KEY, params, num_components=3, init_scale=5.0)
    attribute = jax.jit(
        lambda mode: attributions.gradient(model.apply, params, cs, x, mode=mode), static_argnums=0
    )
    A = attribute("forward")
    np.testing.assert_allclose(A, attribute("reverse"), atol=1e-5 * A.max())
    mask = masks.batch_topk(A, 1.4)  # 7 of 15 pairs

    def loss(cs, route):
        return jnp.mean(sparse.apply(model.apply, params, cs, mask, x, route=route, slots=2) ** 2)

    differentiate = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, gradient = differentiate(cs, "materialize")
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    for route in ("masked", "dispatch"):
        other, other_gradient = differentiate(cs, route)
        np.testing.assert_allclose(other, value, rtol=1e-5, err_msg=route)
        for a, b in zip(jax.tree.leaves(other_gradient), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * largest, err_msg=route)
