"""Commands in processes of their own, forked from one that has imported what they import.

A process that imports the package anew works for seconds before it does anything.
"""

import multiprocessing
import os
import runpy
import signal
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest

_COMMANDS = ("curve", "experiment", "graph", "harvest", "labels", "evidence")
_IMPORTED = [__name__, *(f"apd_jax.commands.{name}" for name in _COMMANDS)]
_FORKS = multiprocessing.get_context("forkserver")


def _run(module: str, args: list[str], root: Path, env: dict[str, str], printed: Path) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(printed / name, os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(env)
    os.chdir(root)
    # Of tests that a shell runs in the background it would be ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class Command:
    """`python -m module args` in the folder `root`, as `subprocess.Popen` shows it.

    What it prints goes into two files of the folder `printed`.
    """

    def __init__(self, module: str, *args: object, root: Path, env: dict[str, str], printed: Path):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", f"{root}:{root / 'tests'}")
            _FORKS.set_forkserver_preload(_IMPORTED)
            forkserver.ensure_running()
        self._printed = printed
        given = (module, [*map(str, args)], root, env, printed)
        self._process = _FORKS.Process(target=_run, args=given)
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, signum: int) -> None:
        os.kill(self._process.pid, signum)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float = 300.0) -> tuple[str, str]:
        """What it printed, once it has ended."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()  # it would slow everything after it
            raise AssertionError(f"still running after {timeout} s")
        return tuple((self._printed / name).read_text() for name in ("stdout", "stderr"))
