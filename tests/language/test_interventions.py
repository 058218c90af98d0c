"""Generated text and switched components, on a tiny Llama whose components are drawn at random."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import LLAMA_CONFIG, V, llama, llama_weights, write_folder

from apd_jax import components as components_lib
from apd_jax import language
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.language.tokens import PAD
from apd_jax.methods.apd import APD
from apd_jax.network.problem import Problem

TOKENS = np.random.default_rng(3).integers(0, V - 2, (2, 6)).astype(np.int32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path, _ = write_folder(tmp_path_factory.mktemp("m") / "llama", LLAMA_CONFIG, llama_weights())
    return language.load(path)


@pytest.fixture(scope="module")
def found(model):
    """Three components of rank one at every MLP matrix of layer 1."""
    problem = Problem(
        model.apply_fn,
        model.params,
        lambda rng, step: jnp.asarray(TOKENS),
        select=model.matrices("mlp", layers=[1]),
    )
    components = components_lib.init(
        jax.random.key(0),
        model.params,
        num_components=3,
        rank=1,
        init_scale=1.0,
        select=problem.chosen,
        layouts=problem.layouts,
        like_target=True,
    )
    return Decomposition(problem, components, APD(num_components=3, rank=1))


@pytest.fixture(scope="module")
def run():
    return jax.jit(lambda i, params, x: i(params, x), static_argnums=0)


def test_greedy_is_a_plain_loop(model):
    tokens = [list(TOKENS[0]), list(TOKENS[1][:2])]
    padded = np.full((2, 6), PAD)
    for row, own in zip(padded, tokens, strict=True):
        row[: len(own)] = own
    found = language.generate(model.apply_fn, model.params, padded, num_tokens=4)
    weights = {name: np.asarray(a, np.float64) for name, a in model.params.items()}
    for row, own in zip(found, tokens, strict=True):
        for _ in range(4):  # a forward pass in numpy that shares nothing with the decoder
            own.append(int(llama(weights, np.array([own]))[0, -1].argmax()))
        assert row.tolist() == own + [PAD] * (10 - len(own))


def test_draws_follow_the_softmax_and_the_seed(model):
    # A network that knows one distribution, at temperature 2: p² normalised is drawn at 1.
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.2, 0.0]))

    def network(params, tokens):
        return jnp.broadcast_to(params, (*tokens.shape, 4))

    def draw(seed):
        start = np.zeros((400, 1), np.int32)
        return language.generate(
            network, logits, start, num_tokens=3, temperature=2.0, seed=seed, length=5
        )

    first, again, other = draw(0), draw(0), draw(1)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    share = np.bincount(first[:, 1:].ravel(), minlength=4) / 1200
    p = np.sqrt([0.5, 0.3, 0.2, 0.0])
    np.testing.assert_allclose(share, p / p.sum(), atol=0.05)  # 3.5 standard deviations


def test_what_cannot_be_generated(model):
    def refused(match, **options):
        arguments = {"tokens": TOKENS, "num_tokens": 2} | options
        with pytest.raises(InputError, match=match):
            language.generate(model.apply_fn, model.params, **arguments)

    refused("at least one whole number in every row", tokens=np.full((1, 3), PAD))
    refused("must be behind a prompt's end", tokens=np.array([[1, PAD, 2]]))
    refused("num_tokens of at least 1", num_tokens=0)
    refused("temperature of at least 0; got 2 and nan", temperature=float("nan"))
    refused("need 8 positions; there are 7", length=7)
    with pytest.raises(InputError, match="model's context is 12"):
        model.generate("w1 w2 w3", num_tokens=10)
    with pytest.raises(InputError, match="the text is empty"):
        model.generate("", num_tokens=2)


def test_steered_at_all_positions_is_edited(model, found, run):
    scales = {0: 0.0, 2: 3.0}
    edited = found.edit(scales)
    everywhere = language.steer(found, scales, np.ones(6, bool))
    expected = run(model.apply_fn, edited, TOKENS)
    here = run(everywhere.apply_fn, everywhere.params, TOKENS)
    np.testing.assert_allclose(here, expected, atol=2e-5)
    target = run(model.apply_fn, model.params, TOKENS)
    assert np.abs(np.asarray(expected - target)).max() > 0.01
    nowhere = language.steer(found, scales, np.zeros((1, 6), bool))
    np.testing.assert_allclose(run(nowhere.apply_fn, nowhere.params, TOKENS), target, atol=2e-5)
    at_once = language.steer(found, scales)
    for name, a in at_once.params.items():
        np.testing.assert_array_equal(a, edited[name])


def test_positions_are_chosen_by_mask_or_by_token(model, found, run):
    # What is steered at position 3 changes nothing before it, and layer 1 is the last: nor after.
    at = np.arange(6) == 3
    by_mask = language.steer(found, {1: 0.0}, at[:5])  # as far as it goes
    here = np.asarray(run(by_mask.apply_fn, by_mask.params, TOKENS))
    target = np.asarray(run(model.apply_fn, model.params, TOKENS))
    edited = np.asarray(run(model.apply_fn, found.edit({1: 0.0}), TOKENS))
    np.testing.assert_allclose(here[:, ~at], target[:, ~at], atol=2e-5)
    np.testing.assert_allclose(here[:, at], edited[:, at], atol=2e-5)
    token = TOKENS[0, 3]
    by_token = language.steer(found, {1: 0.0}, lambda tokens: tokens == token)
    here = np.asarray(run(by_token.apply_fn, by_token.params, TOKENS))
    chosen = token == TOKENS
    np.testing.assert_allclose(here[chosen], edited[chosen], atol=2e-5)
    np.testing.assert_allclose(here[~chosen], target[~chosen], atol=2e-5)


def test_swapped_twice_is_the_identity(model, found, run):
    once = language.swapped(found, 0, 2, sign=-1)
    twice = language.swapped(once, 0, 2, sign=-1)
    for name, f in found.components.factors.items():
        P, Q = np.asarray(f.weights), np.asarray(once.components.factors[name].weights)
        norms = [np.linalg.norm(a, axis=(1, 2)) for a in (P, Q)]
        np.testing.assert_allclose(*norms, rtol=1e-6)
        np.testing.assert_array_equal(Q[1], P[1])
        # What 0 writes is now along what 2 wrote, with the other sign; what it reads is as before.
        u, v = np.asarray(f.U)[..., 0], np.asarray(f.V)[:, 0]
        own = once.components.factors[name]
        np.testing.assert_allclose(np.asarray(own.U)[..., 0], u)
        unit = -v[2] / np.linalg.norm(v[2])
        np.testing.assert_allclose(own.V[0, 0] / np.linalg.norm(own.V[0, 0]), unit, atol=1e-6)
        change = np.asarray(once.problem.params[name] - found.problem.params[name])
        np.testing.assert_allclose(change, (Q - P).sum(0), atol=1e-6)
        np.testing.assert_allclose(twice.components.factors[name].V, f.V, atol=1e-6)
    for name, a in model.params.items():
        np.testing.assert_allclose(twice.problem.params[name], a, atol=1e-6)
    everywhere = language.swap(found, 0, 2, np.ones(6, bool), sign=-1)
    expected = run(model.apply_fn, once.problem.params, TOKENS)
    here = run(everywhere.apply_fn, everywhere.params, TOKENS)
    np.testing.assert_allclose(here, expected, atol=2e-5)


def test_swapped_between_sites(model, found):
    """Each site has numbers of its own: two that write as wide may exchange what they write."""
    tree = dict(found.components.tree)
    names = list(found.components.factors)
    first = {name: 3 * i for i, name in enumerate(names)}
    for name in names:
        ids = range(first[name], first[name] + 3)
        tree[name] = dataclasses.replace(tree[name], ids=ids)
    own = dataclasses.replace(found, components=components_lib.Components(tree, 9))
    (down,), (gate, up) = ([n for n in names if ("down" in n) == d] for d in (True, False))
    with pytest.raises(InputError, match="choose two at the same sites"):
        language.swapped(own, first[down], first[up])
    with pytest.raises(InputError, match="components 3 and 3 cannot exchange"):
        language.swapped(own, 3, 3)
    after = language.swapped(own, first[up], first[gate] + 1)
    changed = [n for n, a in model.params.items() if (after.problem.params[n] != a).any()]
    assert sorted(changed) == sorted([up, gate])
    written = np.asarray(after.components.factors[up].V[0, 0])
    v = np.asarray(found.components.factors[gate].V[1, 0])
    np.testing.assert_allclose(written / np.linalg.norm(written), v / np.linalg.norm(v), atol=1e-6)


def test_a_sample_before_and_after(model, found, tmp_path):
    change = language.steer(found, {0: 8.0, 1: -8.0}, lambda tokens: tokens >= 0)
    before, after = model.before_and_after("w1 w2 w3", change, num_tokens=6)
    assert before.startswith("w1 w2 w3") and after.startswith("w1 w2 w3") and before != after
    assert before == model.generate("w1 w2 w3", num_tokens=6)
    model.save(tmp_path, change.weights)
    assert language.load(tmp_path).generate("w1 w2 w3", num_tokens=6) == after


def test_what_cannot_be_switched(found):
    with pytest.raises(InputError, match="component 9 does not exist"):
        language.steer(found, {9: 0.0}, np.ones(6, bool))
    with pytest.raises(InputError, match=r"a bool array \[T\] or \[B, T\]"):
        language.steer(found, {0: 0.0}, [0, 1])
    change = language.steer(found, {0: 0.0}, np.ones(9, bool))
    with pytest.raises(InputError, match=r"shape \(1, 9\), but the tokens have \(2, 6\)"):
        change.apply_fn(change.params, TOKENS)
