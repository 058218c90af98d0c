"""The host loop: what it logs and writes, and what it refuses.

Stopping and going on: test_resume.py.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_method

from apd_jax.errors import InputError, NonFiniteError
from apd_jax.methods import registry
from apd_jax.network.problem import Problem
from apd_jax.train import checkpoint
from apd_jax.train import loop as train

PARAMS = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)}


def make_problem(batch_size=8, **more):
    def sample_fn(key, step):
        return jax.random.normal(jax.random.fold_in(key, step), (batch_size, 4))

    return Problem(lambda params, x: x @ params["w"], PARAMS, sample_fn, **more)


def small(**fields):
    sizes = {"num_components": 3, "num_steps": 12, "batch_size": 8}
    sizes |= {"init_scale": 3.0, "learning_rate": 1e-2}
    every = {"steps_per_call": 5, "log_every_steps": 4, "checkpoint_every_steps": 5}
    return make_method(**sizes | every | fields)


def test_rows_do_not_depend_on_the_steps_per_call():
    # 12 steps, a row every 4th and the last: 4, 8, 12.
    # Whether in calls of 5, 5, 2, or of 1, or all at once.
    runs = [train.fit(make_problem(), small(steps_per_call=n)) for n in (5, 1, 100)]
    names = ("total", "faithfulness")
    terms = {*names, "minimality", "simplicity", "mean_active"}
    first, first_rows = runs[0]
    for trained, rows in runs:
        assert [row["step"] for row in rows] == [4, 8, 12]
        assert set(rows[0]) == {"step", *terms, "seconds_per_step"}
        for row, expected in zip(rows, first_rows, strict=True):
            np.testing.assert_allclose(
                [row[k] for k in names], [expected[k] for k in names], rtol=1e-6
            )
        np.testing.assert_allclose(
            trained.components.factors["w"].U,
            first.components.factors["w"].U,
            rtol=1e-5,
            atol=1e-7,
        )
    assert all(row["mean_active"] == 1.0 and row["seconds_per_step"] > 0 for row in first_rows)


def test_a_config_is_taken_as_well_as_an_object():
    method = small(num_steps=3)
    trained, rows = train.fit(make_problem(), method)
    other, other_rows = train.fit(make_problem(), registry.settings(method))
    jax.tree.map(np.testing.assert_array_equal, other, trained)
    assert [row["total"] for row in rows] == [row["total"] for row in other_rows]


def test_the_last_step_is_always_logged():
    _, rows = train.fit(make_problem(), small(num_steps=7, log_every_steps=100))
    assert [row["step"] for row in rows] == [7]


def test_workdir_files(tmp_path):
    trained, rows = train.fit(make_problem(), small(keep_checkpoints=2), workdir=tmp_path)
    factors = trained.components.factors["w"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert list((tmp_path / "tensorboard").glob("events.*"))
    # In calls of 5, 5 and 2 with one due every 5 steps, and one at the end: 5, 10, 12.
    # Two of them are kept.
    sizes, step, state = checkpoint.read(tmp_path / "checkpoints")
    assert list(sizes) == [10, 12] and step == 12
    np.testing.assert_array_equal(state["components"]["tree"]["w"]["U"], factors.U)
    step, restored = train.restore_trained(make_problem(), small(), tmp_path)
    assert step == 12
    np.testing.assert_array_equal(restored.components.factors["w"].V, factors.V)


def test_a_learned_gate_comes_back(tmp_path):
    method = small(mask="learned", threshold=0.1, importance_coeff=0.1)
    trained, _ = train.fit(make_problem(), method, workdir=tmp_path)
    thresholds = trained.gate["log_thresholds"]
    assert thresholds.shape == (3,) and np.ptp(thresholds) > 0
    _, restored = train.restore_trained(make_problem(), method, tmp_path)
    np.testing.assert_array_equal(restored.gate["log_thresholds"], thresholds)


def test_tensorboard_gets_every_loss_of_every_instance(tmp_path, monkeypatch):
    seen = set()
    monkeypatch.setattr(
        "tensorboardX.event_file_writer.EventsWriter.write_event",
        lambda self, event: seen.update((v.tag, event.step) for v in event.summary.value),
    )
    train.fit(make_problem(), small(num_instances=2), workdir=tmp_path)
    names = ("total", "faithfulness", "minimality", "simplicity")
    assert {(f"{name}/{i}", 12) for name in names for i in (0, 1)} <= seen


def test_a_finished_run_only_returns(tmp_path, monkeypatch):
    first = train.fit(make_problem(), small(), workdir=tmp_path)
    monkeypatch.delattr("apd_jax.train.parallel.pmap_steps")  # it must not take a step
    again = train.fit(make_problem(), small(), workdir=tmp_path)
    assert again[1] == first[1]
    U, expected = (run[0].components.factors["w"].U for run in (again, first))
    np.testing.assert_array_equal(U, expected)


def test_restoring_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist; let the run write its first checkpoint"):
        train.restore_trained(make_problem(), small(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_restoring_leaves_what_a_running_training_is_writing(tmp_path):
    train.fit(make_problem(), small(), workdir=tmp_path)
    unfinished = tmp_path / "checkpoints" / "99.orbax-checkpoint-tmp"
    unfinished.mkdir()
    assert train.restore_trained(make_problem(), small(), tmp_path)[0] == 12
    assert unfinished.is_dir()


@pytest.mark.parametrize("num_instances", [1, 2])
def test_not_finite_names_step_and_term_and_keeps_the_last_good_checkpoint(tmp_path, num_instances):
    # The batch of step 8 (counted from 0), the 9th, holds an infinity.
    # Outputs and minimality are then not finite.
    def sample_fn(key, step):
        x = jax.random.normal(jax.random.fold_in(key, step), (8, 4))
        return jnp.where(step == 8, jnp.inf, 1.0) * x

    problem = Problem(lambda params, x: x @ params["w"], PARAMS, sample_fn)
    method = small(num_instances=num_instances)
    with pytest.raises(NonFiniteError) as caught:
        train.fit(problem, method, workdir=tmp_path)
    assert str(caught.value).startswith("training stopped at step 9: not finite: minimality")
    assert str(caught.value).endswith("The checkpoint of step 5 is kept.")
    assert checkpoint.read(tmp_path / "checkpoints")[1] == 5
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4]
    with pytest.raises(
        NonFiniteError,
        match=r"stopped at step 9: [^.]*; try a smaller learning_rate or init_scale\.$",
    ):
        train.fit(problem, method)  # no workdir: no checkpoint to speak of


def test_divergence_is_caught():
    fields = {"optimizer": "sgd", "learning_rate": 1e30, "schedule": "constant"}
    with pytest.raises(
        NonFiniteError, match=r"training stopped at step \d+: not finite: .*faithfulness"
    ):
        train.fit(make_problem(), small(**fields, warmup_fraction=0.0))


@pytest.mark.parametrize(
    ("problem", "fields", "message"),
    [
        ({}, {"topk": 4.0}, "topk must be above 0 and at most 3"),
        ({}, {"batch_size": 10}, "batch_size = 10 is not divisible by the 4 devices"),
        ({"batch_size": 16}, {}, r"leading sizes \['16'\], but batch_size is 8"),
        ({}, {"mask": "exact"}, "mask = 'exact'"),
        ({"select": "kernel"}, {}, "'kernel' matches no leaf"),
        ({}, {"hidden_reconstruction_coeff": 1.0}, "hidden"),
        ({"elsewhere": lambda key, step: jnp.ones((8, 4))}, {}, "not by 'apd'"),
    ],
)
def test_refused(problem, fields, message):
    with pytest.raises(InputError, match=message):
        train.fit(make_problem(**problem), small(**fields))


def test_instances_are_single_runs_of_their_own_keys():
    trained, rows = train.fit(make_problem(), small(num_instances=2))
    U = trained.components.factors["w"].U
    assert U.shape == (2, 3, 4, 3)
    assert len(rows[0]["total"]) == 2 and rows[0]["total"][0] != rows[0]["total"][1]
    # Instance 0 is the run without instances.
    alone, alone_rows = train.fit(make_problem(), small())
    np.testing.assert_allclose(U[0], alone.components.factors["w"].U, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(rows[-1]["total"][0], alone_rows[-1]["total"], rtol=1e-5)


def test_always_on_and_unit_norm_are_in_what_comes_back():
    trained, _ = train.fit(make_problem(), small(unit_norm_U=True, num_always_on=1))
    lengths = jnp.linalg.norm(trained.components.factors["w"].U, axis=1)
    np.testing.assert_allclose(lengths, 1.0, rtol=1e-5)
