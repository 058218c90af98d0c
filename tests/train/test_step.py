"""The train step: masks, switches, always-on components, instances, one trace, no sort. Its numbers are in test_goldens.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close, load_golden, make_config

from apd_jax import attributions, components, losses
from apd_jax.errors import InputError
from apd_jax.forward import sparse
from apd_jax.gates import selection as masks
from apd_jax.train import parallel
from apd_jax.train import step as step_lib

F, H, B = 4, 3, 8
TERMS = {
    "faithfulness": "faithfulness_coeff",
    "minimality": "minimality_coeff",
    "hidden_reconstruction": "hidden_reconstruction_coeff",
    "simplicity": "simplicity_coeff",
    "attribution_lp": "attribution_lp_coeff",
}


def apply_fn(params, x):
    h = jax.nn.relu(x @ params["w"])
    return h @ params["v"], {"h": h}


def sample_fn(key, step):
    return jax.random.normal(jax.random.fold_in(key, step), (B, F))


PARAMS = {
    "w": jnp.asarray(np.random.default_rng(0).normal(size=(F, H)), jnp.float32),
    "v": jnp.asarray(np.random.default_rng(1).normal(size=(H, F)), jnp.float32),
}


def config_of(**fields):
    return make_config(
        **{"num_components": 5, "num_steps": 20, "batch_size": B, "init_scale": 3.0, "topk": 1.3}
        | fields
    )


def run(config, num_steps=1, **more):
    state = step_lib.init_state(jax.random.key(0), PARAMS, config)
    step = step_lib.make_step(apply_fn, sample_fn, config, **more)
    return jax.jit(step_lib.scan_steps(step, num_steps))(state, PARAMS, jax.random.key(1))


@pytest.mark.parametrize("missing", [None, *TERMS])
def test_every_loss_can_be_switched_off(missing):
    fields = {
        coefficient: 0.0 if name == missing else 0.5 + i
        for i, (name, coefficient) in enumerate(TERMS.items())
    }
    state, metrics = run(config_of(**fields))
    assert set(metrics) == {"total", "mean_active", *TERMS} - {missing}
    # The total is the weighted sum, and the terms are logged without their coefficients.
    np.testing.assert_allclose(
        metrics["total"],
        sum(fields[TERMS[name]] * metrics[name] for name in TERMS if name != missing),
        rtol=1e-6,
    )
    assert state.step == 1


def test_all_terms_by_hand():
    config = config_of(
        hidden_reconstruction_coeff=1.0, attributions_at="target", minimality_loss="kl"
    )
    c = step_lib.init_state(jax.random.key(0), PARAMS, config).components
    x = sample_fn(jax.random.key(1), 0)
    mask = masks.batch_topk(attributions.gradient(apply_fn, PARAMS, c, x), 1.3)
    out, hidden = sparse.apply(apply_fn, PARAMS, c, mask, x)
    target_out, target_hidden = apply_fn(PARAMS, x)
    expected = {
        "faithfulness": losses.faithfulness(c, PARAMS),
        "minimality": losses.minimality(out, target_out, "kl"),
        "hidden_reconstruction": losses.hidden_reconstruction(hidden, target_hidden),
        "simplicity": losses.simplicity(c, mask, 0.9),
        "mean_active": 10 / 8,  # ⌊1.3·8⌋ = 10 pairs of 8 examples
    }
    _, metrics = run(config)
    for name, value in expected.items():
        close(metrics[name][0], value, err_msg=name)


def test_attributions_at_the_component_sum():
    # The mask must be that of the gradient at Σ P_c: it is told from the one at θ* by the simplicity it gives.
    config = config_of(attributions_at="components")
    c = step_lib.init_state(jax.random.key(0), PARAMS, config).components
    x, simplicity = sample_fn(jax.random.key(1), 0), {}
    for name, at in (("components", components.total(c, PARAMS)), ("target", PARAMS)):
        simplicity[name] = losses.simplicity(
            c, masks.batch_topk(attributions.gradient(apply_fn, at, c, x), 1.3), 0.9
        )
    assert abs(simplicity["components"] / simplicity["target"] - 1) > 1e-3
    close(run(config)[1]["simplicity"][0], simplicity["components"])
    close(run(config_of())[1]["simplicity"][0], simplicity["target"])


def test_attribution_fn_is_used_for_the_attributions_only():
    # Its tangents decide the mask; the losses' forward passes are those of apply_fn.
    def other(params, x):
        return x @ params["w"] @ params["v"]

    config = config_of()
    c = step_lib.init_state(jax.random.key(0), PARAMS, config).components
    x = sample_fn(jax.random.key(1), 0)
    mask = masks.batch_topk(attributions.gradient(other, PARAMS, c, x), 1.3)
    expected = losses.minimality(
        sparse.apply(apply_fn, PARAMS, c, mask, x)[0], apply_fn(PARAMS, x)[0]
    )
    close(run(config, attribution_fn=other)[1]["minimality"][0], expected)


# Masks

SCORES = jnp.asarray(np.random.default_rng(2).uniform(size=(B, 5)), jnp.float32)
X = jnp.asarray(
    np.random.default_rng(3).normal(size=(B, F))
    * (np.random.default_rng(4).uniform(size=(B, F)) < 0.4),
    jnp.float32,
)


def num_active(x):
    return jnp.sum(x != 0, axis=1)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"mask": "batch_topk"}, lambda s: masks.batch_topk(s, 1.3)),
        ({"mask": "topk", "topk": 2.0}, lambda s: masks.topk(s, 2)),
        ({"mask": "exact"}, lambda s: masks.batch_largest(s, int((X != 0).sum()))),
        ({"mask": "none"}, lambda s: jnp.ones(s.shape, bool)),
    ],
    ids=lambda v: v.get("mask", "") if isinstance(v, dict) else "",
)
@pytest.mark.parametrize("num_always_on", [0, 2])
def test_mask_kinds_and_always_on_components(fields, expected, num_always_on):
    mask_fn = step_lib.make_mask_fn(
        config_of(**fields, num_always_on=num_always_on), num_active_fn=num_active
    )
    mask = mask_fn(SCORES, X)
    assert mask.dtype == bool and mask.shape == (B, 5)
    # The first ones are on everywhere and the choice is among the others alone: they are not counted.
    assert mask[:, :num_always_on].all()
    np.testing.assert_array_equal(mask[:, num_always_on:], expected(SCORES[:, num_always_on:]))


def test_inactive_components_in_part():
    """1 where kept; elsewhere uniform, drawn for every example and component apart, and for a share of the components as for all."""
    keys = jax.random.split(jax.random.key(0), 500)
    mask = jnp.tile(jnp.array([True, False, False, False]), (500, 1))
    kept = step_lib.partly(mask, keys)
    assert (kept[:, 0] == 1).all() and kept.min() >= 0 and kept[:, 1:].max() < 1
    np.testing.assert_allclose(np.cov(kept[:, 1:].T), np.eye(3) / 12, atol=0.012)
    np.testing.assert_allclose(kept[:, 1:].mean(0), 0.5, atol=0.05)
    halves = jax.vmap(
        lambda part: step_lib.partly(part, keys, "component"),
        axis_name="component",
        in_axes=1,
        out_axes=1,
    )
    np.testing.assert_array_equal(halves(mask.reshape(500, 2, 2)).reshape(500, 4), kept)


def test_the_loss_with_inactive_components_in_part_by_hand():
    config = config_of(inactive="uniform", simplicity_coeff=0.0)
    c, key = step_lib.init_state(jax.random.key(0), PARAMS, config).components, jax.random.key(1)
    x = sample_fn(key, 0)
    mask = masks.batch_topk(attributions.gradient(apply_fn, PARAMS, c, x), 1.3)
    draws = jax.random.fold_in(jax.random.fold_in(key, step_lib._PARTS), 0)
    kept = step_lib.partly(mask, jax.vmap(lambda b: jax.random.fold_in(draws, b))(jnp.arange(B)))
    out, _ = sparse.apply(apply_fn, PARAMS, c, kept, x)
    _, metrics = run(config)
    close(metrics["minimality"][0], losses.minimality(out, apply_fn(PARAMS, x)[0]))
    assert metrics["mean_active"][0] == 10 / 8  # the mask's


@pytest.mark.parametrize(("inactive", "threshold_rate"), [("drop", None), ("uniform", 0.4)])
def test_a_learned_mask_by_hand(inactive, threshold_rate):
    """One step of gradient descent on thresholds and components, against autodiff of the loss with the importances written out."""
    fields = {
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "schedule": "constant",
        "warmup_fraction": 0.0,
        "inactive": inactive,
    }
    fields |= {"threshold_learning_rate": threshold_rate}
    key = jax.random.key(1)
    x = sample_fn(key, 0)
    A = attributions.gradient(
        apply_fn, PARAMS, step_lib.init_state(jax.random.key(0), PARAMS, config_of()).components, x
    )
    threshold = float(jnp.median(A))
    config = config_of(
        mask="learned",
        threshold=threshold,
        importance_coeff=0.2,
        num_always_on=1,
        minimality_coeff=30.0,
        **fields,
    )
    before = step_lib.init_state(jax.random.key(0), PARAMS, config).components
    np.testing.assert_allclose(before.thresholds, threshold, rtol=1e-6)
    draws = jax.random.fold_in(jax.random.fold_in(key, step_lib._PARTS), 0)

    def loss(c):
        g = (A**8 / (A**8 + jnp.exp(8 * c.log_thresholds)[None])).at[:, 0].set(1.0)
        kept = (
            g
            if inactive == "drop"
            else step_lib.partly(g, jax.vmap(lambda b: jax.random.fold_in(draws, b))(jnp.arange(B)))
        )
        out, _ = sparse.apply(apply_fn, PARAMS, c, kept, x)
        terms = (
            losses.faithfulness(c, PARAMS),
            losses.minimality(out, apply_fn(PARAMS, x)[0]),
            losses.simplicity(c, g, config.schatten_p),
        )
        return jnp.array([1.0, 30.0, config.simplicity_coeff, 0.2]) @ jnp.array(
            [*terms, g[:, 1:].sum() / B]
        )

    expected, gradient = jax.value_and_grad(loss)(before)
    state, metrics = run(config)
    close(metrics["total"][0], expected)
    assert metrics["mean_active"][0] == 1 + np.sum(A[:, 1:] > threshold) / B
    assert np.abs(gradient.log_thresholds).max() > 1e-3 and gradient.log_thresholds[0] == 0
    steps = jax.tree.map(lambda new, old: (old - new) / 0.1, state.components, before)
    jax.tree.map(lambda step, d: close(step, d, 1e-3), steps.tree, gradient.tree)
    close(steps.log_thresholds, gradient.log_thresholds * (threshold_rate or 0.1) / 0.1, 1e-3)


def test_a_learned_mask_needs_thresholds():
    with pytest.raises(InputError, match="needs components with thresholds"):
        step_lib.make_mask_fn(config_of(mask="learned", threshold=0.1))(SCORES, X)


def test_exact_mask_needs_a_target_that_knows():
    with pytest.raises(
        InputError, match=r"mask = 'exact' .* does not tell; use mask = 'batch_topk'"
    ):
        step_lib.make_mask_fn(config_of(mask="exact"))
    _, metrics = run(
        config_of(mask="exact"), num_active_fn=lambda x: jnp.ones(x.shape[0], jnp.int32)
    )
    assert metrics["mean_active"] == 1.0


def test_always_on_components_through_a_step():
    # 10 of 8·4 pairs are chosen, and 1 component is on in all 8 examples: 18 / 8.
    _, metrics = run(config_of(num_always_on=1))
    assert metrics["mean_active"] == 18 / 8


def test_pentagon_stays_put(pentagon):
    # At the known decomposition faithfulness and minimality are 0, the mask is the identity, and with simplicity off nothing moves.
    config = make_config(
        num_components=5,
        topk=1.0,
        batch_size=5,
        simplicity_coeff=0.0,
        optimizer="sgd",
        schedule="constant",
        learning_rate=1.0,
    )
    config.warmup_fraction = 0.0
    step = step_lib.make_step(pentagon.apply_fn, lambda key, i: pentagon.x, config)
    state = step_lib.TrainState(
        jnp.zeros((), jnp.int32),
        pentagon.components,
        step_lib.make_optimizer(config).init(pentagon.components),
    )
    state, metrics = jax.jit(step)(state, pentagon.params, jax.random.key(0))
    assert metrics["faithfulness"] < 1e-12 and metrics["mean_active"] == 1.0
    # Feature f alone through P_f alone: output f is right; only the neighbours' cos 72° - 0.3 = 0.009 is lost, 2 of 5 outputs.
    np.testing.assert_allclose(
        metrics["minimality"], 2 * (np.cos(2 * np.pi / 5) - 0.3) ** 2 / 5, rtol=1e-3
    )
    close(components.total(state.components, pentagon.params)["W"], pentagon.params["W"], 0.05)


# Execution


def test_optimizers_take_the_schedule():
    # Plain gradient descent at a warm-up of 2 steps: the first step has rate 0, the second half the peak.
    config = config_of(optimizer="sgd", learning_rate=0.1, schedule="constant", warmup_fraction=0.1)
    before = step_lib.init_state(jax.random.key(0), PARAMS, config).components
    one, two = run(config)[0].components, run(config, 2)[0].components
    assert jnp.array_equal(one.factors["w"].U, before.factors["w"].U)
    assert not jnp.array_equal(two.factors["w"].U, before.factors["w"].U)
    # The first step of Adam is lr·sign(g), here 0.1; adamw first takes w -> w (1 - lr·decay) = 0.95 w.
    for optimizer in ("adam", "adamw"):
        state, _ = run(
            config_of(
                optimizer=optimizer,
                weight_decay=0.5,
                learning_rate=0.1,
                warmup_fraction=0.0,
                schedule="constant",
            )
        )
        kept = 0.95 if optimizer == "adamw" else 1.0
        moved = state.components.factors["w"].U - kept * before.factors["w"].U
        np.testing.assert_allclose(np.abs(moved), 0.1, rtol=1e-3)


@pytest.mark.parametrize(
    "fields",
    [{"unit_norm_U": True}, {"attributions_at": "components", "sparse_route": "dispatch"}],
    ids=str,
)
def test_instances_equal_single_runs(fields):
    config = config_of(learning_rate=0.02, **fields)
    step = step_lib.scan_steps(step_lib.make_step(apply_fn, sample_fn, config), 3)
    init_keys, data_keys = (
        jax.random.split(jax.random.key(0), 2),
        jax.random.split(jax.random.key(1), 2),
    )
    init = lambda key: step_lib.init_state(key, PARAMS, config)  # noqa: E731
    together = jax.jit(jax.vmap(lambda i, d: step(init(i), PARAMS, d)))(init_keys, data_keys)
    alone = jax.jit(lambda i, d: step(init(i), PARAMS, d))
    for i in range(2):
        for a, b in zip(
            jax.tree.leaves(jax.tree.map(lambda a, i=i: a[i], together)),
            jax.tree.leaves(alone(init_keys[i], data_keys[i])),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_instances", [1, 2])
def test_one_trace_per_step_function(num_instances):
    traces = []

    def counted(params, x):
        traces.append(x.shape)
        return apply_fn(params, x)

    config, devices = config_of(), jax.local_devices()[:2]
    step = step_lib.make_step(counted, sample_fn, config, axis_name=parallel.AXIS)
    key, init = jax.random.key(1), lambda key: step_lib.init_state(key, PARAMS, config)
    if num_instances == 1:
        state = init(key)
    else:
        step, key = jax.vmap(step, in_axes=(0, None, 0)), jax.random.split(key, 2)
        state = jax.vmap(init)(key)
    program, state = parallel.pmap_steps(step, 3, devices), parallel.replicate(state, devices)
    state, _ = program(state, PARAMS, key)
    first = len(traces)
    for _ in range(3):
        state, _ = program(state, PARAMS, key)
    assert len(traces) == first > 0
    assert parallel.unreplicate(state).step.reshape(-1)[0] == 12


@pytest.mark.parametrize("name", ["tms_small", "resid1_small"])
def test_no_sort_in_the_compiled_step(name):
    golden = load_golden(name)
    config = make_config(
        num_components=golden.components.num_components,
        batch_size=golden.x.shape[0],
        hidden_reconstruction_coeff=1.0,
    )
    step = step_lib.make_step(golden.apply_fn, lambda key, i: golden.x, config)
    state = step_lib.TrainState(
        jnp.zeros((), jnp.int32),
        golden.components,
        step_lib.make_optimizer(config).init(golden.components),
    )
    lowered = jax.jit(step).lower(state, golden.params, jax.random.key(0))
    assert "sort" not in lowered.as_text() and "top_k" not in lowered.as_text()
    text = lowered.compile().as_text()
    assert " sort(" not in text and "TopK" not in text
