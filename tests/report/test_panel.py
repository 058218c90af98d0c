"""How the live panel chooses the components of one input, against the gate itself."""

import every_gate
import jax
import numpy as np
import pytest
from conftest import make_method, make_problem

from apd_jax import SPD
from apd_jax.decomposition import Decomposition
from apd_jax.evaluation import components_view
from apd_jax.report import panel

DECIDED_BY_THE_BATCH = ("batch_topk", "batch_topk_always_on", "exact")


def by_rule(rule, A):
    """What page/network.js does with the attributions [C] of one input."""
    chosen = np.full(A.shape, rule["all"])
    chosen[: rule["num_always_on"]] = True
    others = np.arange(rule["num_always_on"], len(A))
    if "topk" in rule:
        chosen[others[np.argsort(-A[others], kind="stable")[: rule["topk"]]]] = True
    else:
        cuts = np.array([np.inf if cut is None else cut for cut in rule["cuts"]])
        chosen |= np.greater(A, cuts)
    return chosen


@pytest.mark.parametrize("name", every_gate.GATES)
def test_the_rule_is_the_gates(name, pentagon):
    target, d = every_gate.decomposed(pentagon, name)
    x = target.sample_fn(jax.random.key(4), 0)
    found = components_view.behaviour(d, x)
    rule = panel.mask_rule(d, found.cut)
    assert rule["at"] == "target" and len(rule["cuts"]) == 5
    chosen = np.stack([by_rule(rule, A) for A in found.attributions.astype(np.float64)])
    if name in DECIDED_BY_THE_BATCH:
        # An input alone is held against the cut of the report's inputs. Where the batch kept more
        # than there are attributions above 0, an attribution of 0 is not kept.
        first = np.arange(5) < d.method.always_on
        np.testing.assert_array_equal(chosen, found.mask & (found.attributions > 0) | first)
    else:
        alone = np.concatenate([d.activity(x[b : b + 1]).active for b in range(8)])
        np.testing.assert_array_equal(chosen[:8], alone)
    assert chosen.any() and (name == "none" or not chosen.all())


def test_learned_thresholds_are_cuts_of_their_own(pentagon):
    """A single cut for all would keep the third component from 0.1 on, and its own is 0.4."""
    _, d = every_gate.decomposed(pentagon, "learned")
    rule = panel.mask_rule(d, 0.1)
    np.testing.assert_allclose(rule["cuts"], every_gate.THRESHOLDS, rtol=1e-6)
    assert by_rule(rule, np.full(5, 0.3)).tolist() == [True, True, False, False, False]


def test_nothing_was_kept(pentagon):
    _, d = every_gate.decomposed(pentagon, "batch_topk")
    rule = panel.mask_rule(d, float("inf"))
    assert rule["cuts"] == [None] * 5 and not by_rule(rule, np.ones(5)).any()


@pytest.mark.parametrize(
    "fields", [{"attribution": "ablation"}, {"attribution_metric": "kl"}, {"mask_per": "position"}]
)
def test_attributions_that_the_page_does_not_take(fields, pentagon):
    _, d = every_gate.decomposed(pentagon, "batch_topk")
    method = make_method(num_components=5, **fields)
    assert panel.mask_rule(Decomposition(d.problem, d.components, method), 0.1) is None


def test_gates_that_read_activations(pentagon):
    problem = make_problem(pentagon.apply_fn, pentagon.params, lambda rng, step: pentagon.x)
    method = SPD(num_components=2)
    components = method.make_components(jax.random.key(0), problem)
    gate = method.make_gate(jax.random.key(1), problem, components)
    assert panel.mask_rule(Decomposition(problem, components, method, gate=gate), 0.1) is None
