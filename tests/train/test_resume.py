"""Stopped and started again, a run ends as if it had never been stopped: bit for bit.

By any means and at any moment.
"""

import json
import os
import random
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_method

from apd_jax.errors import Interrupted
from apd_jax.methods.vpd import VPD
from apd_jax.network.problem import Problem
from apd_jax.train import checkpoint, progress
from apd_jax.train import loop as train

PARAMS = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)}


def sample_fn(key, step):
    return jax.random.normal(jax.random.fold_in(key, step), (8, 4))


PROBLEM = Problem(lambda params, x: x @ params["w"], PARAMS, sample_fn)


def rows_of(workdir):
    """The logged rows without what a clock says."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if name != "seconds_per_step"} for row in rows
    ]


def assert_same_end(one, other):
    """Newest checkpoints (the whole state) and metrics are equal, bit for bit."""
    _, step, state = checkpoint.read(one / "checkpoints")
    _, other_step, other_state = checkpoint.read(other / "checkpoints")
    assert step == other_step
    assert jax.tree.structure(state) == jax.tree.structure(other_state)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other_state), strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    assert rows_of(one) == rows_of(other)


SMALL = {"num_components": 3, "num_steps": 18, "batch_size": 8, "learning_rate": 1e-2}
SMALL |= {"steps_per_call": 3, "log_every_steps": 2, "checkpoint_every_steps": 6}
APD = make_method(**SMALL, init_scale=3.0)
LEARNED = APD.replace(
    mask="learned",
    threshold=0.1,
    importance_coeff=0.1,
    inactive="uniform",
    threshold_learning_rate=0.1,
)
POOLED = VPD(
    **SMALL,
    gate_kind="pieces",
    gate_width=2,
    faithfulness_coeff=1.0,
    faithfulness_warmup_steps=2,
    adversary="pooled",
)


@pytest.mark.parametrize(
    ("signum", "method"),
    [
        (signal.SIGTERM, LEARNED),
        (signal.SIGINT, APD.replace(num_instances=2, unit_norm_U=True)),
        (signal.SIGTERM, POOLED),  # what its adversary keeps is part of the state
    ],
    ids=["learned", "instances", "adversary"],
)
def test_interrupted_twice_ends_the_same(tmp_path, monkeypatch, signum, method):
    train.fit(PROBLEM, method, workdir=tmp_path / "whole")

    class Display(progress.ProgressDisplay):
        def update(self, step, values):
            if step in (3, 12):
                os.kill(os.getpid(), signum)

    monkeypatch.setattr(train, "ProgressDisplay", Display)
    for expected in (3, 12):
        with pytest.raises(Interrupted) as stop:
            train.fit(PROBLEM, method, workdir=tmp_path / "stopped")
        # A checkpoint is saved there although none was due.
        assert (stop.value.step, stop.value.signum) == (expected, signum)
        assert checkpoint.read(tmp_path / "stopped" / "checkpoints")[1] == expected
    train.fit(PROBLEM, method, workdir=tmp_path / "stopped")
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")
    assert [row["step"] for row in rows_of(tmp_path / "stopped")] == [*range(2, 19, 2)]


def test_signals_act_as_usual_again_afterwards(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    method = make_method(num_components=3, num_steps=2, batch_size=8)
    train.fit(PROBLEM, method, workdir=tmp_path)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_torn_newest_checkpoint_still_ends_the_same(tmp_path):
    method = make_method(
        num_components=3,
        num_steps=12,
        batch_size=8,
        steps_per_call=3,
        log_every_steps=3,
        checkpoint_every_steps=3,
    )
    for name in ("whole", "torn"):
        train.fit(PROBLEM, method, workdir=tmp_path / name)
    for file in (tmp_path / "torn" / "checkpoints" / "12").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    # Half a line, as a kill leaves it.
    with (tmp_path / "torn" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "fai')
    train.fit(PROBLEM, method, workdir=tmp_path / "torn")
    assert_same_end(tmp_path / "whole", tmp_path / "torn")


# The command line

COMMAND = (
    "--config=configs/tms.py:5-2,smoke",
    "--config.apd.num_steps=800",
    "--config.apd.steps_per_call=50",
)
EVERY = ("--config.apd.log_every_steps=50", "--config.apd.checkpoint_every_steps=50")


def wait_for(process, condition):
    """Until the condition holds or the process has ended, whichever comes first."""
    while process.poll() is None and not condition():
        time.sleep(0.002)


def lines(workdir, since=0.0):
    """Rows in the metrics file, if it was touched after that time."""
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() and path.stat().st_mtime > since else 0


@pytest.mark.slow
def test_killed_at_random_moments_ends_the_same(tmp_path, cli, start_cli):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = start_cli(*COMMAND, *EVERY, f"--workdir={whole}")
    draw = random.Random(0)
    # The first dies while it imports, makes its folder or trains its target.
    # Each other one after 1 to 6 of its 16 calls more than the last checkpoint, at any moment of a
    # step, a log line or a checkpoint being written.
    for kill in range(3):
        there, now, more = checkpoint_step(killed) // 50, time.time(), draw.randint(1, 6)
        process = start_cli(*COMMAND, *EVERY, f"--workdir={killed}")
        if kill == 0:
            time.sleep(draw.uniform(1, 2.5))
        else:
            wait_for(
                process, lambda there=there, now=now, more=more: lines(killed, now) >= there + more
            )
            time.sleep(draw.uniform(0, 0.06))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"kill {kill} came too late"
    assert cli(*COMMAND, *EVERY, f"--workdir={killed}").returncode == 0
    uninterrupted.communicate()
    assert uninterrupted.returncode == 0
    assert_same_end(whole, killed)
    results = [json.loads((folder / "evaluation.json").read_text()) for folder in (whole, killed)]
    for result in results:
        for name in ("minutes_decomposition", "peak_rss_gib"):
            result.pop(name)
    assert results[0] == results[1]


def checkpoint_step(workdir):
    return max(
        [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()],
        default=0,
    )


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_a_checkpoint_and_says_so(tmp_path, start_cli, signum, code):
    process = start_cli(
        "--config=configs/tms.py:5-2,smoke",
        "--config.apd.num_steps=1000000",
        f"--workdir={tmp_path}",
    )
    wait_for(process, lambda: lines(tmp_path) > 3)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    step = checkpoint_step(tmp_path)
    saved = "the checkpoint is saved, and the same command goes on from there."
    assert stderr.splitlines()[-1] == f"Stopped at step {step}; {saved}"
    assert step > 0 and "Traceback" not in stderr
    assert checkpoint.read(tmp_path / "checkpoints")[1] == step


def test_ctrl_c_while_the_target_trains_ends_in_a_sentence(tmp_path, start_cli):
    process = start_cli(
        "--config=configs/tms.py:5-2,smoke",
        "--config.target.pretrain.num_steps=100000000",
        f"--workdir={tmp_path}",
    )
    wait_for(process, lambda: (tmp_path / "config.json").exists())
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr and stderr.strip()
