"""The linear targets: what they compute, what their inputs are, and how the truth scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_method
from ml_collections import ConfigDict

from apd_jax import components, targets
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError


def make(num_blocks, block_size):
    target = targets.build(
        ConfigDict({"name": "linear", "num_blocks": num_blocks, "block_size": block_size}), 64
    )
    return target, target.init_fn(jax.random.key(0))


def test_a_block_diagonal_rotation_on_one_block_at_a_time():
    target, params = make(3, 2)
    W = np.asarray(params["W"])
    inside = np.equal.outer(np.arange(6) // 2, np.arange(6) // 2)
    assert not W[~inside].any()
    np.testing.assert_allclose(W @ W.T, np.eye(6), atol=1e-5)
    x = target.sample_fn(jax.random.key(1), jnp.int32(0))
    blocks = (np.asarray(x).reshape(64, 3, 2) != 0).any(-1)
    assert (blocks.sum(1) == 1).all() and blocks.any(0).all()
    np.testing.assert_allclose(target.apply_fn(params, x), np.asarray(x) @ W, atol=1e-5)


def scored(P, target, params):
    cs = components.from_materialized({"W": jnp.asarray(P, jnp.float32)})
    decomposition = Decomposition(target.problem(params), cs, make_method())
    return target.score_fn(decomposition, jax.random.key(0), np.ones(len(P), bool)).metrics


def test_the_truth_scores_as_such_and_halves_do_not():
    target, params = make(2, 3)
    W = np.asarray(params["W"])
    first, second = (
        np.where(np.arange(6)[:, None] < 3, W, 0),
        np.where(np.arange(6)[:, None] >= 3, W, 0),
    )
    whole = scored([second, 0 * W, first], target, params)
    assert whole["num_blocks_found"] == 2 and whole["share_of_largest"] == pytest.approx(1)
    assert whole["block_cosine"] == pytest.approx(1, abs=1e-5) and whole[
        "block_norm_ratio"
    ] == pytest.approx(1, abs=1e-5)
    split = scored([second / 2, second / 2, first], target, params)
    assert split["num_blocks_found"] == 1 and split["block_norm_ratio"] == pytest.approx(
        0.75, abs=1e-5
    )
    merged = scored([first + second, 0 * W, 0 * W], target, params)
    assert merged["num_blocks_found"] == 0 and merged["block_cosine"] < 0.75


def test_refused():
    with pytest.raises(InputError, match="block_size must be at least 1; got 0"):
        make(2, 0)
