"""Pretraining: one step by hand, determinism, fixed leaves, divergence; a 5-2 target's pentagon."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from apd_jax import targets
from apd_jax.targets.pretrain import pretrain


def make_config(hidden="none", **changes):
    config = {
        "name": "tms",
        "seed": 3,
        "num_features": 5,
        "d_hidden": 2,
        "hidden": hidden,
        "feature_probability": 0.05,
    }
    settings = {
        "num_steps": 20,
        "batch_size": 64,
        "learning_rate": 5e-3,
        "schedule": "constant",
        "weight_decay": 0.01,
        "warmup_fraction": 0.0,
    }
    return ConfigDict(config | {"pretrain": settings | changes})


def run(config, **kwargs):
    return pretrain(targets.build(config, 8), config, **kwargs)


def test_first_step_is_adamw():
    config = make_config(num_steps=1, learning_rate=0.1, weight_decay=0.2)
    target = targets.build(config, 8)
    params, history = pretrain(target, config)
    key_init, key_data = jax.random.split(jax.random.key(3))
    start = target.init_fn(key_init)
    loss, gradient = jax.value_and_grad(target.loss_fn)(
        start, target.pretrain_sample_fn(key_data, 0)
    )
    # Adam's first step is lr·g/(|g| + 1e-8); decoupled decay adds lr·0.2·θ.
    for name in start:
        g = np.asarray(gradient[name])
        expected = start[name] - 0.1 * (g / (np.abs(g) + 1e-8) + 0.2 * start[name])
        np.testing.assert_allclose(params[name], expected, rtol=1e-4, atol=1e-5)
    assert history == [{"step": 1, "loss": pytest.approx(float(loss), rel=1e-5)}]


def test_seed_decides_everything():
    first, again = run(make_config())[0], run(make_config())[0]
    assert all(np.array_equal(first[name], again[name]) for name in first)
    other = make_config()
    other.seed = 4
    assert not np.array_equal(first["W"], run(other)[0]["W"])


@pytest.mark.parametrize("hidden", ["identity", "rotation"])
def test_frozen_leaves_stay_as_drawn(hidden):
    config = make_config(hidden)
    start = targets.build(config, 8).init_fn(jax.random.split(jax.random.key(3))[0])
    params, _ = run(config)
    np.testing.assert_allclose(
        params["hidden"], start["hidden"], atol=1e-6
    )  # compiled and plain `expm` round differently
    assert not np.array_equal(params["W"], start["W"])
    if hidden == "identity":
        assert np.array_equal(params["hidden"], np.eye(2))


def test_history_and_progress_every_hundred_steps():
    calls = []
    _, history = run(
        make_config(num_steps=250),
        progress=lambda step, num_steps, scalars: calls.append((step, num_steps, scalars["loss"])),
    )
    assert [entry["step"] for entry in history] == [100, 200, 250]
    assert calls == [(entry["step"], 250, entry["loss"]) for entry in history]
    assert history[-1]["loss"] < history[0]["loss"]


def test_tms_5_2_learns_the_pentagon():
    params, history = run(make_config(num_steps=5000, batch_size=1024, schedule="linear"))
    # The released code's trained 5-2 target (golden file tms_5_2) has rows of length 1.13 to 1.14
    # and biases of -0.245. Five directions evenly spaced in the plane are 360°/5 = 72° apart.
    W = np.asarray(params["W"])
    np.testing.assert_allclose(np.linalg.norm(W, axis=1), np.full(5, 1.135), atol=0.03)
    np.testing.assert_allclose(params["b"], np.full(5, -0.245), atol=0.02)
    angles = np.sort(np.degrees(np.arctan2(W[:, 1], W[:, 0])))
    np.testing.assert_allclose(np.diff(angles), np.full(4, 72.0), atol=3)
    # Predicting 0 would cost E[x²] = 0.05/3 = 0.0167.
    assert history[-1]["loss"] < 0.0025


def test_resid_mlp_keeps_its_embedding_and_learns():
    config = ConfigDict(
        {
            "name": "resid_mlp",
            "seed": 0,
            "num_features": 8,
            "d_resid": 16,
            "num_layers": 2,
            "d_mlp": 4,
            "activation": "relu",
        }
    )
    config.update({"use_bias": False, "embedding": "random", "signed": True})
    config.feature_probability = 0.2
    config.pretrain = make_config(num_steps=200, learning_rate=1e-2).pretrain
    target = targets.build(config, 8)
    params, history = pretrain(target, config)
    start = target.init_fn(jax.random.split(jax.random.key(0))[0])
    np.testing.assert_allclose(params["W_E"], start["W_E"], atol=1e-6)
    assert np.array_equal(params["W_U"], params["W_E"].T)
    # Passing x on unchanged would cost E[ReLU(x)²] = 0.2/6 = 0.033.
    assert history[-1]["loss"] < 0.2 / 6


def test_divergence_names_the_step():
    # A step of 1e30 makes the outputs, of order W², overflow in the next step.
    with pytest.raises(
        ValueError,
        match=r"no longer finite at step 1; "
        r"lower config.target.pretrain.learning_rate \(now 1e\+30\)",
    ):
        run(make_config(learning_rate=1e30))


def test_divergence_in_the_last_step_is_seen():
    # lr·weight_decay·θ overflows, and no loss comes after it.
    with pytest.raises(ValueError, match="no longer finite at step 0"):
        run(make_config(num_steps=1, learning_rate=1e38, weight_decay=1e9))


def test_no_steps_is_refused():
    with pytest.raises(ValueError, match="num_steps must be at least 1; got 0"):
        run(make_config(num_steps=0))
