"""Whole runs with components split over devices: checkpoints, resuming, and other meshes."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, close
from meshes import problem_of, sample_fn, sgd
from ml_collections import ConfigDict

from apd_jax.errors import InputError, Interrupted
from apd_jax.methods import registry
from apd_jax.train import loop as train
from apd_jax.train import parallel, placement
from apd_jax.train.state import init_state
from apd_jax.train.workdir import claim


def small(M=1, **fields):
    sizes = {"num_components": 4, "num_component_shards": M}
    every = {"steps_per_call": 4, "log_every_steps": 1, "checkpoint_every_steps": 4}
    return sgd(**sizes | every | fields)


def fit(monkeypatch, D, M, *, stop=None, workdir=None, **fields):
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "global_devices", lambda: jax.devices()[: D * M])
        if stop:  # as if a signal had come, after the first call
            patch.setattr(train.parallel, "largest", lambda value: 15)
        return train.fit(problem_of(), small(M, **fields), workdir=workdir)


def test_resume_is_bit_for_bit_and_on_other_meshes_close(tmp_path, monkeypatch):
    trained, rows = fit(monkeypatch, 2, 2)
    alone, alone_rows = fit(monkeypatch, 1, 1)
    for D, M in ((2, 2), (1, 1)):
        workdir = tmp_path / f"{D}x{M}"
        with pytest.raises(Interrupted, match="step 4"):
            fit(monkeypatch, 2, 2, stop=True, workdir=workdir)
        resumed, resumed_rows = fit(monkeypatch, D, M, workdir=workdir)
        assert [row["step"] for row in resumed_rows] == list(range(1, 21))
        for a, b, c in zip(*map(jax.tree.leaves, (resumed, trained, alone)), strict=True):
            if (D, M) == (2, 2):
                np.testing.assert_array_equal(a, b)
            close(a, c, 1e-4)
        step, restored = train.restore_trained(problem_of(), small(M), workdir)
        assert step == 20
        jax.tree.map(np.testing.assert_array_equal, restored, resumed)
    for row, other in zip(rows, alone_rows, strict=True):
        assert row["mean_active"] == other["mean_active"]
        assert row["total"] == pytest.approx(other["total"], rel=1e-4)
    with pytest.raises(Interrupted):
        fit(monkeypatch, 1, 1, stop=True, workdir=tmp_path / "alone")
    resumed, _ = fit(monkeypatch, 2, 2, workdir=tmp_path / "alone")
    jax.tree.map(lambda a, b: close(a, b, 1e-4), resumed, alone)


def test_a_learned_gate_is_split_saved_and_read(tmp_path, monkeypatch):
    learned = {"mask": "learned", "threshold": 0.05, "importance_coeff": 0.1, "num_steps": 8}
    alone, _ = fit(monkeypatch, 1, 1, **learned)
    with pytest.raises(Interrupted, match="step 4"):
        fit(monkeypatch, 2, 2, stop=True, workdir=tmp_path, **learned)
    resumed, _ = fit(monkeypatch, 1, 4, workdir=tmp_path, **learned)
    assert np.ptp(resumed.gate["log_thresholds"]) > 0
    close(resumed.gate["log_thresholds"], alone.gate["log_thresholds"], 1e-4)
    _, restored = train.restore_trained(problem_of(), small(**learned), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, restored, resumed)


def test_a_machine_with_one_device_reads_it(tmp_path, monkeypatch):
    expected, _ = fit(monkeypatch, 2, 2, num_steps=4, workdir=tmp_path)
    read = "import sys; from apd_jax.train.checkpoint import read; state = read(sys.argv[1])[2]"
    show = "print(float(state['components']['tree']['W']['U'].sum()))"
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, "-c", f"{read}; {show}", tmp_path / "checkpoints"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    U = expected.components.factors["W"].U
    assert float(done.stdout) == pytest.approx(float(U.sum()), rel=1e-5)


def test_a_torn_checkpoint_is_skipped(tmp_path, monkeypatch):
    expected, _ = fit(monkeypatch, 2, 2, workdir=tmp_path)
    for file in (tmp_path / "checkpoints" / "20").rglob("*"):
        if file.is_file() and "/d/" in str(file):
            file.write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apd_jax.train.checkpoint.log.warning", lambda *args: None)
        resumed, _ = fit(monkeypatch, 2, 2, workdir=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, resumed, expected)


def test_instances_settings_and_batches_from_the_host(monkeypatch):
    batches = [np.asarray(sample_fn(jax.random.key(5), i)) for i in range(6)]
    settings = {
        "seed": np.array([3, 4]),
        "topk": np.array([1.0, 1.7]),
        "simplicity_coeff": np.array([0.1, 1.0]),
    }

    def advance(D, M):
        monkeypatch.setattr(parallel, "global_devices", lambda: jax.devices()[: D * M])
        method = small(M, num_instances=2, num_steps=6, steps_per_call=3)
        problem = problem_of(sample=batches)
        half, _ = train.advance(problem, method, settings=settings, until=3)
        return train.advance(problem, method, half, settings=settings)

    (found, rows), (expected, expected_rows) = advance(2, 2), advance(1, 1)
    assert found.components.factors["W"].U.shape == (2, 4, 6, 5)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), found.components, expected.components)
    np.testing.assert_array_equal(found.step, [6, 6])
    assert [row["mean_active"] for row in rows] == [row["mean_active"] for row in expected_rows]


def test_a_workdir_goes_on_with_other_shards_but_no_other_setting(tmp_path):
    def ask(**fields):
        claim(tmp_path / "w", ConfigDict({"apd": registry.settings(sgd(**fields))}))

    ask(num_component_shards=4)
    ask(num_component_shards=2)
    with pytest.raises(InputError, match=r"apd\.topk is 1\.7 there and 1\.0 here\. Use another"):
        ask(num_component_shards=2, topk=1.0)


def test_initial_components_are_those_of_one_device():
    method = sgd()
    init = lambda key: init_state(key, problem_of(select=["W"]), method)  # noqa: E731
    placed = placement.arrange(sgd(num_component_shards=4), jax.devices())
    made = placed.make(init, jax.random.key(7))
    jax.tree.map(np.testing.assert_array_equal, placed.get(made), jax.jit(init)(jax.random.key(7)))


def test_gathering_as_several_processes_do_it():
    placed = placement.arrange(sgd(num_component_shards=4), jax.devices())
    problem, method = problem_of(select=["W"]), sgd(mask="learned", threshold=0.1)
    make = jax.jit(jax.vmap(lambda key: init_state(key, problem, method)))
    state = jax.tree.map(np.asarray, make(jax.random.split(jax.random.key(0))))
    on_devices = placed.put(state)
    gathered = jax.tree.map(placed._gathered, on_devices, placement._specs(on_devices))
    jax.tree.map(np.testing.assert_array_equal, gathered, state)
