"""Successive halving: which settings go on, and that these end as if there had been no halving."""

import jax
import numpy as np
import pytest
from conftest import PRETRAIN, TMS, close, make_method
from ml_collections import ConfigDict

from apd_jax import targets
from apd_jax.errors import InputError
from apd_jax.sweep import halving, judge
from apd_jax.sweep.grid import parse
from apd_jax.sweep.halving import Rung, best, rungs
from apd_jax.train import loop


@pytest.mark.parametrize(
    ("settings", "steps", "halve", "expected"),
    [
        (5, 100, 0, [(100, 5)]),
        (1, 100, 2, [(100, 1)]),
        (2, 100, 2, [(50, 2), (100, 1)]),
        (6, 100, 2, [(25, 6), (50, 3), (100, 2)]),  # log2 6 = 2.6: two halvings
        (40, 80, 2, [(10, 40), (20, 20), (40, 10), (80, 5)]),  # never more than three
        (10, 90, 3, [(10, 10), (30, 4), (90, 2)]),  # 10/3 and 10/9, rounded up
        (8, 2, 2, [(1, 8), (2, 4)]),  # no part without a step
    ],
)
def test_rungs(settings, steps, halve, expected):
    assert rungs(settings, steps, halve) == [Rung(*one) for one in expected]


@pytest.mark.parametrize("halve", [1, -1])
def test_a_bad_factor_is_refused(halve):
    with pytest.raises(InputError, match="--halve must be at least 2"):
        rungs(4, 100, halve)


def test_the_best_by_the_mean_over_seeds():
    # Means 3, 2, 2.5, 10.
    values = np.array([[1.0, 5.0], [2.0, 2.0], [2.5, 2.5], [0.0, 20.0]])
    assert best(values, 1).tolist() == [1] and best(values, 3).tolist() == [0, 1, 2]
    # A run that diverged counts as the worst seen, 20: means (1 + 20) / 2, 2, 2.5, 10.
    values[0, 1] = np.inf
    assert best(values, 3).tolist() == [1, 2, 3]
    assert best(np.full((3, 2), np.inf), 2).tolist() == [0, 1]


@pytest.fixture(scope="module")
def problem(pentagon):
    method = make_method(
        num_components=5, rank=2, batch_size=64, num_steps=8, steps_per_call=2, log_every_steps=2
    )
    target = targets.build(ConfigDict(TMS | {"pretrain": PRETRAIN}), 64)
    return target, pentagon.params, method, parse("seed=0:2;topk=0.5,1,2", method)


def test_planted_criteria_decide_and_the_survivors_are_the_runs_themselves(
    problem, monkeypatch, tmp_path
):
    target, params, method, grid = problem
    seen = []

    def planted(problem, method, trained, seed):
        # Of the settings 0, 1, 2 (two seeds each) the middle one is bad.
        seen.append(jax.tree.map(np.asarray, trained.components))
        order = {6: [1, 2, 9, 0, 2, 2], 4: [5, 4, 3, 2]}[len(seen[-1].factors["W"].U)]
        return {name: np.array(order, float) for name in judge.CRITERIA}

    monkeypatch.setattr(judge, "criteria", planted)
    runs = halving.train_all(target, params, method, grid, halve=2, workdir=tmp_path)
    assert [(run.setting, run.seed) for run in runs] == [(s, j) for s in range(3) for j in range(2)]
    assert [run.step for run in runs] == [8, 8, 4, 4, 8, 8]
    assert [run.scores["bits"] for run in runs] == [5, 4, 9, 0, 3, 2]
    # The other two were carried over to another program; here they are from start to end in one.
    all_four = grid.ceiling(method).replace(num_instances=4)
    settings = {"topk": np.array([0.5, 0.5, 2.0, 2.0]), "seed": np.array([0, 1, 0, 1])}
    whole, _ = loop.advance(target.problem(params), all_four, settings=settings)
    close(seen[-1].factors["W"].U, whole.components.factors["W"].U, 1e-5)

    # Nothing is computed again.
    monkeypatch.setattr(judge, "criteria", lambda *_: pytest.fail("judged again"))
    monkeypatch.delattr("apd_jax.train.parallel.pmap_steps")
    assert halving.train_all(target, params, method, grid, halve=2, workdir=tmp_path) == runs
