"""TMS with co-active features: the data, and the score of decompositions of known quality."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import get_config, make_method, method_of
from ml_collections import ConfigDict

from apd_jax import components, evaluation, targets
from apd_jax.decomposition import Decomposition
from apd_jax.methods.meanings import default_config
from apd_jax.targets import pretrain


def build(num_groups=3, group_size=2, d_hidden=3, probability=0.2, batch_size=8):
    config = ConfigDict(
        {
            "name": "tms_coactive",
            "num_groups": num_groups,
            "group_size": group_size,
            "d_hidden": d_hidden,
        }
    )
    config.update({"group_probability": probability, "pretrain": {"batch_size": 8}})
    return targets.build(config, batch_size)


# Data


def test_groups_are_active_together_and_values_are_independent():
    x = np.asarray(build(batch_size=20_000).sample_fn(jax.random.key(0), 7)).reshape(-1, 3, 2)
    active = (x != 0).all(axis=2)
    np.testing.assert_array_equal(active, (x != 0).any(axis=2))
    # 60,000 groups: the share of active ones has standard deviation sqrt(0.2·0.8/6e4) = 0.0016,
    # that of pairs 0.0014; the mean of 12,000 uniform values 0.0026, the correlation of 12,000
    # pairs 0.009.
    np.testing.assert_allclose(active.mean(), 0.2, atol=0.007)
    np.testing.assert_allclose((active[:, 0] & active[:, 1]).mean(), 0.04, atol=0.006)
    np.testing.assert_allclose(x[active].mean(axis=0), 0.5, atol=0.012)
    np.testing.assert_allclose(x[active].var(axis=0), 1 / 12, atol=0.004)
    assert abs(np.corrcoef(*x[active].T)[0, 1]) < 0.04


def test_samples_are_pure():
    target = build()
    first, again, next_one = (target.sample_fn(jax.random.key(0), step) for step in (3, 3, 4))
    assert (
        np.array_equal(first, again)
        and not np.array_equal(first, next_one)
        and first.shape == (8, 6)
    )
    assert np.array_equal(
        target.num_active_fn(
            jnp.array([[0, 0, 0.1, 0.2, 0, 0], [0.3, 0, 0.1, 0.2, 1, 1], [0] * 6])
        ),
        [1, 3, 0],
    )


def test_the_network_is_that_of_tms():
    target = build()
    params = jax.jit(target.init_fn)(jax.random.key(0))
    x = target.sample_fn(jax.random.key(1), 0)
    W = np.asarray(params["W"])
    np.testing.assert_allclose(target.apply_fn(params, x)[0], np.maximum(x @ W @ W.T, 0), atol=1e-6)
    np.testing.assert_allclose(
        target.attribution_fn(params, x), np.maximum(x @ W @ W.T, 0), atol=1e-6
    )
    np.testing.assert_allclose(
        target.loss_fn(params, x), np.mean((np.maximum(x @ W @ W.T, 0) - x) ** 2), rtol=1e-5
    )
    assert (target.select, target.uses) == (("W",), {"W": 2})


# Score. W has orthogonal rows of length 1 in every group: rank 2, norm sqrt(2).

W = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1], [1, 0, 0]], np.float32)


def rows(*kept, factor=1.0):
    """The component with these rows of W."""
    return factor * np.isin(np.arange(6), kept)[:, None].astype(np.float32) * W


def score(*parts, k=1.0):
    target = build()
    params = {"W": jnp.asarray(W), "b": jnp.zeros(6)}
    found = components.from_materialized({"W": jnp.stack(parts), "b": None}, uses={"W": 2})
    method = make_method(num_components=len(parts), topk=k, batch_size=8)
    decomposition = Decomposition(target.problem(params), found, method)
    return target.score_fn(decomposition, jax.random.key(0), np.ones(len(parts), bool))


def check(found, **expected):
    for name, value in expected.items():
        assert found.metrics[name] == pytest.approx(value, abs=1e-5), name


def test_the_true_components_score_best():
    # In another order, with two components left over: an empty one, and a tiny one that points the
    # way of group 0.
    best = score(rows(4, 5), rows(factor=0.0), rows(0, 1), rows(0, 1, factor=1e-3), rows(2, 3))
    check(
        best,
        num_groups=3,
        groups_found=3,
        mmcs_groups=1,
        ml2r_groups=1,
        purity=1,
        mean_rank=2,
        true_rank=2,
    )
    np.testing.assert_allclose(best.panels["groups"].matrix[:, :3], np.eye(3), atol=1e-5)
    assert list(best.panels["groups"].columns) == ["2", "4", "0", "3", "1"]
    assert best.panels["ranks"].lines["component"].tolist() == [2, 2, 2]
    assert set(best.labels) <= set(best.metrics)


def test_half_the_norm_is_the_limit():
    check(
        score(rows(0, 1, factor=0.6), rows(2, 3, factor=0.4), rows(4, 5)),
        groups_found=2,
        mmcs_groups=1,
        ml2r_groups=2 / 3,
    )


def test_one_component_per_feature_finds_no_group():
    # One of two orthogonal rows of length 1: cosine and norm ratio are both 1 / sqrt(2), and the
    # rank is 1.
    split = score(*(rows(f) for f in range(6)))
    check(split, groups_found=0, mmcs_groups=0.5**0.5, ml2r_groups=0.5**0.5, purity=1, mean_rank=1)


def test_one_component_for_everything_finds_no_group():
    # It is given to one group, of whose rows it has all; 2 of its squared norm of 6 lie there.
    # The two others are left over.
    whole = score(rows(*range(6)))
    check(whole, groups_found=0, mmcs_groups=1 / 3, ml2r_groups=1 / 3, purity=1 / 9, mean_rank=1)


def test_of_the_true_components_each_answers_for_its_group():
    target = build()
    params = {"W": jnp.asarray(W), "b": jnp.zeros(6)}
    found = components.from_materialized(
        {"W": jnp.stack([rows(0, 1), rows(2, 3), rows(4, 5)]), "b": None}, uses={"W": 2}
    )
    method = make_method(num_components=3, topk=1.0)
    decomposition = Decomposition(target.problem(params), found, method)
    x = jnp.repeat(jnp.eye(3), 2, axis=1)
    np.testing.assert_array_equal(decomposition.mask(x), np.eye(3, dtype=bool))


# Configs

FILE = "tms_coactive"


@pytest.mark.parametrize("arg", ["", "6x2-5", "8x3-10", "1x1-1", "2x3-4,smoke", "smoke"])
def test_every_variant_is_valid(arg):
    config = get_config(FILE, arg)
    assert config.is_locked and set(config.apd) == set(default_config())
    method_of(config).check()
    target = targets.build(config.target, config.apd.batch_size)
    params = jax.eval_shape(target.init_fn, jax.random.key(0))
    assert params["W"].shape == (
        config.target.num_groups * config.target.group_size,
        config.target.d_hidden,
    )
    assert jax.eval_shape(target.sample_fn, jax.random.key(0), 0).shape == (
        config.apd.batch_size,
        params["W"].shape[0],
    )


def test_sizes_and_seeds():
    config = get_config(FILE, "8x3-10")
    assert (config.target.num_groups, config.target.group_size, config.target.d_hidden) == (
        8,
        3,
        10,
    )
    assert get_config(FILE).to_json() == get_config(FILE, "6x2-5").to_json()
    config.seed = 3
    assert (config.target.seed, config.apd.seed, config.evaluation.seed) == (3, 3, 3)


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("6x2-5,8x3-10", "names 6x2-5 and 8x3-10; give one of them"),
        (
            "6x2",
            r"unknown co-active TMS variant .* '6x2'; known: 6x2-5, 8x3-10, smoke. "
            r"Did you mean '6x2-5'\?",
        ),
        ("0x2-5", "unknown co-active TMS variant"),
    ],
)
def test_unknown_variants_are_refused(arg, message):
    with pytest.raises(ValueError, match=message):
        get_config(FILE, arg)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 0}, "num_groups must be at least 1; got 0"),
        ({"group_size": 0}, "group_size must be at least 1; got 0"),
        ({"probability": 0.0}, r"group_probability must lie in \(0, 1\]; got 0.0"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        build(**change)


def test_a_trained_target_has_every_feature_and_is_evaluated():
    config = get_config(FILE, "2x2-3")
    with config.unlocked():
        config.target.pretrain.num_steps, config.target.pretrain.batch_size = 500, 256
        config.target.pretrain.learning_rate = 0.02
        config.apd.batch_size = 64
    target = targets.build(config.target, 64)
    params, _ = pretrain.pretrain(target, config.target)
    assert np.linalg.norm(params["W"], axis=1).min() > 0.9
    # Two directions in each group.
    assert np.linalg.svd(params["W"].reshape(2, 2, 3), compute_uv=False).min() > 0.5
    parts = jnp.stack([params["W"] * (jnp.arange(4)[:, None] // 2 == g) for g in range(2)])
    true = components.from_materialized({"W": parts, "b": None}, uses={"W": 2})
    decomposition = Decomposition(target.problem(params), true, method_of(config))
    found = evaluation.evaluate(target, decomposition, num_batches=2, seed=config.evaluation.seed)
    m = found.metrics
    assert (m["groups_found"], m["num_groups"], m["num_alive_components"]) == (2, 2, 2)
    assert m["relative_parameter_error"] < 1e-9
    # k is the expected number of active groups: little is lost, only where a small batch has more
    # of them.
    assert m["minimality_topk"] < 0.3 * m["minimality_none"]
    assert {"groups", "ranks", "components", "firing"} == set(found.panels)
