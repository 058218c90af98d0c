"""Training of all runs of a grid side by side, with successive halving: settings that do badly are given up early.

A rung is a part of the training after which settings are given up. Its folder, rungs/0, rungs/1, ..., holds its checkpoints, its log and
judged.npz; what is there is not computed again. Shapes: R runs of a rung, seeds of a setting next to each other.
"""

from __future__ import annotations

import dataclasses
import io
import math

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float, Int, PyTree

from apd_jax.components import Components
from apd_jax.errors import InputError
from apd_jax.methods.config import Config
from apd_jax.sweep import judge
from apd_jax.sweep.grid import Grid
from apd_jax.targets.base import FeatureTarget, Target
from apd_jax.train import loop as train
from apd_jax.train import parallel

MAX_HALVINGS = (
    3  # earlier than at an eighth of the training (for halve = 2) a run tells little of its end
)


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
            f"--halve must be at least 2 (the best half goes on), or 0 to train all settings to the end; got {halve}."
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
    """The settings with the lowest mean over seeds, in their order. A run without a finite value counts as the worst one seen."""
    finite = values[np.isfinite(values)]
    mean = np.where(np.isfinite(values), values, finite.max() if finite.size else 0.0).mean(axis=1)
    return np.sort(np.argsort(mean, kind="stable")[:count]).astype(np.int32)


def train_all(
    target: Target,
    params: PyTree,
    config: Config,
    grid: Grid,
    *,
    criterion: str = "worst_error",
    halve: int = 0,
    evaluation_seed: int = 0,
    workdir: epath.PathLike | None = None,
) -> list[Run]:
    """Trains every setting with every seed, all of a rung in one program, and judges each where it ended.

    Args:
      config: of the decomposition (`apd`); also the reference that all are judged by.
      criterion: of `judge.CRITERIA`, by which settings go on.
      workdir: where to keep rungs, and to go on from.
    Returns: every run, by setting and seed.
    Raises: as `train.advance`; but a run that diverges stops no other, and is a failure.
    Cost: of memory, R times that of a run. Of the steps of full training about (J + 2) / (2 · 2^J) for halve = 2.
    """
    problem, settings, num_seeds = target.problem(params), grid.settings, len(grid.seeds)
    names = (*judge.CRITERIA, *(judge.TRUTH if isinstance(target, FeatureTarget) else ()))
    alive, state, done = np.arange(len(settings)), None, {}
    plan = rungs(len(settings), config.num_steps, halve)
    for number, rung in enumerate(plan):
        folder = None if workdir is None else epath.Path(workdir) / "rungs" / str(number)
        R = len(alive) * num_seeds
        values = {
            field: np.repeat([settings[s][field] for s in alive], num_seeds) for field in grid.axes
        }
        stage = grid.ceiling(config)
        stage.num_instances = R
        part = f", part {number + 1} of {len(plan)}" if len(plan) > 1 else ""
        state, _ = train.advance(
            problem,
            stage,
            state,
            settings=values | {"seed": np.tile(grid.seeds, len(alive))},
            until=rung.until,
            workdir=folder,
            title=f"sweep of {R} runs{part}",
        )
        components = jax.tree.map(jnp.asarray, state.components)
        judged = parallel.from_primary(
            lambda components=components, folder=folder: _judged(
                target, params, config, components, evaluation_seed, folder
            ),
            like={name: np.zeros(R) for name in names},
        )
        judged = {
            name: np.asarray(values).reshape(len(alive), num_seeds)
            for name, values in judged.items()
        }
        for i, s in enumerate(alive):
            for j, seed in enumerate(grid.seeds):
                done[s, j] = Run(
                    int(s),
                    seed,
                    rung.until,
                    {name: float(values[i, j]) for name, values in judged.items()},
                )
        if number + 1 < len(plan):
            chosen = best(judged[criterion], plan[number + 1].num_settings)
            instances = (chosen[:, None] * num_seeds + np.arange(num_seeds)[None, :]).ravel()
            state, alive = (
                jax.tree.map(lambda a, instances=instances: a[instances], state),
                alive[chosen],
            )
    return [done[place] for place in sorted(done)]


def _judged(
    target: Target,
    params: PyTree,
    config: Config,
    components: Components,
    seed: int,
    folder: epath.Path | None,
) -> dict[str, np.ndarray]:
    """Criteria and truth of every run of a rung, from its folder if they are there."""
    path = None if folder is None else folder / "judged.npz"
    if path is not None and path.exists():
        return dict(np.load(io.BytesIO(path.read_bytes())))
    judged = judge.criteria(target.problem(params), config, components, seed) | judge.truth(
        target, params, components, config.num_always_on
    )
    if path is not None:
        unfinished = path.with_name(".judged.npz.unfinished")
        with unfinished.open("wb") as file:
            np.savez(file, **judged)
        unfinished.rename(path)
    return judged
