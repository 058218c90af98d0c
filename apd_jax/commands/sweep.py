"""A sweep in one folder, behind `python -m apd_jax.sweep`."""

from __future__ import annotations

import json
from typing import Any

from etils import epath
from ml_collections import ConfigDict
from rich.console import Console

from apd_jax.commands import experiment
from apd_jax.errors import InputError
from apd_jax.methods import registry
from apd_jax.paths import user_path
from apd_jax.report import figures
from apd_jax.sweep import grid as grid_lib
from apd_jax.sweep.halving import rungs, train_all
from apd_jax.sweep.results import Results
from apd_jax.train import parallel


def run(
    config: Any,
    workdir: epath.PathLike,
    text: str,
    console: Console,
    *,
    criterion: str = "worst_error",
    halve: int = 0,
) -> Results:
    """A sweep in one folder: target, training of all runs, sweep.json, table, figures.

    The same call goes on where it stopped.

    Args:
      config: the experiment's. Its `apd` fills in what is not swept, and is the reference that all
        runs are judged by.
      text: as of --sweep; see `grid.parse`.
      criterion, halve: as of `halving.train_all`.
    Raises:
      InputError: a setting, or a workdir that cannot be used.
      Interrupted: by a signal, with a checkpoint saved.
    """
    folder = user_path(workdir)
    method = registry.of(config.apd)
    grid = grid_lib.parse(text, method)
    rungs(len(grid.settings), method.num_steps, halve)  # refuses a bad number
    if method.num_instances != 1:
        raise InputError(
            f"a sweep makes its own instances; give seed=0:{method.num_instances} in --sweep "
            "instead of num_instances."
        )
    if "recipe" in config:
        raise InputError(
            "a sweep trains once with the settings of `apd`, not in the stages of a recipe; give "
            "the target's own config."
        )
    asked = {
        "axes": {field: list(values) for field, values in grid.axes.items()},
        "seeds": list(grid.seeds),
    }
    whole = ConfigDict(
        config.to_dict() | {"sweep": asked | {"criterion": criterion, "halve": halve}}
    )
    target, params = experiment.prepare(whole, folder)
    found = train_all(
        target,
        params,
        method,
        grid,
        criterion=criterion,
        halve=halve,
        evaluation_seed=config.evaluation.seed,
        workdir=folder,
    )
    results = Results(grid, found, method.num_steps, criterion)
    parallel.from_primary(lambda: _write(results, folder, console))
    return results


def _write(results: Results, folder: epath.Path, console: Console) -> None:
    (folder / "sweep.json").write_text(json.dumps(results.as_json(), indent=2, allow_nan=False))
    figures.save(folder / "figures", results.figures())
    console.print(results.table(f"{folder.name}: {len(results.runs)} runs"))
    if best := results.best():
        values = {"seed": best.seed} | results.grid.settings[best.setting]
        again = " ".join(f"--config.apd.{field}={value}" for field, value in values.items())
        weights = f"--config.target.weights_path={folder / 'target' / 'params.npz'}"
        console.print(
            f"Best by {results.criterion.replace('_', ' ')}; alone: python -m apd_jax.main ... "
            f"{again} {weights}",
            soft_wrap=True,
        )
    console.print(f"Figures: {folder / 'figures'}   Runs: {folder / 'sweep.json'}", soft_wrap=True)
