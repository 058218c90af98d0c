"""python -m apd_jax.sweep, end to end, and what it refuses."""

import importlib.util
import json
import re

import pytest
from conftest import ROOT

from apd_jax.sweep import halving
from apd_jax.sweep.grid import parse
from apd_jax.train import parallel

TMS = "--config=configs/tms.py:5-2,smoke"
SMALL = (
    TMS,
    "--config.apd.num_steps=8",
    "--config.apd.steps_per_call=2",
    "--config.target.pretrain.num_steps=5",
)


@pytest.fixture
def sweep_here(main_here):
    return lambda *args: main_here(*args, module="apd_jax.sweep.__main__")


def test_a_grid_of_two_by_two_by_two(sweep_here, tmp_path, monkeypatch):
    command = (
        *SMALL,
        f"--workdir={tmp_path}",
        "--sweep=seed=0:2;topk=0.3,0.6;learning_rate=1e-2,1e30",
        "--halve=2",
    )
    # Killed after the first part of training: 4 settings for 2 steps, then 2 for 2 more, then 1 for
    # the last 4.
    judge = halving._Sweep.judge

    def killed(*args):
        judge(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(halving._Sweep, "judge", killed)
    stopped = sweep_here(*command)
    assert stopped.returncode == 130 and "the same command goes on" in stopped.stderr
    first = (tmp_path / "rungs" / "0" / "metrics.jsonl").read_bytes()
    target = (tmp_path / "target" / "params.npz").read_bytes()

    monkeypatch.setattr(halving._Sweep, "judge", judge)
    steps, pmap_steps = [], parallel.pmap_steps

    def counted(step, num_steps, devices):
        program = pmap_steps(step, num_steps, devices)

        def run(state, *args, **more):
            steps.append((state.step.shape[1], num_steps))
            return program(state, *args, **more)

        return run

    monkeypatch.setattr(parallel, "pmap_steps", counted)
    result = sweep_here(*command)
    assert result.returncode == 0, result.stderr
    # 8 runs are not trained again; 4 for two steps, 2 for two and two.
    assert steps == [(4, 2), (2, 2), (2, 2)]
    assert first == (tmp_path / "rungs" / "0" / "metrics.jsonl").read_bytes()
    assert target == (tmp_path / "target" / "params.npz").read_bytes()

    there = json.loads((tmp_path / "sweep.json").read_text())
    assert len(there["runs"]) == 8 and len(there["settings"]) == 4
    for run in there["runs"]:  # the second learning rate diverges: a failure, not an end
        assert run["diverged"] == (run["learning_rate"] == 1e30)
        assert (run["sparse_error"] is None) == run["diverged"] and (
            run["success"] == 0 or not run["diverged"]
        )
    assert [row["num_diverged"] for row in there["settings"]] == [0, 2, 0, 2]
    assert [row["step"] for row in there["settings"]].count(2) == 2  # given up early ...
    assert sorted(row["step"] for row in there["settings"] if row["learning_rate"] == 1e-2) == [
        4,
        8,
    ]  # ... those that diverge
    figures = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert figures == {
        "sweep_topk_learning_rate",
        "sweep_criteria",
        "sweep_picks",
        "sweep_picks_by_setting",
    }

    best = there["runs"][there["best_run"]]
    assert (
        best["step"] == 8
        and f"--config.apd.seed={best['seed']} --config.apd.topk={best['topk']}" in result.stdout
    )

    steps.clear()
    again = sweep_here(*command)
    assert (
        again.returncode == 0
        and not steps
        and json.loads((tmp_path / "sweep.json").read_text()) == there
    )

    other = sweep_here(*[arg.replace("0.3,0.6", "0.3,0.7") for arg in command])
    assert (
        other.returncode == 2
        and "sweep.axes.topk is [0.3, 0.6] there and [0.3, 0.7] here" in other.stderr
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--sweep=",), "--sweep is empty"),
        (("--sweep=topkk=1",), "Did you mean 'topk'"),
        (("--sweep=num_components=3,4",), "cannot be swept"),
        (("--sweep=topk=0.3,0.6", "--halve=1"), "--halve must be at least 2"),
        (("--sweep=topk=0.3,0.6", "--config.apd.num_instances=3"), "give seed=0:3 in --sweep"),
        (("--sweep=topk=0.3,0.6", "more"), "unexpected argument"),
    ],
)
def test_refused_in_a_sentence(sweep_here, tmp_path, args, message):
    result = sweep_here(*SMALL, f"--workdir={tmp_path / 'run'}", *args)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and not (tmp_path / "run").exists()


def test_without_a_config_or_workdir(sweep_here, tmp_path):
    assert "--workdir is missing" in sweep_here(TMS, "--sweep=topk=0.3").stderr
    assert "--config is missing" in sweep_here(f"--workdir={tmp_path}", "--sweep=topk=0.3").stderr


def test_the_commands_that_are_written_down_span_a_grid():
    spec = importlib.util.spec_from_file_location("tms", ROOT / "configs" / "tms.py")
    tms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tms)
    texts = [
        (ROOT / path).read_text()
        for path in ("docs/howto/commands.md", "apd_jax/sweep/__main__.py")
    ]
    axes = [found for text in texts for found in re.findall(r"--sweep='([^']*)'", text)]
    assert len(axes) >= 3
    for text in axes:
        assert len(parse(text, tms.get_config("5-2").apd).settings) > 1
