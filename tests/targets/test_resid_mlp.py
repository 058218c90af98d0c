"""The ResidMLP target: against the released implementation's golden arrays, and by hand."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from apd_jax import components, targets
from apd_jax.targets import resid_mlp

GOLDEN = Path(__file__).parents[1] / "golden"
BIASES = {"bias1_0": "bias_in_0", "bias2_0": "bias_out_0"}  # name there -> name here


def make_config(**changes):
    config = {
        "name": "resid_mlp",
        "num_features": 6,
        "d_resid": 12,
        "num_layers": 2,
        "d_mlp": 4,
        "activation": "relu",
        "use_bias": False,
        "signed": True,
    }
    config |= {"embedding": "random", "feature_probability": 0.3, "pretrain": {"batch_size": 8}}
    return ConfigDict(config | changes)


def load(file, activation="relu"):
    golden = {name: jnp.asarray(array) for name, array in np.load(GOLDEN / f"{file}.npz").items()}
    params = {
        key.removeprefix("target/"): golden[key] for key in golden if key.startswith("target/")
    }
    params = {BIASES.get(name, name): leaf for name, leaf in params.items()}
    F, D = params["W_E"].shape
    num_layers = sum(name.startswith("mlp_in") for name in params)
    sizes = {
        "num_features": F,
        "d_resid": D,
        "num_layers": num_layers,
        "d_mlp": params["mlp_in_0"].shape[1],
    }
    return (
        golden,
        params,
        targets.build(
            make_config(**sizes, activation=activation, use_bias="bias_in_0" in params), 8
        ),
    )


@pytest.mark.parametrize(
    ("file", "activation"),
    [("resid1_small", "relu"), ("resid2_small", "relu"), ("resid1_bias_gelu", "gelu")],
)
def test_forward_is_the_released_one(file, activation):
    golden, params, target = load(file, activation)
    out, hidden = target.apply_fn(params, golden["x"])
    np.testing.assert_allclose(out, golden["target_out"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        target.attribution_fn(params, golden["x"]), golden["target_out"], rtol=1e-5, atol=1e-5
    )
    assert {f"act_recon_inputs/target/{name}" for name in hidden} == {
        k for k in golden if k.startswith("act_recon_inputs/target/")
    }
    for name, activations in hidden.items():
        np.testing.assert_allclose(
            activations, golden[f"act_recon_inputs/target/{name}"], rtol=1e-5, atol=1e-5
        )


def test_monosemantic_baseline_is_the_released_one():
    golden, params, target = load("resid1_small")
    x = golden["scrub/x"]
    np.testing.assert_allclose(target.label_fn(x), golden["scrub/labels"], rtol=1e-6)
    loss = np.mean((target.monosemantic_fn(x) - target.apply_fn(params, x)[0]) ** 2, axis=1)
    np.testing.assert_allclose(loss, golden["scrub/loss/monosemantic"], rtol=1e-4, atol=1e-7)


def test_monosemantic_baseline_by_hand():
    # 2 layers of 1 neuron: the first two features get x + ReLU(x), the third stays x.
    target = targets.build(make_config(num_features=3, d_mlp=1), 8)
    np.testing.assert_allclose(
        target.monosemantic_fn(jnp.array([[1.0, -1.0, 0.5]])), [[2.0, -1.0, 0.5]]
    )
    np.testing.assert_allclose(target.label_fn(jnp.array([[1.0, -1.0, 0.5]])), [[2.0, -1.0, 1.0]])


def test_forward_by_hand():
    # One feature, two residual dimensions: r = 2·(1, 0) = (2, 0);  pre = 2·3 = 6, with bias -1: 5;
    # r += 5·(0.1, 0.2) + (1, 0) = (3.5, 1);  out = r·(1, 1) = 4.5.
    # The hidden activation is ReLU(6) = 6: before the bias.
    params = {
        "W_E": jnp.array([[1.0, 0.0]]),
        "W_U": jnp.array([[1.0], [1.0]]),
        "mlp_in_0": jnp.array([[3.0], [7.0]]),
    }
    params |= {
        "bias_in_0": jnp.array([-1.0]),
        "mlp_out_0": jnp.array([[0.1, 0.2]]),
        "bias_out_0": jnp.array([1.0, 0.0]),
    }
    target = targets.build(
        make_config(num_features=1, d_resid=2, num_layers=1, d_mlp=1, use_bias=True), 8
    )
    out, hidden = target.apply_fn(params, jnp.array([[2.0]]))
    np.testing.assert_allclose(out, [[4.5]], rtol=1e-6)
    np.testing.assert_allclose(hidden["mlp_in_0"], [[6.0]])
    # Loss: the label is 2 + ReLU(2) = 4, so (4.5 - 4)² = 0.25.
    np.testing.assert_allclose(target.loss_fn(params, jnp.array([[2.0]])), 0.25, rtol=1e-5)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_contracted_form_has_the_same_value_and_tangents(num_layers, use_bias):
    target = targets.build(
        make_config(num_layers=num_layers, use_bias=use_bias, activation="gelu"), 16
    )
    params = jax.jit(target.init_fn)(jax.random.key(0))
    direction = jax.tree.map(
        lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), params
    )
    params = jax.tree.map(
        lambda leaf, d: leaf + 0.1 * d, params, direction
    )  # also away from zero biases and W_U = W_Eᵀ
    x = target.sample_fn(jax.random.key(1), 0)
    natural = jax.jit(lambda p, d: jax.jvp(lambda p: target.apply_fn(p, x)[0], (p,), (d,)))(
        params, direction
    )
    contracted = jax.jit(lambda p, d: jax.jvp(lambda p: target.attribution_fn(p, x), (p,), (d,)))(
        params, direction
    )
    for a, b in zip(natural, contracted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max())


def test_contracted_form_never_enters_the_residual_stream():
    target = targets.build(make_config(d_resid=977), 16)
    params = jax.jit(target.init_fn)(jax.random.key(0))
    jaxpr = str(jax.make_jaxpr(target.attribution_fn)(params, jnp.ones((16, 6))))
    assert "f32[16,4]" in jaxpr
    assert "f32[16,977]" not in jaxpr


def test_init():
    target = targets.build(make_config(), 8)
    params = jax.jit(target.init_fn)(jax.random.key(0))
    assert {name: leaf.shape for name, leaf in params.items()} == {
        "W_E": (6, 12),
        "W_U": (12, 6),
        "mlp_in_0": (12, 4),
        "mlp_out_0": (4, 12),
        "mlp_in_1": (12, 4),
        "mlp_out_1": (4, 12),
    }
    np.testing.assert_allclose(jnp.linalg.norm(params["W_E"], axis=1), np.ones(6), rtol=1e-6)
    assert np.array_equal(params["W_U"], params["W_E"].T)
    assert components.selected_paths(params, target.select) == [
        "mlp_in_0",
        "mlp_in_1",
        "mlp_out_0",
        "mlp_out_1",
    ]
    clean = targets.build(make_config(d_resid=6, embedding="identity", use_bias=True), 8).init_fn(
        jax.random.key(0)
    )
    assert np.array_equal(clean["W_E"], np.eye(6)) and np.array_equal(clean["W_U"], np.eye(6))
    assert clean["bias_in_1"].shape == (4,) and clean["bias_out_1"].shape == (6,)


def test_samples_are_signed():
    x = np.asarray(targets.build(make_config(), 20_000).sample_fn(jax.random.key(0), 0))
    active = x[x != 0]
    # 120,000 entries, 36,000 active: standard deviations 0.0013 (share) and
    # 0.577/sqrt(36000) = 0.003 (mean).
    np.testing.assert_allclose(active.size / x.size, 0.3, atol=0.006)
    np.testing.assert_allclose(active.mean(), 0.0, atol=0.015)
    np.testing.assert_allclose(active.var(), 1 / 3, atol=0.01)
    assert -1 <= active.min() < -0.99 and 0.99 < active.max() <= 1


def test_neuron_contributions_by_hand():
    # Identity embedding, 2 features. Layer 0, one neuron: in (1, 2), out (3, 4): contributions 1·3
    # and 2·4.
    # Layer 1: in (5, 0), out (-1, 6): 5·(-1) and 0·6.
    params = {"W_E": jnp.eye(2), "W_U": jnp.eye(2)}
    weights = {"W_E": None, "W_U": None}  # as in a materialised component
    weights |= {"mlp_in_0": jnp.array([[1.0], [2.0]]), "mlp_out_0": jnp.array([[3.0, 4.0]])}
    weights |= {"mlp_in_1": jnp.array([[5.0], [0.0]]), "mlp_out_1": jnp.array([[-1.0, 6.0]])}
    np.testing.assert_allclose(
        resid_mlp.neuron_contributions(params, weights, 2), [[3.0, -5.0], [8.0, 0.0]]
    )


def test_feature_weights_of_every_component():
    target = targets.build(make_config(), 8)
    params = jax.jit(target.init_fn)(jax.random.key(0))
    parts = components.init(jax.random.key(1), params, num_components=3, select=target.select)
    weights = components.materialize(parts)
    vectors = jax.vmap(lambda one: target.feature_weights(params, one))(weights)
    assert vectors.shape == (3, 6, 8)
    # Component 2, feature 5, second neuron of layer 1 (the sixth of all).
    into = params["W_E"][5] @ weights["mlp_in_1"][2][:, 1]
    out_of = weights["mlp_out_1"][2][1] @ params["W_U"][:, 5]
    np.testing.assert_allclose(vectors[2, 5, 5], into * out_of, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_mlp": 0}, "d_mlp must be at least 1; got 0"),
        (
            {"activation": "rleu"},
            "unknown target.activation 'rleu'; known: relu, gelu. Did you mean 'relu'?",
        ),
        (
            {"embedding": "ident"},
            "unknown target.embedding 'ident'; known: random, identity. Did you mean 'identity'?",
        ),
        (
            {"embedding": "identity"},
            "needs d_resid = num_features; got d_resid = 12 and num_features = 6",
        ),
        ({"pretrain": {"batch_size": 0}}, "batch_size must be at least 1; got 0"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        targets.build(make_config(**change), 8)
