"""Methods with learned gates: their terms by hand, and the same step on one and on two devices."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close, make_problem

from apd_jax import components, losses
from apd_jax.ablations.base import masked
from apd_jax.ablations.stochastic import draws
from apd_jax.errors import InputError
from apd_jax.forward import sparse
from apd_jax.forward.sparse import SiteWeights
from apd_jax.methods import observe
from apd_jax.methods.base import ELSEWHERE, HERE
from apd_jax.methods.observe import example_keys
from apd_jax.methods.spd import SPD
from apd_jax.methods.targeted import Targeted
from apd_jax.methods.vpd import VPD
from apd_jax.methods.whole import Whole
from apd_jax.train import loop, parallel, passes
from apd_jax.train.state import init_state
from apd_jax.train.step import make_step

RNG = np.random.default_rng(0)
PARAMS = {
    "w": jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32),
    "v": jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32),
}
KEY = jax.random.key(1)
B = 8
SMALL = {"num_components": 6, "batch_size": B, "num_steps": 20, "warmup_fraction": 0.0}
SMALL |= {"optimizer": "sgd", "learning_rate": 0.05, "faithfulness_warmup_steps": 0}
LITTLE = {"gate_kind": "pieces", "gate_width": 3}
GENTLE = {"faithfulness_coeff": 1.0, "gradient_clip": 0.5, "adversary_rate": 0.1}


def apply_fn(params, x):
    h = jax.nn.relu(x @ params["w"])
    return h @ params["v"], {"h": h}


def sample_fn(key, step):
    return jax.random.normal(jax.random.fold_in(key, step), (B, 6))


def sequences(key, step):
    return jax.random.normal(jax.random.fold_in(key, step), (B, 2, 6))


def valid(x):
    """The first position always, the second of some examples."""
    return jnp.stack([jnp.ones(x.shape[0], bool), x[:, 1, 0] > 0], axis=1)


def elsewhere(key, step):
    return 2 + jax.random.normal(jax.random.fold_in(key, 77 + step), (B, 6))


PROBLEM = make_problem(apply_fn, PARAMS, sample_fn)
SEQUENCES = make_problem(apply_fn, PARAMS, sequences, valid_fn=valid)
TWO_STREAMS = make_problem(apply_fn, PARAMS, sample_fn, elsewhere=elsewhere)


def begun(problem, method):
    """The state that training begins with."""
    return jax.jit(lambda: init_state(jax.random.key(0), problem, method))()


def first_step(method, problem=PROBLEM):
    """The states before and after it, its gate's activity by stream, the batch and the metrics."""
    state = begun(problem, method)

    @jax.jit
    def first(state):
        gate, x = method.gate(state.gate, problem), problem.source(KEY, 0)
        activity = {}
        for stream, batch in method.by_stream(x).items():
            scene = observe.scene(method, problem, gate, state.components, PARAMS, batch)
            activity[stream] = vars(gate(scene.seen))
        return make_step(problem, method)(state, PARAMS, KEY), activity, x

    (after, metrics), activity, x = first(state)
    return (state, after), {s: SimpleNamespace(**a) for s, a in activity.items()}, x, metrics


def pass_keys(number, x):
    """The draws of a pass of the first step, a key per example."""
    return example_keys(jax.random.fold_in(jax.random.fold_in(KEY, passes._PARTS + number), 0), x)


def test_spd_by_hand():
    method = SPD(**SMALL, **LITTLE, importance_p=0.7, importance_coeff=0.1, dropped_coeff=0.5)
    (state, _), activity, x, metrics = first_step(method)
    activity, c = activity[HERE], state.components
    # Every site has numbers of its own: 6 for v, the first in the tree, and 6 for w.
    assert {name: f.ids for name, f in c.factors.items()} == {"v": range(0, 6), "w": range(6, 12)}
    assert activity.values.shape == (B, 12) and c.factors["w"].rank == 1

    @jax.jit
    def by_hand(c, g):
        target = apply_fn(PARAMS, x)[0]
        drawn = [masked(g, draws(pass_keys(i, x), (), 12)) for i in (0, 1)]

        def distance(m, only):
            weights = {name: SiteWeights(c.factors[name].take(m)) for name in only}
            return losses.minimality(sparse.run(apply_fn, PARAMS, c, weights, x)[0], target)

        return {
            "faithfulness": losses.faithfulness(c, PARAMS),
            "stochastic": distance(drawn[0], ("v", "w")),
            "layerwise": (distance(drawn[1], ["v"]) + distance(drawn[1], ["w"])) / 2,
            "dropped": distance(g, ("v", "w")),
        }

    expected = by_hand(c, activity.values) | {
        "importance": np.mean((np.asarray(activity.upper) + 1e-12) ** 0.7, axis=0).sum(),
        "mean_active": np.sum(activity.active) / B,
    }
    assert set(metrics) == {*expected, "total"}
    for name, value in expected.items():
        close(metrics[name], value, err_msg=name)
    total = sum(metrics[name] for name in ("faithfulness", "stochastic", "layerwise"))
    close(metrics["total"], total + 0.1 * metrics["importance"] + 0.5 * metrics["dropped"])


def test_smooth_l0_in_place_of_a_power():
    fields = {"importance_gamma": 0.5, "importance_gamma_final": 0.1}
    alone = {"stochastic_coeff": 0.0, "elsewhere_coeff": 0.0}  # no other pass is compiled
    method = Targeted(**SMALL, **LITTLE, **fields, **alone)
    _, activity, _, metrics = first_step(method, TWO_STREAMS)
    for stream, name in ((HERE, "importance"), (ELSEWHERE, "importance_elsewhere")):
        g2 = np.asarray(activity[stream].upper, np.float64) ** 2
        close(metrics[name], np.mean(1.25 * g2 / (g2 + 0.25), axis=0).sum())
    assert abs(float(metrics["importance"] - metrics["importance_elsewhere"])) > 1e-3
    with pytest.raises(InputError, match="importance_gamma_final must be a finite number above 0"):
        method.replace(importance_gamma_final=0.0).check()


def test_frequency_and_trim_by_hand():
    method = Whole(**SMALL, **LITTLE, **GENTLE, rank=3, adversarial_coeff=0.0, trim_coeff=0.1)
    method = method.replace(importance_p_final=None)  # p stays 2
    (state, _), activity, _, metrics = first_step(method)
    activity, c = activity[HERE], state.components
    # All numbers at every site.
    assert all(f.ids is None and f.rank == 3 for f in c.factors.values())
    rates = np.mean((np.asarray(activity.upper) + 1e-12) ** 2, axis=0)
    close(metrics["importance"], rates.sum())
    close(metrics["frequency"], np.sum(rates * np.log2(1 + B * rates)))
    fired = jax.device_put(np.mean(activity.active, axis=0, dtype=np.float32))
    close(metrics["trim"], losses.trim(c, fired, method.trim_p))
    assert "adversarial" not in metrics and state.ablation == {}


def test_the_adversary_is_worse_than_chance_and_kept():
    method = VPD(**SMALL, **LITTLE, **GENTLE, importance_coeff=0.0, frequency_coeff=0.0)
    method = method.replace(adversary_ascents=8, stochastic_coeff=0.0)
    (state, after), _, _, metrics = first_step(method)
    calm = first_step(method.replace(adversary_ascents=0))[3]
    assert metrics["adversarial"] > 1.2 * calm["adversarial"]
    before, after = state.ablation["adversarial"], after.ablation["adversarial"]
    # 8 ascents, and the one of the training pass itself.
    assert before.count == 0 and after.count == 9
    assert after.sources.components.shape == (B, 12) and after.sources.delta.shape == (B, 2)
    assert (np.asarray(after.sources.components) != before.sources.components).any()


NESTED = {"rank": 3, "nested": True, "trim_coeff": 0.1}
BLOCK = {"gate_kind": "transformer", "gate_d_model": 8, "gate_blocks": 1}
FRESH = {"adversary": "fresh", "adversary_shared": "batch"}
EVERY = {  # each kind of gate, adversary, mask and stream once
    "spd": SPD(**SMALL, **LITTLE, gate_learning_rate=0.1),
    "vpd": VPD(**SMALL, **GENTLE, **BLOCK, mask_per="position"),
    "whole": Whole(**SMALL, **LITTLE, **GENTLE, **NESTED, adversary="pooled"),
    "targeted": Targeted(
        **(SMALL | LITTLE | GENTLE | FRESH),
        **{"unmasked_coeff": 0.5, "dropped_coeff": 0.5, "frequency_coeff": 0.1},
    ),
}


def problem_of(method):
    if method.per_position:
        return SEQUENCES
    return TWO_STREAMS if len(method.streams) > 1 else PROBLEM


def run(method, state, num_devices, num_steps=3):
    problem, devices = problem_of(method), jax.local_devices()[:num_devices]
    step = make_step(problem, method, axis_name=parallel.AXIS)
    state, metrics = parallel.pmap_steps(step, num_steps, devices)(
        parallel.replicate(state, devices), PARAMS, KEY
    )
    for leaf in jax.tree.leaves(jax.device_get(state)):  # every device holds the same
        for copy in leaf[1:]:
            np.testing.assert_array_equal(copy, leaf[0])
    return parallel.unreplicate(state), jax.device_get(metrics)


def measured(method):
    return {name for name, term in method.terms().items() if term.on}


@pytest.mark.parametrize("name", EVERY)
def test_two_devices_do_what_one_does(name):
    method = EVERY[name]
    method.check()
    before = begun(problem_of(method), method)
    (one, metrics), (two, theirs) = run(method, before, 1), run(method, before, 2)
    assert set(theirs) == set(metrics) == measured(method) | {"total", "mean_active"}
    for term, values in metrics.items():
        assert np.isfinite(values).all()
        np.testing.assert_allclose(theirs[term], values, rtol=1e-5, atol=1e-7, err_msg=term)
    for part in ("components", "gate", "ablation"):
        ours = getattr(one, part)
        jax.tree.map(lambda a, b: close(a, b, 1e-5), getattr(two, part), ours)
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), ours, getattr(before, part))
        if part == "components" or (method.gate_kind == "pieces" and part == "gate"):
            assert min(jax.tree.leaves(moved)) > 0, part  # all of it is trained


def test_two_streams_of_data():
    # What is elsewhere has a term of its own; Δ is whole there, so the pass is the target's where
    # nothing is ablated.
    own = {"elsewhere", "unmasked", "dropped", "dropped_elsewhere", "importance_elsewhere"}
    assert own <= measured(EVERY["targeted"])
    with pytest.raises(InputError, match="needs a second stream of data; give elsewhere"):
        loop.fit(PROBLEM, EVERY["targeted"])


def test_faithfulness_warm_up_comes_before_the_first_step():
    method = EVERY["spd"].replace(faithfulness_warmup_steps=60, faithfulness_warmup_rate=0.05)
    warm = jax.jit(lambda key: init_state(key, PROBLEM, method))(jax.random.key(0)).components
    cold = begun(PROBLEM, EVERY["spd"]).components
    missing = [losses.relative_faithfulness(c, PARAMS) for c in (cold, warm)]
    assert missing[0] > 0.5 and missing[1] < 0.2 * missing[0]
    # Before it, components are as large together as the target's weights.
    close(jnp.std(components.total(cold, PARAMS)["w"]), jnp.std(PARAMS["w"]), 0.5)
