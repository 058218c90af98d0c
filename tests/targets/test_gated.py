"""The hand-coded gated functions: what they compute, and that only the truth scores as such."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_method
from ml_collections import ConfigDict

from apd_jax import components, targets
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.targets import gated

BUILT = {}


def make(gate="bias", n=3, layers=2, m=6, probability=0.2, batch_size=64):
    key = (gate, n, layers, m, probability, batch_size)
    if key not in BUILT:
        fields = {
            "name": "gated",
            "num_functions": n,
            "num_layers": layers,
            "neurons_per_function": m,
            "gate": gate,
        }
        target = targets.build(ConfigDict(fields | {"bit_probability": probability}), batch_size)
        BUILT[key] = target, jax.jit(target.init_fn)(jax.random.key(0))
    return BUILT[key]


def exact(params, t):
    """F_f(t), in numpy, one function at a time."""
    return np.stack(
        [
            a * np.cos(b * t + c) + d * np.sin(e * t + f) + g
            for a, b, c, d, e, f, g in np.asarray(params["functions"], np.float64)
        ]
    )


@pytest.mark.parametrize("gate", gated.GATES)
def test_interpolates_the_functions_that_are_switched_on(gate):
    target, params = make(gate)
    knots = np.linspace(0, 5, 6)  # m = 6
    for bits in ((0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 1, 1)):
        x = np.concatenate([knots[:, None], np.tile(bits, (6, 1))], axis=1)
        out, hidden = target.apply_fn(params, jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(out[:, 0], np.asarray(bits) @ exact(params, knots), atol=1e-4)
        # With no bit on, no neuron is: the outputs do not depend on any weight.
        assert any(h.any() for h in hidden.values()) == any(bits)
    # Between two knots the network is the line through them.
    middle = jnp.asarray([[2.5, 1, 0, 0]])
    np.testing.assert_allclose(
        target.apply_fn(params, middle)[0][0, 0],
        exact(params, np.array([2.0, 3.0]))[0].mean(),
        atol=1e-4,
    )


@pytest.mark.parametrize("gate", gated.GATES)
def test_true_components_sum_to_the_target_and_share_no_neuron(gate):
    target, params = make(gate)
    parts = gated.truth(params, 2)
    assert sorted(parts) == sorted(components.selected_paths(params, target.select))
    for name, part in parts.items():
        np.testing.assert_array_equal(part.sum(0), params[name])
    norms = gated.neuron_norms(parts, 2)
    assert norms.shape == (3, 18)
    assert ((norms > 0).sum(axis=0) == 1).all() and ((norms > 0).sum(axis=1) == 6).all()


def test_neurons_gated_by_weights_are_balanced():
    _, params = make("weights")
    for i in range(2):
        inside, outside = (
            np.linalg.norm(params[f"mlp_in_{i}"], axis=0),
            np.linalg.norm(params[f"mlp_out_{i}"], axis=1),
        )
        np.testing.assert_allclose(inside, outside, rtol=1e-4)
        assert not params[f"bias_in_{i}"].any()


def test_half_of_a_function_is_silent_behind_a_bias_and_a_quarter_without():
    # P/2 alone at t = 2.5: behind the bias every neuron reads (t + 6)/2 = 4.25, below its
    # β + 6 >= 5. Without bias both factors are halved.
    for gate, expected in (("bias", 0.0), ("weights", 0.25)):
        target, params = make(gate)
        half = params | {name: part[0] / 2 for name, part in gated.truth(params, 2).items()}
        x = jnp.asarray([[2.5, 1, 0, 0]])
        np.testing.assert_allclose(
            target.apply_fn(half, x)[0],
            expected * target.apply_fn(params, x)[0],
            rtol=1e-4,
            atol=1e-6,
        )


def test_samples():
    target, _ = make("bias", probability=0.2, batch_size=20_000)
    x = np.asarray(target.sample_fn(jax.random.key(0), 7))
    assert x.shape == (20_000, 4)
    assert x[:, 0].min() >= 0 and x[:, 0].max() <= 5
    assert set(np.unique(x[:, 1:])) == {0.0, 1.0}
    # Standard deviations: of the mean of t 5/sqrt(12·2e4) = 0.010, of the share of bits
    # sqrt(0.16/6e4) = 0.0016.
    np.testing.assert_allclose(x[:, 0].mean(), 2.5, atol=0.05)
    np.testing.assert_allclose(x[:, 1:].mean(), 0.2, atol=0.008)
    np.testing.assert_array_equal(target.num_active_fn(jnp.asarray(x)), x[:, 1:].sum(axis=1))
    assert np.array_equal(x, target.sample_fn(jax.random.key(0), 7)) and not np.array_equal(
        x, target.sample_fn(jax.random.key(0), 8)
    )


def scored(weights, target, params):
    """weights: {leaf: [C, ...]}."""
    tree = {name: jnp.asarray(weights[name]) if name in weights else None for name in params}
    parts = components.from_materialized(tree)
    decomposition = Decomposition(target.problem(params), parts, make_method())
    return target.score_fn(decomposition, jax.random.key(0), np.ones(parts.num_components, bool))


@pytest.mark.parametrize("gate", gated.GATES)
def test_the_truth_is_found(gate):
    target, params = make(gate)
    order = np.array([2, 0, 1])  # the components stand in another order than the functions
    score = scored(
        {name: part[order] for name, part in gated.truth(params, 2).items()}, target, params
    )
    assert (
        score.metrics["functions_found"]
        == score.metrics["functions_computed"]
        == score.metrics["num_functions"]
        == 3
    )
    assert score.metrics["success"] == 1
    assert score.metrics["mmcs_functions"] == pytest.approx(1, abs=1e-4) and score.metrics[
        "ml2r_functions"
    ] == pytest.approx(1, abs=1e-4)
    assert score.metrics["one_bit_error"] < 1e-6 and score.metrics["one_bit_error_own"] < 1e-6
    assert set(score.labels) <= set(score.metrics)
    assert set(score.panels) == {"function_0", "function_1", "function_2", "neurons"}
    lines = score.panels["function_1"].lines
    np.testing.assert_allclose(
        lines["function"], exact(params, np.linspace(0, 5, 51))[1], atol=1e-4
    )
    np.testing.assert_allclose(lines["its component alone"], lines["target"], atol=1e-4)
    upper, lower = np.split(score.panels["neurons"].matrix, 2)
    np.testing.assert_allclose(upper, lower, atol=1e-3)
    assert score.panels["neurons"].rows == [
        *(f"function {f}" for f in range(3)),
        "component 1",
        "component 2",
        "component 0",
    ]


def test_what_is_not_the_truth_is_not_found():
    target, params = make("weights")
    true = gated.truth(params, 2)
    # Functions 0 and 1 in one component, and nothing in another: their network still works, but
    # neither is found.
    merged = scored(
        {name: jnp.stack([part[0] + part[1], part[2], 0 * part[0]]) for name, part in true.items()},
        target,
        params,
    ).metrics
    assert merged["functions_found"] == 1 and merged["success"] == 0
    assert merged["mmcs_functions"] < 0.7 and merged["one_bit_error"] < 1e-6
    # All components shrunk by a quarter: the right directions, but too short. 1 - (3/4)² of the
    # output is missing.
    shrunk = scored({name: 0.75 * part for name, part in true.items()}, target, params).metrics
    assert shrunk["functions_found"] == 0 and shrunk["functions_computed"] == 0
    assert shrunk["mmcs_functions"] == pytest.approx(1, abs=1e-4) and shrunk[
        "ml2r_functions"
    ] == pytest.approx(0.75, abs=1e-4)
    assert shrunk["one_bit_error_own"] == pytest.approx((1 - 0.75**2) ** 2, rel=1e-3)
    # Fewer components than functions: one function is left over.
    fewer = scored({name: part[:2] for name, part in true.items()}, target, params).metrics
    assert fewer["functions_found"] == fewer["functions_computed"] == 2 and fewer["success"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "num_functions must be at least 1; got 0"),
        ({"m": 5}, "neurons_per_function must be at least 6; got 5"),
        ({"layers": 4}, "= 18 neurons cannot be shared evenly by num_layers = 4"),
        (
            {"gate": "weight"},
            "unknown target.gate 'weight'; known: bias, weights. Did you mean 'weights'",
        ),
        ({"probability": 0.0}, r"bit_probability must lie in \(0, 1\]; got 0.0"),
    ],
)
def test_refused(change, message):
    with pytest.raises(InputError, match=message):
        make(**change)
