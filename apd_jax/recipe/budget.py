"""How many steps a recipe's stages may have where its time is bounded."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import numpy as np
from etils import epath

from apd_jax.errors import InputError
from apd_jax.methods.apd import APD
from apd_jax.network.problem import Problem
from apd_jax.paths import user_path
from apd_jax.recipe.numbers import STAGES, Recipe, stage_method
from apd_jax.recipe.scales import Scales
from apd_jax.train import loop, parallel
from apd_jax.train.progress import duration, say, seconds

SHARE = "steps.json"  # in a workdir: the share of its steps that fits the budget
LEAST_STEPS = 10  # that a stage has in any case
_PER_CALL, _CALLS = 4, 3  # steps that are timed


def within(
    problem: Problem,
    method: APD,
    recipe: Recipe,
    stages: Sequence[str],
    scales: Scales,
    workdir: epath.PathLike | None,
    began: float,
) -> Recipe:
    """The recipe with as many steps in each of its stages as its `budget` of time leaves.

    A few steps of each size are timed. All stages are cut by the same share, and their schedules
    with them. In a workdir the share is kept: a resumed run has the steps that it began with,
    however long it takes.

    Args:
      began: when the budget began to run, of `time.monotonic`.
    Cost: compiling a step of each size, and _PER_CALL * _CALLS of them.
    """
    if not recipe.get("budget"):
        return recipe

    def decide() -> np.ndarray:
        kept = None if workdir is None else user_path(workdir) / SHARE
        if kept is not None and kept.exists():
            return np.array([_read(kept)], np.float32)
        return np.full(1, np.nan, np.float32)

    share = float(parallel.from_primary(decide, like=np.zeros(1, np.float32))[0])
    if np.isnan(share):
        needed = _needed(problem, method, recipe, stages, scales)
        left = seconds(recipe.budget) - (time.monotonic() - began)
        found = np.array([min(1.0, max(left, 0.0) / needed)], np.float32)
        share = float(parallel.from_primary(lambda: found, like=found)[0])
        if workdir is not None:
            parallel.from_primary(lambda: _keep(user_path(workdir), share))
        say(
            f"{', '.join(stages)} would take {duration(needed)}, and of the budget "
            f"{duration(max(left, 0))} is left: {share:.0%} of their steps."
        )
    return _cut(recipe, share) if share < 1 else recipe


def kept(recipe: Recipe, workdir: epath.PathLike) -> Recipe:
    """The recipe of the run in a workdir, with the steps that it had and no budget.

    Raises:
      InputError: the file that says so is torn.
    """
    path = user_path(workdir) / SHARE
    return _spent(recipe, _read(path)) if recipe.get("budget") and path.exists() else recipe


def as_trained(recipe: Recipe, num_steps: int) -> Recipe:
    """The same of a run whose last stage had `num_steps`: what another run by it is to have."""
    if not recipe.get("budget"):
        return recipe
    return _spent(recipe, num_steps / recipe[STAGES[-1]].num_steps)


def _spent(recipe: Recipe, share: float) -> Recipe:
    cut = _cut(recipe, share)
    cut.budget = ""
    return cut


def _needed(
    problem: Problem, method: APD, recipe: Recipe, stages: Sequence[str], scales: Scales
) -> float:
    """Seconds that the stages would take, without compiling."""
    settings = {stage: stage_method(method, recipe, stage, scales) for stage in stages}
    cost: dict[int, float] = {}
    for stage, s in settings.items():
        if s.num_instances not in cost:
            short = s.replace(steps_per_call=_PER_CALL, log_every_steps=_PER_CALL)
            until = min(_PER_CALL * _CALLS, s.num_steps)
            rows = loop.advance(problem, short, until=until, title=f"a few steps of {stage}")[1]
            cost[s.num_instances] = min(row["seconds_per_step"] for row in rows)
    return sum(s.num_steps * cost[s.num_instances] for s in settings.values())


def _cut(recipe: Recipe, share: float) -> Recipe:
    cut = recipe.copy_and_resolve_references()
    for stage in STAGES:
        steps = cut[stage].num_steps
        cut[stage].num_steps = max(min(LEAST_STEPS, steps), round(share * steps))
    return cut


def _keep(workdir: epath.Path, share: float) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / SHARE).write_text(json.dumps({"share_of_steps": share}))


def _read(path: epath.Path) -> float:
    try:
        return float(json.loads(path.read_text())["share_of_steps"])
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path}, which says how many steps this run has, is torn; choose another workdir."
        ) from None
