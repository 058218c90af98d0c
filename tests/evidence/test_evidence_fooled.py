"""Decompositions of which nothing is needed, though they sum to the network and ablate well.

And the true one of the same network, which is needed, if a random network does worse.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_method, make_problem

from apd_jax import components as components_lib
from apd_jax.decomposition import Decomposition
from apd_jax.evidence import controls, length, retrain
from apd_jax.evidence.card import NEEDED, Evidence
from apd_jax.evidence.check import Case, Check
from apd_jax.evidence.subject import Setting, fresh, make
from apd_jax.methods.optimizers import Trained

INPUTS, ANDS, XORS = 12, 10, 5
GATES = ANDS + XORS


def gates():
    """Every gate's own weights: a AND b = relu(a + b - 1), a XOR b = relu(a - b - 1) + its mirror.

    The last input is the constant 1.
    """
    first = np.zeros((GATES, INPUTS + 1, ANDS + 2 * XORS), np.float32)
    second = np.zeros((GATES, ANDS + 2 * XORS, GATES), np.float32)
    for g in range(GATES):
        a, b = g % INPUTS, (5 * g + 1 + g // INPUTS) % INPUTS
        units = [(g, 1, 1)] if g < ANDS else [(2 * g - ANDS, 1, -1), (2 * g - ANDS + 1, -1, 1)]
        for unit, by_a, by_b in units:
            first[g, [a, b, INPUTS], unit] = by_a, by_b, -1
            second[g, unit, g] = 1
    return {"first": first, "second": second}


def all_on(parts, seed=0):
    """As many full matrices at random that sum to the same weights."""
    rng, found = np.random.default_rng(seed), {}
    for name, P in parts.items():
        drawn = rng.normal(size=P.shape) * np.std(P.sum(axis=0))
        found[name] = (P.sum(axis=0) / len(P) + drawn - drawn.mean(axis=0)).astype(np.float32)
    return found


def signs(rng, step):
    x = jax.random.rademacher(jax.random.fold_in(rng, step), (64, INPUTS), jnp.float32)
    return jnp.concatenate([x, jnp.ones((64, 1))], axis=1)


@pytest.fixture(scope="module")
def boolean():
    """Parts -> their decomposition: a component is kept where it has some attribution."""
    params = {name: jnp.asarray(P.sum(axis=0)) for name, P in gates().items()}
    problem = make_problem(lambda p, x: jax.nn.relu(x @ p["first"]) @ p["second"], params, signs)
    method = make_method(num_components=GATES, mask="threshold", threshold=0.02, batch_size=64)

    def decomposition(parts):
        parts = {name: jnp.asarray(P) for name, P in parts.items()}
        return Decomposition(problem, components_lib.from_materialized(parts), method)

    return decomposition


def failed(found):
    return {check.number for check in found.checks if check.passed is False}


def test_components_that_are_all_on_are_not_needed(boolean):
    found = boolean(all_on(gates())).evidence(checks=(1, 2, 3, 19))
    assert failed(found) == {2, 19}  # the others are met: hardly anything is ever ablated
    values = found["minimality"].values
    assert values["active"] > 0.95 * values["alive"] == pytest.approx(0.95 * GATES)
    of = found["description_length"].values
    assert of["ranks"] > of["whole_ranks"] == 13 + 15
    assert found.verdict.startswith("It is not shown that these components are needed")
    assert "not met: minimality (2), description length (19)" in found.verdict


def test_true_gates_are_needed_if_a_random_network_does_worse(boolean, monkeypatch):
    true = boolean(gates())

    # Untrained components stand for a decomposition that failed on the random network.
    def untrained(case, params):
        return [fresh(jax.random.key(7), case.subject)]

    monkeypatch.setattr(retrain, "again", untrained)
    found = true.evidence(checks=NEEDED, full=True)
    assert not failed(found)
    assert found.verdict.startswith("These components are needed for this behaviour")
    # An AND is true on a quarter of the inputs, an XOR on half of them.
    assert found["minimality"].values["active"] == pytest.approx(5, abs=0.6)
    assert found["controls"].values["trained_on_random_network_bars_failed"] >= 2

    # And here the control finds as much as there is to find in this network.
    monkeypatch.setattr(controls, "random_params", lambda case, key: case.subject.params)
    monkeypatch.setattr(retrain, "again", lambda case, params: [case.subject.trained])
    controlled = true.evidence(checks=(16,), full=True)["controls"]
    assert controlled.values["trained_on_random_network_bars_failed"] == 0
    assert controlled.passed is False


def card(**changes):
    checks = {
        number: Check(number, f"check_{number}", f"Check {number}", passed=True)
        for number in NEEDED
    }
    controlled = {"fooled": 0, "trained_on_random_network_bars_failed": 2}
    checks[16] = dataclasses.replace(checks[16], values=controlled)
    for name, change in changes.items():
        number = int(name[1:])
        checks[number] = dataclasses.replace(checks[number], **change)
    return Evidence({}, list(checks.values())).verdict


def test_what_a_verdict_may_say():
    assert card().startswith("These components are needed for this behaviour")
    beaten = {"fooled": 0, "trained_on_random_network_bars_failed": 0}
    assert card(_16={"passed": False, "values": beaten}).startswith(
        "These components show the structure of the data, not of what this network has learned"
    )
    # Where other controls are fooled too, or another bar is missed, not even that is shown.
    for change in (
        {"_16": {"passed": False, "values": beaten | {"fooled": 1}}},
        {"_16": {"passed": False, "values": beaten}, "_3": {"passed": False}},
        {"_19": {"passed": False}},
    ):
        assert card(**change).startswith("It is not shown that these components are needed")
    assert "(not run: checks 5)" in card(_5={"passed": None})
    uncontrolled = card(_16={"values": {"fooled": 0}})
    assert "needed" not in uncontrolled and "was not run (--full): 8 of 8 bars" in uncontrolled


def test_tms_whose_components_are_all_on_is_shorter_as_a_whole():
    """TMS 20-5: twenty full matrices that sum to W, and k = all."""
    rng = np.random.default_rng(1)
    W = rng.normal(size=(20, 5)).astype(np.float32)
    W /= np.linalg.norm(W, axis=1, keepdims=True)
    parts = all_on({"W": np.eye(20, dtype=np.float32)[:, :, None] * W[None]})
    problem = make_problem(
        lambda p, x: jax.nn.relu(x @ p["W"] @ p["W"].T), {"W": jnp.asarray(W)}, None
    )
    x = jnp.asarray((rng.random((64, 20)) < 0.2) * rng.random((64, 20)), jnp.float32)
    method = make_method(num_components=20, topk=20.0)
    trained = Trained(components_lib.from_materialized({"W": jnp.asarray(parts["W"])}))
    subject = make(Setting(problem, method), problem.params, trained, x)
    decomposition = Decomposition(problem, trained.components, method)
    case = Case(subject, decomposition, jax.random.key(0), lambda i: x, 1)
    assert length.minimality(case).passed is False
    check = length.description_length(case)
    assert check.passed is False and check.values["whole_ranks"] == 5
    assert "not shorter than both" in check.text
