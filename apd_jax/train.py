"""The host loop around the step: data, devices, logging, checkpoints, resume, interruption."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from rich.console import Console

from apd_jax import checkpoint, parallel
from apd_jax import components as components_lib
from apd_jax import config as config_lib
from apd_jax import step as step_lib
from apd_jax.components import Components
from apd_jax.config import Config
from apd_jax.errors import InputError, Interrupted, NonFiniteError
from apd_jax.problem import Problem
from apd_jax.progress import MetricsLog, ProgressDisplay


def fit(problem: Problem, config: Config, *, workdir: epath.PathLike | None = None) -> tuple[Components, list[dict[str, Any]]]:
    """Trains components until `config.num_steps`, going on from the newest checkpoint in `workdir` if there is one.

    Of several processes every one must call this, with the same arguments; only process 0 touches `workdir`, and only its rows go
    back to before a resume.

    Returns: the components (with a leading axis of instances if there are several) and the logged rows.
    Raises:
      InputError: settings, sampler or checkpoints that do not fit. NonFiniteError: a loss is not finite.
      Interrupted: SIGINT or SIGTERM came; a checkpoint is saved (only with a workdir, otherwise signals are left alone).
    """
    config_lib.validate(config)
    devices = parallel.global_devices()
    parallel.check_batch(config.batch_size, len(devices))
    _check_sampler(problem, config)

    init_key, data_key = jax.random.split(jax.random.key(config.seed))
    state, key, step = _build(problem, config, init_key, data_key)
    log_rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        manager = metrics_log = None
        start = 0
        if workdir is not None:
            if parallel.is_primary():
                folder = epath.Path(workdir) / "checkpoints"
                manager = stack.enter_context(contextlib.closing(checkpoint.open_manager(folder, config.keep_checkpoints)))
            initial = (0, state)
            start, state = parallel.from_primary(lambda: checkpoint.restore_latest(manager, state) or initial, like=initial)
            start = int(start)
            if parallel.is_primary():
                metrics_log = stack.enter_context(contextlib.closing(MetricsLog(workdir, start)))
                log_rows = metrics_log.rows
        if start < config.num_steps:
            state = parallel.replicate(state, devices)
            params = jax.tree.map(jnp.asarray, problem.params)
            console = Console(stderr=True, quiet=not parallel.is_primary())
            display = stack.enter_context(ProgressDisplay("decomposition", config.num_steps, console=console))
            caught = stack.enter_context(_caught_signals() if workdir is not None else contextlib.nullcontext([]))
            programs: dict[int, Callable] = {}
            while start < config.num_steps:
                length = min(config.steps_per_call, config.num_steps - start)
                if length not in programs:
                    programs[length] = parallel.pmap_steps(step, length, devices)
                began = time.monotonic()
                state, metrics = programs[length](state, params, key)
                metrics = jax.device_get(metrics)
                seconds = time.monotonic() - began
                _check_finite(metrics, start, manager)
                for row in _rows(metrics, start, config):
                    row["seconds_per_step"] = seconds / length
                    metrics_log.append(row) if metrics_log else log_rows.append(row)
                display.update(
                    start + length, {name: float(np.mean(values[-1])) for name, values in metrics.items() if name != "mean_active"}
                )
                previous, start = start, start + length
                due = start // config.checkpoint_every_steps > previous // config.checkpoint_every_steps
                signum = parallel.largest(caught[0] if caught else 0)  # whichever process was told to stop, all do, and here
                if manager and (due or signum or start == config.num_steps):
                    checkpoint.save(manager, start, parallel.unreplicate(state))
                if signum:
                    parallel.from_primary(manager.wait_until_finished if manager else lambda: None)
                    raise Interrupted(start, signum)
            state = parallel.unreplicate(state)
    return _finished(state.components, config), log_rows


def restore_components(problem: Problem, config: Config, workdir: epath.PathLike) -> tuple[int, Components]:
    """The components of the newest readable checkpoint in `workdir`, with its step.

    Raises:
      InputError: there is none.
    """
    like = jax.eval_shape(lambda: _build(problem, config, *jax.random.split(jax.random.key(config.seed)))[0])
    _, step, state = checkpoint.read(epath.Path(workdir) / "checkpoints", like)
    return step, _finished(state.components, config)


def _finished(components: Components, config: Config) -> Components:
    """The components as the next step would use them: unit-norm U is restored at the beginning of a step."""
    return components_lib.normalize_U(components) if config.unit_norm_U else components


def _build(problem: Problem, config: Config, init_key, data_key):
    """Initial state, data key and per-device step; with a leading axis of instances if there are several."""
    make_state = lambda key: step_lib.init_state(key, problem.params, config, select=problem.select, uses=problem.uses)  # noqa: E731
    step = step_lib.make_step(
        problem.apply_fn,
        problem.sample_fn,
        config,
        attribution_fn=problem.attribution_fn,
        num_active_fn=problem.num_active_fn,
        axis_name=parallel.AXIS,
    )
    keys = [jax.vmap(lambda i, key=key: jax.random.fold_in(key, i))(jnp.arange(config.num_instances)) for key in (init_key, data_key)]
    if config.num_instances == 1:
        return jax.jit(make_state)(keys[0][0]), keys[1][0], step
    return jax.jit(jax.vmap(make_state))(keys[0]), keys[1], jax.vmap(step, in_axes=(0, None, 0))


def _check_sampler(problem: Problem, config: Config) -> None:
    x = jax.eval_shape(problem.sample_fn, jax.random.key(0), jnp.zeros((), jnp.int32))
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(x)}
    if sizes != {config.batch_size}:
        raise InputError(
            f"sample_fn draws arrays with leading sizes {sorted(map(str, sizes))}, but batch_size is {config.batch_size}; make them equal."
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
