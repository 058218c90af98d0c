"""Every reader asks about the mask of training: that of the method's gate, whichever it is."""

import every_gate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close
from ml_collections import ConfigDict

from apd_jax import SPD, targets
from apd_jax.decomposition import Decomposition
from apd_jax.evaluation import components_view, features, general
from apd_jax.evidence.subject import Setting, make

BATCHES, SEED = 2, 3
STREAM = jax.random.fold_in(jax.random.key(SEED), general.STREAM)


def error(pentagon, m, x):
    """mean (f(κ) - f(θ*))² by numpy: κ has W_b = Σ_c m_bc P_c on example b."""
    W = np.einsum("bc,cfd->bfd", m, pentagon.weights["W"])
    out = np.maximum(np.einsum("bf,bfd,bgd->bg", x, W, W) + np.asarray(pentagon.params["b"]), 0)
    return np.mean((out - np.asarray(pentagon.apply_fn(pentagon.params, x))) ** 2)


def importances(name, A):
    """g = σ(8 log(A/τ)) = (A/τ)⁸ / (1 + (A/τ)⁸), and 1 for what is always on."""
    odds = (A / every_gate.THRESHOLDS) ** 8
    first = every_gate.GATES[name].get("num_always_on", 0)
    return np.where(np.arange(5) < first, 1.0, odds / (1 + odds))


# Every gate by one of the two, and the kinds that an evaluation treats differently by both.
READ_BY = {
    "features": ["batch_topk", "topk", "learned", "exact", "batch_topk_always_on"],
    "general": ["batch_topk", "threshold", "threshold_0", "none", "learned_always_on"],
}


@pytest.mark.parametrize(("room", "name"), [(room, n) for room in READ_BY for n in READ_BY[room]])
def test_evaluations_take_the_mask_of_training(room, name, pentagon):
    target, decomposition = every_gate.decomposed(pentagon, name)
    evaluate, key = general.evaluate, STREAM
    if room == "features":
        evaluate, key = features.evaluate, jax.random.split(STREAM)[0]
    m = evaluate(target, decomposition, num_batches=BATCHES, seed=SEED).metrics

    batches = [np.asarray(target.sample_fn(key, step)) for step in range(BATCHES)]
    of_batches = [every_gate.attributions_of(pentagon, x) for x in batches]
    masks = [every_gate.mask(name, A, x) for A, x in zip(of_batches, batches, strict=True)]
    expected = np.mean([error(pentagon, m, x) for m, x in zip(masks, batches, strict=True)])
    assert m["minimality_topk"] == pytest.approx(expected, rel=1e-3, abs=1e-8)
    fired = [m & (A > 0) for m, A in zip(masks, of_batches, strict=True)]
    assert m["mean_active_components"] == pytest.approx(np.sum(fired) / (BATCHES * 32))
    if name.startswith("learned"):
        gates = [importances(name, A) for A in of_batches]
        expected = np.mean([error(pentagon, g, x) for g, x in zip(gates, batches, strict=True)])
        assert m["minimality_gates"] == pytest.approx(expected, rel=1e-3, abs=1e-8)
        assert m["minimality_stochastic"] != m["minimality_gates"]
    else:
        assert "minimality_gates" not in m and "minimality_stochastic" not in m


@pytest.mark.parametrize("name", every_gate.GATES)
def test_reports_and_evidence_take_the_mask_of_training(name, pentagon):
    target, decomposition = every_gate.decomposed(pentagon, name)
    x = target.sample_fn(jax.random.key(4), 0)
    A = every_gate.attributions_of(pentagon, x)
    mask = every_gate.mask(name, A, x)

    found = components_view.behaviour(decomposition, x)
    close(found.attributions, A)
    np.testing.assert_array_equal(found.mask, mask)
    fired = mask & (A > 0)
    close(found.firing_rates, fired.mean(axis=0))
    cuts = np.where(fired, A, np.inf).min(axis=0)  # infinite for what is never kept
    np.testing.assert_allclose(found.cuts, cuts, rtol=1e-5)
    assert found.cut == found.cuts[decomposition.method.always_on :].min()

    setting = Setting(decomposition.problem, decomposition.method)
    subject = make(setting, pentagon.params, decomposition.trained, x)
    np.testing.assert_array_equal(subject.mask, mask)
    close(subject.scores, A)


@pytest.fixture(scope="module")
def gated():
    """SPD's components and gates as they begin, on TMS with a hidden matrix: two sites."""
    config = ConfigDict(every_gate.TARGET | {"hidden": "identity"})
    target = targets.build(config, 32)
    problem = target.problem(jax.jit(target.init_fn)(jax.random.key(0)))
    method = SPD(num_components=4, batch_size=32)
    components = method.make_components(jax.random.key(1), problem)
    gate = method.make_gate(jax.random.key(2), problem, components)
    return target, Decomposition(problem, components, method, gate=gate)


@pytest.mark.parametrize("room", ["features", "general"])
def test_evaluations_take_learned_gates(room, gated):
    target, decomposition = gated
    evaluate, key = general.evaluate, STREAM
    if room == "features":
        evaluate, key = features.evaluate, jax.random.split(STREAM)[0]
    m = evaluate(target, decomposition, num_batches=BATCHES, seed=SEED).metrics
    assert m["num_components"] == 8  # four at each of two sites
    batches = [target.sample_fn(key, step) for step in range(BATCHES)]
    activity = [decomposition.activity(x) for x in batches]
    active = np.mean([np.sum(a.active) for a in activity]) / 32
    assert 0 < m["mean_active_components"] == pytest.approx(active)
    for name, of in (("topk", "active"), ("gates", "values")):
        errors = []
        for x, a in zip(batches, activity, strict=True):
            out = decomposition.sparse_output(x, getattr(a, of))[0]
            whole = decomposition.problem.apply_fn(decomposition.problem.params, x)[0]
            errors.append(jnp.mean((out - whole) ** 2))
        assert m[f"minimality_{name}"] == pytest.approx(float(np.mean(errors)), rel=1e-4)
