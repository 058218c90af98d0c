"""Sixty mistakes at the command line: one sentence each, exit status 2, and nothing written."""

from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

TMS = f"--config={ROOT}/configs/tms.py:5-2,smoke"
RESID = f"--config={ROOT}/configs/resid_mlp.py:smoke"
SPD = f"--config={ROOT}/configs/spd.py:tms,5-2,smoke"
RECIPE = f"--config={ROOT}/configs/recipe.py:tms,5-2,smoke"

SETTINGS = {  # of one field of a config: what it is set to, and what the sentence holds
    "apd.num_components=0": "num_components must be at least 1",
    "apd.num_components=many": "many",
    "apd.rank=0": "rank must be at least 1",
    "apd.rank=1.5": "1.5",
    "apd.topk=0": "topk must be above 0",
    "apd.topk=-1": "topk must be above 0",
    "apd.topk=6": "at most 5",
    "apd.topk=nan": "topk must",
    "apd.topk=0.001": "so none",
    "apd.mask=top": "unknown mask 'top'; known",
    "apd.mask=exactly": "Did you mean 'exact'",
    "apd.inactive=off": "unknown inactive",
    "apd.threshold=-1": "threshold must be",
    "apd.seed=-1": "seed must lie in",
    "apd.seed=4294967297": "seed must lie in",
    "apd.seed=x": "x",
    "target.seed=-3": "target.seed must lie in",
    "evaluation.seed=18446744073709551616": "evaluation.seed must lie in",
    "apd.num_steps=0": "num_steps must be at least 1",
    "apd.num_steps=1e3": "1e3",
    "apd.batch_size=0": "batch_size must be at least 1",
    "apd.batch_size=-8": "batch_size must be at least 1",
    "apd.learning_rate=0": "learning_rate must be a finite number above 0",
    "apd.learning_rate=inf": "learning_rate must be a finite number above 0",
    "apd.learning_rte=1": "learning_rte",
    "apd.schedule=cosin": "Did you mean 'cosine'",
    "apd.warmup_fraction=1": "warmup_fraction must lie in [0, 1)",
    "apd.optimizer=adamm": "Did you mean 'adam'",
    "apd.gradient_clip=0": "gradient_clip must be",
    "apd.minimality_loss=kll": "unknown minimality_loss",
    "apd.minimality_coeff=-1": "minimality_coeff must be",
    "apd.simplicity_coeff=inf": "simplicity_coeff must be",
    "apd.schatten_p=0": "schatten_p must be",
    "apd.attribution=gradients": "Did you mean 'gradient'",
    "apd.attribution_mode=probes": "Did you mean 'probe'",
    "apd.attribution_metric=l2": "unknown attribution_metric",
    "apd.attributions_at=here": "unknown attributions_at",
    "apd.num_probes=0": "num_probes must be at least 1",
    "apd.num_always_on=5": "num_always_on must lie in",
    "apd.num_component_shards=3": "num_component_shards = 3",
    "apd.importance_coeff=1": "is read by mask = 'learned' only",
    "apd.steps_per_call=0": "steps_per_call must be at least 1",
    "apd.checkpoint_every_steps=0": "checkpoint_every_steps must be at least 1",
    "apd.keep_checkpoints=0": "keep_checkpoints must be at least 1",
    "apd.sparse_route=fast": "unknown sparse_route",
    "apd.mask_per=token": "unknown mask_per",
    "target.name=tmss": "Did you mean 'tms'",
    "target.hidden=diagonal": "unknown target.hidden",
    "target.num_features=0": "num_features",
    "target.feature_probability=2": "feature_probability",
    "target.weights_path=missing.npz": "missing.npz cannot be read",
    "target.weights_path=weights.txt": "must end in .npz or .safetensors",
}


def refused(done, words: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert "Traceback" not in done.stderr and "apd_jax.errors" not in lines[-1]
    assert lines[-1].startswith("apd_jax: ") and words in lines[-1], lines[-1]


@pytest.mark.parametrize(("change", "words"), SETTINGS.items(), ids=SETTINGS)
def test_a_value_that_does_not_fit(main_here, tmp_path, change, words):
    refused(main_here(TMS, f"--workdir={tmp_path / 'run'}", f"--config.{change}"), words)
    left = [p.name for p in (tmp_path / "run").rglob("*") if p.is_file()]
    if "weights_path" not in change:
        assert not left


ARGUMENTS = {
    "no config": (["--workdir={run}"], "--config is missing"),
    "no workdir": ([TMS], "--workdir is missing"),
    "a file that is not there": (["--config=nothing.py", "--workdir={run}"], "nothing.py"),
    "a variant that is not there": (
        [f"--config={ROOT}/configs/tms.py:5-2,smok", "--workdir={run}"],
        "Did you mean 'smoke'",
    ),
    "a word": ([TMS, "--workdir={run}", "train"], "unexpected argument 'train'"),
    "an unknown mode": (["--mode=repot", "--workdir={run}"], "repot"),
    "an unknown flag": ([TMS, "--workdr={run}"], "workdr"),
    "nothing to evaluate": (["--mode=evaluate", "--workdir={run}"], "holds no config.json"),
    "nothing to inspect": (["--mode=inspect", "--workdir={run}"], "holds no config.json"),
    "nothing to report": (["--mode=report", "--workdir={run}"], "holds no config.json"),
    "nothing to compare with": (["--mode=compare", "--workdir={run}"], "--other is missing"),
    "two empty folders": (
        ["--mode=compare", "--workdir={run}", "--other={run}"],
        "holds no config.json",
    ),
    "a pattern as name": ([TMS, "--workdir={run}[1]"], "which checkpoints cannot have"),
    "a method's setting in a recipe": (
        [RECIPE, "--workdir={run}", "--config.apd.num_steps=5"],
        "num_steps is set by the recipe",
    ),
    "a setting of another method": (
        [SPD, "--workdir={run}", "--config.apd.topk=1"],
        "topk",
    ),
    "a gate of another kind": (
        [SPD, "--workdir={run}", "--config.apd.gate_kind=mlp"],
        "unknown gate_kind",
    ),
    "a batch that devices cannot share": (
        [RESID, "--workdir={run}", "--config.apd.batch_size=7"],
        "7",
    ),
}


@pytest.mark.parametrize(("args", "words"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_that_do_not_fit(main_here, tmp_path, args, words):
    refused(main_here(*(arg.format(run=tmp_path / "run") for arg in args)), words)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"apd": {}}', '{"target": 3, "apd": 4}'])
def test_a_config_that_is_damaged(main_here, tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    for mode in ("evaluate", "inspect", "report"):
        refused(main_here(f"--mode={mode}", f"--workdir={tmp_path}"), "")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def weights(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return f"--config.target.weights_path={path}"


def test_weights_that_do_not_fit(main_here, tmp_path):
    W, b = np.ones((5, 2), np.float32), np.zeros(5, np.float32)
    for i, (arrays, words) in enumerate(
        (
            ({"W": W}, "lacks 'b'"),
            ({"W": W, "b": b, "c": b}, "holds 'c'"),
            ({"W": W.T, "b": b}, "with shape (2, 5)"),
            ({"W": W * np.nan, "b": b}, "not finite"),
            ({"W": W, "b": b.astype(str)}, "not a real number"),
        )
    ):
        flag = weights(tmp_path / f"{i}.npz", **arrays)
        refused(main_here(TMS, f"--workdir={tmp_path / str(i)}", flag), words)
