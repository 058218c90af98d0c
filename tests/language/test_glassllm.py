"""A network that others trained, from its own package: its logits, and the tutorial on it."""

import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from conftest import ROOT

from apd_jax import language


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The folder of glassllm 0.1.0 (MIT, 3 MB), which is fetched but not installed."""
    folder = tmp_path_factory.mktemp("glassllm")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    quick = ["--quiet", "--disable-pip-version-check", "--retries=0", "--timeout=20"]
    done = subprocess.run(
        [*pip, *quick, f"--dest={folder}", "glassllm==0.1.0"], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"glassllm cannot be fetched: {done.stderr.strip().splitlines()[-1]}")
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder / "glassllm"


@pytest.fixture(scope="module")
def weights(package):
    return package / "weights" / "en.npz"


SENTENCE = "Alice was beginning to get very tired of sitting by her sister on the bank."


def test_logits_and_tokens_are_those_of_its_own_code(package, weights, monkeypatch):
    monkeypatch.syspath_prepend(str(package.parent))
    from glassllm.config import Config  # pyright: ignore[reportMissingImports]
    from glassllm.model import GlassLM  # pyright: ignore[reportMissingImports]
    from glassllm.tokenizer import Tokenizer  # pyright: ignore[reportMissingImports]

    ours, theirs = language.load(weights), GlassLM(Config())
    with np.load(weights) as arrays:
        for name, tensor in theirs.named_parameters().items():
            tensor.data[...] = arrays[name]
    tokens = ours.encode(SENTENCE)
    own = Tokenizer.load(weights.with_suffix(".tokenizer.json"))
    assert tokens.tolist() == own.encode(SENTENCE) and ours.decode(tokens) == SENTENCE
    expected = theirs(tokens[None]).data
    assert np.abs(ours.apply_fn(ours.params, tokens[None]) - expected).max() < 1e-4


def test_the_tutorial_runs(package, tmp_path, monkeypatch, capsys):
    """As it stands, but for fewer steps, and fewer and smaller batches."""
    page = (ROOT / "docs" / "tutorials" / "language.md").read_text()
    code = "\n".join(re.findall(r"```py\n(.*?)```", page, re.DOTALL))
    for written, fewer in (
        ('"num_steps": 300', '"num_steps": 20'),
        ("num_batches=40", "num_batches=9"),
        ("num_batches=4,", "num_batches=1,"),
        ("batch_size=128", "batch_size=32"),
        ("length=32", "length=16"),
    ):
        assert code.count(written) == (4 if written == "length=32" else 1)
        code = code.replace(written, fewer)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "glassllm").symlink_to(package)
    space: dict = {}
    exec(code, space)
    assert "matrices at zero" in (printed := capsys.readouterr().out) and " out: " in printed
    model, chosen = space["model"], space["chosen"]
    edited = language.load(tmp_path / "edited").params
    names = model.matrices("mlp", layers=[0])
    for name, leaf in model.params.items():
        changed = not np.array_equal(leaf, edited[name])
        assert changed <= (name in names)
    assert len(chosen) > 0 and any(not np.array_equal(model.params[n], edited[n]) for n in names)
    space["model"].save("edited")  # over what is there
    again = language.load(tmp_path / "edited").params
    assert all(np.array_equal(leaf, again[name]) for name, leaf in model.params.items())
