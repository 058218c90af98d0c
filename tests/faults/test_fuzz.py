"""Whatever `decompose` is given, it trains a step or says in a sentence why it does not."""

import ast

import fuzz
from conftest import ROOT, XLA_FLAGS
from processes import Command

DRAWS = 150  # `python tests/faults/fuzz.py 500` for more


def test_wrong_arguments_end_in_a_sentence(tmp_path):
    env = {"XLA_FLAGS": f"{XLA_FLAGS} --xla_force_host_platform_device_count=1"}
    done = Command(fuzz.__name__, DRAWS, root=ROOT, env=env, printed=tmp_path)
    stdout, stderr = done.communicate(timeout=600)
    assert done.returncode == 0, stderr[-3000:]
    ends = ast.literal_eval(stdout)
    assert ends["trained"] + ends["sentence"] >= DRAWS
    assert ends["trained"] and ends["sentence"] > DRAWS / 2
