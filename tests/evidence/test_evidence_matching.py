"""Matching, the audit of attributions, purity and the parts of leaves, each against numpy."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_golden, make_method, make_problem
from scipy import stats

from apd_jax import attributions as attributions_lib
from apd_jax import components as components_lib
from apd_jax.components import Components
from apd_jax.errors import InputError
from apd_jax.evidence import audit, truth
from apd_jax.evidence.matching import agreement
from apd_jax.evidence.subject import Setting, make
from apd_jax.methods.optimizers import Trained


def drawn(seed, C=4):
    rng = np.random.default_rng(seed)
    return {
        "a": rng.normal(size=(C, 3, 2)).astype(np.float32),
        "b": rng.normal(size=(C, 2, 5)).astype(np.float32),
    }


def as_components(weights):
    return components_lib.from_materialized({name: jnp.asarray(P) for name, P in weights.items()})


def test_agreement_is_the_best_of_all_matchings():
    first, second = drawn(0), drawn(1)
    flat = [
        np.concatenate([w["a"].reshape(4, -1), w["b"].reshape(4, -1)], axis=1)
        for w in (first, second)
    ]
    unit = [f / np.linalg.norm(f, axis=1, keepdims=True) for f in flat]
    cosine = unit[0] @ unit[1].T
    best = max(itertools.permutations(range(4)), key=lambda p: cosine[range(4), p].sum())
    found = agreement(as_components(first), as_components(second))
    np.testing.assert_array_equal(found.match, best)
    np.testing.assert_allclose(found.cosine, cosine[range(4), best], atol=1e-5)


def test_agreement_of_the_same_in_another_order_among_more():
    first, order = drawn(0), [2, 0, 3, 1]
    # Twice as long, and two dead ones.
    other = {name: np.concatenate([2 * P[order], 0 * P[:2]]) for name, P in first.items()}
    found = agreement(as_components(first), as_components(other))
    np.testing.assert_array_equal(found.match, np.argsort(order))
    assert (found.mean_cosine, found.share) == pytest.approx((1, 1), abs=1e-5)
    back = agreement(as_components(other), as_components(first))
    assert (back.match[4:] == -1).all() and back.share == 1
    assert not back.large[4:].any()  # the dead do not count
    with pytest.raises(InputError, match="differ in leaf 'b'"):
        agreement(as_components(first), as_components({"a": first["a"]}))


def audited(subject):
    found, failed = audit.audited(subject)
    return audit.correlations(found), failed


def test_audit_by_leaf():
    weights, rng = drawn(0), np.random.default_rng(2)
    params = {name: jnp.asarray(P.sum(axis=0)) for name, P in weights.items()}

    def apply_fn(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    x = jnp.asarray(rng.normal(size=(32, 3)), jnp.float32)
    method = make_method(num_components=4, topk=2.0)
    setting = Setting(make_problem(apply_fn, params, None), method)
    subject = make(setting, params, Trained(as_components(weights)), x)
    leaves = audit.by_leaf(subject, {})
    found = leaves["b"]
    assert set(found) == set(audit.kinds(subject))
    # The outputs are linear in b, so ablating its part alone moves them by tanh(x a) P_cb, which is
    # exactly what the gradient says.
    assert found["gradient_forward"] == pytest.approx(1)
    assert found["gradient_reverse"] == pytest.approx(1)
    # In a: true ablation by numpy, gradients by the method's own forward mode on the whole network
    # with b held.
    found = leaves["a"]
    a, b = weights["a"], weights["b"].sum(axis=0)
    whole = np.tanh(x @ a.sum(axis=0)) @ b
    true = np.stack(
        [np.sqrt(np.mean((np.tanh(x @ (a.sum(axis=0) - P)) @ b - whole) ** 2, axis=1)) for P in a],
        axis=1,
    )
    only_a = components_lib.from_materialized({"a": jnp.asarray(a), "b": None})
    gradient = attributions_lib.gradient(apply_fn, params, only_a, x, mode="forward")
    assert found["gradient_forward"] == pytest.approx(
        stats.spearmanr(true.ravel(), np.ravel(gradient)).statistic, abs=1e-3
    )


def test_audit_of_sites_with_numbers_of_their_own():
    """Components 0 to 3 live in a alone and 4 to 7 in b: the others' parts there are zeros."""
    weights, rng = drawn(0), np.random.default_rng(2)
    params = {name: jnp.asarray(P.sum(axis=0)) for name, P in weights.items()}
    factors = as_components(weights).factors
    ids = {"a": range(4), "b": range(4, 8)}
    own = {name: dataclasses.replace(f, ids=ids[name]) for name, f in factors.items()}
    padded = {name: np.zeros((8, *P.shape[1:]), np.float32) for name, P in weights.items()}
    padded["a"][:4], padded["b"][4:] = weights["a"], weights["b"]

    def apply_fn(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    x = jnp.asarray(rng.normal(size=(16, 3)), jnp.float32)
    setting = Setting(make_problem(apply_fn, params, None), make_method(num_components=8, topk=2.0))
    subjects = [
        make(setting, params, Trained(components), x)
        for components in (Components(own, 8), as_components(padded))
    ]
    np.testing.assert_allclose(subjects[0].scores, subjects[1].scores, rtol=1e-4, atol=1e-6)
    (found, failed), (expected, _) = map(audited, subjects)
    assert not failed and found == pytest.approx(expected, abs=1e-4)
    # They are apart already; a leaf's correlations are those of its own, not of others' zeros.
    assert audit.apart(subjects[0].components) is subjects[0].components
    together = audit.audited(subjects[0])[0]
    assert audit.by_leaf(subjects[0], together)["b"] == pytest.approx(
        audit.correlations({kind: a[:, 4:] for kind, a in together.items()})
    )


def test_purity():
    # Feature 0: component 0 alone. Feature 1: component 1, which beside its own squared norm of 1
    # holds 3 of feature 2's. None is left for feature 2.
    P = np.zeros((2, 3, 2))
    P[0, 0], P[1, 1], P[1, 2] = (1, 0), (1, 0), (0, 3**0.5)
    W = np.array([[1, 0], [1, 0], [1, 0]], float)
    np.testing.assert_allclose(truth.purity(P, W), [1, 0.25, 0])


def test_leaf_parts_of_faithful_components_sum_to_the_whole():
    golden = load_golden("resid2_small")
    names = [name for name in golden.components.factors]
    parts = {name: 0.5 * jnp.stack([golden.params[name], golden.params[name]]) for name in names}
    tree = {name: parts.get(name) for name in golden.params}
    components = components_lib.from_materialized(tree)
    problem = golden.target.problem(golden.params)
    setting = Setting(problem, make_method(num_components=2, topk=1.0))
    subject = make(setting, golden.params, Trained(components), golden.x)
    found = truth.leaf_parts(golden.target, subject)
    assert set(found) == set(names)
    for of_components, whole in found.values():
        np.testing.assert_allclose(of_components.sum(axis=0), whole, atol=1e-5)
    # Each component has a quarter of every leaf's squared norm: of four leaves, three quarters of
    # it lie outside any one.
    assert truth.cross_leaf_share(subject) == pytest.approx(0.75, abs=1e-4)


def test_audit_sees_where_first_order_breaks():
    """A saturated softmax, softmax(10 s·e_0) for s from 0.4 to 2.

    With s the cost of ablation rises, p(10 s) - 1/4, and the gradient falls, 10 s·p(1 - p): their
    ranks are opposed. Integrated gradients add up to the ablation exactly.
    """
    W = 10 * jnp.eye(4)[:1]
    x = jnp.linspace(0.4, 2.0, 32)[:, None]
    problem = make_problem(lambda p, x: jax.nn.softmax(x @ p["W"]), {"W": W}, None)
    setting = Setting(problem, make_method(num_components=1, topk=1.0))
    trained = Trained(as_components({"W": W[None]}))
    found, _ = audited(make(setting, {"W": W}, trained, x))
    assert found["gradient_forward"] == pytest.approx(-1, abs=0.01)
    assert found["gradient_reverse"] == pytest.approx(-1, abs=0.01)
    assert found["integrated_gradient"] > 0.99
