"""What a sweep found, by setting; as JSON, table and figures.

Success rates, and how well the criteria pick.

Shapes: S settings, n seeds of each, m runs to choose among.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.table import Table

from apd_jax.report import sweeps
from apd_jax.report.tables import number
from apd_jax.sweep.grid import Grid
from apd_jax.sweep.halving import Run
from apd_jax.sweep.judge import CRITERIA
from apd_jax.targets.base import Panel


@dataclasses.dataclass(frozen=True)
class Results:
    """All runs of a sweep, whose number is settings times seeds."""

    grid: Grid
    runs: Sequence[Run]  # by setting and seed
    num_steps: int  # of runs that were not given up
    criterion: str

    @property
    def has_truth(self) -> bool:
        return "success" in self.runs[0].scores

    def of(self, name: str) -> Float[np.ndarray, "S n"]:
        """A score of every run."""
        return np.array([run.scores[name] for run in self.runs]).reshape(-1, len(self.grid.seeds))

    @property
    def complete(self) -> np.ndarray:
        """[S], which settings were trained to the end."""
        return np.array([run.step == self.num_steps for run in self.runs[:: len(self.grid.seeds)]])

    def settings(self) -> list[dict[str, Any]]:
        """A row per setting.

        Its values, how far it got, counts, the mean criteria of its finite runs, and the seed that
        the criterion picks.
        """
        rows, n = [], len(self.grid.seeds)
        for s, setting in enumerate(self.grid.settings):
            runs = self.runs[s * n : (s + 1) * n]
            chosen = min(runs, key=lambda run: run.scores[self.criterion])
            row: dict[str, Any] = {
                **setting,
                "step": chosen.step,
                "num_runs": n,
                "num_diverged": sum(run.diverged for run in runs),
            }
            if self.has_truth:
                successes = int(sum(run.scores["success"] for run in runs))
                row |= {"num_successes": successes, "success_rate": successes / n}
            for name in CRITERIA:
                finite = [run.scores[name] for run in runs if math.isfinite(run.scores[name])]
                row |= {name: float(np.mean(finite)) if finite else None}
            found = math.isfinite(chosen.scores[self.criterion])
            row["best_seed"] = chosen.seed if found else None
            if self.has_truth:
                row["best_seed_succeeds"] = found and bool(chosen.scores["success"])
            rows.append(row)
        return rows

    def best(self) -> Run | None:
        """The run that the criterion picks of all that were trained to the end.

        None if none is finite.
        """
        finite = [
            run
            for run in self.runs
            if run.step == self.num_steps and math.isfinite(run.scores[self.criterion])
        ]
        return min(finite, key=lambda run: run.scores[self.criterion], default=None)

    def as_json(self) -> dict[str, Any]:
        """The best run's number, settings and runs. What is not finite is null."""
        names, best = self.grid.settings, self.best()
        runs = [
            {**names[run.setting], "seed": run.seed, "step": run.step, "diverged": run.diverged}
            | {name: value if math.isfinite(value) else None for name, value in run.scores.items()}
            for run in self.runs
        ]
        number = None if best is None else self.runs.index(best)
        return {
            "criterion": self.criterion,
            "best_run": number,
            "settings": self.settings(),
            "runs": runs,
        }

    def table(self, title: str) -> Table:
        """A row per setting."""
        table = Table(title=title)
        for field in self.grid.axes:
            table.add_column(field, justify="right")
        titles = [
            "steps",
            "diverged",
            *(["success"] if self.has_truth else []),
            *[name.replace("_", " ") for name in CRITERIA],
            "best seed",
        ]
        for name in titles:
            table.add_column(name, justify="right")
        for row, complete in zip(self.settings(), self.complete, strict=True):
            cells = [f"{row[field]:g}" for field in self.grid.axes] + [
                str(row["step"]),
                str(row["num_diverged"]),
            ]
            if self.has_truth:
                cells.append(f"{row['num_successes']} of {row['num_runs']}")
            cells += ["" if row[name] is None else number(row[name]) for name in CRITERIA]
            picked = "none" if row["best_seed"] is None else str(row["best_seed"])
            if self.has_truth and row["best_seed"] is not None:
                picked += ", succeeds" if row["best_seed_succeeds"] else ", fails"
            table.add_row(*cells, picked, style=None if complete else "dim")
        return table

    def figures(self) -> dict[str, Any]:
        """{file name: Figure}.

        Maps over every pair of swept fields, and, where the truth is known, how well the criteria
        pick.
        """
        panels = {f"sweep_{'_'.join(fields)}": self._map(*fields) for fields in self._pairs()}
        figures = {name: sweeps.panel(panel) for name, panel in panels.items()}
        if self.has_truth:
            scores = {name: self.of(name)[self.complete].ravel() for name in CRITERIA}
            mmcs, success = (self.of(name)[self.complete].ravel() for name in ("mmcs", "success"))
            figures["sweep_criteria"] = sweeps.criteria(scores, CRITERIA, mmcs, success > 0)
            if len(self.grid.seeds) > 1:
                figures["sweep_picks"] = sweeps.picks(
                    {name: values.mean(axis=0) for name, values in self.picked().items()},
                    int(self.complete.sum()),
                )
                figures["sweep_picks_by_setting"] = sweeps.panel(self._picks_by_setting())
        return figures

    def _pairs(self) -> list[tuple[str, ...]]:
        swept = [field for field, values in self.grid.axes.items() if len(values) > 1]
        return (
            list(itertools.combinations(swept, 2))
            if len(swept) > 1
            else [(field,) for field in swept]
        )

    def _map(self, *fields: str) -> Panel:
        """Mean over all other axes and seeds at every pair of values, or along one axis.

        NaN where all settings were given up.
        """
        rows = self.settings()
        row_field, column_field = (fields[0], fields[1]) if len(fields) == 2 else (None, fields[0])
        row_values = self.grid.axes[row_field] if row_field else (None,)
        measure = "success_rate" if self.has_truth else self.criterion
        matrix = np.full((len(row_values), len(self.grid.axes[column_field])), np.nan)
        for i, j in np.ndindex(*matrix.shape):
            cell = [
                row[measure]
                for row, complete in zip(rows, self.complete, strict=True)
                if complete
                and row[column_field] == self.grid.axes[column_field][j]
                and (row_field is None or row[row_field] == row_values[i])
                and row[measure] is not None
            ]
            matrix[i, j] = np.mean(cell) if cell else np.nan
        others = [
            field
            for field, values in self.grid.axes.items()
            if field not in fields and len(values) > 1
        ]
        mean_of = " and ".join([f"{len(self.grid.seeds)} seeds", *others])
        what = (
            "Share of runs in which every feature has a component of its own"
            if self.has_truth
            else f"Mean {self.criterion}"
        )
        good = (
            "Good: a broad bright region, not a single cell."
            if self.has_truth
            else "Good: low, and flat around the lowest cell."
        )
        return Panel(
            title="Success rate" if self.has_truth else self.criterion.replace("_", " "),
            caption=f"{what}, over {mean_of}. {good}"
            + ("" if self.complete.all() else " White: given up before the end."),
            xlabel=column_field,
            ylabel=row_field or "",
            matrix=matrix,
            unit="share of runs" if self.has_truth else self.criterion,
            rows=[f"{value:g}" for value in row_values] if row_field else ["all"],
            columns=[f"{value:g}" for value in self.grid.axes[column_field]],
        )

    def picked(self) -> dict[str, Float[np.ndarray, "S m"]]:
        """How often the run chosen among m = 1 ... n seeds succeeds, of every complete setting.

        By criterion, by "chance", and as the "best possible".
        """
        success = self.of("success")[self.complete]
        found = {
            name: np.array(
                [chosen(c, s) for c, s in zip(self.of(name)[self.complete], success, strict=True)]
            )
            for name in CRITERIA
        }
        best = np.array([chosen(-s, s) for s in success])
        return found | {
            "chance": np.repeat(success.mean(axis=1, keepdims=True), success.shape[1], axis=1),
            "best possible": best,
        }

    def _picks_by_setting(self) -> Panel:
        picked = {name: values[:, -1] for name, values in self.picked().items()}
        settings = [
            s for s, complete in zip(self.grid.settings, self.complete, strict=True) if complete
        ]
        return Panel(
            title="Success of the seed chosen by each criterion",
            caption="Every row is a setting. Chance is its success rate; the other columns are 1 "
            "where the seed chosen among all succeeds (with ties, their mean). Good: a criterion's "
            "column is as bright as the best possible.",
            xlabel="chosen by",
            ylabel=", ".join(self.grid.axes) or "setting",
            matrix=np.stack(list(picked.values()), axis=1),
            unit="success rate",
            rows=[
                ", ".join(f"{value:g}" for value in setting.values()) or "all"
                for setting in settings
            ],
            columns=[name.replace("_", " ") for name in picked],
        )


def chosen(
    criterion: Float[np.ndarray, " n"], success: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " m"]:
    r"""Success rate of the run with the lowest criterion among m of n drawn at random, m = 1 ... n.

    Σ_i C(n - i, m - 1) / C(n, m) · success of the i-th best, i = 1 ... n. Equal runs share their
    mean success.
    """
    n = len(criterion)
    order = np.argsort(criterion, kind="stable")
    _, tie = np.unique(criterion[order], return_inverse=True)
    ranked = (np.bincount(tie, success[order]) / np.bincount(tie))[tie]
    return np.array(
        [
            sum(math.comb(n - i, m - 1) * ranked[i - 1] for i in range(1, n + 1)) / math.comb(n, m)
            for m in range(1, n + 1)
        ]
    )
