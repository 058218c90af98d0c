"""What the commands share."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from apd_jax.commands import cli


def test_compiled_programs_are_kept_beside_the_workdir(tmp_path):
    """In a process of its own: the tests' cache is set by the variable that switches this off."""
    code = """
import sys, jax
from apd_jax.commands.cli import keep_programs
keep_programs(sys.argv[1])
print(jax.config.jax_compilation_cache_dir)
"""

    def place(**env):
        inherited = {
            name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"
        }
        command = [sys.executable, "-c", code, str(tmp_path / "runs" / "a")]
        return subprocess.run(
            command, env=inherited | env, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert place() == str(tmp_path / "runs" / ".jax_cache")
    assert place(JAX_COMPILATION_CACHE_DIR="/elsewhere") == "/elsewhere"


def test_a_mistyped_flag_of_a_command_without_config(capsys):
    for command in ("apd_jax.serve", "apd_jax.evidence"):
        with pytest.raises(SystemExit) as stop:
            cli.parse([command, "--workdri=runs/a"])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.startswith("apd_jax: Unknown command line flag 'wor")


def test_our_notes_and_warnings_are_shown_and_those_of_others_are_not():
    """As the commands do it: under absl's app.run, which has the handler."""
    code = """
import logging
from absl import app
from apd_jax.commands import cli
def main(_):
    cli.only_our_messages()
    for name in ("apd_jax.recipe", "orbax"):
        logging.getLogger(name).info("a note of %s", name)
        logging.getLogger(name).warning("a warning of %s", name)
    logging.getLogger("orbax").error("an error of orbax")
app.run(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines() == [
        "a note of apd_jax.recipe",
        "a warning of apd_jax.recipe",
        "an error of orbax",
    ]
