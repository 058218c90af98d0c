"""The train step: terms, masks, always-on components, instances, one trace, no sort.

Its numbers are in test_goldens.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close, load_golden, make_method, make_problem, seen

from apd_jax import attributions, components, losses, masks
from apd_jax.ablations.base import masked
from apd_jax.ablations.stochastic import draws
from apd_jax.errors import InputError
from apd_jax.forward import sparse
from apd_jax.methods.observe import example_keys
from apd_jax.train import parallel, passes
from apd_jax.train.state import begin_at, init_state
from apd_jax.train.step import make_loss, make_step, scan_steps

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
PROBLEM = make_problem(apply_fn, PARAMS, sample_fn)
KEY = jax.random.key(1)


def small(**fields):
    sizes = {"num_components": 5, "num_steps": 20, "batch_size": B, "init_scale": 3.0}
    return make_method(**sizes | {"topk": 1.3} | fields)


def begin(method, problem=PROBLEM):
    return init_state(jax.random.key(0), problem, method)


def run(method, num_steps=1, **more):
    problem = make_problem(apply_fn, PARAMS, sample_fn, **more)
    steps = jax.jit(scan_steps(make_step(problem, method), num_steps))
    return steps(begin(method, problem), PARAMS, KEY)


def first_draws(num_components=5):
    """r of the first step's one pass."""
    own = jax.random.fold_in(jax.random.fold_in(KEY, passes._PARTS), 0)
    return draws(example_keys(own, sample_fn(KEY, 0)), (), num_components)


@pytest.mark.parametrize("missing", [None, *TERMS])
def test_every_loss_can_be_switched_off(missing):
    fields = {
        coefficient: 0.0 if name == missing else 0.5 + i
        for i, (name, coefficient) in enumerate(TERMS.items())
    }
    state, metrics = run(small(**fields))
    assert set(metrics) == {"total", "mean_active", *TERMS} - {missing}
    # The total is the weighted sum, and the terms are logged without their coefficients.
    np.testing.assert_allclose(
        metrics["total"],
        sum(fields[TERMS[name]] * metrics[name] for name in TERMS if name != missing),
        rtol=1e-6,
    )
    assert state.step == 1


def test_all_terms_by_hand():
    method = small(hidden_reconstruction_coeff=1.0, attributions_at="target", minimality_loss="kl")
    c, x = begin(method).components, sample_fn(KEY, 0)
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
    _, metrics = run(method)
    for name, value in expected.items():
        close(metrics[name][0], value, err_msg=name)


def test_attributions_at_the_component_sum():
    # The mask must be that of the gradient at Σ P_c: the simplicity it gives tells it from θ*'s.
    method = small(attributions_at="components")
    c, x, simplicity = begin(method).components, sample_fn(KEY, 0), {}
    for name, at in (("components", components.total(c, PARAMS)), ("target", PARAMS)):
        mask = masks.batch_topk(attributions.gradient(apply_fn, at, c, x), 1.3)
        simplicity[name] = losses.simplicity(c, mask, 0.9)
    assert abs(simplicity["components"] / simplicity["target"] - 1) > 1e-3
    close(run(method)[1]["simplicity"][0], simplicity["components"])
    close(run(small())[1]["simplicity"][0], simplicity["target"])


def test_attribution_fn_is_used_for_the_attributions_only():
    # Its tangents decide the mask; the losses' forward passes are those of apply_fn.
    def other(params, x):
        return x @ params["w"] @ params["v"]

    method = small()
    c, x = begin(method).components, sample_fn(KEY, 0)
    mask = masks.batch_topk(attributions.gradient(other, PARAMS, c, x), 1.3)
    out, _ = sparse.apply(apply_fn, PARAMS, c, mask, x)
    expected = losses.minimality(out, apply_fn(PARAMS, x)[0])
    close(run(method, attribution_fn=other)[1]["minimality"][0], expected)


def test_make_loss_is_the_total_of_that_step():
    # Step 3 has batch and draws of its own; the same x and key give the same total again.
    method = small(inactive="uniform", simplicity_coeff_final=0.1)
    state, metrics = run(method, 3)
    one, _ = jax.jit(make_step(PROBLEM, method))(state, PARAMS, KEY)
    assert one.step == 4
    _, fourth = run(method, 4)
    loss = make_loss(PROBLEM, method, step=3)
    found = loss(state.components, state.gate, PARAMS, KEY, sample_fn(KEY, 3))
    close(found, fourth["total"][3])
    first = make_loss(PROBLEM, method)
    start = begin(method)
    close(first(start.components, None, PARAMS, KEY, sample_fn(KEY, 0)), metrics["total"][0])


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
        ({"mask": "threshold", "threshold": 0.6}, lambda s: s > 0.6),
        ({"mask": "exact"}, lambda s: masks.batch_largest(s, int((X != 0).sum()))),
        ({"mask": "none"}, lambda s: jnp.ones(s.shape, bool)),
    ],
    ids=lambda v: v.get("mask", "") if isinstance(v, dict) else "",
)
@pytest.mark.parametrize("num_always_on", [0, 2])
def test_mask_kinds_and_always_on_components(fields, expected, num_always_on):
    problem = make_problem(apply_fn, PARAMS, sample_fn, num_active_fn=num_active)
    found = small(**fields, num_always_on=num_always_on).gate((), problem)(seen(SCORES, X))
    mask = found.active
    assert mask.dtype == bool and mask.shape == (B, 5)
    # The sparse pass uses the mask itself, and the ranking is by attributions.
    np.testing.assert_array_equal(found.values, mask)
    np.testing.assert_array_equal(found.scores, SCORES)
    # The first ones are on everywhere. The choice is among the others alone: they do not count.
    assert mask[:, :num_always_on].all()
    np.testing.assert_array_equal(mask[:, num_always_on:], expected(SCORES[:, num_always_on:]))


def test_the_loss_with_inactive_components_in_part_by_hand():
    method = small(inactive="uniform", simplicity_coeff=0.0)
    c, x = begin(method).components, sample_fn(KEY, 0)
    mask = masks.batch_topk(attributions.gradient(apply_fn, PARAMS, c, x), 1.3)
    out, _ = sparse.apply(apply_fn, PARAMS, c, masked(mask, first_draws()), x)
    _, metrics = run(method)
    close(metrics["minimality"][0], losses.minimality(out, apply_fn(PARAMS, x)[0]))
    assert metrics["mean_active"][0] == 10 / 8  # the mask's


@pytest.mark.parametrize(("inactive", "threshold_rate"), [("drop", None), ("uniform", 0.4)])
def test_a_learned_mask_by_hand(inactive, threshold_rate):
    """One step of gradient descent on thresholds and components.

    Against autodiff of the loss with the importances written out.
    """
    x = sample_fn(KEY, 0)
    A = attributions.gradient(apply_fn, PARAMS, begin(small()).components, x)
    threshold = float(jnp.median(A))
    descent = {"optimizer": "sgd", "learning_rate": 0.1, "schedule": "constant"}
    learned = {"mask": "learned", "threshold": threshold, "importance_coeff": 0.2}
    method = small(
        **descent,
        **learned,
        warmup_fraction=0.0,
        inactive=inactive,
        threshold_learning_rate=threshold_rate,
        num_always_on=1,
        minimality_coeff=30.0,
    )
    before = begin(method)
    start = before.gate["log_thresholds"]
    np.testing.assert_allclose(jnp.exp(start), threshold, rtol=1e-6)

    def loss(c, log_thresholds):
        g = (A**8 / (A**8 + jnp.exp(8 * log_thresholds)[None])).at[:, 0].set(1.0)
        kept = g if inactive == "drop" else masked(g, first_draws())
        out, _ = sparse.apply(apply_fn, PARAMS, c, kept, x)
        terms = (
            losses.faithfulness(c, PARAMS),
            losses.minimality(out, apply_fn(PARAMS, x)[0]),
            losses.simplicity(c, g, method.schatten_p),
            g[:, 1:].sum() / B,
        )
        return jnp.array([1.0, 30.0, method.simplicity_coeff, 0.2]) @ jnp.array(terms)

    both = jax.value_and_grad(loss, argnums=(0, 1))
    expected, (gradient, by_thresholds) = both(before.components, start)
    state, metrics = run(method)
    close(metrics["total"][0], expected)
    assert metrics["mean_active"][0] == 1 + np.sum(A[:, 1:] > threshold) / B
    assert np.abs(by_thresholds).max() > 1e-3 and by_thresholds[0] == 0
    steps = jax.tree.map(
        lambda new, old: (old - new) / 0.1, state.components.tree, before.components.tree
    )
    jax.tree.map(lambda step, d: close(step, d, 1e-3), steps, gradient.tree)
    moved = (start - state.gate["log_thresholds"]) / (threshold_rate or 0.1)
    close(moved, by_thresholds, 1e-3)


def test_a_learned_mask_needs_thresholds():
    with pytest.raises(InputError, match="needs a gate with thresholds, as training with it gives"):
        small(mask="learned", threshold=0.1).gate((), PROBLEM)


def test_exact_mask_needs_a_target_that_knows():
    with pytest.raises(
        InputError, match=r"mask = 'exact' .* does not tell; use mask = 'batch_topk'"
    ):
        small(mask="exact").gate((), PROBLEM)
    _, metrics = run(small(mask="exact"), num_active_fn=lambda x: jnp.ones(x.shape[0], jnp.int32))
    assert metrics["mean_active"] == 1.0


def test_always_on_components_through_a_step():
    # 10 of 8·4 pairs are chosen, and 1 component is on in all 8 examples: 18 / 8.
    _, metrics = run(small(num_always_on=1))
    assert metrics["mean_active"] == 18 / 8


def test_pentagon_stays_put(pentagon):
    # At the known decomposition faithfulness and minimality are 0 and the mask is the identity.
    # With simplicity off nothing moves.
    descent = {"optimizer": "sgd", "schedule": "constant", "learning_rate": 1.0}
    sizes = {"num_components": 5, "topk": 1.0, "batch_size": 5}
    method = make_method(**sizes, **descent, simplicity_coeff=0.0, warmup_fraction=0.0)
    problem = make_problem(
        pentagon.apply_fn, pentagon.params, lambda key, i: pentagon.x, uses={"W": 2}
    )
    state = begin_at(pentagon.components, problem, method)
    step = jax.jit(make_step(problem, method))
    state, metrics = step(state, pentagon.params, jax.random.key(0))
    assert metrics["faithfulness"] < 1e-12 and metrics["mean_active"] == 1.0
    # Feature f alone through P_f alone: output f is right. Only the neighbours' cos 72° - 0.3 =
    # 0.009 is lost, 2 of 5 outputs.
    np.testing.assert_allclose(
        metrics["minimality"], 2 * (np.cos(2 * np.pi / 5) - 0.3) ** 2 / 5, rtol=1e-3
    )
    close(components.total(state.components, pentagon.params)["W"], pentagon.params["W"], 0.05)


# Execution


def test_optimizers_take_the_schedule():
    # Plain gradient descent at a warm-up of 2 steps: first at rate 0, then at half the peak.
    method = small(optimizer="sgd", learning_rate=0.1, schedule="constant", warmup_fraction=0.1)
    before = begin(method).components
    one, two = run(method)[0].components, run(method, 2)[0].components
    assert jnp.array_equal(one.factors["w"].U, before.factors["w"].U)
    assert not jnp.array_equal(two.factors["w"].U, before.factors["w"].U)
    # The first step of Adam is lr·sign(g), here 0.1.
    # adamw first takes w -> w (1 - lr·decay) = 0.95 w.
    rate = {"learning_rate": 0.1, "warmup_fraction": 0.0, "schedule": "constant"}
    for optimizer in ("adam", "adamw"):
        state, _ = run(small(optimizer=optimizer, weight_decay=0.5, **rate))
        kept = 0.95 if optimizer == "adamw" else 1.0
        moved = state.components.factors["w"].U - kept * before.factors["w"].U
        np.testing.assert_allclose(np.abs(moved), 0.1, rtol=1e-3)


@pytest.mark.parametrize(
    "fields",
    [{"unit_norm_U": True}, {"attributions_at": "components", "sparse_route": "dispatch"}],
    ids=str,
)
def test_instances_equal_single_runs(fields):
    method = small(learning_rate=0.02, **fields)
    step = scan_steps(make_step(PROBLEM, method), 3)
    init_keys = jax.random.split(jax.random.key(0), 2)
    data_keys = jax.random.split(jax.random.key(1), 2)

    def alone(init_key, data_key):
        return step(init_state(init_key, PROBLEM, method), PARAMS, data_key)

    together = jax.jit(jax.vmap(alone))(init_keys, data_keys)
    for i in range(2):
        one = jax.tree.map(lambda a, i=i: a[i], together)
        expected = jax.jit(alone)(init_keys[i], data_keys[i])
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_instances", [1, 2])
def test_one_trace_per_step_function(num_instances):
    traces = []

    def counted(params, x):
        traces.append(x.shape)
        return apply_fn(params, x)

    method, devices = small(), jax.local_devices()[:2]
    problem = make_problem(counted, PARAMS, sample_fn)
    step, key = make_step(problem, method, axis_name=parallel.AXIS), KEY
    if num_instances == 1:
        state = begin(method)
    else:
        step, key = jax.vmap(step, in_axes=(0, None, 0)), jax.random.split(key, 2)
        state = jax.vmap(lambda k: init_state(k, PROBLEM, method))(key)
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
    method = make_method(
        num_components=golden.components.num_components,
        batch_size=golden.x.shape[0],
        hidden_reconstruction_coeff=1.0,
    )
    problem = make_problem(golden.apply_fn, golden.params, lambda key, i: golden.x)
    state = begin_at(golden.components, problem, method)
    lowered = jax.jit(make_step(problem, method)).lower(state, golden.params, jax.random.key(0))
    assert "sort" not in lowered.as_text() and "top_k" not in lowered.as_text()
    text = lowered.compile().as_text()
    assert " sort(" not in text and 'custom_call_target="TopK"' not in text
