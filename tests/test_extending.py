"""docs/extending.md: every example is short, and runs as it stands."""

import re

import pytest
from conftest import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.S)


def test_every_example_is_short():
    assert len(BLOCKS) == 5
    assert max(len(block.splitlines()) for block in BLOCKS) <= 30


@pytest.mark.parametrize("number", range(1, len(BLOCKS)))
def test_the_example_runs(number, capsys, monkeypatch):
    monkeypatch.setattr("apd_jax.train.progress._SECONDS_BETWEEN_LINES", 1e9)
    space: dict = {}
    exec(BLOCKS[0], space)
    if number == 3:  # goes on from the imports of the examples before it
        exec("from apd_jax.methods.base import Number, Term", space)
    exec(BLOCKS[number], space)
    assert capsys.readouterr().out.strip()
