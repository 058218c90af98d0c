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

from apd_jax import checkpoint, data, parallel
from apd_jax import components as components_lib
from apd_jax import config as config_lib
from apd_jax import step as step_lib
from apd_jax.components import Components
from apd_jax.config import Config
from apd_jax.errors import InputError, Interrupted, NonFiniteError
from apd_jax.problem import Problem
from apd_jax.progress import MetricsLog, ProgressDisplay
from apd_jax.step import TrainState


def fit(
    problem: Problem,
    config: Config,
    *,
    workdir: epath.PathLike | None = None,
    components: Components | None = None,
    title: str = "decomposition",
) -> tuple[Components, list[dict[str, Any]]]:
    """Trains components until `config.num_steps`, going on from the newest checkpoint in `workdir` if there is one.

    Of several processes every one must call this, with the same arguments; only process 0 touches `workdir`, and only its rows go
    back to before a resume.

    Args:
      components: where to begin (with the leading axis of instances, if there are several) instead of at random.
      title: of the progress display.
    Returns: the components (with a leading axis of instances if there are several) and the logged rows.
    Raises:
      InputError: settings, data or checkpoints that do not fit. NonFiniteError: a loss is not finite.
      Interrupted: SIGINT or SIGTERM came; a checkpoint is saved (only with a workdir, otherwise signals are left alone).
    """
    config_lib.validate(config)
    devices = parallel.global_devices()
    parallel.check_batch(config.batch_size, len(devices))
    _check_batch_size(problem, config)
    state, key, step = _build(problem, config, *jax.random.split(jax.random.key(config.seed)))
    if components is not None:
        state = dataclasses.replace(state, components=components)
    with _resumed(workdir, config, state) as (start, state, record):
        if start < config.num_steps:
            params = jax.tree.map(jnp.asarray, problem.params)
            program = functools.cache(lambda num_steps: parallel.pmap_steps(step, num_steps, devices))
            calls = data.calls(problem.sample_fn, start, config.num_steps, config.steps_per_call)
            run = lambda state, num_steps, batches: program(num_steps)(state, params, key, *batches)  # noqa: E731
            with _caught_signals() if workdir is not None else contextlib.nullcontext([]) as caught:
                state = _train(run, parallel.replicate(state, devices), start, calls, config, record, caught, title)
            state = parallel.unreplicate(state)
        return _finished(state.components, config), record.rows


@dataclasses.dataclass(frozen=True)
class _Record:
    """What a run leaves behind: its rows, and on process 0 of a run with a workdir the files."""

    rows: list[dict[str, Any]]
    log: MetricsLog | None = None
    checkpoints: ocp.CheckpointManager | None = None

    def add(self, row: dict[str, Any]) -> None:
        self.log.append(row) if self.log else self.rows.append(row)

    def save(self, step: int, state: PyTree) -> None:
        if self.checkpoints:
            checkpoint.save(self.checkpoints, step, parallel.unreplicate(state))

    def wait_until_saved(self) -> None:
        parallel.from_primary(self.checkpoints.wait_until_finished if self.checkpoints else lambda: None)


@contextlib.contextmanager
def _resumed(workdir: epath.PathLike | None, config: Config, initial: TrainState) -> Iterator[tuple[int, TrainState, _Record]]:
    """Where a run goes on: at step 0 with the initial state, or at the workdir's newest checkpoint."""
    if workdir is None:
        yield 0, initial, _Record([])
        return
    with contextlib.ExitStack() as stack:
        manager = None
        if parallel.is_primary():
            folder = epath.Path(workdir) / "checkpoints"
            manager = stack.enter_context(contextlib.closing(checkpoint.open_manager(folder, config.keep_checkpoints)))
        begin = (0, initial)
        start, state = parallel.from_primary(lambda: checkpoint.restore_latest(manager, initial) or begin, like=begin)
        record = _Record([])
        if parallel.is_primary():
            log = stack.enter_context(contextlib.closing(MetricsLog(workdir, int(start))))
            record = _Record(log.rows, log, manager)
        yield int(start), state, record


def _train(
    run: Callable,
    state: PyTree,
    step: int,
    calls: Iterator[tuple[int, tuple]],
    config: Config,
    record: _Record,
    caught: list[int],
    title: str,
) -> PyTree:
    """Makes the calls one after another; after each logs, saves and stops, whatever is due.

    Args:
      run: (replicated state, number of steps, batches) -> (state, metrics stacked over steps).
      step: where the state stands.
      caught: a signal that asks to stop is in it.
    """
    with ProgressDisplay(title, config.num_steps, console=Console(stderr=True, quiet=not parallel.is_primary())) as display:
        upcoming = next(calls)
        while upcoming:
            (length, batches), began = upcoming, time.monotonic()
            state, metrics = run(state, length, batches)
            upcoming = next(calls, None)  # the host pulls the next batches while the devices work
            metrics = jax.device_get(metrics)
            seconds_per_step = (time.monotonic() - began) / length
            _check_finite(metrics, step, record.checkpoints)
            for row in _rows(metrics, step, config):
                record.add(row | {"seconds_per_step": seconds_per_step})
            previous, step = step, step + length
            display.update(step, {name: float(np.mean(values[-1])) for name, values in metrics.items() if name != "mean_active"})
            signum = parallel.largest(caught[0] if caught else 0)  # whichever process was told to stop, all do, and here
            due = step // config.checkpoint_every_steps > previous // config.checkpoint_every_steps
            if due or signum or step == config.num_steps:
                record.save(step, state)
            if signum:
                record.wait_until_saved()
                raise Interrupted(step, signum)
    return state


def restore_components(problem: Problem, config: Config, workdir: epath.PathLike, *, until: int | None = None) -> tuple[int, Components]:
    """The components of the newest readable checkpoint in `workdir` (up to step `until`), with its step.

    Raises:
      InputError: there is none.
    """
    like = jax.eval_shape(lambda: _build(problem, config, *jax.random.split(jax.random.key(config.seed)))[0])
    _, step, state = checkpoint.read(epath.Path(workdir) / "checkpoints", like, until=until)
    return step, _finished(state.components, config)


def _finished(components: Components, config: Config) -> Components:
    """The components as the next step would use them: unit-norm U is restored at the beginning of a step."""
    return components_lib.normalize_U(components) if config.unit_norm_U else components


def _build(problem: Problem, config: Config, init_key, data_key):
    """Initial state, data key and per-device step; with a leading axis of instances if there are several."""
    layouts = problem.layouts

    def make_state(key):
        return step_lib.init_state(key, problem.params, config, select=problem.select, uses=problem.uses, layouts=layouts)

    fed = isinstance(problem.sample_fn, data.Batches)
    step = step_lib.make_step(
        problem.apply_fn,
        None if fed else problem.sample_fn,
        config,
        attribution_fn=problem.attribution_fn,
        num_active_fn=problem.num_active_fn,
        valid_fn=problem.valid_fn,
        axis_name=parallel.AXIS,
    )
    keys = [jax.vmap(lambda i, key=key: jax.random.fold_in(key, i))(jnp.arange(config.num_instances)) for key in (init_key, data_key)]
    if config.num_instances == 1:
        return jax.jit(make_state)(keys[0][0]), keys[1][0], step
    return jax.jit(jax.vmap(make_state))(keys[0]), keys[1], jax.vmap(step, in_axes=(0, None, 0, None) if fed else (0, None, 0))


def _check_batch_size(problem: Problem, config: Config) -> None:
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(data.shapes(problem.sample_fn))}
    if sizes != {config.batch_size}:
        raise InputError(
            f"sample_fn gives arrays with leading sizes {sorted(map(str, sizes))}, but batch_size is {config.batch_size}; make them equal."
        )


def _rows(metrics: Mapping[str, np.ndarray], start: int, config: Config) -> Iterator[dict[str, Any]]:
    length = len(metrics["total"])
    for i in range(length):
        step = start + i + 1
        if step % config.log_every_steps == 0 or step == config.num_steps:
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
    kept = f" The checkpoint of step {manager.latest_step()} is kept." if manager and manager.latest_step() is not None else ""
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
