"""Networks of Flax, in both its interfaces, and of Equinox: (apply_fn, params, x) each."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from draws import B, draw
from flax import nnx


class Vision(nn.Module):
    """A U-Net in small.

    Grouped and transposed convolutions with a flipped kernel, group normalisation, concatenation.
    """

    @nn.compact
    def __call__(self, x):
        a = nn.relu(nn.Conv(4, (3, 3), padding="CIRCULAR")(x))
        b = nn.GroupNorm(2)(nn.Conv(4, (3, 3), strides=2, feature_group_count=2)(a))
        up = nn.ConvTranspose(3, (2, 2), strides=(2, 2), transpose_kernel=True)(nn.relu(b))
        return nn.Dense(2)(
            nn.max_pool(jnp.concatenate([a, up], axis=-1), (2, 2), (2, 2)).mean((1, 2))
        )


def linen_vision():
    x = draw(9, B, 4, 4, 2)
    return Vision().apply, jax.jit(Vision().init)(jax.random.key(1), x), x


class Sequences(nnx.Module):
    """Causal attention, then an LSTM."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 4, 8, decode=False, rngs=rngs)
        self.rnn, self.out = (
            nnx.RNN(nnx.OptimizedLSTMCell(4, 3, rngs=rngs)),
            nnx.Linear(3, 2, rngs=rngs),
        )

    def __call__(self, x):
        return self.out(
            self.rnn(x + self.attention(x, mask=nnx.make_causal_mask(x[..., 0])))[:, -1]
        )


def nnx_sequences():
    graph, params, rest = nnx.split(Sequences(nnx.Rngs(0)), nnx.Param, ...)
    return (lambda p, x: nnx.merge(graph, p, rest, copy=True)(x)), params, draw(9, B, 3, 4)


def equinox_module():
    model = eqx.nn.MLP(4, 3, 6, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return (lambda p, x: jax.vmap(eqx.combine(p, static))(x)), params, draw(9, B, 4)
