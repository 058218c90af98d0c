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
from apd_jax.commands import configs, harvest, runs
from apd_jax.commands.given import Given
from apd_jax.commands.runs import Restored, restore, shapes, target_path, unfinished
from apd_jax.components import Components
from apd_jax.decomposition import instances
from apd_jax.errors import InputError, seed_of
from apd_jax.evaluation.general import STREAM
from apd_jax.methods import registry
from apd_jax.network import data
from apd_jax.paths import quoted, user_path
from apd_jax.recipe import scales, stages
from apd_jax.report import compare as compare_lib
from apd_jax.report import figures, html, tables, text
from apd_jax.targets import pretrain, weights
from apd_jax.targets.base import Target
from apd_jax.train import checkpoint, loop, parallel, placement
from apd_jax.train.progress import ProgressDisplay, read_rows, say
from apd_jax.train.workdir import claim, load_config

BOTH = ("apply", "data")  # what pages and evaluations need of a network of one's own
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
    say(f"At the end: the page {folder / 'report.html'}. Until then: {folder / 'metrics.jsonl'}.")
    if "recipe" in config:
        trained, _, method = stages.fit(problem, method, config.recipe, workdir=folder)
    else:
        method = scales.prepared(problem, method)
        trained, _ = loop.fit(problem, method, workdir=folder)
    rows = read_rows(folder / "metrics.jsonl")
    done = Restored(config, method, target, problem, method.num_steps, trained, rows, folder)
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
    target = targets.build(config.target, method.batch_size, folder)
    params = parallel.from_primary(
        lambda: _target_params(target, config, folder), like=shapes(target)
    )
    return target, params


def evaluate(
    workdir: epath.PathLike,
    console: Console,
    given: Given | None = None,
    *,
    thorough: bool = False,
) -> None:
    """Evaluation, figures and report of a run that has a checkpoint, from its saved config.

    Args:
      given: as of `runs.restore`. thorough: as of `evaluation.evaluate`.
    """
    run = restore(workdir, given, BOTH)
    if run.step < run.method.num_steps:
        console.print(unfinished(run))
    _report(run, user_path(workdir), console, thorough)


def report(workdir: epath.PathLike, console: Console, given: Given | None = None) -> None:
    """`report.html` again (one per instance), from the run's checkpoint.

    And from what its evaluation and evidence left there.

    Raises:
      InputError: the folder is no workdir, or the run has not been evaluated yet.
    """
    _pages(restore(workdir, given, BOTH), user_path(workdir), console)


def compare(
    workdir: epath.PathLike, other: epath.PathLike, console: Console, given: Given | None = None
) -> None:
    """Two runs side by side, on the terminal and as `compare.html` in the first one's folder.

    Of a network of one's own neither function nor data is needed; what an evaluation adds is left
    out where there is none.

    Raises:
      InputError: one of them is no workdir, or has not been evaluated yet.
    """
    comparison = compare_lib.compare(*(_run(user_path(path), given) for path in (workdir, other)))
    for part in compare_lib.terminal(comparison):
        console.print(part)
    console.print(
        f"Page: {compare_lib.write(user_path(workdir) / 'compare.html', comparison)}",
        soft_wrap=True,
    )


def _run(folder: epath.Path, given: Given | None) -> compare_lib.Run:
    """Of several instances the first."""
    run, metrics, rates = restore(folder, given), {}, None
    if run.target is not None or (folder / "evaluation.json").exists():
        metrics, rates = _evaluated(folder), _arrays(folder, 0)["firing_rates"]
    return compare_lib.Run(
        folder,
        run.config.to_dict(),
        _of_instance(metrics, 0),
        run.rows,
        run.params,
        run.instances[0].components,
        rates,
        _initial(run),
    )


def _initial(run: Restored) -> Components | None:
    """What a run began with; None where its beginning needs its data, or a network of one's own."""
    if run.target is None or "recipe" in run.config or run.method.finds_beginning:
        return None
    return loop.initial_components(run.problem, run.method)


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


def inspect(workdir: epath.PathLike, console: Console, given: Given | None = None) -> None:
    """Prints what the checkpoints of a workdir, or a saved decomposition, hold.

    The network is not run.
    """
    folder = user_path(workdir)
    if runs.is_saved(folder):
        run = restore(folder, given)
        state = {"params": run.params, "components": run.trained.components.tree}
        console.print(tables.tree_table(state | {"gate": run.trained.gate}, title=str(folder)))
        found = [one.components for one in run.instances]
    else:
        found = _checkpoints(folder, console, given)
    for i, one in enumerate(found):
        arrays = _arrays(folder, i)
        rates, features = arrays.get("firing_rates"), arrays.get("feature_of_component")
        for table in tables.components_tables(one, rates, features, console.width):
            console.print(table)
    if not _arrays_path(folder, 0).exists():
        console.print(
            "Firing rates and features come with the evaluation, at the end of the run or by "
            "--mode=evaluate."
        )


def _checkpoints(folder: epath.Path, console: Console, given: Given | None) -> list[Components]:
    """Prints the tree of the newest checkpoint; its components by instance."""
    config = load_config(folder)
    steps, step, state = checkpoint.read(folder / "checkpoints")
    console.print(
        f"{folder / 'checkpoints'}: steps "
        + ", ".join(f"{step} ({size / 2**20:.1f} MiB)" for step, size in steps.items()),
        soft_wrap=True,
    )
    console.print(tables.tree_table(state, title=f"State at step {step}"))
    method = registry.of(config.apd if "apd" in config else config)
    if method.own_numbers:  # which the checkpoint does not hold
        return [one.components for one in restore(folder, given).instances]
    trees = instances(state["components"]["tree"], method)
    return [components_lib.from_raw(raw) for raw in trees]


def _target_params(target: Target, config: Config, folder: epath.Path) -> PyTree:
    """The target's weights: those in the workdir, else a given file's, else freshly trained.

    In the workdir afterwards.
    """
    claim(folder, config, older=configs.later)
    if target.keep_fn is not None:
        target.keep_fn(folder)
    path, like = target_path(folder), shapes(target)
    if path.exists():
        return weights.load(path, like)
    if config.target.weights_path:
        params = weights.load(config.target.weights_path, like)
    elif target.loss_fn is None:
        params = target.init_fn(jax.random.key(config.target.seed))
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


def _report(run: Restored, folder: epath.Path, console: Console, thorough: bool = False) -> None:
    """Evaluation, its files, the figures, the report, and the table on the screen."""
    target, history = run.evaluated_target, run.rows
    earlier = [read_rows(path) for path in (folder / "stages").glob("*/metrics.jsonl")]
    minutes = sum(map(_minutes, [history, *earlier]))
    count, results = len(run.instances), []
    for i in range(count):
        one = run.decomposition(i, history)
        evaluation = evaluation_lib.evaluate(
            target, one, num_batches=run.num_batches, seed=run.seed, thorough=thorough
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
        console.print(table, *map(tables.grid_table, evaluation.grids))
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


def _minutes(rows: Sequence[Mapping[str, Any]]) -> float:
    """Every logged row stands for the steps since the row before, at the speed of its own call."""
    steps = np.diff([0] + [row["step"] for row in rows])
    seconds = (n * row["seconds_per_step"] for n, row in zip(steps, rows, strict=True))
    return float(sum(seconds)) / 60


def _pages(run: Restored, folder: epath.Path, console: Console) -> None:
    """report.html, and report_1.html ... for further instances."""
    metrics, history = _evaluated(folder), run.rows
    target, evidence = run.evaluated_target, None
    if (folder / "evidence.json").exists():
        evidence = json.loads((folder / "evidence.json").read_text())
    if harvest.kept(run, folder, console):
        source = harvest.page(run, folder, evidence=evidence, metrics=_of_instance(metrics, 0))
        path = text.write(folder / "report.html", source)
        console.print(f"Report: {path}", soft_wrap=True)
        return
    x, count = _report_inputs(run, target), len(run.instances)
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
            settings=run.config.to_dict(),
            metrics=_of_instance(metrics, i),
            arrays=_arrays(folder, i),
            evidence=evidence,
            evidence_command=f"python -m apd_jax.evidence --workdir={quoted(folder)}",
            figures=[str(figure.relative_to(folder)) for figure in found],
            instances=[(str(j), other.name) for j, other in enumerate(paths)] if count > 1 else [],
            instance=i,
        )
        html.write(path, source)
    console.print(f"Report: {paths[0]}", soft_wrap=True)


def _report_inputs(run: Restored, target: Target | None) -> PyTree:
    """The inputs that pages show, of REPORT_BATCHES batches."""
    key = jax.random.fold_in(jax.random.key(run.seed), STREAM + 2)
    source = run.problem.sample_fn if target is None else target.fresh_fn
    sample_fn = data.as_sampler(source, REPORT_BATCHES)

    @jax.jit
    def draw() -> PyTree:
        return jax.lax.map(lambda step: sample_fn(key, step), jnp.arange(REPORT_BATCHES))

    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), draw())


def _own_rss_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _peak_rss_gib(folder: epath.Path) -> float:
    """What an earlier process of this run needed."""
    path = folder / "evaluation.json"
    return json.loads(path.read_text())["peak_rss_gib"] if path.exists() else 0.0


def _arrays_path(folder: epath.Path, instance: int) -> epath.Path:
    return folder / ("evaluation.npz" if instance == 0 else f"evaluation_{instance}.npz")


def _arrays(folder: epath.Path, instance: int) -> dict[str, np.ndarray]:
    """Of the evaluation; {} where there is none."""
    path = _arrays_path(folder, instance)
    return dict(np.load(io.BytesIO(path.read_bytes()))) if path.exists() else {}
