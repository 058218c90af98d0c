"""Which checks are asked, in what order, and what a budget leaves out."""

import io
import re
import time

import jax
import jax.numpy as jnp
import pytest
from conftest import make_method, make_problem
from rich.console import Console

from apd_jax import components as components_lib
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.evidence import CHECKS, audit, budget
from apd_jax.evidence.asking import Display, answers, chosen
from apd_jax.evidence.check import Case, Check, Cost, Question
from apd_jax.evidence.subject import Setting, make
from apd_jax.train import progress

VOCABULARY = 2048


@pytest.fixture(scope="module")
def tokens():
    """Two positions of tokens, embedded and read out: more outputs than are gone back from."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "embed": jax.random.normal(keys[0], (VOCABULARY, 2)),
        "w": jnp.eye(2),
        "out": jax.random.normal(keys[1], (2, VOCABULARY)),
    }

    def apply_fn(p, x):
        return p["embed"][x] @ p["w"] @ p["out"]

    components = components_lib.from_materialized(
        {"embed": None, "w": jnp.eye(2)[:, :, None] * jnp.eye(2)[None], "out": None}
    )
    settings = {"minimality_loss": "kl", "mask_per": "position", "attribution_mode": "probe"}
    method = make_method(num_components=2, topk=1.0, **settings)
    problem = make_problem(apply_fn, params, None, select="w")
    x = jax.random.randint(keys[2], (3, 2), 0, VOCABULARY)
    decomposition = Decomposition(problem, components, method)
    subject = make(Setting(problem, method), params, decomposition.trained, x)
    return Case(subject, decomposition, jax.random.key(1), lambda i: x, 1)


def numbers(asked):
    return [question.number for question in chosen(CHECKS, asked)]


def test_checks_by_number_name_and_part_of_a_name():
    assert numbers(None) == list(range(1, 20))
    assert numbers(["faithfulness", 3, "19", "Worst-case"]) == [1, 3, 5, 19]
    assert numbers("scrubbing") == numbers(7) == [7]
    for asked, said in (
        ("scrubing", r"Did you mean 'scrubbing'\?"),
        (["ablation"], "names several checks"),
        (["geometri"], "names no check"),
        ([20], r"names no check; known: parameter_faithfulness \(1\)"),
    ):
        with pytest.raises(InputError, match=said):
            chosen(CHECKS, asked)


def test_a_budget_is_read_as_people_write_it():
    read = [progress.seconds(given) for given in (90, "90", "90s", "1.5 min", "1h30min", "2 hours")]
    assert read == [90, 90, 90, 90, 5400, 7200]
    for bad in ("5 apples", "", "0", "-3", 0):
        with pytest.raises(InputError, match="budget must be"):
            progress.seconds(bad)


class OneSecond(budget.Clock):
    """Every pass takes a second, and compiling nothing."""

    _forward = (0.0, 1.0)


def test_what_does_not_fit_says_so_and_what_the_verdict_needs_comes_first(tokens):
    asked = []

    def question(number, cost):
        def ask(case):
            asked.append(number)
            return Check(passed=True)

        return Question(number, f"check_{number}", f"Check {number}", ask, lambda case: cost)

    questions = [
        question(8, Cost(forward=5)),
        question(9, Cost(gradient=50)),
        question(16, Cost(gradient=1)),
    ]
    text = io.StringIO()
    clock = OneSecond(tokens, 100.0, time.monotonic())
    with Display(Console(file=text), 3) as display:
        found = answers(tokens, questions, display, clock)
    assert asked == [16, 8]
    assert [(check.number, check.passed) for check in found] == [(8, True), (9, None), (16, True)]
    assert "not run: it would take about 2.5 min" in found[1].why
    assert re.search(r"0/3 checks after \d+ s; now Check 16 \(16\), about 3 s", text.getvalue())


def test_a_check_that_took_long_makes_the_others_be_expected_to(tokens, monkeypatch):
    """What is left out by the pieces is named first; then what is by the pace of a check."""
    asked, now = [], [0.0]
    monkeypatch.setattr(budget.time, "monotonic", lambda: now[0])

    def question(number, passes, seconds):
        def ask(case):
            asked.append(number)
            now[0] += seconds
            return Check(passed=True)

        cost = Cost(forward=passes)
        return Question(number, f"check_{number}", f"Check {number}", ask, lambda case: cost)

    class Quick(budget.Clock):
        _forward = (0.0, 0.3)  # a third of what check 1 takes

    questions = [question(1, 1, 0.9), question(2, 2, 0), question(3, 1, 0), question(4, 40, 0)]
    text, clock = io.StringIO(), Quick(tokens, 2.6, now[0])
    with Display(Console(file=text), 4) as display:
        found = answers(tokens, questions, display, clock)
    assert asked == [1, 3]
    assert [check.number for check in found if check.why] == [2, 4]
    assert "what will not fit: check_4 (4), about 12 s" in text.getvalue()
    assert clock.expects(Cost(forward=1)) == pytest.approx(0.9)


def test_wide_outputs_are_probed(tokens):
    check = audit.fidelity(tokens)
    assert {"gradient_probe", "integrated_gradient"} <= set(check.values)
    assert all(value > 0.5 for value in check.values.values())
    assert f"{audit.NUM_PROBES} random directions of {2 * VOCABULARY} outputs" in check.budget
    assert tokens.row == "position" and tokens.examples == "3 examples of 2 positions"


def test_pieces_are_timed(tokens):
    clock = budget.Clock(tokens, 60.0, time.monotonic())
    one, two = (clock.expects(Cost(forward=count)) for count in (100, 200))
    assert 0 < one < two == pytest.approx(2 * one)
    assert clock.expects(Cost()) == 0 and clock.left <= 60
    # No log: as many steps as the method has, each of some passes.
    assert clock.expects(Cost(runs=1)) > 0
