"""Partial ablation against numpy, brute force over corners, and interval bounds."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_method, make_problem

from apd_jax import components as components_lib
from apd_jax.decomposition import Decomposition
from apd_jax.evidence import ablate, bounds
from apd_jax.evidence.check import Case
from apd_jax.evidence.subject import Setting, Subject, baselines, distance, errors, outputs, scaled
from apd_jax.methods.optimizers import Trained

C, N = 4, 256
UNUSED = components_lib.from_materialized({"w": jnp.zeros((2, 2, 2))})


def make_subject(apply_fn, weights, x, mask, **fields):
    """Components with the given P_c, [C, ...] per leaf, and the mask as it is given.

    The target is their sum.
    """
    components = components_lib.from_materialized(weights)
    params = {name: jnp.sum(P, axis=0) for name, P in weights.items()}
    method = make_method(num_components=mask.shape[1], **fields)
    problem = make_problem(apply_fn, params, None)
    decomposition = Decomposition(problem, components, method)
    seen = (params, Trained(components), x, apply_fn(params, x))
    subject = Subject(*seen, jnp.ones(mask.shape), mask, mask, Setting(problem, method))
    return subject, Case(subject, decomposition, jax.random.key(0), lambda i: x, 1)


@pytest.fixture(scope="module")
def linear():
    """f(x) = x·w with one output.

    Component c contributes a_bc = x_b·w_c, so D_b = (Σ_inactive (1 - r_c) a_bc)².
    """
    rng = np.random.default_rng(0)
    w = rng.normal(size=(C, 3, 1)).astype(np.float32)
    x = rng.normal(size=(N, 3)).astype(np.float32)
    mask = rng.random((N, C)) < 0.4
    subject, case = make_subject(
        lambda p, x: x @ p["w"], {"w": jnp.asarray(w)}, jnp.asarray(x), jnp.asarray(mask)
    )
    return subject, case, np.where(mask, 0, (x @ w[:, :, 0].T)).astype(np.float64)


def test_scale_is_the_output_variance(linear):
    subject, case, _ = linear
    constant, none = baselines(subject)
    assert float(constant) == pytest.approx(float(np.var(subject.target_out)), rel=1e-5)
    # Without components a linear network gives 0.
    assert float(none) == pytest.approx(float(np.mean(subject.target_out**2)), rel=1e-5)
    assert case.scale == pytest.approx(min(float(constant), float(none)))


def test_random_and_average_scales(linear):
    _, case, a = linear
    values = ablate.partial(case).values
    assert values["zero"] == pytest.approx(np.mean(a.sum(1) ** 2) / case.scale, rel=1e-4)
    # 1 - r is uniform: mean 1/2, variance 1/12. 8 · 256 draws: a few per cent of noise.
    expected = np.mean(a.sum(1) ** 2 / 4 + (a**2).sum(1) / 12)
    assert values["random"] == pytest.approx(expected / case.scale, rel=0.1)
    rate = np.asarray(case.subject.mask).mean(axis=0)
    assert values["mean"] == pytest.approx(np.mean((a @ (1 - rate)) ** 2) / case.scale, rel=1e-4)
    # Fresh components are small, so putting them in the place of the inactive ones changes little.
    assert values["init"] == pytest.approx(values["zero"], rel=0.5)
    assert values["init"] != values["zero"]


def test_trajectories(linear):
    _, case, a = linear
    check = ablate.monotone(case)
    t = np.linspace(0, 1, ablate.CURVE_POINTS)
    np.testing.assert_allclose(
        check.arrays["trajectory_joint"],
        t**2 * np.mean(a.sum(1) ** 2) / case.scale,
        rtol=1e-3,
        atol=1e-6,
    )
    # Attributions are all alike here, so the order is that of the components: the first
    # ⌊t·inactive⌉ inactive ones are off.
    inactive = ~np.asarray(case.subject.mask)
    place = np.cumsum(inactive, axis=1) - 1
    for point in (5, 10, 17):
        off = inactive & (place < np.round(np.float32(t[point]) * inactive.sum(1, keepdims=True)))
        expected = np.mean((a * off).sum(1) ** 2) / case.scale
        assert check.arrays["trajectory_by_attribution"][point] == pytest.approx(
            expected, rel=1e-3, abs=1e-6
        )
    for curve in check.arrays.values():
        assert curve[0] == pytest.approx(0, abs=1e-6) and curve[-1] == pytest.approx(
            np.mean(a.sum(1) ** 2) / case.scale, rel=1e-3
        )


def test_the_attack_finds_the_worst_corner(linear):
    subject, case, a = linear
    # The error is convex in r, so its maximum is at a corner: shared, the worst of 2^C; per example
    # the larger of the sums of positive and of negative contributions.
    worst = max(np.mean((a @ (1 - np.array(r))) ** 2) for r in itertools.product((0, 1), repeat=C))
    found = ablate.worst(case).arrays["worst_shared"] * case.scale
    assert found[-1] == pytest.approx(worst, rel=1e-3) and (np.diff(found) >= 0).all()
    each = np.maximum(np.maximum(a, 0).sum(1), np.maximum(-a, 0).sum(1)) ** 2
    found = ablate.attack(subject, jax.random.key(1), shared=False)[-1]
    assert (np.asarray(found) <= each * (1 + 1e-4) + 1e-6).all()
    assert np.mean(found) == pytest.approx(each.mean(), rel=0.05)  # a local maximum here and there


def test_kl_over_positions_without_padding():
    """D is a mean over examples and the positions that count, by numpy.

    The constant output is the mean distribution.
    """
    rng = np.random.default_rng(3)
    # 6 examples, 5 positions, 4 classes.
    logits, other = rng.normal(size=(2, 6, 5, 4)).astype(np.float32)
    valid = rng.random((6, 5)) < 0.7
    problem = make_problem(
        lambda p, x: x, {"w": jnp.ones((2, 2))}, None, valid_fn=lambda x: jnp.asarray(valid)
    )
    setting = Setting(problem, make_method(minimality_loss="kl"))
    shown, off = jnp.asarray(logits), jnp.zeros((6, 2), bool)
    trained = Trained(UNUSED)
    subject = Subject(problem.params, trained, shown, shown, off, off, off, setting)
    p, q = (np.exp(a) / np.exp(a).sum(-1, keepdims=True) for a in (logits, other))
    kl = np.sum(p * np.log(p / q), axis=-1)
    assert np.mean(distance(subject, jnp.asarray(other))) == pytest.approx(
        kl[valid].mean(), rel=1e-5
    )
    mean = p[valid].mean(axis=0)
    expected = np.sum(p * np.log(p / mean), axis=-1)[valid].mean()
    assert float(baselines(subject)[0]) == pytest.approx(expected, rel=1e-4)
    # What stands at padding does not matter.
    spoilt = np.where(valid[:, :, None], other, 100 * other)
    np.testing.assert_allclose(
        distance(subject, jnp.asarray(spoilt)), distance(subject, jnp.asarray(other)), rtol=1e-6
    )


def network(params, x):
    """Two layers, one weight used twice, and of every interval rule at least one operation."""
    h = jax.nn.relu(x @ params["a"] + params["b"][None, :])
    h = jnp.concatenate([h, -h], axis=1) - 0.1
    h = (h @ params["c"]).reshape(x.shape[0], 2, 2) / jnp.asarray([2.0, -3.0])[None, :, None]
    return (
        jnp.tanh(h.reshape(x.shape[0], 4) @ params["a"].T[:, :3]) ** 2
        * jnp.sum(h, axis=(1, 2))[:, None]
        + x
    )


@pytest.fixture(scope="module", params=["mse", "kl"])
def small(request):
    rng = np.random.default_rng(1)
    shapes = {"a": (3, 4), "b": (4,), "c": (8, 4)}
    weights = {
        name: jnp.asarray(0.5 * rng.normal(size=(C, *shape)), jnp.float32)
        for name, shape in shapes.items()
    }
    weights["b"] = weights["b"][:, None, :]  # components hold matrices
    x, mask = (
        jnp.asarray(rng.normal(size=(24, 3)), jnp.float32),
        jnp.asarray(rng.random((24, C)) < 0.5),
    )
    return make_subject(
        lambda p, x: network(p | {"b": p["b"][0]}, x),
        weights,
        x,
        mask,
        minimality_loss=request.param,
    )


def test_permitted_masks_stay_inside_the_bound(small):
    subject, case = small
    lo, hi = bounds.output_bounds(subject, 24)
    limit = bounds.error_bound(subject, 24)
    assert np.all(np.asarray(hi) >= np.asarray(lo)) and np.isfinite(hi).all()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        r = rng.random(subject.mask.shape)  # inside, and at corners
        r = r if seed % 2 else r < 0.5
        mask = scaled(subject, jnp.asarray(r, jnp.float32))
        out = outputs(subject, mask)
        assert np.all(out >= lo - 1e-4) and np.all(out <= hi + 1e-4)
        assert np.all(errors(subject, mask) <= limit * (1 + 1e-4) + 1e-5)
    values = ablate.worst(case).values
    assert 0 < values["per_example_where_bounded"] <= values["bound"] * (1 + 1e-4)


def test_without_inactive_components_the_bound_is_the_output(small):
    subject, _ = small
    mask = subject.mask | True
    every = dataclasses.replace(subject, mask=mask, values=mask)
    lo, hi = bounds.output_bounds(every, 24)
    np.testing.assert_allclose(lo, subject.target_out, atol=1e-5)
    np.testing.assert_allclose(hi, subject.target_out, atol=1e-5)


def test_a_component_that_is_needed_in_part_may_be_worth_that_part(linear):
    subject, _, _ = linear
    g = np.where(subject.mask, 1.0, 0.0)
    g[:, 0] = 0.25
    every = jnp.ones_like(subject.mask)
    graded = dataclasses.replace(subject, mask=every, values=jnp.asarray(g, jnp.float32))
    r = np.random.default_rng(3).random(g.shape)
    np.testing.assert_allclose(scaled(graded, jnp.float32(r)), g + (1 - g) * r, rtol=1e-6)
    # Rounded up, nothing would be left to ablate; the ascent finds what is left of 1 - g.
    found = ablate.attack(graded, jax.random.key(0), shared=False, steps=20)[-1]
    assert np.all(found > 0)
    lo, hi = bounds.output_bounds(graded, 24)
    assert np.all(hi > lo)
    assert np.all(found[:24] <= bounds.error_bound(graded, 24) * (1 + 1e-4))


def test_an_interval_worked_by_hand():
    # w = 1 (active) + [0, 2] + [-3, 0] (inactive) = [-2, 3]; relu(2·w) = [0, 6]; minus 1: [-1, 5].
    # Target: relu(0) - 1 = -1, so the error is up to 36.
    weights = {"w": jnp.array([1.0, 2.0, -3.0]).reshape(3, 1, 1)}
    subject, _ = make_subject(
        lambda p, x: jax.nn.relu(x @ p["w"]) - 1,
        weights,
        jnp.array([[2.0]]),
        jnp.array([[True, False, False]]),
    )
    lo, hi = bounds.output_bounds(subject, 1)
    assert (lo.item(), hi.item()) == pytest.approx((-1, 5))
    assert bounds.error_bound(subject, 1).item() == pytest.approx(36)


def test_an_operation_without_a_rule_is_named():
    weights = {"w": jnp.array([1.0, 2.0]).reshape(2, 1, 1)}
    subject, case = make_subject(
        lambda p, x: jnp.sin(x @ p["w"]), weights, jnp.ones((4, 1)), jnp.array([[True, False]] * 4)
    )
    with pytest.raises(bounds.UnboundedError, match="'sin'"):
        bounds.error_bound(subject, 4)
    check = ablate.worst(case)
    assert "no interval rule for the operation 'sin'" in check.text and "bound" not in check.values
