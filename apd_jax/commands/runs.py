"""Folders of runs, opened: workdirs of experiments and of `decompose`, and saved decompositions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import PyTree
from ml_collections import ConfigDict

from apd_jax import targets
from apd_jax.commands import configs
from apd_jax.commands.given import Given
from apd_jax.decomposition import Decomposition, instances
from apd_jax.errors import InputError
from apd_jax.methods import registry
from apd_jax.methods.base import Method
from apd_jax.methods.optimizers import Trained
from apd_jax.network.problem import Problem, check_function
from apd_jax.paths import user_path
from apd_jax.recipe import budget, scales, stages
from apd_jax.storage import folder as storage
from apd_jax.storage import workdirs
from apd_jax.storage.structure import Functions
from apd_jax.targets import weights
from apd_jax.targets.base import Target
from apd_jax.train import loop
from apd_jax.train.progress import read_rows
from apd_jax.train.workdir import load_config

EVALUATION_BATCHES = 20  # of a network of one's own
_WANTED = {
    "apply": ("its function", "--apply=module:function"),
    "data": ("inputs", "--data=module:sample_fn or --data=FILE.npy"),
}


@dataclasses.dataclass(frozen=True)
class Restored:
    """A run as its folder holds it.

    config: as config.json holds it, with `target` and `evaluation` if it is an experiment's;
      otherwise the method's settings under `apd`.
    method: as the components were trained (with a recipe: by its last stage).
    target: with batches of the decomposition's size; None for a network of one's own.
    trained: with a leading axis of instances if there are several. rows: what was logged of it.
    """

    config: Any
    method: Method
    target: Target | None
    problem: Problem
    step: int
    trained: Trained
    rows: Sequence[Mapping[str, Any]]
    folder: epath.Path | None = None  # where its target may have kept something

    @property
    def params(self) -> PyTree:
        return self.problem.params

    @property
    def instances(self) -> list[Trained]:
        return instances(self.trained, self.method)

    @property
    def seed(self) -> int:
        """Of the evaluation."""
        return self.method.seed if self.target is None else self.config.evaluation.seed

    @property
    def num_batches(self) -> int:
        """Of the evaluation."""
        known = self.target is not None
        return self.config.evaluation.num_batches if known else EVALUATION_BATCHES

    @property
    def evaluated_target(self) -> Target | None:
        """The target with batches of the evaluation's size."""
        if self.target is None:
            return None
        size = self.config.evaluation.batch_size
        return targets.build(self.config.target, size, self.folder)

    def decomposition(self, i: int = 0, history: Sequence[Mapping[str, Any]] = ()) -> Decomposition:
        """One instance, with its own values of the logged rows."""
        rows = [{n: v[i] if isinstance(v, list) else v for n, v in row.items()} for row in history]
        recipe = self.config.recipe if "recipe" in self.config else None
        one = self.instances[i]
        method = self.method.replace(num_instances=1)
        return Decomposition(self.problem, one.components, method, rows, recipe, one.gate)


def restore(
    path: epath.PathLike, given: Given | None = None, needs: Sequence[str] = ()
) -> Restored:
    """The run of a workdir at its newest readable checkpoint, or a saved decomposition.

    Args:
      given: where the network is one's own, what the command line says of it.
      needs: what of that ("apply", "data") must be there.
    Raises:
      InputError: no such folder, no readable checkpoint, or something missing: one sentence.
    """
    folder, given = user_path(path), given or Given()
    config = None if is_saved(folder) else load_config(folder)
    if config is not None and "target" in config:
        if given:
            raise InputError(
                f"{folder} is a run on the target {config.target.name!r}, whose function and data "
                "are known; leave out --apply, --data, --params and --valid."
            )
        return _of_experiment(folder, configs.completed(config))
    return _of_own(folder, given, needs)


def is_saved(folder: epath.Path) -> bool:
    """Whether `decomposition.save` wrote it."""
    return (folder / storage.ABOUT).exists()


def _of_experiment(folder: epath.Path, config: Any) -> Restored:
    method = registry.of(config.apd)
    target = targets.build(config.target, method.batch_size, folder)
    params = weights.load(target_path(folder), shapes(target))
    problem = target.problem(params)
    if "recipe" in config:
        with config.unlocked():
            config.recipe = budget.kept(config.recipe, folder)
        found = stages.found_method(method, folder)
        method = stages.last_method(problem, found, config.recipe)
    else:
        method = scales.prepared(problem, method)
    step, trained = loop.restore_trained(problem, method, folder)
    trained = jax.tree.map(jnp.asarray, trained)
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["step"] <= step]
    return Restored(config, method, target, problem, step, trained, rows, folder)


def _of_own(folder: epath.Path, given: Given, needs: Sequence[str]) -> Restored:
    if missing := [name for name in needs if not getattr(given, name)]:
        what, how = zip(*(_WANTED[name] for name in missing), strict=True)
        before = workdirs.kept_function(folder) if "apply" in missing else ""
        hint = f" (which was {before})" if before else ""
        raise InputError(
            f"{folder} decomposes a network of your own, of which {' and '.join(what)}{hint} are "
            f"not stored there; give {' and '.join(how)}."
        )
    functions = Functions(given.function("apply"), valid_fn=given.function("valid"))
    if is_saved(folder):
        found = storage.load(folder, functions.apply_fn, given.like(), valid_fn=functions.valid_fn)
        step = found.history[-1]["step"] if found.history else found.method.num_steps
    else:
        step, found = workdirs.load(folder, functions, given.like())
    source = given.source(found.method.batch_size)
    problem = dataclasses.replace(found.problem, sample_fn=source)
    if given.apply and source is not None:
        check_function(problem)
    config = ConfigDict({"apd": registry.settings(found.method)})
    if found.recipe is not None:
        config.recipe = found.recipe
    return Restored(config, found.method, None, problem, step, found.trained, found.history)


def earlier_checkpoints(run: Restored, workdir: epath.PathLike) -> dict[int, Trained]:
    """{step: what was trained} of the checkpoints before the newest, as far as readable."""
    folder, found, until = user_path(workdir), {}, run.step - 1
    if is_saved(folder):
        return {}
    while True:
        try:
            if run.target is None:
                functions = Functions(run.problem.apply_fn)
                step, one = workdirs.load(folder, functions, run.params, until=until)
                trained = one.trained
            else:
                step, trained = loop.restore_trained(run.problem, run.method, folder, until=until)
        except InputError:  # there is none, or none that can be read
            return found
        found[step], until = jax.tree.map(jnp.asarray, trained), step - 1


def unfinished(run: Restored) -> str:
    """What is said of a run that is not at its last step."""
    at = f"This run is at step {run.step} of {run.method.num_steps}"
    return f"{at}; what follows describes that step."


def shapes(target: Target) -> PyTree:
    return jax.eval_shape(target.init_fn, jax.random.key(0))


def target_path(folder: epath.Path) -> epath.Path:
    """Where an experiment keeps its target's weights."""
    return folder / "target" / "params.npz"
