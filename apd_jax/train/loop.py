"""The host loop around the step: data, devices, logging, checkpoints, resume, interruption."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree
from rich.console import Console

from apd_jax import components as components_lib
from apd_jax.components import Components
from apd_jax.errors import InputError, Interrupted, NonFiniteError
from apd_jax.methods import config as config_lib
from apd_jax.methods.config import Config
from apd_jax.network import data
from apd_jax.network.problem import Problem
from apd_jax.train import checkpoint, parallel, placement
from apd_jax.train import step as step_lib
from apd_jax.train.progress import MetricsLog, ProgressDisplay
from apd_jax.train.step import TrainState

Settings = Mapping[str, np.ndarray]  # {field: [instances]}
Placement = placement.Copies | placement.Shards


def fit(
    problem: Problem,
    config: Config,
    *,
    workdir: epath.PathLike | None = None,
    components: Components | None = None,
    title: str = "decomposition",
) -> tuple[Components, list[dict[str, Any]]]:
    """Trains components until `config.num_steps`, going on from the newest checkpoint in `workdir` if there is one.

    Args:
      components: where to begin (with the leading axis of instances, if there are several) instead of at random.
      title: of the progress display.
    Returns: the components (with a leading axis of instances if there are several) and the logged rows.
    Raises: as `advance`.
    """
    state, rows, placed = _advance(
        problem, config, components=components, workdir=workdir, title=title
    )
    return finished(placed.get(state.components), config), rows


def advance(
    problem: Problem,
    config: Config,
    state: TrainState | None = None,
    *,
    components: Components | None = None,
    settings: Settings | None = None,
    until: int | None = None,
    workdir: epath.PathLike | None = None,
    title: str = "decomposition",
) -> tuple[TrainState, list[dict[str, Any]]]:
    """`fit` by parts, and with instances that differ in settings: from a state, or the newest checkpoint in `workdir`, to a step.

    Of several processes every one must call this, with the same arguments. Only process 0 touches `workdir`, and only its rows go
    back to before a resume; where components are split over devices, every process writes its own into the checkpoints.

    Args:
      state: where to begin; None is step 0, at random but for `components`.
      settings: {field: a value per instance}, of "seed" and the fields in `config.TRACEABLE`; see `step.make_step`. An instance is the
        run that has these values in its config. Instances that stop being finite are then carried on, as they harm no others.
      until: the step to end at; `config.num_steps`, which the schedules go by, if None.
    Raises:
      InputError: settings, data or checkpoints that do not fit. NonFiniteError: a loss is not finite.
      Interrupted: SIGINT or SIGTERM came; a checkpoint is saved (only with a workdir, otherwise signals are left alone).
    """
    state, rows, placed = _advance(
        problem,
        config,
        state,
        components=components,
        settings=settings,
        until=until,
        workdir=workdir,
        title=title,
    )
    return placed.get(state), rows


def _advance(
    problem: Problem,
    config: Config,
    state: TrainState | None = None,
    *,
    components: Components | None,
    settings: Settings | None = None,
    until: int | None = None,
    workdir: epath.PathLike | None,
    title: str,
) -> tuple[TrainState, list[dict[str, Any]], Placement]:
    """`advance`, with the state still on the devices."""
    config_lib.validate(config)
    placed = placement.arrange(config, parallel.global_devices())
    _check_batch_size(problem, config)
    end = config.num_steps if until is None else until
    initial, key, step = _build(problem, config, settings, placed)
    if components is not None:
        components = dataclasses.replace(
            components, log_thresholds=initial.components.log_thresholds
        )  # those of these settings
        initial = dataclasses.replace(initial, components=components)
    with _resumed(workdir, config, initial if state is None else state, placed) as (
        start,
        reached,
        record,
    ):
        if start < end:
            traced = None if settings is None else _traced(settings)
            params, key, traced = placed.share(
                (jax.tree.map(jnp.asarray, problem.params), key, traced)
            )
            program = functools.cache(lambda num_steps: placed.steps(step, num_steps))
            calls = data.calls(problem.sample_fn, start, end, config.steps_per_call)
            run = lambda state, num_steps, batches: program(num_steps)(
                state, params, key, *batches, settings=traced
            )  # noqa: E731
            with _caught_signals() if workdir is not None else contextlib.nullcontext([]) as caught:
                reached = _train(
                    run,
                    reached,
                    start,
                    end,
                    calls,
                    config,
                    record,
                    caught,
                    title,
                    may_diverge=settings is not None,
                )
        return reached, record.rows, placed


@dataclasses.dataclass(frozen=True)
class _Record:
    """What a run leaves behind: its rows, and on process 0 of a run with a workdir the files (of Shards, checkpoints on all)."""

    rows: list[dict[str, Any]]
    placed: Placement
    log: MetricsLog | None = None
    checkpoints: ocp.CheckpointManager | None = None

    def add(self, row: dict[str, Any]) -> None:
        self.log.append(row) if self.log else self.rows.append(row)

    def save(self, step: int, state: PyTree) -> None:
        if self.checkpoints:
            checkpoint.save(
                self.checkpoints,
                step,
                state if isinstance(self.placed, placement.Shards) else self.placed.get(state),
            )

    def wait_until_saved(self) -> None:
        parallel.from_primary(
            self.checkpoints.wait_until_finished if self.checkpoints else lambda: None
        )


@contextlib.contextmanager
def _resumed(
    workdir: epath.PathLike | None, config: Config, initial: TrainState, placed: Placement
) -> Iterator[tuple[int, TrainState, _Record]]:
    """Where a run goes on, on the devices: at the workdir's newest checkpoint, or with the initial state."""
    together = isinstance(
        placed, placement.Shards
    )  # no process may hold the whole state, so each reads and writes its part of it
    initial = placed.put(initial) if together else initial
    begin = (int(np.max(jax.device_get(initial.step))), initial)  # the same of all instances
    if workdir is None:
        yield begin[0], initial if together else placed.put(initial), _Record([], placed)
        return
    with contextlib.ExitStack() as stack:
        manager, log = None, None
        if parallel.is_primary() or together:
            folder = epath.Path(workdir) / "checkpoints"
            manager = stack.enter_context(
                contextlib.closing(
                    checkpoint.open_manager(folder, config.keep_checkpoints, together=together)
                )
            )
        if together:
            start, state = checkpoint.restore_latest(manager, initial, together=True) or begin
        else:
            start, state = parallel.from_primary(
                lambda: checkpoint.restore_latest(manager, initial) or begin, like=begin
            )
            state = placed.put(state)
        if parallel.is_primary():
            log = stack.enter_context(contextlib.closing(MetricsLog(workdir, int(start))))
        yield int(start), state, _Record(log.rows if log else [], placed, log, manager)


def _train(
    run: Callable,
    state: PyTree,
    step: int,
    end: int,
    calls: Iterator[tuple[int, tuple]],
    config: Config,
    record: _Record,
    caught: list[int],
    title: str,
    *,
    may_diverge: bool,
) -> PyTree:
    """Makes the calls one after another; after each logs, saves and stops, whatever is due.

    Args:
      run: (replicated state, number of steps, batches) -> (state, metrics stacked over steps).
      step: where the state stands. end: where it shall get to.
      caught: a signal that asks to stop is in it.
      may_diverge: losses that are not finite are logged, and training goes on.
    """
    with ProgressDisplay(
        title, end, console=Console(stderr=True, quiet=not parallel.is_primary())
    ) as display:
        upcoming = next(calls)
        while upcoming:
            (length, batches), began = upcoming, time.monotonic()
            state, metrics = run(state, length, batches)
            upcoming = next(calls, None)  # the host pulls the next batches while the devices work
            metrics = jax.device_get(metrics)
            seconds_per_step = (time.monotonic() - began) / length
            if not may_diverge:
                _check_finite(metrics, step, record.checkpoints)
            for row in _rows(metrics, step, end, config):
                record.add(row | {"seconds_per_step": seconds_per_step})
            previous, step = step, step + length
            display.update(
                step,
                {
                    name: _finite_mean(values[-1])
                    for name, values in metrics.items()
                    if name != "mean_active"
                },
            )
            signum = parallel.largest(
                caught[0] if caught else 0
            )  # whichever process was told to stop, all do, and here
            due = step // config.checkpoint_every_steps > previous // config.checkpoint_every_steps
            if due or signum or step == end:
                record.save(step, state)
            if signum:
                record.wait_until_saved()
                raise Interrupted(step, signum)
    return state


def restore_components(
    problem: Problem, config: Config, workdir: epath.PathLike, *, until: int | None = None
) -> tuple[int, Components]:
    """The components of the newest readable checkpoint in `workdir` (up to step `until`), with its step.

    Raises:
      InputError: there is none.
    """
    like = jax.eval_shape(
        lambda: _build(problem, config, None, placement.Copies(jax.local_devices()[:1]))[0]
    )
    _, step, state = checkpoint.read(epath.Path(workdir) / "checkpoints", like, until=until)
    return step, finished(state.components, config)


def finished(components: Components, config: Config) -> Components:
    """The components as the next step would use them: unit-norm U is restored at the beginning of a step."""
    return components_lib.normalize_U(components) if config.unit_norm_U else components


def _build(problem: Problem, config: Config, settings: Settings | None, placed: Placement):
    """Initial state, data key and per-device step; with a leading axis of instances if there are several, or settings of theirs."""
    layouts = problem.layouts

    def make_state(key, settings=None):
        return step_lib.init_state(
            key,
            problem.params,
            config,
            select=problem.select,
            uses=problem.uses,
            layouts=layouts,
            settings=settings,
        )

    fed = isinstance(problem.sample_fn, data.Batches)
    step = step_lib.make_step(
        problem.apply_fn,
        None if fed else problem.sample_fn,
        config,
        attribution_fn=problem.attribution_fn,
        num_active_fn=problem.num_active_fn,
        valid_fn=problem.valid_fn,
        **placed.axes,
    )
    if settings is None:
        roots, instances = jax.random.key(config.seed)[None], jnp.arange(config.num_instances)
    else:  # each is the first instance of a run of its own
        seeds = ({"seed": [config.seed]} | dict(settings))["seed"]
        roots, instances = (
            jnp.stack([jax.random.key(int(seed)) for seed in seeds]),
            jnp.zeros(config.num_instances, jnp.int32),
        )
    init_keys, data_keys = jax.vmap(_keys)(jnp.broadcast_to(roots, instances.shape), instances)
    if config.num_instances == 1 and settings is None:
        return placed.make(make_state, init_keys[0]), data_keys[0], step
    state = placed.make(
        jax.vmap(make_state), init_keys, None if settings is None else _traced(settings)
    )
    return state, data_keys, jax.vmap(step, in_axes=(0, None, 0, None) if fed else (0, None, 0))


def _keys(root: jax.Array, instance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The keys of one instance: for its initial components, and for its batches."""
    init_key, data_key = jax.random.split(root)
    return jax.random.fold_in(init_key, instance), jax.random.fold_in(data_key, instance)


def _traced(settings: Settings) -> dict[str, jax.Array]:
    """What the step is given of them, [instances] each."""
    return {
        name: jnp.asarray(values, jnp.float32)
        for name, values in settings.items()
        if name != "seed"
    }


def _finite_mean(values: Any) -> float:
    """The mean over the instances that are finite."""
    finite = np.extract(np.isfinite(values), values)
    return float(finite.mean()) if finite.size else float("nan")


def _check_batch_size(problem: Problem, config: Config) -> None:
    sizes = {
        leaf.shape[0] if leaf.ndim else None
        for leaf in jax.tree.leaves(data.shapes(problem.sample_fn))
    }
    if sizes != {config.batch_size}:
        raise InputError(
            f"sample_fn gives arrays with leading sizes {sorted(map(str, sizes))}, but batch_size is {config.batch_size}; make them equal."
        )


def _rows(
    metrics: Mapping[str, np.ndarray], start: int, end: int, config: Config
) -> Iterator[dict[str, Any]]:
    length = len(metrics["total"])
    for i in range(length):
        step = start + i + 1
        if step % config.log_every_steps == 0 or step == end:
            yield {"step": step} | {name: values[i].tolist() for name, values in metrics.items()}


def _check_finite(metrics: Mapping[str, np.ndarray], start: int, manager) -> None:
    bad = [
        (int(np.argmin(finite)), name)
        for name, values in metrics.items()
        if not (finite := np.isfinite(values.reshape(len(values), -1)).all(1)).all()
    ]
    if not bad:
        return
    first, _ = min(bad)
    terms = [name for i, name in bad if i == first and name != "total"] or ["total"]
    kept = (
        f" The checkpoint of step {manager.latest_step()} is kept."
        if manager and manager.latest_step() is not None
        else ""
    )
    raise NonFiniteError(
        f"training stopped at step {start + first + 1}: not finite: {', '.join(terms)}; try a smaller learning_rate or init_scale.{kept}"
    )


@contextlib.contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM is put into; a second one acts as usual. Main thread only."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handle(signum, frame):
        caught.append(signum)
        for s, handler in before.items():
            signal.signal(s, handler)

    for s in before:
        signal.signal(s, handle)
    try:
        yield caught
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
