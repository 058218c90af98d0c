"""What leaves read on every example, on a network with a bias before its leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apd_jax import components
from apd_jax.methods.apd import APD
from apd_jax.network.problem import Problem
from apd_jax.recipe import beginning, constant, modes, scales, stages

FEATURES, WIDTH = 4, 8
drawn = np.random.default_rng(0)
EMBED, BIAS = drawn.normal(size=(FEATURES, WIDTH)), 0.4 * drawn.normal(size=WIDTH)
PARAMS = {"W": jnp.asarray(drawn.normal(size=(WIDTH, WIDTH)), jnp.float32)}


@pytest.fixture(autouse=True, scope="module")
def fewer_examples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modes, "NUM_EXAMPLES", 2048)
        yield


def sample(key, step):
    """Every feature is on with probability 0.15, then uniform in [0, 1]."""
    on, size = jax.random.split(jax.random.fold_in(key, step))
    return jax.random.uniform(size, (256, FEATURES)) * jax.random.bernoulli(
        on, 0.15, (256, FEATURES)
    )


def network(bias):
    embed, b = jnp.asarray(EMBED, jnp.float32), jnp.asarray(bias[None], jnp.float32)
    return Problem(lambda p, x: (x @ embed + b) @ p["W"], PARAMS, sample)


def test_what_is_left_without_the_constant():
    batches = modes.looked_at(network(BIAS), 256, jax.random.key(0), 1)
    found = constant.read(network(BIAS), batches)
    assert found is not None
    ins, effect, left, whole = found
    x = np.concatenate(list(batches)) @ EMBED
    np.testing.assert_allclose(left["W"][:, 0], x, atol=1e-5)
    np.testing.assert_allclose(effect, np.mean((x @ np.asarray(PARAMS["W"])) ** 2, 1), atol=1e-4)
    read = x + BIAS
    unit = read / np.linalg.norm(read, axis=1, keepdims=True)
    np.testing.assert_allclose(whole["W"][:, 0], unit, atol=1e-5)
    assert np.allclose(np.linalg.norm(ins["W"][x.any(1), 0], axis=1), 1, atol=1e-5)
    assert constant.read(network(0 * BIAS), batches) is None


def test_no_constant_where_as_many_examples_agree_on_something_else():
    """Five keys, each as often: none is what is read at nothing."""
    keys = np.eye(5)[np.arange(100) % 5][:, None]
    assert constant.idle({"W": keys}) is None
    seldom = np.concatenate([keys, np.ones((61, 1, 5))])
    assert np.array_equal(constant.idle({"W": seldom}), np.arange(161) >= 100)
    assert constant.idle({"W": seldom[:-2]}) is None


def test_components_are_blind_to_the_constant_which_is_always_on():
    problem = network(BIAS)
    method = APD(num_components=12, rank=2, topk=0.0, batch_size=256)
    reference = scales.measure(problem, method)
    found = beginning.accepted(problem, method, stages.default_recipe(), reference)
    assert found is not None and found.num_always_on
    on, W = found.num_always_on, np.asarray(PARAMS["W"])
    P = np.asarray(components.materialize(found.components)["W"])
    np.testing.assert_allclose(P.sum(0), W, atol=1e-4)
    np.testing.assert_allclose(np.einsum("d,cde->ce", BIAS, P[on:]), 0, atol=0.02)
    for a in EMBED:
        does = np.einsum("d,cde->ce", a, P)
        own = on + np.argmax(np.linalg.norm(does[on:], axis=1))
        np.testing.assert_allclose(np.delete(does[on:], own - on, 0), 0, atol=0.02)
        np.testing.assert_allclose(does[own] + does[:on].sum(0), a @ W, atol=0.02)
        assert np.linalg.norm(does[own]) > 0.3 * np.linalg.norm(a @ W)
