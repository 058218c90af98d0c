"""Instances that differ in settings: each is the run that has these values in its config."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close, make_config

from apd_jax import config as config_lib
from apd_jax import train
from apd_jax.errors import NonFiniteError
from apd_jax.problem import Problem

PARAMS = {
    "w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32),
    "v": jnp.asarray(np.random.default_rng(1).normal(size=(3, 4)), jnp.float32),
}
SMALL = {"num_components": 5, "num_steps": 6, "batch_size": 8, "init_scale": 3.0, "learning_rate": 1e-2, "warmup_fraction": 0.4}
SMALL |= {"steps_per_call": 3, "log_every_steps": 1}
BASES = {
    "topk": {"topk": 1.3, "simplicity_coeff_final": 0.5, "hidden_reconstruction_coeff": 0.5, "optimizer": "adamw", "weight_decay": 0.1},
    "whole": {"mask": "topk", "topk": 2.0, "sparse_route": "dispatch", "schedule": "linear"},
    "threshold": {"mask": "threshold", "threshold": 0.4, "attribution_lp_coeff": 0.2, "optimizer": "sgd", "schedule": "constant"},
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
}


def make_problem():
    def apply_fn(params, x):
        h = jax.nn.relu(x @ params["w"])
        return h @ params["v"], {"h": h}

    return Problem(apply_fn, PARAMS, lambda key, step: jax.random.normal(jax.random.fold_in(key, step), (8, 4)))


def by_instance(config, runs):
    """{field: its value in every run}."""
    fields = {field for run in runs for field in run}
    return {field: np.array([run[field] if field in run else config[field] for run in runs]) for field in fields}


def test_every_field_is_tried():
    assert {field for changes in CHANGES.values() for field in changes} == {"seed", *config_lib.TRACEABLE}


@pytest.mark.parametrize("base", BASES)
def test_an_instance_is_the_run_with_its_values_in_the_config(base):
    problem, config = make_problem(), make_config(**SMALL | BASES[base])
    changed = list(CHANGES[base].items())
    runs = [{}, dict(changed[::2]), dict(changed[1::2])]
    config.num_instances = len(runs)
    state, rows = train.advance(problem, config, settings=by_instance(config, runs))
    config.num_instances = 1
    for i, run in [(i, run) for i, run in enumerate(runs) if run]:
        alone = config.copy_and_resolve_references()
        alone.update(run)
        components, alone_rows = train.fit(problem, alone)
        for name in ("total", "faithfulness", "minimality", "simplicity", "mean_active"):
            close([row[name][i] for row in rows], [row[name] for row in alone_rows], 2e-5, f"{run} {name}")
        for name, f in components.factors.items():
            close(state.components.factors[name].U[i], f.U, 5e-5, f"{run} {name}")


def test_in_parts_from_a_state_is_the_same_as_in_one_go(tmp_path):
    problem, config = make_problem(), make_config(**SMALL, num_instances=3)
    settings = {"learning_rate": np.array([1e-2, 2e-2, 3e-2]), "seed": np.array([3, 4, 5])}
    whole, rows = train.advance(problem, config, settings=settings)
    half, first = train.advance(problem, config, settings=settings, until=3, workdir=tmp_path)
    again, _ = train.advance(problem, config, settings=settings, until=3, workdir=tmp_path)
    # The other two go on alone: what an instance does depends on no other.
    config.num_instances, kept = 2, np.array([0, 2])
    rest, last = train.advance(
        problem,
        config,
        jax.tree.map(lambda a: a[kept], half),
        settings={field: values[kept] for field, values in settings.items()},
    )
    assert [row["step"] for row in first] == [1, 2, 3] and [row["step"] for row in last] == [4, 5, 6]
    for name in ("w", "v"):
        np.testing.assert_array_equal(half.components.factors[name].V, again.components.factors[name].V)
        close(rest.components.factors[name].V, whole.components.factors[name].V[kept], 1e-5)
    close([row["total"] for row in last], [np.array(row["total"])[kept] for row in rows[3:]], 1e-5)


def test_an_instance_that_diverges_harms_no_other():
    problem, config = make_problem(), make_config(**SMALL, optimizer="sgd", schedule="constant", num_instances=2)
    state, rows = train.advance(problem, config, settings={"learning_rate": np.array([1e-2, 1e30])})
    assert np.isfinite([row["total"][0] for row in rows]).all() and not np.isfinite(rows[-1]["total"][1])
    alone, _ = train.advance(problem, config, settings={"learning_rate": np.array([1e-2, 1e-2])})
    close(state.components.factors["w"].U[0], alone.components.factors["w"].U[0])
    with pytest.raises(NonFiniteError):  # without settings nothing of it is wanted
        config.learning_rate = 1e30
        train.fit(problem, config)
