"""Success rates, what the criteria pick, and what is written of it: from planted runs."""

import itertools
import json

import numpy as np
import pytest
from conftest import make_method

from apd_jax.report import figures
from apd_jax.sweep.grid import parse
from apd_jax.sweep.halving import Run
from apd_jax.sweep.judge import CRITERIA
from apd_jax.sweep.results import Results, chosen

# Two values of k, two learning rates, three seeds. The reference loss finds the successes, bits
# take the failures.
SUCCESS = np.array([[1, 0, 1], [0, 0, 1], [0, 0, 0], [1, 1, 1]])


def make_results(truth=True, given_up=()):
    grid = parse("seed=0:3;topk=1,2;learning_rate=1e-3,1e-2", make_method())
    runs = []
    for s, j in np.ndindex(4, 3):
        loss = np.inf if (s, j) == (2, 1) else 2.0 - SUCCESS[s, j] + 0.1 * j
        scores = {
            "reference_loss": loss,
            "sparse_error": 0.1,
            "bits": 1.0 + SUCCESS[s, j],
            "worst_error": 0.2,
        }
        known = {
            "success": float(SUCCESS[s, j]),
            "mmcs": 0.5 + 0.4 * SUCCESS[s, j],
            "ml2r": 0.9,
            "num_features_owned": 3.0,
        }
        runs.append(Run(s, j, 5 if s in given_up else 10, scores | (known if truth else {})))
    return Results(grid, runs, 10, "reference_loss")


@pytest.mark.parametrize(
    "criterion",
    [[3.0, 1.0, 2.0, 5.0, 4.0], [1.0, 1.0, 2.0, 2.0, 2.0], [np.inf, 1.0, np.inf, 0.5, np.inf]],
)
def test_chosen_against_all_subsets(criterion):
    criterion, success = np.array(criterion), np.array([1.0, 0.0, 1.0, 1.0, 0.0])
    for m, rate in enumerate(chosen(criterion, success), start=1):
        picks = []
        for subset in map(list, itertools.combinations(range(5), m)):
            lowest = criterion[subset].min()
            picks.append((subset, lowest))
        # Of equal runs any may be taken: the mean over all of that value in the whole set, as their
        # labels are exchangeable.
        expected = np.mean([success[criterion == lowest].mean() for _, lowest in picks])
        assert rate == pytest.approx(expected)


def test_a_row_per_setting():
    rows = make_results().settings()
    assert [row["success_rate"] for row in rows] == pytest.approx([2 / 3, 1 / 3, 0, 1])
    assert [row["num_diverged"] for row in rows] == [0, 0, 1, 0]
    assert [(row["topk"], row["learning_rate"]) for row in rows] == [
        (1, 1e-3),
        (1, 1e-2),
        (2, 1e-3),
        (2, 1e-2),
    ]
    # The lowest loss: seed 0 of 1.0, 2.1, 1.2; seed 2 of 2.0, 2.1, 1.2; seed 0 of 2.0, inf, 2.2;
    # seed 0.
    assert [row["best_seed"] for row in rows] == [0, 2, 0, 0]
    assert [row["best_seed_succeeds"] for row in rows] == [True, True, False, True]
    assert rows[2]["reference_loss"] == pytest.approx(2.1)  # of the finite two


def test_the_best_run_was_trained_to_the_end():
    # Losses of 1.0: seed 0 of settings 0 and 3, of which the first counts, unless it was given up.
    assert (make_results().best().setting, make_results().as_json()["best_run"]) == (0, 0)
    assert (
        make_results(given_up=(0,)).best().setting,
        make_results(given_up=(0,)).as_json()["best_run"],
    ) == (3, 9)


def test_what_criteria_pick():
    picked = make_results().picked()
    assert picked["chance"][:, -1] == pytest.approx([2 / 3, 1 / 3, 0, 1])
    assert picked["best possible"][:, -1] == pytest.approx([1, 1, 0, 1])
    assert picked["reference_loss"][:, -1] == pytest.approx([1, 1, 0, 1])
    assert picked["bits"][:, -1] == pytest.approx([0, 0, 0, 1])
    assert picked["sparse_error"] == pytest.approx(picked["chance"])  # it tells nothing
    for values in picked.values():  # one run to choose among: no choice
        assert values[:, 0] == pytest.approx(picked["chance"][:, 0])


def test_maps():
    panel = make_results()._map("topk", "learning_rate")
    np.testing.assert_allclose(panel.matrix, [[2 / 3, 1 / 3], [0, 1]])
    assert (panel.rows, panel.columns, panel.xlabel, panel.ylabel) == (
        ["1", "2"],
        ["0.001", "0.01"],
        "learning_rate",
        "topk",
    )
    np.testing.assert_allclose(make_results()._map("topk").matrix, [[1 / 2, 1 / 2]])
    # Settings that were given up say nothing of the end.
    np.testing.assert_allclose(
        make_results(given_up=(0, 2))._map("topk", "learning_rate").matrix,
        [[np.nan, 1 / 3], [np.nan, 1]],
    )
    np.testing.assert_allclose(
        make_results(truth=False)._map("topk").matrix,
        [[(1.4 + 5.3 / 3) / 2, (2.1 + 1.1) / 2]],
        rtol=0.05,
    )


@pytest.mark.parametrize("truth", [True, False])
def test_json_table_and_figures(truth, tmp_path):
    results = make_results(truth, given_up=(0,))
    there = json.loads(json.dumps(results.as_json(), allow_nan=False))
    assert len(there["runs"]) == 12 and len(there["settings"]) == 4
    lost = there["runs"][7]
    assert (
        lost["diverged"]
        and lost["reference_loss"] is None
        and (lost["topk"], lost["learning_rate"], lost["seed"]) == (2, 1e-3, 1)
    )
    table = results.table("sweep")
    assert table.row_count == 4 and len(table.columns) == (10 if truth else 9)
    drawn = results.figures()
    more = {"sweep_criteria", "sweep_picks", "sweep_picks_by_setting"} if truth else set()
    assert set(drawn) == {"sweep_topk_learning_rate"} | more
    for path in figures.save(tmp_path, drawn):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_every_criterion_has_a_meaning():
    assert set(CRITERIA) < set(make_results().runs[0].scores) and all(CRITERIA.values())
