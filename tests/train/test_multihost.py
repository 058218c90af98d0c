"""Several processes on this machine do what one does.

The same masks and losses, one set of files, one place to stop at.
"""

import json
import os
import signal
import socket
from pathlib import Path

import jax
import jax.numpy as jnp
import multihost_worker as worker
import numpy as np
import pytest
from conftest import ROOT, close
from processes import Command

from apd_jax import masks
from apd_jax.errors import InputError, Interrupted
from apd_jax.train import loop as train
from apd_jax.train import parallel

WAIT_S = 120
NUM_STEPS = 24


def two_processes(tmp_path, module, *args):
    """`python -m module args` with 2 devices each, as launch/local.sh 2 2 starts them.

    Returns: the exit codes, and what each printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    processes = []
    for i in range(2):
        (printed := tmp_path / f"printed_{i}").mkdir()
        own = env | {"JAX_PROCESS_ID": str(i)}
        processes.append(Command(module, *args, root=ROOT, env=own, printed=printed))
    try:
        printed = ["".join(process.communicate(timeout=WAIT_S)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], printed


def run_two_processes(
    tmp_path, *, num_steps=NUM_STEPS, signalled=-1, at_step=0, num_component_shards=1
):
    """Two workers: the arrays that each saved, and the exit codes."""
    workdir = tmp_path / "w"
    given = [workdir, num_steps, signalled, at_step, num_component_shards]
    codes, _ = two_processes(tmp_path, worker.__name__, *given)
    return [dict(np.load(f"{workdir}.{i}.npz")) for i in range(2)], codes


def run_here(
    monkeypatch,
    workdir,
    num_devices,
    *,
    num_steps=NUM_STEPS,
    signal_at=None,
    num_component_shards=1,
):
    """The same in this process."""
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "global_devices", lambda: jax.devices()[:num_devices])
        if signal_at:
            patch.setattr(
                train.ProgressDisplay, "update", train.ProgressDisplay.update
            )  # restored afterwards
            worker.signal_at(signal_at)
        return train.fit(*worker.make_problem(num_steps, num_component_shards), workdir=workdir)


def rows(workdir):
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def check_rows(workdir, expected, first=1, last=NUM_STEPS):
    found = rows(workdir)
    assert [row["step"] for row in found] == list(range(first, last + 1))
    for row, want in zip(found, expected[first - 1 :], strict=False):
        assert row["mean_active"] == want["mean_active"]
        for name in ("total", "faithfulness", "minimality", "simplicity"):
            assert row[name] == pytest.approx(want[name], rel=1e-4), (row["step"], name)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Components and rows of one device without a break; 1 x 4 devices agrees."""
    folder, monkeypatch = tmp_path_factory.mktemp("one"), pytest.MonkeyPatch()
    trained, history = run_here(monkeypatch, folder / "one", 1)
    run_here(monkeypatch, folder / "four", 4)
    check_rows(folder / "four", history)
    return trained.components.factors["W"], history


def test_stopped_with_two_processes_and_resumed_with_one(tmp_path, monkeypatch, uninterrupted):
    # Process 1 alone is told to stop, after step 12.
    # Both do, there, with a checkpoint and the code of SIGTERM.
    (first, second), codes = run_two_processes(tmp_path, signalled=1, at_step=12)
    assert codes == [128 + signal.SIGTERM] * 2
    assert first["stopped_at"] == second["stopped_at"] == 12 and first["num_devices"] == 4
    assert first["from_primary"] == second["from_primary"] == 7
    assert first["refused"] == "a reason that process 0 alone can see"
    assert str(second["refused"]).startswith("process 0 has stopped")
    # 8 examples, k = 1.4: floor(11.2) = 11 kept over both processes, those that one device keeps.
    mask = np.concatenate([first["mask"], second["mask"]])
    assert mask.sum() == 11
    np.testing.assert_array_equal(mask, masks.batch_topk(jnp.asarray(worker.TIED_SCORES), 1.4))
    factors, history = uninterrupted
    check_rows(tmp_path / "w", history, last=12)
    assert sorted(path.name for path in (tmp_path / "w/checkpoints").iterdir()) == ["12", "8"]

    trained, _ = run_here(monkeypatch, tmp_path / "w", 1)
    check_rows(tmp_path / "w", history)
    close(trained.components.factors["W"].U, factors.U, 1e-4)
    close(trained.components.factors["W"].V, factors.V, 1e-4)


def test_stopped_with_one_process_and_resumed_with_two(tmp_path, monkeypatch, uninterrupted):
    with pytest.raises(Interrupted, match="interrupted at step 8"):
        run_here(monkeypatch, tmp_path / "w", 1, signal_at=8)
    (first, second), codes = run_two_processes(tmp_path)
    assert codes == [0, 0]
    factors, history = uninterrupted
    check_rows(tmp_path / "w", history)
    for name in ("U", "V"):
        np.testing.assert_array_equal(first[name], second[name])
        close(first[name], getattr(factors, name), 1e-4)


def test_components_split_over_two_processes(tmp_path, monkeypatch, uninterrupted):
    # Begun by one process, with two devices for the components and two for the batch.
    # Then each of the four devices, two in a process, has one of the four components, and both
    # processes read and write their part of a checkpoint.
    # Its last is read here, by one device.
    workdir = tmp_path / "w"
    with pytest.raises(Interrupted, match="interrupted at step 8"):
        run_here(monkeypatch, workdir, 4, signal_at=8, num_component_shards=2)
    (first, second), codes = run_two_processes(tmp_path, num_component_shards=4)
    assert codes == [0, 0]
    factors, history = uninterrupted
    check_rows(workdir, history)
    step, restored = train.restore_trained(*worker.make_problem(NUM_STEPS), workdir)
    assert step == NUM_STEPS
    there = restored.components.factors["W"]
    for name in ("U", "V"):
        np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_array_equal(first[name], getattr(there, name))
        close(first[name], getattr(factors, name), 1e-4)


def test_command_line_with_two_processes_writes_and_prints_once(tmp_path):
    """By the recipe: process 0 finds modes, k and what is always on; the others go on from it."""
    codes, printed = two_processes(
        tmp_path,
        "apd_jax.main",
        "--config=configs/recipe.py:tms,5-2,id,smoke",
        f"--workdir={tmp_path}/w",
        "--config.target.pretrain.num_steps=20",
    )
    assert codes == [0, 0], printed
    once = ("Figures: ", "refine (1 of 1): step 10/10", "target: step 20/20")
    assert ["".join(printed).count(words) for words in once] == [1, 1, 1]
    assert [row["step"] for row in rows(tmp_path / "w")] == [5, 10]
    found = json.loads((tmp_path / "w/recipe.json").read_text())
    assert found["num_always_on"] == 1 and found["modes_per_example"] > 0
    assert json.loads((tmp_path / "w/evaluation.json").read_text())["num_devices"] == 4
    assert len(list((tmp_path / "w/tensorboard").iterdir())) == 1


def test_initialize_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    with pytest.raises(InputError, match="set JAX_NUM_PROCESSES and JAX_PROCESS_ID"):
        parallel.initialize()


def test_one_process_needs_no_others(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    parallel.initialize()
    assert not jax.distributed.is_initialized() and parallel.is_primary()
    assert parallel.from_primary(lambda: "x") == "x" and parallel.largest(3) == 3


def test_processes_that_are_not_joined_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(
        InputError, match="4 processes that are not joined; start them as launch/README"
    ):
        parallel.global_devices()
