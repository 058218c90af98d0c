"""MMCS, ML2R and the one-to-one matching, by hand; the matching also against all permutations."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from apd_jax import components
from apd_jax.evaluation import geometry

# Two features, W_0 = (1, 0) and W_1 = (0, 2); three components.
TARGET = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)
COMPONENTS = np.array(
    [
        [[0.1, 0.0], [0.0, 0.0]],  # tiny, but exactly along W_0: cos 1, ratio 0.1
        [[0.8, 0.6], [0.0, 0.0]],  # as long as W_0, askew: cos 0.8, ratio 1
        [[0.0, 0.0], [0.0, 1.5]],  # along W_1: cos 1, ratio 1.5 / 2 = 0.75
    ],
    np.float32,
)


def test_cosines_and_norm_ratios():
    np.testing.assert_allclose(
        geometry.cosines(COMPONENTS, TARGET), [[1, 0], [0.8, 0], [0, 1]], atol=1e-7
    )
    np.testing.assert_allclose(
        geometry.norm_ratios(COMPONENTS, TARGET), [[0.1, 0], [1, 0], [0, 0.75]], atol=1e-7
    )


def test_scores():
    # The cosine's argmax takes the tiny component for feature 0: MMCS (1 + 1)/2, ML2R
    # (0.1 + 0.75)/2 = 0.425. The matching scores cos·min(ratio, 1) = 0.1, 0.8 for feature 0 and
    # 0.75 for feature 1. It takes components 1 and 2: cosines (0.8 + 1)/2 = 0.9, ratios
    # (1 + 0.75)/2 = 0.875. Feature 0 is not owned: 0.8 < 0.9.
    scores = geometry.scores(COMPONENTS, TARGET)
    expected = {
        "mmcs": 1,
        "ml2r": 0.425,
        "mmcs_one_to_one": 0.9,
        "ml2r_one_to_one": 0.875,
        "num_features": 2,
        "num_features_owned": 1,
    }
    assert scores == pytest.approx(expected)


def test_per_feature_is_what_scores_averages():
    each = geometry.per_feature(COMPONENTS, TARGET)
    expected = {
        "mmcs": [1, 1],
        "ml2r": [0.1, 0.75],
        "mmcs_one_to_one": [0.8, 1],
        "ml2r_one_to_one": [1, 0.75],
        "owned": [0, 1],
    }
    assert set(each) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(each[name], values, atol=1e-7, err_msg=name)


def test_one_component_for_two_features():
    # One component holds both features, feature 1 fully and feature 0 by 0.9. It counts once:
    # (0 + 1)/2.
    scores = geometry.scores(np.array([[[0.9, 0.0], [0.0, 2.0]]], np.float32), TARGET)
    expected = {
        "mmcs": 1,
        "ml2r": 0.95,
        "mmcs_one_to_one": 0.5,
        "ml2r_one_to_one": 0.5,
        "num_features": 2,
        "num_features_owned": 1,
    }
    assert scores == pytest.approx(expected)
    np.testing.assert_array_equal(
        geometry.one_to_one(np.ones((1, 2)), np.array([[0.9, 1.0]])), [-1, 0]
    )


def test_main_feature_decides_ownership():
    # The component of feature 0 is exact, but feature 1's part in it is longer (1.9 > 1), so it is
    # not feature 0's own. Component 1 is feature 1's: cos 1, ratio 1.
    components = np.array([[[1.0, 0.0], [1.9, 0.0]], [[0.0, 0.0], [0.0, 2.0]]], np.float32)
    assert geometry.scores(components, TARGET)["num_features_owned"] == 1


def test_length_beyond_the_target_earns_nothing():
    # 0.7 · min(3, 1) = 0.7 < 0.95 · 0.9 = 0.855: the askew vector does not win by being long.
    np.testing.assert_array_equal(
        geometry.one_to_one(np.array([[0.7], [0.95]]), np.array([[3.0], [0.9]])), [1]
    )


def test_a_feature_that_the_target_does_not_hold_scores_zero():
    scores = geometry.scores(COMPONENTS[2:], np.array([[0.0, 0.0], [0.0, 2.0]], np.float32))
    assert scores["mmcs"] == pytest.approx(0.5) and scores["ml2r"] == pytest.approx(0.375)


def test_matching_is_the_best_of_all_permutations():
    rng = np.random.default_rng(0)
    components, target = rng.normal(size=(4, 3, 5)), rng.normal(size=(3, 5))
    cosine, ratio = geometry.cosines(components, target), geometry.norm_ratios(components, target)
    score = cosine * np.minimum(ratio, 1)
    best = max(
        itertools.permutations(range(4), 3), key=lambda owner: score[list(owner), range(3)].sum()
    )
    np.testing.assert_array_equal(geometry.one_to_one(cosine, ratio), best)


def test_what_components_add_to_those_that_are_always_on():
    """Weights u·v of two leaves. Component 0 holds v = 5 and is always on.

    Components 1 and 2 hold u = 2 and u = 3, which alone give no product.
    """
    parts = components.from_materialized(
        {"u": jnp.array([[[0.0]], [[2.0]], [[3.0]]]), "v": jnp.array([[[5.0]], [[0.0]], [[0.0]]])}
    )
    product = lambda w: w["u"] * w["v"]  # noqa: E731
    np.testing.assert_allclose(
        geometry.of_components(product, parts, 1)[:, 0, 0], [0, 10, 15], rtol=1e-6
    )
    np.testing.assert_allclose(geometry.of_components(product, parts)[:, 0, 0], [0, 0, 0])
    linear = lambda w: w["u"] + w["v"]  # noqa: E731
    np.testing.assert_allclose(
        geometry.of_components(linear, parts, 1), geometry.of_components(linear, parts), rtol=1e-6
    )
