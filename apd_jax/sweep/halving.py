"""Training of all runs of a grid side by side, with successive halving.

A rung is a part of the training after which the settings that do badly are given up. Its folder,
rungs/0, rungs/1, ..., holds its checkpoints, its log and judged.npz; what is there is not computed
again. Shapes: R runs of a rung, seeds of a setting next to each other.
"""

from __future__ import annotations

import dataclasses
import io
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float, Int, PyTree

from apd_jax.errors import InputError
from apd_jax.methods import registry
from apd_jax.methods.base import Method
from apd_jax.methods.optimizers import Trained
from apd_jax.paths import user_path
from apd_jax.sweep import judge
from apd_jax.sweep.grid import Grid
from apd_jax.targets.base import FeatureTarget, Target
from apd_jax.train import loop, parallel
from apd_jax.train.state import TrainState

MAX_HALVINGS = 3  # earlier than at an eighth of the training a run tells little of its end


@dataclasses.dataclass(frozen=True)
class Rung:
    until: int  # the step that it ends at
    num_settings: int  # how many take part


@dataclasses.dataclass(frozen=True)
class Run:
    """One run as far as it got."""

    setting: int  # which of `Grid.settings`
    seed: int
    step: int
    scores: dict[str, float]  # criteria and truth; infinite or NaN if it diverged

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.scores["reference_loss"])


def rungs(num_settings: int, num_steps: int, halve: int) -> list[Rung]:
    """After 1/η^J, ..., 1/η² and 1/η of the steps the best 1/η of the settings go on, rounded up.

    J = ⌊log_η settings⌋, at most MAX_HALVINGS.

    Args:
      halve: η; 0 trains all to the end.
    Raises:
      InputError: η is 1 or below 0.
    """
    if halve == 0:
        return [Rung(num_steps, num_settings)]
    if halve < 2:
        raise InputError(
            "--halve must be at least 2 (the best half goes on), or 0 to train all settings to the "
            f"end; got {halve}."
        )
    J = next(
        j
        for j in reversed(range(MAX_HALVINGS + 1))
        if halve**j <= num_settings and num_steps // halve**j >= 1
    )
    return [
        Rung(num_steps // halve ** (J - j), math.ceil(num_settings / halve**j))
        for j in range(J + 1)
    ]


def best(values: Float[np.ndarray, "settings seeds"], count: int) -> Int[np.ndarray, " count"]:
    """The settings with the lowest mean over seeds, in their order.

    A run without a finite value counts as the worst one seen.
    """
    finite = values[np.isfinite(values)]
    mean = np.where(np.isfinite(values), values, finite.max() if finite.size else 0.0).mean(axis=1)
    return np.sort(np.argsort(mean, kind="stable")[:count]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class _Sweep:
    """What all rungs of a sweep share."""

    target: Target
    params: PyTree
    method: Method
    grid: Grid
    evaluation_seed: int
    workdir: epath.PathLike | None

    def train(self, state: TrainState | None, alive: np.ndarray, until: int, number: int, of: int):
        """The runs of the settings that are left, to the end of a rung."""
        seeds, settings = self.grid.seeds, self.grid.settings
        R = len(alive) * len(seeds)
        values = {
            field: np.repeat([settings[s][field] for s in alive], len(seeds))
            for field in self.grid.axes
        }
        part = f", part {number + 1} of {of}" if of > 1 else ""
        return loop.advance(
            self.target.problem(self.params),
            self.grid.ceiling(self.method).replace(num_instances=R),
            state,
            settings=values | {"seed": np.tile(seeds, len(alive))},
            until=until,
            workdir=self.folder(number),
            title=f"sweep of {R} runs{part}",
        )[0]

    def folder(self, number: int) -> epath.Path | None:
        return None if self.workdir is None else user_path(self.workdir) / "rungs" / str(number)

    def judge(self, trained: Trained, number: int) -> dict[str, np.ndarray]:
        """Criteria and truth of every run of a rung, from its folder if they are there."""
        folder = self.folder(number)
        path = None if folder is None else folder / "judged.npz"
        if path is not None and path.exists():
            return dict(np.load(io.BytesIO(path.read_bytes())))
        problem = self.target.problem(self.params)
        judged = judge.criteria(problem, self.method, trained, self.evaluation_seed)
        judged |= judge.truth(self.target, self.params, trained.components, self.method.always_on)
        if path is not None:
            unfinished = path.with_name(".judged.npz.unfinished")
            with unfinished.open("wb") as file:
                np.savez(file, **judged)
            unfinished.replace(path)
        return judged


def train_all(
    target: Target,
    params: PyTree,
    method: Any,
    grid: Grid,
    *,
    criterion: str = "worst_error",
    halve: int = 0,
    evaluation_seed: int = 0,
    workdir: epath.PathLike | None = None,
) -> list[Run]:
    """Trains every setting with every seed, and judges each where it ended.

    All runs of a rung are one program.

    Args:
      method: its settings; also the reference that all are judged by.
      criterion: of `judge.CRITERIA`, by which settings go on.
      workdir: where to keep rungs, and to go on from.
    Returns: every run, by setting and seed.
    Raises: as `train.loop.advance`; but a run that diverges stops no other, and is a failure.
    Cost: of memory, R times that of a run. Of the steps of full training about
      (J + 2) / (2 · 2^J) for halve = 2.
    """
    method = registry.of(method)
    sweep = _Sweep(target, params, method, grid, evaluation_seed, workdir)
    truth = judge.TRUTH if isinstance(target, FeatureTarget) else ()
    names, num_seeds = (*judge.CRITERIA, *truth), len(grid.seeds)
    alive, state, done = np.arange(len(grid.settings)), None, {}
    plan = rungs(len(grid.settings), method.num_steps, halve)
    for number, rung in enumerate(plan):
        state = sweep.train(state, alive, rung.until, number, len(plan))
        trained = jax.tree.map(jnp.asarray, Trained(state.components, state.gate))
        judged = parallel.from_primary(
            lambda trained=trained, number=number: sweep.judge(trained, number),
            like={name: np.zeros(len(alive) * num_seeds) for name in names},
        )
        by_setting = {n: np.asarray(v).reshape(len(alive), num_seeds) for n, v in judged.items()}
        for i, s in enumerate(alive):
            for j, seed in enumerate(grid.seeds):
                scores = {name: float(values[i, j]) for name, values in by_setting.items()}
                done[s, j] = Run(int(s), seed, rung.until, scores)
        if number + 1 < len(plan):
            chosen = best(by_setting[criterion], plan[number + 1].num_settings)
            going_on = (chosen[:, None] * num_seeds + np.arange(num_seeds)[None, :]).ravel()
            state = jax.tree.map(lambda a, going_on=going_on: a[going_on], state)
            alive = alive[chosen]
    return [done[place] for place in sorted(done)]
