"""What the README and the page of commands tell a reader to type, typed."""

import ast
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from absl import flags

import apd_jax.main  # noqa: F401 - defines the flags

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ("howto/commands.md", "language.md")
TEXTS = "\n".join([README, *((ROOT / "docs" / page).read_text() for page in PAGES)])
# As the command line defines them; tests of commands take them away and define them anew.
FLAGS = {name: flags.FLAGS[name] for name in flags.FLAGS}
COMMANDS = sorted(set(re.findall(r"^python -m apd_jax\.main ([^#\n]*?) *(?:#.*)?$", TEXTS, re.M)))


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_the_ten_lines_run_as_written(code, tmp_path):
    """A line that is broken at 100 characters counts once; imports do not count."""
    statements = ast.parse(code).body
    written = [s for s in statements if not isinstance(s, ast.Import | ast.ImportFrom)]
    assert len(written) <= 10
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("["), done.stdout


def test_a_newcomer_reads_it_in_three_minutes():
    """Two examples with a picture each, one table of results; the rest is in docs/."""
    assert len(re.findall(r"```python\n", README)) == 2
    assert README.count("![") == 2
    lines = README.splitlines()
    assert len(lines) <= 120
    assert max(len(line) for line in lines if not line.startswith("|")) <= 120


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_commands_name_things_that_exist(command):
    options = dict(option.removeprefix("--").split("=", 1) for option in shlex.split(command))
    assert "workdir" in options
    if "config" in options:
        path, _, variant = options.pop("config").partition(":")
        namespace: dict = {"__file__": str(ROOT / path)}
        exec(compile((ROOT / path).read_text(), path, "exec"), namespace)
        config = namespace["get_config"](*[variant] if variant else [])
        for name in options:
            if name.startswith("config."):
                field = config
                for part in name.split(".")[1:]:
                    field = field[part]
    else:
        assert options["mode"] in FLAGS["mode"].parser.enum_values
        assert all(name in FLAGS for name in options)


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 12


@pytest.mark.parametrize("goal", ["demo", "test"])
def test_make_goals_do_what_the_readme_says(goal):
    steps = subprocess.run(
        ["make", "--dry-run", "--always-make", goal],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "-m venv .venv" in steps and "pip install" in steps
    assert {"demo": "-m apd_jax.commands.demo", "test": "-m pytest"}[goal] in steps


def test_what_every_change_must_pass():
    """CI calls the README's test command, lint with types, and the docs."""
    called = re.findall(r"^(?:exec )?make (.*)$", (ROOT / ".ci" / "run").read_text(), re.M)
    assert " ".join(called).split() == ["lint", "docs", "test"]


def test_code_is_formatted_and_clean():
    for command in (["format", "--check"], ["check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
