"""The evidence of a run, from its workdir and into it."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from rich.console import Console

from apd_jax.commands import experiment, runs
from apd_jax.commands.given import Given
from apd_jax.commands.runs import Restored
from apd_jax.components import Components
from apd_jax.decomposition import instances
from apd_jax.errors import InputError
from apd_jax.evidence import card, evidence
from apd_jax.evidence.card import Evidence
from apd_jax.paths import quoted, user_path


def write(
    path: epath.PathLike,
    console: Console,
    *,
    full: bool = False,
    other: epath.PathLike | None = None,
    instance: int | None = None,
    num_examples: int | None = None,
    bits_per_rank: float = 1.0,
    given: Given | None = None,
    checks: Sequence[int | str] | None = None,
    budget: int | float | str | None = None,
) -> list[Evidence]:
    """Fills the checks for every instance of a run (or the given one), writes and prints them.

    Files: evidence.json, evidence.md, evidence.npz and figures.

    Args: as of `apd_jax.evidence.evidence`, `budget` of every instance; `other` is the workdir of
      another run of the same target; `given` as of `runs.restore`.
    Raises:
      InputError: no workdir, no checkpoint, another target, an instance that does not exist.
    """
    folder, run = user_path(path), runs.restore(path, given, experiment.BOTH)
    if run.step < run.method.num_steps:
        console.print(runs.unfinished(run))
    count = len(run.instances)
    if instance is not None and not 0 <= instance < count:
        raise InputError(
            f"instance {instance} does not exist; {path} holds {count}, counted from 0."
        )
    numbers = list(range(count)) if instance is None else [instance]
    compared = None
    if other is not None:
        compared = _same_target(run, runs.restore(other, given), path, other)
    command = f"python -m apd_jax.evidence --workdir={quoted(path)}" + (" --full" if full else "")
    command += f" --other={quoted(other)}" if other else ""
    command += f" --checks={','.join(map(str, checks))}" if checks else ""
    command += f" --budget={budget}" if budget else ""
    for name, value in vars(given or Given()).items():
        command += f" --{name}={quoted(value)}" if value else ""
    rows = run.rows
    earlier, found = runs.earlier_checkpoints(run, folder), []
    for i in numbers:
        found.append(
            evidence(
                run.decomposition(i, rows),
                target=run.evaluated_target,
                num_examples=num_examples,
                bits_per_rank=bits_per_rank,
                full=full,
                checks=checks,
                budget=budget,
                seeds=[trained for j, trained in enumerate(run.instances) if j != i],
                other=compared,
                earlier={step: instances(t, run.method)[i] for step, t in earlier.items()},
                provenance={"workdir": str(path), "command": command, "step": run.step},
                console=Console(stderr=True),
            )
        )
        title = f"Evidence: {folder.name}" + (f", instance {i}" if count > 1 else "")
        console.print(found[-1].table(title))
    paths = card.save(found, folder, numbers, several=count > 1)
    console.print("  ".join(map(str, paths)), soft_wrap=True)
    if (folder / "evaluation.json").exists():
        experiment.report(folder, console, given)  # the page shows the card
    return found


def _same_target(
    run: Restored, other: Restored, path: epath.PathLike, other_path: epath.PathLike
) -> Components:
    """The other run's components (of its first instance), if both decompose the same weights."""
    mine, theirs = (jax.tree.leaves(r.params) for r in (run, other))
    same = len(mine) == len(theirs) and all(
        a.shape == b.shape and np.allclose(a, b) for a, b in zip(mine, theirs, strict=True)
    )
    if not same:
        how = "give both calls the same params"
        if run.target is not None:
            weights = user_path(path) / "target" / "params.npz"
            how = f"start the second run with --config.target.weights_path={weights}"
        raise InputError(f"{path} and {other_path} decompose different target networks; {how}.")
    return other.instances[0].components
