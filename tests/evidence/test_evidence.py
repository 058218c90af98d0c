"""The exact decomposition of the TMS pentagon passes every bar that applies.

What is tampered with fails the right one.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_method, make_problem
from ml_collections import ConfigDict

from apd_jax import SPD, targets
from apd_jax import components as components_lib
from apd_jax.components import Components
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.evidence import CHECKS, ablate, fit, length
from apd_jax.evidence.ablate import LADDER
from apd_jax.evidence.check import Case
from apd_jax.evidence.subject import Setting, make
from apd_jax.methods.optimizers import Trained

TARGET = {
    "name": "tms",
    "num_features": 5,
    "d_hidden": 2,
    "hidden": "none",
    "feature_probability": 0.05,
    "pretrain": {"batch_size": 1},
}
# k above the 0.25 features that are active on average; log rows that have levelled off.
HISTORY = [
    {"step": i, "faithfulness": 1e-5, "minimality": 1e-4 + 1e-6 * (i % 2), "simplicity": 0.1}
    for i in range(40)
]
PROVENANCE = {"workdir": "memory", "command": "pytest", "step": 40}


def of_W(P):
    return components_lib.from_materialized({"W": jnp.asarray(P), "b": None}, uses={"W": 2})


@pytest.fixture(scope="module")
def judge(pentagon):
    """(P_c of W, or Components) -> its evidence: of all checks, or of those given by number."""
    target = targets.build(ConfigDict(TARGET), 512)

    def ask(P, *checks, **options):
        components = P if isinstance(P, Components) else of_W(P)
        method = make_method(num_components=components.num_components, topk=0.35, batch_size=512)
        decomposition = Decomposition(target.problem(pentagon.params), components, method, HISTORY)
        return decomposition.evidence(
            target=target, provenance=PROVENANCE, checks=checks or None, **options
        )

    return ask


@pytest.fixture(scope="module")
def truth(judge, pentagon):
    return judge(pentagon.weights["W"])


def test_the_truth_passes_every_bar_that_applies(truth):
    not_passed = {check.name for check in truth.checks if not check.passed}
    # 8 and 9 have no bar, 12 has no dead component to tell the alive from, and 13 to 15 ask for
    # further runs.
    assert not_passed == {
        *(
            "attribution_fidelity",
            "well_tempered",
            "alive_components",
            "capacity",
            "seeds",
            "data",
        ),
    }
    assert all(truth[name].why for name in ("capacity", "seeds", "data"))
    assert truth.verdict.startswith(
        "These components do this behaviour on this distribution, under ablations up to this budget"
    )
    assert "a decomposition trained on a random network, was not run (--full)" in truth.verdict
    assert [check.number for check in truth.checks] == list(range(1, len(CHECKS) + 1))


def test_the_truths_numbers(truth):
    assert truth["parameter_faithfulness"].values["relative_parameter_error"] < 1e-10
    geometry = truth["geometry"].values
    assert (geometry["mmcs"], geometry["purity"], geometry["num_features_owned"]) == pytest.approx(
        (1, 1, 5), abs=1e-6
    )
    # Beside the cosine: alone, a feature is served by its own component and no other.
    assert geometry["ablation_least"] > 0.9
    card = truth.markdown()
    assert (
        "| feature | component | cosine | norm ratio | purity | lost when ablated alone |" in card
    )
    length = truth["description_length"].values
    needed = truth["minimality"].values
    assert length["suggested_k"] == needed["smallest_k"] <= 1.05 * needed["true_count"]
    # All components on give the target exactly, so every curve starts at 0 and ends at the sparse
    # error.
    sparse = truth["sparse_reconstruction"].values["trained"]
    for name in ("joint", "by_attribution", "random_order"):
        curve = truth["monotone_trajectories"].arrays[f"trajectory_{name}"]
        assert curve[0] == pytest.approx(0, abs=1e-6)
        assert curve[-1] == pytest.approx(sparse, rel=1e-4, abs=1e-7)


def test_bits_worked_by_hand(judge, pentagon):
    # Ten examples, five of them with one feature: k = 0.35 keeps ⌊3.5⌋ = 3 pairs, each of one
    # component of rank 1 in one leaf. At the largest k all 50 pairs are kept, but few have an
    # attribution above 0: a feature alone drives its own output and (0.009 of) its neighbours',
    # which takes the neighbours' components too: three per example.
    x = jnp.concatenate([jnp.eye(5), jnp.zeros((5, 5))])
    check = judge(pentagon.weights["W"], 19, x=x, bits_per_rank=0.5)["description_length"]
    assert check.values["bits"] == pytest.approx(3 / 10 * (np.log2(5) + 0.5), rel=1e-6)
    assert check.arrays["length_bits"][-1] == pytest.approx(
        5 * 3 / 10 * (np.log2(5) + 0.5), rel=1e-6
    )


def test_bits_of_learned_gates_count_what_is_kept():
    """Logits of a gate may be below 0 where a component is kept; attributions of 0 name nothing."""
    x = jnp.ones((6, 3))
    params = {"w": jnp.arange(6.0).reshape(3, 2)}
    problem = make_problem(lambda p, x: x @ p["w"], params, lambda rng, step: x)
    method = SPD(num_components=4)
    components = method.make_components(jax.random.key(0), problem)
    gate = method.make_gate(jax.random.key(1), problem, components)
    trained = Trained(components, gate)
    subject = make(Setting(problem, method), params, trained, x)
    subject = dataclasses.replace(subject, scores=-jnp.ones((6, 4)))
    # All four of rank one: 4 (log₂ 4 + 1).
    assert float(length.bits(subject, jnp.ones((6, 4), bool), 1.0)) == pytest.approx(12)
    assert subject.kept == "causal importances above 0"


def test_the_attack_is_between_what_it_started_from_and_the_bound(truth):
    values = truth["worst_case_ablation"].values
    shared = [values[f"shared_{steps}"] for steps in LADDER]
    assert shared == sorted(shared)
    # All inactive ones off is a permitted choice.
    assert shared[0] >= truth["sparse_reconstruction"].values["trained"] - 1e-6
    assert values["per_example_80"] >= values["shared_80"] - 1e-6
    assert values["per_example_where_bounded"] <= values["bound"] + 1e-6


def test_json_has_the_schema_of_the_report(truth):
    written = json.loads(json.dumps(truth.to_json(), allow_nan=False))
    assert set(written) == {"provenance", "verdict", "checks"}
    assert set(written["provenance"]) == {
        "workdir",
        "command",
        "step",
        "seed",
        "device",
        "num_devices",
        "jax",
        "date",
    }
    for check in written["checks"]:
        assert set(check) == {
            "number",
            "name",
            "title",
            "passed",
            "bar",
            "values",
            "text",
            "why",
            "budget",
        }
        assert check["text"] or check["why"]
        assert check["passed"] in (True, False, None) and all(
            isinstance(v, float) for v in check["values"].values()
        )
        assert check["bar"] or check["passed"] is None


def failed(found):
    return {check.name for check in found.checks if check.passed is False}


BARRED = (1, 2, 3, 4, 5, 6, 7, 10, 11)


def test_two_components_mixed_fail_geometry(judge, pentagon):
    P = np.array(pentagon.weights["W"])
    P[0] = P[1] = (P[0] + P[1]) / 2
    found = judge(P, *BARRED)
    assert "geometry" in failed(found) and "parameter_faithfulness" not in failed(found)
    # Two of five have a component shared half and half, that holds half of the feature's weights.
    assert found["geometry"].values["purity"] == pytest.approx(0.8)
    assert found["shrinkage"].values["norm_ratio"] == pytest.approx(0.8)
    assert "geometry (10)" in found.verdict and found.verdict.startswith("It is not shown")


def test_two_components_merged_fail_geometry_and_nothing_else(judge, pentagon):
    P = np.array(pentagon.weights["W"])
    P[0], P[1] = P[0] + P[1], 0
    found = judge(P, 1, 3, 4, 5, 10)
    assert failed(found) == {"geometry"}
    # The merged component serves one of its two features. The other is left with one of norm 0.
    values = found["geometry"].values
    assert values["num_features_owned"] == 4 or values["mmcs_one_to_one"] == pytest.approx(0.8)


def test_components_scaled_by_nine_tenths_fail_faithfulness_and_shrinkage(judge, pentagon):
    found = judge(0.9 * np.array(pentagon.weights["W"]), 1, 10, 11)
    assert failed(found) == {"parameter_faithfulness", "shrinkage", "geometry"}
    missing = found["parameter_faithfulness"].values["relative_parameter_error"]
    assert missing == pytest.approx(0.01, rel=1e-4)  # (1 - 0.9)²
    shrinkage = found["shrinkage"].values
    assert shrinkage["norm_ratio"] == pytest.approx(0.9) and shrinkage["gain"] < 0.9
    # The direction is right.
    assert found["geometry"].values["mmcs_one_to_one"] == pytest.approx(1, abs=1e-6)


def test_a_cancelling_pair_is_only_found_by_the_attack(judge, pentagon):
    # +Q and -Q are small enough beside the features' components never to be kept. They cancel when
    # scaled together, but not apart. On an input of feature f, +Q alone adds x_f Q_f to the hidden
    # layer and Q to the way out.
    Q = np.zeros((1, 5, 2), np.float32)
    Q[0] = 0.6 * np.array([[1, 0], [0, 1], [1, 0], [0, 1], [1, 0]])
    P = np.concatenate([np.array(pentagon.weights["W"]), Q, -Q])
    target = targets.build(ConfigDict(TARGET), 512)
    # "Never active" is made so: attributions see only the features' own components.
    method = make_method(num_components=7, topk=0.35, batch_size=512)
    decomposition = Decomposition(target.problem(pentagon.params), of_W(P), method)
    x = target.sample_fn(jax.random.key(5), jnp.zeros((), jnp.int32))
    setting = Setting(decomposition.problem, method)
    subject = make(setting, pentagon.params, decomposition.trained, x)
    truth = (x != 0)[:, :, None] & np.eye(5, 7, dtype=bool)[None]
    mask = jnp.asarray(truth.any(axis=1))
    subject = dataclasses.replace(subject, mask=mask, values=mask)
    case = Case(subject, decomposition, jax.random.key(0), lambda i: x, 1)
    assert fit.faithfulness(case).passed and fit.sparse(case).passed
    assert ablate.monotone(case).values["joint_max"] <= 0.1
    worst = ablate.worst(case)
    assert worst.passed is False and worst.values["shared_80"] > 0.3


def test_untrained_components_and_other_networks_fail(judge, truth, pentagon):
    values = truth["controls"].values
    assert truth["controls"].passed
    assert "parameter faithfulness (1)" in truth["controls"].text
    assert all(
        values[f"{name}_bars_failed"] >= 2
        for name in ("untrained", "random_network", "shuffled_network")
    )
    untrained = components_lib.init(
        jax.random.key(1), pentagon.params, num_components=5, select="W", uses={"W": 2}
    )
    found = judge(untrained, 1, 3, 10, 11)
    assert failed(found) == {
        "parameter_faithfulness",
        "sparse_reconstruction",
        "geometry",
        "shrinkage",
    }


def test_controls_that_pass_are_told_loudly(judge, pentagon, monkeypatch):
    # With bars that everything passes the controls pass, too, and the verdict says so.
    for name in ("PARAMETER_BAR", "UNMASKED_BAR"):
        monkeypatch.setattr(fit, name, 1e9)
    for module in (fit, ablate):
        monkeypatch.setattr(module, "ERROR_BAR", 1e9)
    found = judge(pentagon.weights["W"], 16)
    assert found["controls"].passed is False
    assert "WARNING: the control untrained (checks 1 and 3) and the control" in found.verdict


def test_a_network_without_a_target(pentagon):
    """A stranger's network, judged on the caller's examples.

    What needs features says why it is missing; everything else is there.
    """
    W = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32))
    components = components_lib.from_materialized({"W": jnp.eye(4)[:, :, None] * W[None]})
    kl = {"minimality_loss": "kl", "attribution_metric": "kl"}
    method = make_method(num_components=4, topk=2.0, **kl)
    x = jax.random.bernoulli(jax.random.key(0), 0.5, (64, 4)).astype(jnp.float32)
    problem = make_problem(lambda p, x: x @ p["W"], {"W": W}, None)
    decomposition = Decomposition(problem, components, method)
    found = decomposition.evidence(x=x, checks=(1, 2, 3, 7, 10, 17, 18, 19))
    assert found["provenance"].passed is None and found["provenance"].why == "not known: workdir"
    assert (
        found["parameter_faithfulness"].passed
        and found["sparse_reconstruction"].values["all"] < 1e-6
    )
    for name in ("scrubbing", "geometry", "convergence"):
        assert found[name].passed is None and found[name].why
    assert "true_count" not in found["minimality"].values
    with pytest.raises(InputError, match="no data"):
        decomposition.evidence()


def test_a_loss_that_falls_has_converged_where_it_no_longer_matters():
    """x one-hot, W the identity: ‖W‖²/N = 1/4, and the unit of error is at most E x².

    The second window of five rows is half the first.
    """
    method = make_method(num_components=4, topk=1.0)
    components = components_lib.from_materialized({"W": jnp.eye(4)[:, :, None] * jnp.eye(4)[None]})
    problem = make_problem(lambda p, x: x @ p["W"], {"W": jnp.eye(4)}, None)
    x = jnp.tile(jnp.eye(4), (8, 1))

    def passed(**first):
        rows = [
            {name: value * (1 if i < 5 else 0.5) for name, value in first.items()} | {"step": i}
            for i in range(10)
        ]
        found = Decomposition(problem, components, method, rows).evidence(x=x, checks=(17,))
        return found["convergence"].passed

    assert passed(faithfulness=1e-7, minimality=1e-6)
    assert not passed(faithfulness=1e-3, minimality=1e-6)  # moves by twice the bar, 1e-3/4
    assert not passed(faithfulness=1e-7, minimality=0.1)
