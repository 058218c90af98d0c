"""What the README tells a reader to type, typed."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^python -m apd_jax\.main ([^#\n]*)", README, re.MULTILINE)


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


def test_three_apis_are_shown():
    assert len(re.findall(r"```python\n", README)) == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_commands_name_things_that_exist(command):
    options = dict(option.removeprefix("--").split("=", 1) for option in command.split())
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
        assert options["mode"] in ("evaluate", "inspect", "report", "compare")


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 5


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
    assert {"demo": "-m apd_jax.main --config=configs/tms.py:40-10", "test": "-m pytest"}[
        goal
    ] in steps


def test_code_is_formatted_and_clean():
    for command in (["format", "--check"], ["check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
