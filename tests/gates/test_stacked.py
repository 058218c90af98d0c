"""A site that is a stack of matrices: a piece is needed if any of its matrices needs it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close

import apd_jax
from apd_jax.gates import piece_mlp


def network(params, x):
    return jax.nn.relu(jnp.einsum("bhd,hdk->bhk", x, params["W"])).sum(1)


def sample(rng, step):
    return jax.random.normal(rng, (16, 3, 4))


@pytest.fixture(scope="module")
def decomposed():
    params = {"W": jax.random.normal(jax.random.key(0), (3, 4, 5))}
    spd = apd_jax.SPD(num_components=6, batch_size=16, num_steps=3, gate_width=4)
    return apd_jax.decompose(network, params, sample, method=spd)


def test_logits_are_the_largest_over_matrices(decomposed):
    x = np.asarray(sample(jax.random.key(1), 0), np.float64)
    ((name, f),) = decomposed.components.factors.items()
    assert f.axes.batch == (0,)
    U = np.asarray(f.U, np.float64)[..., 0]  # [n, 3, d]
    inner = np.einsum("bhd,nhd->bhn", x, U)
    mlp = decomposed.gate[name]
    flat = jnp.asarray(inner.reshape(-1, 6), jnp.float32)
    z = np.asarray(piece_mlp.apply(mlp, flat)).reshape(16, 3, 6)
    close(decomposed.activity(jnp.asarray(x, jnp.float32)).scores, z.max(axis=1))
