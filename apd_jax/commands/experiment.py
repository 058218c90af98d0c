"""The stages of one run in one folder: target, decomposition, evaluation, figures, report.

A workdir holds config.json, target/params.npz, checkpoints/ (orbax), metrics.jsonl, tensorboard/,
evaluation.json, evaluation.npz, figures/ and report.html. Every stage takes up what it finds there.
"""

from __future__ import annotations

import dataclasses
import io
import json
import resource
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import PyTree
from rich.console import Console

from apd_jax import components as components_lib
from apd_jax import evaluation as evaluation_lib
from apd_jax import targets
from apd_jax.decomposition import Decomposition, instances
from apd_jax.errors import InputError, seed_of
from apd_jax.evaluation.general import STREAM
from apd_jax.methods import registry
from apd_jax.methods.base import Method
from apd_jax.methods.optimizers import Trained
from apd_jax.paths import user_path
from apd_jax.recipe import stages
from apd_jax.report import compare as compare_lib
from apd_jax.report import figures, html, tables
from apd_jax.targets import pretrain, weights
from apd_jax.targets.base import Target
from apd_jax.train import checkpoint, loop, parallel, placement
from apd_jax.train.progress import ProgressDisplay, read_rows
from apd_jax.train.workdir import claim, load_config

Config = Any  # an experiment's ConfigDict
REPORT_BATCHES = 4  # of `evaluation.batch_size`: the inputs that a report measures components on


def run(config: Config, workdir: epath.PathLike, console: Console) -> None:
    """All stages; each goes on from what the workdir already holds.

    Of several processes, only process 0 touches the workdir.

    Raises:
      InputError: a setting, or a workdir that cannot be used.
      Interrupted: by a signal, with a checkpoint saved.
    """
    folder = user_path(workdir)
    target, params = prepare(config, folder)
    problem, method = target.problem(params), registry.of(config.apd)
    if "recipe" in config:
        trained, _, method = stages.fit(problem, method, config.recipe, workdir=folder)
    else:
        trained, _ = loop.fit(problem, method, workdir=folder)
    done = Restored(config, method, target, params, method.num_steps, trained)
    parallel.from_primary(lambda: _report(done, folder, console))


def prepare(config: Config, folder: epath.Path) -> tuple[Target, PyTree]:
    """The target network with its weights, trained if the workdir does not hold them yet.

    The workdir is then this config's.

    Raises:
      InputError: a setting, or a workdir that cannot be used.
    """
    method = registry.of(config.apd)
    seed_of("target.seed", config.target.seed)
    seed_of("evaluation.seed", config.evaluation.seed)
    if "recipe" in config:
        stages.check(method, config.recipe)
    else:
        method.check()
    placement.arrange(method, parallel.global_devices())  # or says why it cannot
    target = targets.build(config.target, method.batch_size)
    params = parallel.from_primary(
        lambda: _target_params(target, config, folder), like=_shapes(target)
    )
    return target, params


@dataclasses.dataclass(frozen=True)
class Restored:
    """A run as its workdir holds it."""

    config: Config  # the experiment's
    method: Method  # as the components were trained (with a recipe: by its last stage)
    target: Target  # with batches of the decomposition's size
    params: PyTree
    step: int
    trained: Trained  # with a leading axis of instances if there are several

    @property
    def instances(self) -> list[Trained]:
        return instances(self.trained, self.method)

    def decomposition(self, i: int = 0, history: Sequence[Mapping[str, Any]] = ()) -> Decomposition:
        """One instance, with its own values of the logged rows."""
        rows = [{n: v[i] if isinstance(v, list) else v for n, v in row.items()} for row in history]
        recipe = self.config.recipe if "recipe" in self.config else None
        one = self.instances[i]
        method = self.method.replace(num_instances=1)
        problem = self.target.problem(self.params)
        return Decomposition(problem, one.components, method, rows, recipe, one.gate)


def restore(workdir: epath.PathLike) -> Restored:
    """The run of a workdir at its newest readable checkpoint, from its saved config.

    Raises:
      InputError: not a workdir, or without a readable checkpoint.
    """
    folder = user_path(workdir)
    config = load_config(folder)
    if "target" not in config:
        raise InputError(
            f"{folder} was written by apd_jax.decompose, of a network that is not stored there; "
            "load it in Python by the same call of decompose, which goes on from its checkpoints."
        )
    method = registry.of(config.apd)
    target = targets.build(config.target, method.batch_size)
    params = weights.load(_target_path(folder), _shapes(target))
    problem = target.problem(params)
    if "recipe" in config:
        found = stages.found_method(method, folder)
        method = stages.last_method(problem, found, config.recipe)
    step, trained = loop.restore_trained(problem, method, folder)
    return Restored(config, method, target, params, step, jax.tree.map(jnp.asarray, trained))


def earlier_checkpoints(run: Restored, workdir: epath.PathLike) -> dict[int, Trained]:
    """{step: what was trained} of the checkpoints before the newest, as far as readable."""
    found, until, problem = {}, run.step - 1, run.target.problem(run.params)
    while True:
        try:
            step, trained = loop.restore_trained(problem, run.method, workdir, until=until)
        except InputError:  # there is none, or none that can be read
            return found
        found[step], until = jax.tree.map(jnp.asarray, trained), step - 1


def unfinished(run: Restored) -> str:
    """What is said of a run that is not at its last step."""
    at = f"This run is at step {run.step} of {run.method.num_steps}"
    return f"{at}; what follows describes that step."


def evaluate(workdir: epath.PathLike, console: Console) -> None:
    """Evaluation, figures and report of a run that has a checkpoint, from its saved config."""
    run = restore(workdir)
    if run.step < run.method.num_steps:
        console.print(unfinished(run))
    _report(run, user_path(workdir), console)


def report(workdir: epath.PathLike, console: Console) -> None:
    """`report.html` again (one per instance), from the run's checkpoint.

    And from what its evaluation and evidence left there.

    Raises:
      InputError: the folder is no workdir, or the run has not been evaluated yet.
    """
    _pages(restore(workdir), user_path(workdir), console)


def compare(workdir: epath.PathLike, other: epath.PathLike, console: Console) -> None:
    """Two evaluated runs side by side, on the terminal and as `compare.html`.

    The page lies in the first one's folder.

    Raises:
      InputError: one of them is no workdir, or has not been evaluated yet.
    """
    comparison = compare_lib.compare(*(_run(user_path(path)) for path in (workdir, other)))
    for part in compare_lib.terminal(comparison):
        console.print(part)
    console.print(
        f"Page: {compare_lib.write(user_path(workdir) / 'compare.html', comparison)}",
        soft_wrap=True,
    )


def _run(folder: epath.Path) -> compare_lib.Run:
    """Of several instances the first."""
    run = restore(folder)
    arrays = np.load(io.BytesIO(_arrays_path(folder, 0).read_bytes()))
    return compare_lib.Run(
        folder,
        run.config.to_dict(),
        _of_instance(_evaluated(folder), 0),
        _history(run, folder),
        run.params,
        run.instances[0].components,
        arrays["firing_rates"],
    )


def _evaluated(folder: epath.Path) -> dict[str, Any]:
    """What evaluation.json holds.

    Raises:
      InputError: there is none yet.
    """
    if not (folder / "evaluation.json").exists():
        raise InputError(
            f"{folder} has not been evaluated yet; do that first, by --mode=evaluate (which makes "
            "the report too)."
        )
    return json.loads((folder / "evaluation.json").read_text())


def _of_instance(metrics: Mapping[str, Any], i: int) -> dict[str, Any]:
    return {**metrics, **(metrics["instances"][i] if "instances" in metrics else {})}


def inspect(workdir: epath.PathLike, console: Console) -> None:
    """Prints what the checkpoints of a workdir hold, without running the network."""
    folder = user_path(workdir)
    config = load_config(folder)
    steps, step, state = checkpoint.read(folder / "checkpoints")
    console.print(
        f"{folder / 'checkpoints'}: steps "
        + ", ".join(f"{step} ({size / 2**20:.1f} MiB)" for step, size in steps.items())
    )
    console.print(tables.tree_table(state, title=f"State at step {step}"))
    method = registry.of(config.apd)
    for i, raw in enumerate(instances(state["components"]["tree"], method)):
        one = components_lib.from_raw(raw)
        if method.own_numbers:  # which the checkpoint does not hold
            one = restore(workdir).instances[i].components
        saved, arrays = _arrays_path(folder, i), {}
        if saved.exists():  # numpy opens local paths only
            arrays = np.load(io.BytesIO(saved.read_bytes()))
        console.print(
            tables.components_table(
                one, arrays.get("firing_rates"), arrays.get("feature_of_component")
            )
        )
    if not _arrays_path(folder, 0).exists():
        console.print(
            "Firing rates and features come with the evaluation, at the end of the run or by "
            "--mode=evaluate."
        )


def _shapes(target: Target) -> PyTree:
    return jax.eval_shape(target.init_fn, jax.random.key(0))


def _target_path(folder: epath.Path) -> epath.Path:
    return folder / "target" / "params.npz"


def _target_params(target: Target, config: Config, folder: epath.Path) -> PyTree:
    """The target's weights: those in the workdir, else a given file's, else freshly trained.

    In the workdir afterwards.
    """
    claim(folder, config)
    path, like = _target_path(folder), _shapes(target)
    if path.exists():
        return weights.load(path, like)
    if config.target.weights_path:
        params = weights.load(config.target.weights_path, like)
    elif target.loss_fn is None:
        params = jax.jit(target.init_fn)(jax.random.key(config.target.seed))
    else:
        with ProgressDisplay("target", config.target.pretrain.num_steps) as display:
            params, history = pretrain.pretrain(
                target, config.target, progress=lambda step, _, values: display.update(step, values)
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "metrics.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in history)
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    weights.save(path, params)
    return params


def _report(run: Restored, folder: epath.Path, console: Console) -> None:
    """Evaluation, its files, the figures, the report, and the table on the screen."""
    settings = run.config.evaluation
    target = targets.build(run.config.target, settings.batch_size)
    history = _history(run, folder)
    earlier = [read_rows(path) for path in (folder / "stages").glob("*/metrics.jsonl")]
    minutes = sum(map(_minutes, [history, *earlier]))
    count, results = len(run.instances), []
    for i in range(count):
        one = run.decomposition(i, history)
        evaluation = evaluation_lib.evaluate(
            target, one, num_batches=settings.num_batches, seed=settings.seed
        )
        results.append(evaluation.metrics)
        with _arrays_path(folder, i).open("wb") as file:
            np.savez_compressed(file, **evaluation.arrays)
        name = "figures" if count == 1 else f"figures/instance_{i}"
        figures.save_all(folder / name, evaluation, one)
        title = folder.name + (f", instance {i}" if count > 1 else "")
        table = tables.results_table(
            evaluation.metrics, minutes, labels=evaluation.labels, title=title
        )
        console.print(table)
    provenance = {
        "seed": run.method.seed,
        "step": run.step,
        "num_stages": 1 + len(earlier),
        "total_steps": run.step + sum(rows[-1]["step"] for rows in earlier if rows),
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "minutes_decomposition": minutes,
        "peak_rss_gib": max(_peak_rss_gib(folder), _own_rss_gib()),
    }
    mean, more = results[0], {}
    if count > 1:
        mean = {key: float(np.mean([result[key] for result in results])) for key in results[0]}
        more = {"instances": results}
    (folder / "evaluation.json").write_text(json.dumps({**mean, **provenance, **more}, indent=2))
    where = f"Figures: {folder / 'figures'}   Metrics: {folder / 'evaluation.json'}"
    console.print(where, soft_wrap=True)
    _pages(run, folder, console)


def _history(run: Restored, folder: epath.Path) -> list[dict[str, Any]]:
    """The logged rows up to the checkpoint's step."""
    return [row for row in read_rows(folder / "metrics.jsonl") if row["step"] <= run.step]


def _minutes(rows: Sequence[Mapping[str, Any]]) -> float:
    """Every logged row stands for the steps since the row before, at the speed of its own call."""
    steps = np.diff([0] + [row["step"] for row in rows])
    seconds = (n * row["seconds_per_step"] for n, row in zip(steps, rows, strict=True))
    return float(sum(seconds)) / 60


def _pages(run: Restored, folder: epath.Path, console: Console) -> None:
    """report.html, and report_1.html ... for further instances."""
    config, metrics, history = run.config, _evaluated(folder), _history(run, folder)
    target, evidence = targets.build(config.target, config.evaluation.batch_size), None
    if (folder / "evidence.json").exists():
        evidence = json.loads((folder / "evidence.json").read_text())
    x, count = _report_inputs(target, config.evaluation.seed), len(run.instances)
    paths = [folder / ("report.html" if i == 0 else f"report_{i}.html") for i in range(count)]
    for i, path in enumerate(paths):
        drawn = folder / ("figures" if count == 1 else f"figures/instance_{i}")
        found = sorted(drawn.glob("*.png")) if drawn.exists() else []
        one = dataclasses.replace(run.decomposition(i), history=history)
        source = html.Source(
            name=folder.resolve().name,
            decomposition=one,
            x=x,
            target=target,
            settings=config.to_dict(),
            metrics=_of_instance(metrics, i),
            arrays=dict(np.load(io.BytesIO(_arrays_path(folder, i).read_bytes()))),
            evidence=evidence,
            evidence_command=f"python -m apd_jax.evidence --workdir={folder}",
            figures=[str(figure.relative_to(folder)) for figure in found],
            instances=[(str(j), other.name) for j, other in enumerate(paths)] if count > 1 else [],
            instance=i,
        )
        html.write(path, source)
    console.print(f"Report: {paths[0]}", soft_wrap=True)


def _report_inputs(target: Target, seed: int) -> PyTree:
    """The inputs that pages show, of REPORT_BATCHES batches."""
    key = jax.random.fold_in(jax.random.key(seed), STREAM + 2)

    @jax.jit
    def draw() -> PyTree:
        return jax.lax.map(lambda step: target.sample_fn(key, step), jnp.arange(REPORT_BATCHES))

    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), draw())


def _own_rss_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _peak_rss_gib(folder: epath.Path) -> float:
    """What an earlier process of this run needed."""
    path = folder / "evaluation.json"
    return json.loads(path.read_text())["peak_rss_gib"] if path.exists() else 0.0


def _arrays_path(folder: epath.Path, instance: int) -> epath.Path:
    return folder / ("evaluation.npz" if instance == 0 else f"evaluation_{instance}.npz")
