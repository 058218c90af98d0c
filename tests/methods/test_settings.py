"""Instances that differ in settings: each is the run that has these values in its settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close, make_method

from apd_jax.errors import NonFiniteError
from apd_jax.methods.apd import APD
from apd_jax.methods.vpd import VPD
from apd_jax.network.problem import Problem
from apd_jax.train import loop as train

PARAMS = {
    "w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32),
    "v": jnp.asarray(np.random.default_rng(1).normal(size=(3, 4)), jnp.float32),
}
SMALL = {
    "num_components": 5,
    "num_steps": 6,
    "batch_size": 8,
    "init_scale": 3.0,
    "learning_rate": 1e-2,
    "warmup_fraction": 0.4,
}
SMALL |= {"steps_per_call": 3, "log_every_steps": 1}
BASES = {
    "topk": {
        "topk": 1.3,
        "simplicity_coeff_final": 0.5,
        "hidden_reconstruction_coeff": 0.5,
        "optimizer": "adamw",
        "weight_decay": 0.1,
    },
    "whole": {"mask": "topk", "topk": 2.0, "sparse_route": "dispatch", "schedule": "linear"},
    "threshold": {
        "mask": "threshold",
        "threshold": 0.4,
        "attribution_lp_coeff": 0.2,
        "optimizer": "sgd",
        "schedule": "constant",
    },
    "learned": {
        "mask": "learned",
        "threshold": 0.4,
        "importance_coeff": 0.1,
        "threshold_learning_rate": 0.1,
    },
}
CHANGES = {
    "topk": {
        "seed": 7,
        "init_scale": 2.0,
        "topk": 2.7,
        "faithfulness_coeff": 0.3,
        "minimality_coeff": 4.0,
        "hidden_reconstruction_coeff": 3.0,
        "simplicity_coeff": 2.0,
        "simplicity_coeff_final": 0.1,
        "schatten_p": 0.6,
        "learning_rate": 3e-2,
        "weight_decay": 0.7,
    },
    "whole": {"topk": 3.0},
    "threshold": {"threshold": 0.8, "attribution_lp_coeff": 0.7, "attribution_lp_p": 0.5},
    "learned": {"threshold": 0.8, "importance_coeff": 0.3, "threshold_learning_rate": 0.02},
}


def make_problem():
    def apply_fn(params, x):
        h = jax.nn.relu(x @ params["w"])
        return h @ params["v"], {"h": h}

    return Problem(
        apply_fn, PARAMS, lambda key, step: jax.random.normal(jax.random.fold_in(key, step), (8, 4))
    )


def by_instance(method, runs):
    """{field: its value in every run}."""
    fields = {field for run in runs for field in run}
    return {
        field: np.array([run.get(field, getattr(method, field)) for run in runs])
        for field in fields
    }


def test_every_field_is_tried():
    tried = {field for changes in CHANGES.values() for field in changes}
    assert tried == {"seed", *APD.numbers()}


def check_second_instance(method, changes, names):
    """Of two instances, one with the changes, that one is the run with them in its settings."""
    problem, runs = make_problem(), [{}, changes]
    together = method.replace(num_instances=len(runs))
    state, rows = train.advance(problem, together, settings=by_instance(method, runs))
    trained, alone_rows = train.fit(problem, method.replace(**changes))
    for name in ("total", "mean_active", *names):
        close([row[name][1] for row in rows], [row[name] for row in alone_rows], 2e-5, name)
    assert abs(rows[-1]["total"][0] / rows[-1]["total"][1] - 1) > 1e-3  # they do differ
    for name, f in trained.components.factors.items():
        close(state.components.factors[name].U[1], f.U, 5e-5, name)
    gate = jax.tree.map(lambda a: a[1], state.gate)
    jax.tree.map(lambda a, b: close(a, b, 5e-5), gate, trained.gate)


@pytest.mark.parametrize("base", BASES)
def test_an_instance_is_the_run_with_its_values_in_the_settings(base):
    names = ("faithfulness", "minimality", "simplicity")
    check_second_instance(make_method(**SMALL | BASES[base]), CHANGES[base], names)


def test_the_rate_of_an_adversary_and_coefficients_of_its_terms_may_differ():
    method = VPD(
        **SMALL | {"num_components": 4, "init_scale": 1.0},
        gate_kind="pieces",
        gate_width=2,
        minimality_loss="mse",
        faithfulness_coeff=1.0,
        faithfulness_warmup_steps=0,
        gradient_clip=None,
    )
    changes = {"adversary_rate": 0.2, "adversarial_coeff": 2.0, "importance_p_final": 1.5}
    check_second_instance(method, changes, ("adversarial", "stochastic", "importance"))


def test_an_instance_that_diverges_harms_no_other():
    descent = {"optimizer": "sgd", "schedule": "constant"}
    problem, method = make_problem(), make_method(**SMALL, **descent, num_instances=2)
    state, rows = train.advance(problem, method, settings={"learning_rate": np.array([1e-2, 1e30])})
    assert np.isfinite([row["total"][0] for row in rows]).all()
    assert not np.isfinite(rows[-1]["total"][1])
    alone, _ = train.advance(problem, method, settings={"learning_rate": np.array([1e-2, 1e-2])})
    close(state.components.factors["w"].U[0], alone.components.factors["w"].U[0])
    with pytest.raises(NonFiniteError):  # without settings nothing of it is wanted
        train.fit(problem, method.replace(learning_rate=1e30))
