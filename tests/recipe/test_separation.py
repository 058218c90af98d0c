"""Codes that are on together: mechanisms that read more than one dimension."""

import jax
import jax.numpy as jnp
import numpy as np
from toys import mixtures_of_three

from apd_jax import components
from apd_jax.network.problem import Problem
from apd_jax.recipe import modes, scales, separation
from apd_jax.recipe.beginning import accepted


def test_codes_that_are_mostly_on_together_are_groups():
    """0, 3 and 4 of ten examples; 1 apart from them; 2 and 5 on nearly always, as by chance."""
    on = np.zeros((10, 6), bool)
    on[0:3, 0] = on[0:4, 3] = on[1:4, 4] = True
    on[3:6, 1] = on[:9, 2] = on[:8, 5] = True
    groups, share = separation.together(on)
    assert groups == ((0, 3, 4),)
    assert share == np.float32((4 + 3 + 9 + 8) / (3 + 4 + 3 + 3 + 9 + 8))


def test_codes_as_sparse_as_a_gaussian_are_found_by_their_skewness():
    """U(0, 1) on two examples of five, mixed: E|s|/√var is 0.81, that of a Gaussian 0.80."""
    draw = np.random.default_rng(0)
    codes = (draw.random((16_384, 12)) < 0.4) * draw.random((16_384, 12))
    mixing = draw.normal(size=(12, 12))
    x = (codes @ mixing).astype(np.float32)
    read = separation.Read(x[:, None], True)
    found = read.regressed(0, read.codes(0, seed=0))
    wanted = mixing / np.linalg.norm(mixing, axis=1, keepdims=True)
    cosine = np.abs(found @ wanted.T)
    assert sorted(cosine.argmax(1)) == list(range(12))
    assert cosine.max(1).min() > 0.9999


def test_codes_that_are_not_lopsided_keep_what_their_size_tells():
    """Of either sign alike: no skewness at all."""
    draw = np.random.default_rng(1)
    codes = draw.laplace(size=(8192, 6)).astype(np.float32)
    mixing = draw.normal(size=(6, 6)).astype(np.float32)
    unmixing = separation.unmixed(codes @ mixing, seed=0)
    shares = np.abs(mixing @ unmixing.T)  # of every code in every projection
    assert sorted(shares.argmax(1)) == list(range(6))
    assert np.all(np.sort(shares, axis=1)[:, -2] < 0.1 * shares.max(1))


def test_planes_are_one_component_each(monkeypatch):
    """f(x) = x W, x points on circles in six planes of two coordinates, each on for a fifth."""
    monkeypatch.setattr(modes, "NUM_EXAMPLES", 2048)
    _, method, r = mixtures_of_three()
    W = np.random.default_rng(0).normal(size=(12, 12)).astype(np.float32)

    def sample(key, step):
        on, where = jax.random.split(jax.random.fold_in(key, step))
        angle = jax.random.uniform(where, (256, 6), maxval=2 * np.pi)
        x = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=2)
        return (x * jax.random.bernoulli(on, 0.2, (256, 6, 1))).reshape(256, 12)

    problem = Problem(lambda p, x: x @ p["W"], {"W": jnp.asarray(W)}, sample)
    found = accepted(problem, method, r, scales.measure(problem, method))
    assert found is not None
    P = np.asarray(components.materialize(found.components)["W"])
    alive = [c for c in range(len(P)) if np.abs(P[c]).max() > 1e-3]
    rows = np.linalg.norm(P[alive], axis=2).reshape(-1, 6, 2).sum(2)  # by plane
    assert sorted(rows.argmax(1)) == list(range(6))
    for one, plane in zip(P[alive], rows.argmax(1), strict=True):
        only = np.zeros_like(W)
        only[2 * plane : 2 * plane + 2] = W[2 * plane : 2 * plane + 2]
        np.testing.assert_allclose(one, only, atol=0.1)
