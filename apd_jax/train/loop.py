"""The host loop around the step: data, devices, logging, checkpoints, resume, interruption."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import PyTree
from rich.console import Console

from apd_jax.components import Components
from apd_jax.errors import InputError, Interrupted
from apd_jax.methods import registry
from apd_jax.methods.base import Method
from apd_jax.methods.optimizers import Trained
from apd_jax.network import data
from apd_jax.network.problem import Problem
from apd_jax.paths import user_path
from apd_jax.train import checkpoint, checks, interrupts, parallel, placement
from apd_jax.train.progress import MetricsLog, ProgressDisplay, begins, say
from apd_jax.train.state import TrainState, init_state
from apd_jax.train.step import make_step
from apd_jax.train.workdir import stopped, stopped_at

Settings = Mapping[str, np.ndarray]  # {field: [instances]}
OnLog = Callable[[dict[str, Any]], Any]
Placement = placement.Copies | placement.Shards


def fit(
    problem: Problem,
    method: Any,
    state: TrainState | None = None,
    *,
    workdir: epath.PathLike | None = None,
    components: Components | None = None,
    title: str = "decomposition",
    on_log: OnLog | None = None,
) -> tuple[Trained, list[dict[str, Any]]]:
    """Trains until `method.num_steps`, from the newest checkpoint in `workdir` if there is one.

    Args:
      method: its settings: an object, or a config as `registry.settings` makes them.
      state: where to begin, e.g. from `begin.begin`; its step counts.
      components: where to begin (with the leading axis of instances, if there are several) instead
        of as the method does.
      title: of the progress display.
      on_log: told of every logged row, on process 0; see `apd_jax.decompose`.
    Returns: components and gate (with a leading axis of instances if there are several), and the
      logged rows.
    Raises: as `advance`.
    """
    method = registry.of(method)
    state, rows, placed = _advance(
        problem,
        method,
        state,
        components=components,
        workdir=workdir,
        title=title,
        on_log=on_log,
    )
    trained = placed.get(Trained(state.components, state.gate))
    return finished(trained, method), rows


def advance(
    problem: Problem,
    method: Any,
    state: TrainState | None = None,
    *,
    components: Components | None = None,
    settings: Settings | None = None,
    until: int | None = None,
    workdir: epath.PathLike | None = None,
    title: str = "decomposition",
    on_log: OnLog | None = None,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """`fit` by parts, and with instances that differ in settings.

    From a state, or the newest checkpoint in `workdir`, to a step. Of several processes every one
    must call this, with the same arguments. Only process 0 touches `workdir`, and only its rows go
    back to before a resume; where components are split over devices, every process writes its own
    into the checkpoints.

    Args:
      state: where to begin; None is step 0, as the method begins but for `components`.
      settings: {field: a value per instance}, of "seed" and the method's numbers; see
        `step.make_step`. An instance is the run that has these values in its settings. Instances
        that stop being finite are then carried on, as they harm no others.
      until: the step to end at; `method.num_steps`, which the schedules go by, if None.
    Raises:
      InputError: settings, data or checkpoints that do not fit.
      NonFiniteError: a loss is not finite.
      Interrupted: SIGINT or SIGTERM came; a checkpoint is saved (only with a workdir, otherwise
        signals are left alone).
    """
    state, rows, placed = _advance(
        problem,
        registry.of(method),
        state,
        components=components,
        settings=settings,
        until=until,
        workdir=workdir,
        title=title,
        on_log=on_log,
    )
    return placed.get(state), rows


@jax.numpy_dtype_promotion("standard")  # optax counts steps in whole numbers
def _advance(
    problem: Problem,
    method: Method,
    state: TrainState | None = None,
    *,
    components: Components | None,
    settings: Settings | None = None,
    until: int | None = None,
    workdir: epath.PathLike | None,
    title: str,
    on_log: OnLog | None,
) -> tuple[TrainState, list[dict[str, Any]], Placement]:
    """`advance`, with the state still on the devices."""
    method.check()
    placed = placement.arrange(method, parallel.global_devices())
    checks.data_fits(problem, method)
    end = method.num_steps if until is None else until
    initial, key, step = _build(problem, method, settings, placed)
    may_diverge = settings is not None
    begin = initial() if state is None else state
    if state is None and components is not None:
        begin = dataclasses.replace(begin, components=components)
    with _resumed(workdir, method, begin, placed) as (start, reached, record):
        if start < end and start != stopped_at(workdir, method.num_steps):
            traced = None if settings is None else _traced(settings)
            params, key, traced = placed.share(
                (jax.tree.map(jnp.asarray, problem.params), key, traced)
            )
            program = functools.cache(lambda num_steps: placed.steps(step, num_steps))
            calls = data.calls(problem.source, start, end, method.steps_per_call)

            def run(state: PyTree, num_steps: int, batches: tuple) -> tuple[PyTree, PyTree]:
                return program(num_steps)(state, params, key, *batches, settings=traced)

            signals = interrupts.caught() if workdir is not None else contextlib.nullcontext([])
            with signals as caught:
                job = _Job(run, end, calls, method, record, caught, title, may_diverge, on_log)
                reached = job.train(reached, start)
        return reached, record.rows, placed


@dataclasses.dataclass(frozen=True)
class _Record:
    """What a run leaves behind: its rows, and on process 0 of a run with a workdir the files.

    Where components are split over devices, every process has its part of the checkpoints.
    """

    rows: list[dict[str, Any]]
    placed: Placement
    log: MetricsLog | None = None
    checkpoints: checkpoint.CheckpointManager | None = None
    workdir: epath.PathLike | None = None

    def stop(self, step: int, num_steps: int) -> None:
        """Says in the workdir that `on_log` ended the run here, once that is saved."""
        self.wait_until_saved()
        if self.log is not None and self.workdir is not None:
            stopped(self.workdir, step, num_steps)

    def add(self, row: dict[str, Any]) -> None:
        self.log.append(row) if self.log else self.rows.append(row)

    def save(self, step: int, state: PyTree) -> None:
        if self.checkpoints:
            split = isinstance(self.placed, placement.Shards)
            checkpoint.save(self.checkpoints, step, state if split else self.placed.get(state))

    def check(self) -> None:
        if self.checkpoints:
            checkpoint.check(self.checkpoints)

    def wait_until_saved(self) -> None:
        parallel.from_primary(
            lambda: checkpoint.wait(self.checkpoints) if self.checkpoints else None
        )


@contextlib.contextmanager
def _resumed(
    workdir: epath.PathLike | None, method: Method, initial: TrainState, placed: Placement
) -> Iterator[tuple[int, TrainState, _Record]]:
    """Where a run goes on: at the workdir's newest checkpoint, or with the initial state."""
    # No process may hold the whole of a split state: each reads and writes its part of it.
    together = isinstance(placed, placement.Shards)
    initial = placed.put(initial) if together else initial
    begin = (int(np.max(jax.device_get(initial.step))), initial)  # the same of all instances
    if workdir is None:
        yield begin[0], initial if together else placed.put(initial), _Record([], placed)
        return
    with contextlib.ExitStack() as stack:
        manager, log = None, None
        if parallel.is_primary() or together:
            manager = checkpoint.open_manager(
                user_path(workdir) / "checkpoints", method.keep_checkpoints, together=together
            )
            stack.enter_context(checkpoint.closing(manager))
        if together:
            start, state = checkpoint.restore_latest(manager, initial, together=True) or begin
        else:
            start, state = parallel.from_primary(
                lambda: checkpoint.restore_latest(manager, initial) or begin, like=begin
            )
            state = placed.put(state)
        if parallel.is_primary():
            log = stack.enter_context(contextlib.closing(MetricsLog(workdir, int(start))))
        yield int(start), state, _Record(log.rows if log else [], placed, log, manager, workdir)


@dataclasses.dataclass(frozen=True)
class _Job:
    """The calls of a run, one after another; after each it logs, saves and stops, whatever is due.

    run: (state on the devices, number of steps, batches) -> (state, metrics stacked over steps).
    end: the step to get to. caught: a signal that asks to stop is in it.
    may_diverge: losses that are not finite are logged, and training goes on.
    """

    run: Callable
    end: int
    calls: Iterator[tuple[int, tuple]]
    method: Method
    record: _Record
    caught: list[int]
    title: str
    may_diverge: bool
    on_log: OnLog | None = None
    stops: list[int] = dataclasses.field(default_factory=list)  # where `on_log` asked to stop

    def train(self, state: PyTree, step: int) -> PyTree:
        console = Console(stderr=True, quiet=not parallel.is_primary())
        say(f"{self.title}: {begins(self.method, state.components, step, self.end)}")
        with ProgressDisplay(self.title, self.end, console=console, begun=step) as display:
            upcoming = next(self.calls)
            while upcoming:
                (length, batches), began = upcoming, time.monotonic()
                state, metrics = self.run(state, length, batches)
                ended = None
                try:
                    upcoming = next(self.calls, None)  # pulled while the devices work
                except InputError as error:  # of the data: what is trained is saved first
                    upcoming, ended = None, error
                metrics = jax.device_get(metrics)
                seconds = (time.monotonic() - began) / length
                previous, step = step, step + length
                self._log(metrics, previous, seconds)
                display.update(step, _shown(metrics))
                if self._save_or_stop(state, previous, step, ended):
                    break
        return state

    def _log(self, metrics: Mapping[str, np.ndarray], start: int, seconds: float) -> None:
        if not self.may_diverge:
            manager = self.record.checkpoints
            kept = manager.latest_step() if manager else None
            checks.losses_finite(metrics, start, kept)
        for row in _rows(metrics, start, self.end, self.method):
            row |= {"seconds_per_step": seconds}
            self.record.add(row)
            if self.on_log is not None and parallel.is_primary():
                answer = self.on_log(dict(row))
                if (
                    isinstance(answer, bool | np.bool_) and answer
                ):  # what else it returns is its own
                    self.stops.append(row["step"])

    def _save_or_stop(
        self, state: PyTree, previous: int, step: int, ended: InputError | None
    ) -> bool:
        """Saves where it is due; whether training is to stop here."""
        self.record.check()
        signum = parallel.largest(self.caught[0] if self.caught else 0)  # if one is told, all stop
        every = self.method.checkpoint_every_steps
        stop = self.on_log is not None and parallel.largest(len(self.stops)) > 0
        if step // every > previous // every or signum or stop or ended or step == self.end:
            self.record.save(step, state)
        if signum or ended:
            self.record.wait_until_saved()
            raise ended or Interrupted(step, signum)
        if stop and step < self.end:
            self.record.stop(step, self.method.num_steps)
        return stop


def _shown(metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The last value of every loss, the mean over finite instances."""
    return {n: _finite_mean(v[-1]) for n, v in metrics.items() if n != "mean_active"}


def restore_trained(
    problem: Problem, method: Method, workdir: epath.PathLike, *, until: int | None = None
) -> tuple[int, Trained]:
    """Components and gate of the newest readable checkpoint in `workdir`, with its step.

    Args:
      until: checkpoints of later steps are passed over.
    Raises:
      InputError: there is none.
    """
    alone = placement.Copies(jax.local_devices()[:1])
    like = jax.eval_shape(lambda: _build(problem, method, None, alone)[0]())
    _, step, state = checkpoint.read(user_path(workdir) / "checkpoints", like, until=until)
    return step, finished(Trained(state.components, state.gate), method)


def initial_components(problem: Problem, method: Method) -> Components:
    """Those that a run of these settings begins with: of several instances the first's."""
    problem.site_names  # noqa: B018 - before params are traced below
    key = _keys(jax.random.key(method.seed), jnp.zeros((), jnp.int32))[0]
    make = jax.jit(lambda key, params: method.make_components(key, problem.with_params(params)))
    return make(key, jax.tree.map(jnp.asarray, problem.params))


def finished(trained: Trained, method: Method) -> Trained:
    """The components as the next step would use them."""
    return dataclasses.replace(trained, components=method.constrain(trained.components))


def _build(
    problem: Problem, method: Method, settings: Settings | None, placed: Placement
) -> tuple[Callable[[], TrainState], jax.Array, Callable]:
    """What makes the initial state, the data key and the per-device step.

    With a leading axis of instances if there are several, or settings of theirs.
    """
    problem.site_names  # noqa: B018 - before params are traced below

    def make_state(key: jax.Array, params: PyTree, settings: Any = None) -> TrainState:
        return init_state(key, problem.with_params(params), method, settings)

    step = make_step(problem, method, fed=problem.fed, **placed.axes)
    if settings is None:
        roots, instances = jax.random.key(method.seed)[None], jnp.arange(method.num_instances)
    else:  # each is the first instance of a run of its own
        seeds = ({"seed": [method.seed]} | dict(settings))["seed"]
        roots = jnp.stack([jax.random.key(int(seed)) for seed in seeds])
        instances = jnp.zeros(method.num_instances, jnp.int32)
    init_keys, data_keys = jax.vmap(_keys)(jnp.broadcast_to(roots, instances.shape), instances)
    params = jax.tree.map(jnp.asarray, problem.params)
    if method.num_instances == 1 and settings is None:
        one = functools.partial(placed.make, make_state, init_keys[0], params)
        return one, data_keys[0], step
    traced = None if settings is None else _traced(settings)
    each = jax.vmap(make_state, in_axes=(0, None, 0))
    axes = (0, None, 0, None) if problem.fed else (0, None, 0)
    several = functools.partial(placed.make, each, init_keys, params, traced)
    return several, data_keys, jax.vmap(step, in_axes=axes)


def _keys(root: jax.Array, instance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The keys of one instance: for its initial components, and for its batches."""
    init_key, data_key = jax.random.split(root)
    return jax.random.fold_in(init_key, instance), jax.random.fold_in(data_key, instance)


def _traced(settings: Settings) -> dict[str, jax.Array]:
    """What the step is given of them, [instances] each."""
    swept = {name: values for name, values in settings.items() if name != "seed"}
    return {name: jnp.asarray(values, jnp.float32) for name, values in swept.items()}


def _finite_mean(values: Any) -> float:
    """The mean over the instances that are finite."""
    finite = np.extract(np.isfinite(values), values)
    return float(finite.mean()) if finite.size else float("nan")


def _rows(
    metrics: Mapping[str, np.ndarray], start: int, end: int, config: Method
) -> Iterator[dict[str, Any]]:
    length = len(metrics["total"])
    for i in range(length):
        step = start + i + 1
        if step % config.log_every_steps == 0 or step == end:
            yield {"step": step} | {name: values[i].tolist() for name, values in metrics.items()}
