"""Beginnings where masks are per position, on networks whose mechanisms are tokens."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apd_jax import components
from apd_jax.methods.apd import APD
from apd_jax.network.problem import Problem
from apd_jax.recipe import beginning, held, modes, positions, scales, stages

TOKENS, LENGTH, WIDTH = 5, 3, 10
drawn = np.random.default_rng(0)
EMBED, PLACES = 3 * np.eye(TOKENS, WIDTH), drawn.normal(size=(LENGTH, WIDTH)) / 2
PARAMS = {
    name: jnp.asarray(drawn.normal(size=(WIDTH, d)), jnp.float32)
    for name, d in {"value": WIDTH, "output": WIDTH - 1}.items()
}


@pytest.fixture(autouse=True, scope="module")
def fewer_examples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modes, "NUM_EXAMPLES", 1536)
        yield


def tokens(key, step):
    key = jax.random.fold_in(key, step)
    return {"tokens": jax.random.randint(key, (64, LENGTH), 0, TOKENS)}


def network(params, x):
    """Every position passes its token on to the next."""
    read = jnp.asarray(EMBED, jnp.float32)[x["tokens"]] + jnp.asarray(PLACES[None], jnp.float32)
    passed = jnp.einsum("st,btd->bsd", jnp.roll(jnp.eye(LENGTH), 1, 0), read @ params["value"])
    return passed @ params["output"] + 0 * x["tokens"][..., None]  # in the places of the tokens


def test_a_row_is_a_token_without_its_place():
    """e ∝ A_token with A = embedding + mean place; what is blind sees x."""

    def valid(x):
        return x["tokens"] != jnp.arange(LENGTH)[None]

    problem = Problem(network, PARAMS, tokens, valid_fn=valid)
    key = jax.random.key(3)
    found = positions.read(problem, 64, key, 1)
    assert found is not None
    ins, effect, signed, whole = found
    seen = np.concatenate([x["tokens"] for x in modes.looked_at(problem, 64 * LENGTH, key, 1)])
    kept = np.asarray(valid({"tokens": seen}))
    assert len(seen) == 1536 // LENGTH and len(effect) == kept.sum() < seen.size
    x = EMBED[seen] + PLACES
    means = np.stack([x[kept[:, t], t].mean(0) for t in range(LENGTH)])
    apart = means - x[kept].mean(0)
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    np.testing.assert_allclose(whole["value"][:, 0], unit[kept], atol=1e-5)
    np.testing.assert_allclose(signed["value"][:, 0], (x - apart)[kept], atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(ins["value"][:, 0], axis=1), 1, rtol=1e-5)
    out = np.roll(x @ np.asarray(PARAMS["value"]), 1, 1) @ np.asarray(PARAMS["output"])
    np.testing.assert_allclose(effect, np.mean(out**2, -1)[kept], rtol=1e-3)


def test_means_that_differ_by_chance_tell_no_positions_apart():
    x = drawn.normal(size=(40, 60, 8)).astype(np.float32)
    valid = np.ones((40, 60), bool)
    np.testing.assert_allclose(positions._left(x, valid), x.reshape(-1, 8), atol=1e-6)
    moved = x + np.linspace(-1, 1, 60)[None, :, None] * np.eye(8, dtype=np.float32)[2]
    apart = positions._left(moved, valid).reshape(x.shape) - x
    assert np.abs(apart.mean(0)).max() < 0.5  # of 1: the means by chance are left


def test_components_begin_at_tokens_and_what_reads_others_is_always_on():
    """Of value, d_i is dual to tokens and places; output reads the token before: whole."""
    problem = Problem(network, PARAMS, tokens)
    method = APD(num_components=12, rank=4, topk=0.0, batch_size=64, mask_per="position")
    recipe = stages.default_recipe()
    found = beginning.accepted(problem, method, recipe, scales.measure(problem, method))
    assert found is not None and 0.9 < found.active < 2.5  # of few rows not exactly
    assert found.num_always_on == 3  # rank 4 each, of 10
    P = {n: np.asarray(W) for n, W in components.materialize(found.components).items()}
    for name, leaf in PARAMS.items():
        np.testing.assert_allclose(P[name].sum(0), leaf, atol=1e-4)
    split = [name for name in P if np.abs(P[name][3:]).max() > 1e-4]
    assert len(split) == 1  # either leaf tells mechanisms apart, and the other is whole
    A = EMBED + PLACES.mean(0)
    apart = np.linalg.svd(PLACES - PLACES.mean(0))[2][:2]
    if split == ["output"]:
        A, apart = A @ np.asarray(PARAMS["value"]), apart @ np.asarray(PARAMS["value"])
    W = np.asarray(PARAMS[split[0]])
    for a in A:
        does = np.einsum("d,cde->ce", a, P[split[0]][3:8])
        own = np.argmax(np.linalg.norm(does, axis=1))
        np.testing.assert_allclose(np.delete(does, own, 0), 0, atol=0.05)  # of 9
        np.testing.assert_allclose(apart @ P[split[0]][3 + own], 0, atol=0.05)
        always = np.einsum("d,cde->e", a, P[split[0]][:3])
        np.testing.assert_allclose(does[own] + always, a @ W, atol=0.05)


def test_what_leaks_is_whole():
    """Of two leaves one reads the modes, the other something else."""
    which = drawn.integers(0, 4, 400)
    one, other = np.eye(4)[which][:, None], drawn.normal(size=(400, 1, 6))
    other /= np.linalg.norm(other, axis=-1, keepdims=True)
    ins = {"one": one, "other": other}
    directions = {"one": np.eye(4)[:, None], "other": np.eye(6)[:4, None]}
    about = (ins, np.ones(400), np.arange(400), directions, np.ones(4))
    m = modes.described(*about, whole=ins)
    assert m.leaks["one"] < 1e-9 and m.leaks["other"] > held.LEAK
    assert held.shared(m) == ["other"] and held.shared(modes.described(*about)) == []


def test_where_positions_are_lost_whole_examples_are_looked_at(caplog):
    caplog.set_level(logging.INFO, logger="apd_jax.recipe")

    def fn(params, x):
        read = jnp.asarray(EMBED, jnp.float32)[x["tokens"]]
        return read @ params["value"] + (read.mean(1) @ params["output"]).sum(-1)[:, None, None]

    assert positions.read(Problem(fn, PARAMS, tokens), 64, jax.random.key(0), 1) is None
    assert "'output'" in caplog.text and "whole examples" in caplog.text
