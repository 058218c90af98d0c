"""docs/language.md: its example runs as it stands, on a tiny random checkpoint."""

import re

import numpy as np
from checkpoint_files import LLAMA_CONFIG, WORDS, llama_weights, write_folder
from conftest import ROOT

from apd_jax import language


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    example, *_ = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "language.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    write_folder("my-model", LLAMA_CONFIG, llama_weights())
    (tmp_path / "my-text").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        (tmp_path / "my-text" / f"{i}.txt").write_text(" ".join(rng.choice([*WORDS], 40)))
    space: dict = {}
    exec(example, space)
    printed = capsys.readouterr().out
    assert f"{space['metrics']['ce_target']:.3f}" in printed
    before, after = language.load("my-model").params, language.load("edited").params
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    # Every site has components of its own: the first one lies in one matrix.
    assert len(changed) == 1 and changed[0] in space["model"].matrices("mlp", layers=[1])
