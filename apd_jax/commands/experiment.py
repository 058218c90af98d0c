"""The stages of one run in one folder: target, decomposition, evaluation, figures, report.

A workdir holds config.json, target/params.npz, checkpoints/ (orbax), metrics.jsonl, tensorboard/, evaluation.json,
evaluation.npz, figures/ and report.html. Every stage takes up what it finds there.
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
from apd_jax.components import Components
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.evaluation.general import STREAM
from apd_jax.methods import config as config_lib
from apd_jax.methods.config import Config
from apd_jax.recipe import stages as recipe
from apd_jax.report import compare as compare_lib
from apd_jax.report import figures, html, tables
from apd_jax.targets import pretrain, weights
from apd_jax.targets.base import Target
from apd_jax.train import checkpoint, parallel, placement
from apd_jax.train import loop as train
from apd_jax.train.progress import ProgressDisplay, read_rows
from apd_jax.train.workdir import claim, load_config

REPORT_BATCHES = (
    4  # of `evaluation.batch_size`: the inputs that a report measures its components on
)


def run(config: Config, workdir: epath.PathLike, console: Console) -> None:
    """All stages; each goes on from what the workdir already holds. Of several processes, only process 0 touches the workdir.

    Raises:
      InputError: a setting, or a workdir that cannot be used. Interrupted: by a signal, with a checkpoint saved.
    """
    folder = epath.Path(workdir)
    target, params = prepare(config, folder)
    problem = target.problem(params)
    if "recipe" in config:
        components, _, settings = recipe.fit(problem, config.apd, config.recipe, workdir=folder)
    else:
        (components, _), settings = train.fit(problem, config.apd, workdir=folder), config.apd
    done = Restored(_with(config, settings), target, params, settings.num_steps, components)
    parallel.from_primary(lambda: _report(done, folder, console))


def prepare(config: Config, folder: epath.Path) -> tuple[Target, PyTree]:
    """The target network with its weights, trained if the workdir does not hold them yet. The workdir is then this config's.

    Raises:
      InputError: a setting, or a workdir that cannot be used.
    """
    if "recipe" in config:
        recipe.check(config.apd, config.recipe)
    else:
        config_lib.validate(config.apd)
    placement.arrange(config.apd, parallel.global_devices())  # or says why it cannot
    target = targets.build(config.target, config.apd.batch_size)
    return target, parallel.from_primary(
        lambda: _target_params(target, config, folder), like=_shapes(target)
    )


@dataclasses.dataclass(frozen=True)
class Restored:
    """A run as its workdir holds it."""

    config: Config  # `apd` as the components were trained (with a recipe: by its last stage)
    target: Target  # with batches of the decomposition's size
    params: PyTree
    step: int
    components: Components  # with a leading axis of instances if there are several

    @property
    def instances(self) -> list[Components]:
        return instances(self.components, self.config)


def restore(workdir: epath.PathLike) -> Restored:
    """The run of a workdir at its newest readable checkpoint, from its saved config.

    Raises:
      InputError: not a workdir, or without a readable checkpoint.
    """
    folder = epath.Path(workdir)
    config = load_config(folder)
    target = targets.build(config.target, config.apd.batch_size)
    params = weights.load(_target_path(folder), _shapes(target))
    problem = target.problem(params)
    if "recipe" in config:
        config = _with(
            config,
            recipe.last_config(problem, recipe.found_config(config.apd, folder), config.recipe),
        )
    step, components = train.restore_components(problem, config.apd, folder)
    return Restored(config, target, params, step, jax.tree.map(jnp.asarray, components))


def _with(config: Config, settings: Config) -> Config:
    """The experiment with other settings of the method."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.apd = settings
    return config.lock()


def earlier_components(run: Restored, workdir: epath.PathLike) -> dict[int, Components]:
    """{step: components} of the checkpoints before the newest, as far as they can be read."""
    found, until = {}, run.step - 1
    while True:
        try:
            step, components = train.restore_components(
                run.target.problem(run.params), run.config.apd, workdir, until=until
            )
        except InputError:  # there is none, or none that can be read
            return found
        found[step], until = jax.tree.map(jnp.asarray, components), step - 1


def evaluate(workdir: epath.PathLike, console: Console) -> None:
    """Evaluation, figures and report of a run that has a checkpoint, from its saved config."""
    run = restore(workdir)
    if run.step < run.config.apd.num_steps:
        console.print(
            f"This run is at step {run.step} of {run.config.apd.num_steps}; what follows describes that step."
        )
    _report(run, epath.Path(workdir), console)


def report(workdir: epath.PathLike, console: Console) -> None:
    """`report.html` again (one per instance), from the run's checkpoint and what its evaluation and evidence left there.

    Raises:
      InputError: the folder is no workdir, or the run has not been evaluated yet.
    """
    _pages(restore(workdir), epath.Path(workdir), console)


def compare(workdir: epath.PathLike, other: epath.PathLike, console: Console) -> None:
    """Two evaluated runs side by side: on the terminal, and as `compare.html` in the first one's folder.

    Raises:
      InputError: one of them is no workdir, or has not been evaluated yet.
    """
    comparison = compare_lib.compare(*(_run(epath.Path(path)) for path in (workdir, other)))
    for part in compare_lib.terminal(comparison):
        console.print(part)
    console.print(
        f"Page: {compare_lib.write(epath.Path(workdir) / 'compare.html', comparison)}",
        soft_wrap=True,
    )


def _run(folder: epath.Path) -> compare_lib.Run:
    """Of several instances the first."""
    run = restore(folder)
    metrics = _of_instance(_evaluated(folder), 0)
    history = [row for row in read_rows(folder / "metrics.jsonl") if row["step"] <= run.step]
    firing_rates = np.load(io.BytesIO(_arrays_path(folder, 0).read_bytes()))["firing_rates"]
    return compare_lib.Run(
        folder, run.config.to_dict(), metrics, history, run.params, run.instances[0], firing_rates
    )


def _evaluated(folder: epath.Path) -> dict[str, Any]:
    """What evaluation.json holds.

    Raises:
      InputError: there is none yet.
    """
    if not (folder / "evaluation.json").exists():
        raise InputError(
            f"{folder} has not been evaluated yet; do that first, by --mode=evaluate (which makes the report too)."
        )
    return json.loads((folder / "evaluation.json").read_text())


def _of_instance(metrics: Mapping[str, Any], i: int) -> dict[str, Any]:
    return {**metrics, **(metrics["instances"][i] if "instances" in metrics else {})}


def inspect(workdir: epath.PathLike, console: Console) -> None:
    """Prints what the checkpoints of a workdir hold, without running the network."""
    folder = epath.Path(workdir)
    config = load_config(folder)
    steps, step, state = checkpoint.read(folder / "checkpoints")
    console.print(
        f"{folder / 'checkpoints'}: steps "
        + ", ".join(f"{step} ({size / 2**20:.1f} MiB)" for step, size in steps.items())
    )
    console.print(tables.tree_table(state, title=f"State at step {step}"))
    for i, raw in enumerate(instances(state["components"]["tree"], config)):
        one = components_lib.from_raw(raw)
        saved = _arrays_path(folder, i)
        arrays = (
            np.load(io.BytesIO(saved.read_bytes())) if saved.exists() else {}
        )  # numpy opens local paths only
        console.print(
            tables.components_table(
                one, arrays.get("firing_rates"), arrays.get("feature_of_component")
            )
        )
    if not _arrays_path(folder, 0).exists():
        console.print(
            "Firing rates and features come with the evaluation, at the end of the run or by --mode=evaluate."
        )


def _shapes(target: Target) -> PyTree:
    return jax.eval_shape(target.init_fn, jax.random.key(0))


def _target_path(folder: epath.Path) -> epath.Path:
    return folder / "target" / "params.npz"


def _target_params(target: Target, config: Config, folder: epath.Path) -> PyTree:
    """The target's weights: those in the workdir, else a given file's, else freshly trained; in the workdir afterwards."""
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
    config = run.config
    target = targets.build(config.target, config.evaluation.batch_size)
    history = [row for row in read_rows(folder / "metrics.jsonl") if row["step"] <= run.step]
    earlier = [read_rows(path) for path in (folder / "stages").glob("*/metrics.jsonl")]
    minutes = sum(map(_minutes, [history, *earlier]))
    provenance = {
        "seed": config.apd.seed,
        "step": run.step,
        "num_stages": 1 + len(earlier),
        "total_steps": run.step + sum(rows[-1]["step"] for rows in earlier if rows),
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "minutes_decomposition": minutes,
        "peak_rss_gib": max(
            _peak_rss_gib(folder), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        ),
    }
    found = run.instances
    results = []
    for i, one in enumerate(found):
        evaluation = evaluation_lib.evaluate(target, run.params, one, config)
        results.append(evaluation.metrics)
        with _arrays_path(folder, i).open("wb") as file:
            np.savez_compressed(file, **evaluation.arrays)
        name = "figures" if len(found) == 1 else f"figures/instance_{i}"
        rows = [
            {key: value[i] if isinstance(value, list) else value for key, value in row.items()}
            for row in history
        ]
        figures.save_all(folder / name, evaluation, rows, config)
        console.print(
            tables.results_table(
                evaluation.metrics,
                minutes,
                labels=evaluation.labels,
                title=f"{folder.name}" + (f", instance {i}" if len(found) > 1 else ""),
            )
        )
    mean = (
        {key: float(np.mean([result[key] for result in results])) for key in results[0]}
        if len(results) > 1
        else results[0]
    )
    more = {"instances": results} if len(results) > 1 else {}
    (folder / "evaluation.json").write_text(json.dumps({**mean, **provenance, **more}, indent=2))
    console.print(
        f"Figures: {folder / 'figures'}   Metrics: {folder / 'evaluation.json'}", soft_wrap=True
    )
    _pages(run, folder, console)


def _minutes(rows: Sequence[Mapping[str, Any]]) -> float:
    """Every logged row stands for the steps since the row before, at the speed of its own call."""
    steps = np.diff([0] + [row["step"] for row in rows])
    return float(sum(n * row["seconds_per_step"] for n, row in zip(steps, rows, strict=True))) / 60


def _pages(run: Restored, folder: epath.Path, console: Console) -> None:
    """report.html, and report_1.html ... for further instances."""
    config = run.config
    metrics, evidence = _evaluated(folder), folder / "evidence.json"
    target = targets.build(config.target, config.evaluation.batch_size)
    key = jax.random.fold_in(jax.random.key(config.evaluation.seed), STREAM + 2)
    batches = jax.jit(
        lambda: jax.lax.map(lambda step: target.sample_fn(key, step), jnp.arange(REPORT_BATCHES))
    )()
    x = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), batches)
    history = [row for row in read_rows(folder / "metrics.jsonl") if row["step"] <= run.step]
    found = run.instances
    paths = [folder / ("report.html" if i == 0 else f"report_{i}.html") for i in range(len(found))]
    single = config.copy_and_resolve_references().apd
    with single.unlocked():
        single.num_instances = 1
    for i, (path, one) in enumerate(zip(paths, found, strict=True)):
        drawn = folder / ("figures" if len(found) == 1 else f"figures/instance_{i}")
        source = html.Source(
            name=folder.resolve().name,
            decomposition=Decomposition(target.problem(run.params), one, single, history),
            x=x,
            target=target,
            settings=config.to_dict(),
            metrics=_of_instance(metrics, i),
            arrays=dict(np.load(io.BytesIO(_arrays_path(folder, i).read_bytes()))),
            evidence=json.loads(evidence.read_text()) if evidence.exists() else None,
            evidence_command=f"python -m apd_jax.evidence --workdir={folder}",
            figures=sorted(str(figure.relative_to(folder)) for figure in drawn.glob("*.png"))
            if drawn.exists()
            else [],
            instances=[(str(j), other.name) for j, other in enumerate(paths)]
            if len(paths) > 1
            else [],
            instance=i,
        )
        html.write(path, source)
    console.print(f"Report: {paths[0]}", soft_wrap=True)


def _peak_rss_gib(folder: epath.Path) -> float:
    """What an earlier process of this run needed."""
    path = folder / "evaluation.json"
    return json.loads(path.read_text())["peak_rss_gib"] if path.exists() else 0.0


def _arrays_path(folder: epath.Path, instance: int) -> epath.Path:
    return folder / ("evaluation.npz" if instance == 0 else f"evaluation_{instance}.npz")


def instances(tree: PyTree, config: Config) -> list[PyTree]:
    """Without an axis of instances: one, or as many as were trained side by side."""
    count = config.apd.num_instances
    return [tree] if count == 1 else [jax.tree.map(lambda a, i=i: a[i], tree) for i in range(count)]
