"""The TMS target: against the released implementation's golden arrays, and by hand."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from apd_jax import components, targets
from apd_jax.targets import pretrain, tms

GOLDEN = Path(__file__).parents[1] / "golden"


def make_config(num_features=5, d_hidden=2, hidden="none", probability=0.05):
    return ConfigDict(
        {
            "name": "tms",
            "num_features": num_features,
            "d_hidden": d_hidden,
            "hidden": hidden,
            "feature_probability": probability,
            "pretrain": {"batch_size": 8},
        }
    )


@pytest.mark.parametrize(
    ("file", "hidden"), [("tms_small", "none"), ("tms_id", "identity"), ("tms_5_2", "none")]
)
def test_forward_is_the_released_one(file, hidden):
    golden = {name: jnp.asarray(array) for name, array in np.load(GOLDEN / f"{file}.npz").items()}
    params = {"W": golden["target/linear1"], "b": golden["target/b_final"]}
    if hidden != "none":
        params["hidden"] = golden["target/hidden_0"]
    target = targets.build(make_config(*params["W"].shape, hidden), 8)
    out, products = target.apply_fn(params, golden["x"])
    np.testing.assert_allclose(out, golden["target_out"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        target.attribution_fn(params, golden["x"]), golden["target_out"], rtol=1e-5, atol=1e-6
    )
    assert {f"act_recon_inputs/target/{name}" for name in products} == {
        k for k in golden if k.startswith("act_recon_inputs/target/")
    }
    for name, product in products.items():
        np.testing.assert_allclose(
            product, golden[f"act_recon_inputs/target/{name}"], rtol=1e-5, atol=1e-6
        )


def test_forward_by_hand():
    # x = (1, 2), W = ((1), (2)), b = (-4, -20):  h = 1·1 + 2·2 = 5;  h Wᵀ + b = (5 - 4, 10 - 20);
    # ReLU gives (1, 0).
    # Loss: ((1 - 1)² + (0 - 2)²) / 2 = 2.
    target = targets.build(make_config(2, 1), 8)
    params = {"W": jnp.array([[1.0], [2.0]]), "b": jnp.array([-4.0, -20.0])}
    x = jnp.array([[1.0, 2.0]])
    np.testing.assert_allclose(target.apply_fn(params, x)[0], [[1.0, 0.0]])
    np.testing.assert_allclose(target.loss_fn(params, x), 2.0)


@pytest.mark.parametrize("hidden", tms.HIDDEN)
def test_contracted_form_has_the_same_value_and_tangents(hidden):
    target = targets.build(make_config(6, 3, hidden, probability=0.5), 16)
    params = jax.jit(target.init_fn)(jax.random.key(0)) | {"b": jnp.full(6, -0.1)}
    x = target.sample_fn(jax.random.key(1), 0)
    direction = jax.tree.map(
        lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), params
    )
    natural = jax.jit(lambda p, d: jax.jvp(lambda p: target.apply_fn(p, x)[0], (p,), (d,)))(
        params, direction
    )
    contracted = jax.jit(lambda p, d: jax.jvp(lambda p: target.attribution_fn(p, x), (p,), (d,)))(
        params, direction
    )
    for a, b in zip(natural, contracted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_params_of_each_hidden_space():
    shapes = {}
    for hidden in tms.HIDDEN:
        target = targets.build(make_config(6, 3, hidden), 8)
        params = jax.jit(target.init_fn)(jax.random.key(0))
        shapes[hidden] = {name: leaf.shape for name, leaf in params.items()}
        assert components.selected_paths(params, target.select) == sorted(set(params) - {"b"})
    assert shapes["none"] == {"W": (6, 3), "b": (6,)}
    assert shapes["identity"] == shapes["rotation"] == {"W": (6, 3), "b": (6,), "hidden": (3, 3)}


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_rotation(size):
    R = tms.rotation(jax.random.key(3), (size, size))
    np.testing.assert_allclose(R @ R.T, np.eye(size), atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.det(R), 1.0, atol=1e-5)
    # The eigenvalues are e^{±iθ}, one pair per plane; one plane is turned by 30°, none by more.
    # One dimension has no plane.
    angles = np.abs(np.angle(np.linalg.eigvals(np.asarray(R))))
    np.testing.assert_allclose(angles.max(), math.radians(30) if size > 1 else 0, atol=1e-3)
    assert np.array_equal(R, tms.rotation(jax.random.key(3), (size, size)))


def test_samples_are_sparse_uniform_and_pure():
    target = targets.build(make_config(5, 2, probability=0.2), 20_000)
    x = np.asarray(target.sample_fn(jax.random.key(0), 7))
    active = x[x != 0]
    # 100,000 entries: the share of active ones has standard deviation sqrt(0.2·0.8/1e5) = 0.0013,
    # the mean of 20,000 uniform values 0.289/sqrt(2e4) = 0.002.
    np.testing.assert_allclose(active.size / x.size, 0.2, atol=0.006)
    np.testing.assert_allclose(active.mean(), 0.5, atol=0.01)
    np.testing.assert_allclose(active.var(), 1 / 12, atol=0.003)
    assert active.min() > 0 and active.max() <= 1
    # Pairs of features are independent: both active in 0.04 of the examples, standard deviation
    # 0.0014.
    np.testing.assert_allclose(np.mean((x[:, 0] != 0) & (x[:, 1] != 0)), 0.04, atol=0.007)
    assert np.array_equal(x, target.sample_fn(jax.random.key(0), 7))
    assert not np.array_equal(x, target.sample_fn(jax.random.key(0), 8))
    assert np.array_equal(target.num_active_fn(jnp.asarray(x)), np.count_nonzero(x, axis=1))


def test_probability_one_is_dense():
    x = targets.build(make_config(probability=1.0), 1000).sample_fn(jax.random.key(0), 0)
    assert (x != 0).all()
    np.testing.assert_allclose(x.mean(), 0.5, atol=0.03)


def test_probes_and_labels():
    target = targets.build(make_config(3, 2), 8)
    assert np.array_equal(target.probes, np.eye(3))
    assert np.array_equal(target.label_fn(target.probes), np.eye(3))


def test_feature_weights_of_every_component():
    target = targets.build(make_config(4, 2, "identity"), 8)
    params = jax.jit(target.init_fn)(jax.random.key(0))
    parts = components.init(
        jax.random.key(1), params, num_components=3, select=target.select, uses=target.uses
    )
    weights = components.materialize(parts)
    rows = jax.vmap(lambda one: target.feature_weights(params, one))(weights)
    assert np.array_equal(rows, weights["W"])
    assert np.array_equal(target.feature_weights(params, params), params["W"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_features": 0}, "num_features must be at least 1; got 0"),
        ({"d_hidden": 0}, "d_hidden must be at least 1; got 0"),
        (
            {"hidden": "rotatoin"},
            "unknown target.hidden 'rotatoin'; known: none, identity, rotation. "
            "Did you mean 'rotation'?",
        ),
        ({"probability": 0.0}, r"feature_probability must lie in \(0, 1\]; got 0.0"),
        ({"probability": 1.5}, r"feature_probability must lie in \(0, 1\]; got 1.5"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        targets.build(make_config(**change), 8)


def test_unknown_target_is_refused_with_the_nearest():
    with pytest.raises(
        ValueError, match=r"unknown target.name 'tsm'; known: .*. Did you mean 'tms'\?"
    ):
        targets.build(ConfigDict({"name": "tsm"}), 8)


@pytest.mark.parametrize("hidden", ["none", "identity"])
def test_untied_is_the_tied_network_with_two_leaves(hidden):
    """Trained tied, W_out = Wᵀ at the end; the same outputs, products and loss."""
    config = make_config(hidden=hidden)
    tied = targets.build(config, 8)
    untied = targets.build(ConfigDict(config.to_dict() | {"name": "tms_untied"}), 8)
    params = tied.init_fn(jax.random.key(3))
    split = untied.finish_fn(params)
    assert set(untied.select) == set(split) - {"b"}
    np.testing.assert_array_equal(split["W_out"], params["W"].T)
    x = untied.sample_fn(jax.random.key(0), 0)
    (out, products), (expected, known) = untied.apply_fn(split, x), tied.apply_fn(params, x)
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    assert products.keys() == known.keys()
    np.testing.assert_allclose(untied.loss_fn(split, x), tied.loss_fn(params, x), rtol=1e-6)
    # Pretraining moves W alone and ends with its transpose.
    settings = {"num_steps": 2, "learning_rate": 1e-2, "schedule": "constant"}
    settings |= {"warmup_fraction": 0.0, "weight_decay": 0.0}
    trained, _ = pretrain.pretrain(untied, ConfigDict({"seed": 0, "pretrain": settings}))
    np.testing.assert_array_equal(trained["W_out"], trained["W"].T)
    assert not np.array_equal(trained["W"], untied.init_fn(jax.random.key(0))["W"])
