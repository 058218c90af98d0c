"""The whole evaluation where the truth is known, and on the reference's residual MLP."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_method
from ml_collections import ConfigDict

from apd_jax import components as components_lib
from apd_jax import targets
from apd_jax.components import Components, Factors
from apd_jax.decomposition import Decomposition
from apd_jax.evaluation import evaluate

GOLDEN = Path(__file__).parents[1] / "golden" / "resid1_small.npz"
BATCHES, BATCH = 4, 64
# The TMS pentagon: five unit rows, 72° apart. With b = -0.3 a feature alone at 1 returns 0.7, and
# its neighbours cos 72° - 0.3 = 0.009.
ANGLES = 2 * np.pi * np.arange(5) / 5
PENTAGON = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1).astype(np.float32)
PARAMS = {"W": jnp.asarray(PENTAGON), "b": jnp.full(5, -0.3)}


TMS = {
    **{"name": "tms", "num_features": 5, "d_hidden": 2, "hidden": "none"},
    **{"feature_probability": 0.05, "pretrain": {"batch_size": 1}},
}
RESIDUAL = {
    **{"name": "resid_mlp", "num_features": 10, "d_resid": 24, "num_layers": 1, "d_mlp": 8},
    **{"activation": "relu", "embedding": "random", "use_bias": False, "signed": True},
    **{"feature_probability": 0.2, "pretrain": {"batch_size": 1}},
}


def run(target, params, components, **fields):
    built = targets.build(ConfigDict(target), BATCH)
    method = make_method(num_components=components.num_components, **fields)
    decomposition = Decomposition(built.problem(params), components, method)
    return evaluate(built, decomposition, num_batches=BATCHES, seed=3)


def run_tms(feature_of_component, **fields):
    """Component c holds the rows that `feature_of_component[c]` lists, and nothing else."""
    P = np.zeros((len(feature_of_component), 5, 2), np.float32)
    for c, features in enumerate(feature_of_component):
        P[c, features] = PENTAGON[features]
    components = components_lib.from_materialized({"W": jnp.asarray(P), "b": None}, uses={"W": 2})
    return run(TMS, PARAMS, components, **fields)


@pytest.fixture(scope="module")
def truth():
    return run_tms([[2], [0], [], [4], [1], [3]], topk=0.5)


def test_truth_scores_full_marks(truth):
    m = truth.metrics
    assert (
        m["faithfulness"] < 1e-12
        and m["relative_parameter_error"] < 1e-12
        and m["minimality_all"] < 1e-12
    )
    full = {
        name: 1.0 for name in ("mmcs", "ml2r", "mmcs_one_to_one", "ml2r_one_to_one", "top1_share")
    }
    assert {name: m[name] for name in full} == pytest.approx(full, abs=1e-6)
    assert (m["num_features"], m["num_features_owned"]) == (5, 5)
    assert (m["num_components"], m["num_alive_components"], m["num_dead_components"]) == (6, 5, 1)
    assert json.loads(json.dumps(m)) == m and not any(name.startswith("scrub") for name in m)


def test_truth_arrays(truth):
    a = truth.arrays
    np.testing.assert_array_equal(a["component_of_feature"], [1, 4, 0, 5, 3])
    np.testing.assert_array_equal(a["feature_of_component"], [2, 0, -1, 4, 1, 3])
    np.testing.assert_array_equal(a["mask_one_hot"][:, [1, 4, 0, 5, 3]], np.eye(5, dtype=bool))
    # A feature alone at value v, top-1: max(v - 0.3, 0), as the target gives; label v. Unsigned
    # data are swept from 0.
    v = np.linspace(0, 1, 41)
    np.testing.assert_allclose(a["sweep_values"], v, atol=1e-7)
    for name in ("target", "top1"):
        np.testing.assert_allclose(
            a[f"sweep_{name}"], np.repeat(np.maximum(v - 0.3, 0)[:, None], 5, axis=1), atol=1e-6
        )
    np.testing.assert_allclose(a["sweep_label"], np.repeat(v[:, None], 5, axis=1), atol=1e-6)
    # Its loss to the label with top-1: mean over v of (v - max(v - 0.3, 0))², over 5 outputs;
    # without a component v².
    np.testing.assert_allclose(
        a["per_feature_loss_top1"], np.full(5, np.mean(np.minimum(v, 0.3) ** 2) / 5), rtol=1e-5
    )
    np.testing.assert_allclose(a["per_feature_loss_none"], np.full(5, np.mean(v**2) / 5), rtol=1e-5)


def test_zero_attributions_do_not_count_as_firing(truth):
    # k = 0.5 keeps more pairs than there are active features (0.25 per example): the rest of the
    # mask falls on zeros.
    fired = truth.arrays["firing_rates"]
    assert fired[2] == 0 and (fired[[0, 1, 3, 4, 5]] > 0).all()
    assert truth.metrics["mean_active_components"] == pytest.approx(fired.sum())
    assert truth.metrics["mean_active_components"] < 0.5


def test_one_component_with_everything_is_not_a_success():
    # Every feature's best component is component 0, cosine and ratio 1. One to one it can only be
    # one feature's: 1/5.
    m = run_tms([[0, 1, 2, 3, 4], []], topk=0.5).metrics
    assert (m["mmcs"], m["ml2r"]) == pytest.approx((1, 1), abs=1e-6)
    assert (m["mmcs_one_to_one"], m["ml2r_one_to_one"]) == pytest.approx((0.2, 0.2), abs=1e-6)
    assert m["num_features_owned"] <= 1 and m["num_alive_components"] == 1


def test_always_on_components():
    # Component 0 is kept everywhere, and is nobody's top-1.
    evaluation = run_tms(
        [[0, 1], [0], [1], [2], [3], [4]],
        num_always_on=1,
        mask="exact",
        attributions_at="components",
        topk=0.5,
    )
    assert (
        evaluation.arrays["mask_one_hot"][:, 0].all()
        and (evaluation.arrays["mask_one_hot"].sum(axis=1) == 2).all()
    )
    assert 0 not in evaluation.arrays["component_of_feature"]
    # "None" of the others: component 0 alone carries feature 0 as the target does (W_0 of it), but
    # not feature 4.
    np.testing.assert_allclose(evaluation.arrays["sweep_none"][-1][[0, 4]], [0.7, 0.0], atol=1e-6)


@pytest.fixture(scope="module")
def residual():
    with np.load(GOLDEN) as file:
        golden = dict(file)
    params = {
        leaf: jnp.asarray(golden[f"target/{leaf}"])
        for leaf in ("W_E", "W_U", "mlp_in_0", "mlp_out_0")
    }

    def factors(leaf):
        U, V = (jnp.asarray(golden[f"components/{leaf}/{part}"]) for part in "UV")
        return Factors(U, V, shape=params[leaf].shape)

    components = Components(
        {leaf: factors(leaf) if leaf.startswith("mlp") else None for leaf in params}
    )
    fields = {"topk": 1.28, "hidden_reconstruction_coeff": 1.0}
    return golden, run(RESIDUAL, params, components, **fields)


def test_residual_mlp_matches_the_reference(residual):
    golden, evaluation = residual
    np.testing.assert_array_equal(
        evaluation.arrays["component_of_feature"], golden["scrub/feature_to_component"]
    )
    # The reference sums the squares over the 10 outputs and takes no root.
    expected = np.sqrt(golden["scrub/one_hot_attributions_sum_of_squares"] / 10)
    np.testing.assert_allclose(
        evaluation.arrays["attributions_one_hot"], expected, rtol=0, atol=1e-5 * expected.max()
    )
    assert evaluation.metrics["faithfulness"] == pytest.approx(
        float(golden["loss/param_match"]), rel=1e-5
    )


def test_residual_mlp_scrubbing(residual):
    _, evaluation = residual
    m, a = evaluation.metrics, evaluation.arrays
    for name in ("topk", "scrubbed", "antiscrubbed", "random", "zero", "monosemantic"):
        assert a[f"scrub_{name}"].shape == (BATCHES * BATCH,)
        assert m[f"scrub_{name}"] == pytest.approx(a[f"scrub_{name}"].mean())
    assert m["scrub_topk"] == m["minimality_topk"]
    # Batch top-k keeps ⌊1.28·64⌋ = 81 pairs of 64 examples, all with attributions above 0.
    assert m["mean_active_components"] == pytest.approx(81 / 64)
    assert m["hidden_reconstruction"] > 0
    np.testing.assert_allclose(a["sweep_values"], np.linspace(-1, 1, 41), atol=1e-7)
    # Neuron contributions: (W_E W_in)[f, n] (W_out W_U)[n, f].
    assert a["feature_weights_components"].shape == (12, 10, 8)
