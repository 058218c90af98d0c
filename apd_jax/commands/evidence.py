"""The evidence of a run, from its workdir and into it."""

from __future__ import annotations

import jax
import numpy as np
from etils import epath
from rich.console import Console

from apd_jax import components as components_lib
from apd_jax import targets
from apd_jax.commands import experiment
from apd_jax.commands.experiment import Restored
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.evidence import card, evidence
from apd_jax.evidence.card import Evidence
from apd_jax.train.progress import read_rows


def write(
    path: epath.PathLike,
    console: Console,
    *,
    full: bool = False,
    other: epath.PathLike | None = None,
    instance: int | None = None,
    num_examples: int | None = None,
    bits_per_rank: float = 1.0,
) -> list[Evidence]:
    """Fills the checks for every instance of a run (or the given one), writes evidence.json, evidence.md, evidence.npz and figures, prints.

    Args: as of `apd_jax.evidence.evidence`; `other` is the workdir of another run of the same target.
    Raises:
      InputError: no workdir, no checkpoint, another target, an instance that does not exist.
    """
    folder, run = epath.Path(path), experiment.restore(path)
    if run.step < run.config.apd.num_steps:
        console.print(
            f"This run is at step {run.step} of {run.config.apd.num_steps}; what follows describes that step."
        )
    instances = experiment.instances(run.components, run.config)
    if instance is not None and not 0 <= instance < len(instances):
        raise InputError(
            f"instance {instance} does not exist; {path} holds {len(instances)}, counted from 0."
        )
    numbers = range(len(instances)) if instance is None else [instance]
    compared = None if other is None else _same_target(run, experiment.restore(other), path, other)
    command = (
        f"python -m apd_jax.evidence --workdir={path}"
        + (" --full" if full else "")
        + (f" --other={other}" if other else "")
    )
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["step"] <= run.step]
    earlier, problem, found = (
        experiment.earlier_components(run, folder),
        run.target.problem(run.params),
        [],
    )
    for i in numbers:
        history = [
            {name: v[i] if isinstance(v, list) else v for name, v in row.items()} for row in rows
        ]
        several = Decomposition(
            problem,
            run.components,
            run.config.apd,
            history,
            run.config.recipe if "recipe" in run.config else None,
        )
        title = f"Evidence: {folder.name}" + (f", instance {i}" if len(instances) > 1 else "")
        found.append(
            evidence(
                several.instance(i),
                target=targets.build(run.config.target, run.config.evaluation.batch_size),
                num_examples=num_examples,
                bits_per_rank=bits_per_rank,
                full=full,
                seeds=[components for j, components in enumerate(instances) if j != i],
                other=compared,
                earlier={
                    step: experiment.instances(components, run.config)[i]
                    for step, components in earlier.items()
                },
                provenance={"workdir": str(path), "command": command, "step": run.step},
                console=Console(stderr=True),
            )
        )
        console.print(found[-1].table(title))
    paths = card.save(found, folder, list(numbers), several=len(instances) > 1)
    console.print("  ".join(map(str, paths)), soft_wrap=True)
    if (folder / "evaluation.json").exists():
        experiment.report(folder, console)  # the page shows the card
    return found


def _same_target(
    run: Restored, other: Restored, path: epath.PathLike, other_path: epath.PathLike
) -> components_lib.Components:
    """The other run's components (of its first instance), if the two runs decompose the very same weights."""
    mine, theirs = (jax.tree.leaves(r.params) for r in (run, other))
    same = len(mine) == len(theirs) and all(
        a.shape == b.shape and np.allclose(a, b) for a, b in zip(mine, theirs, strict=True)
    )
    if not same:
        raise InputError(
            f"{path} and {other_path} decompose different target networks; start the second run with "
            f"--config.target.weights_path={epath.Path(path) / 'target' / 'params.npz'}."
        )
    return experiment.instances(other.components, other.config)[0]
