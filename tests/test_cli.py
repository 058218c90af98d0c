"""What the commands share."""

import os
import subprocess
import sys

from conftest import ROOT


def test_compiled_programs_are_kept_beside_the_workdir(tmp_path):
    """In a process of its own: the tests' own cache is set by the variable that switches this off."""
    code = "from apd_jax.cli import keep_programs; import sys, jax; keep_programs(sys.argv[1]); print(jax.config.jax_compilation_cache_dir)"

    def place(**env):
        inherited = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        command = [sys.executable, "-c", code, str(tmp_path / "runs" / "a")]
        return subprocess.run(command, env=inherited | env, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    assert place() == str(tmp_path / "runs" / ".jax_cache")
    assert place(JAX_COMPILATION_CACHE_DIR="/elsewhere") == "/elsewhere"
