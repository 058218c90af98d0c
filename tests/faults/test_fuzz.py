"""Whatever `decompose` is given, it trains a step or says in a sentence why it does not."""

import ast
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

DRAWS = 150  # `python tests/faults/fuzz.py 500` for more


def test_wrong_arguments_end_in_a_sentence():
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{here}"}
    command = [sys.executable, str(here / "fuzz.py"), str(DRAWS)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    ends = ast.literal_eval(done.stdout)
    assert ends["trained"] + ends["sentence"] >= DRAWS
    assert ends["trained"] and ends["sentence"] > DRAWS / 2
