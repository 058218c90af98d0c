"""What the benchmarks share: programs of many steps, clocks, the device's peaks, tables."""

from __future__ import annotations

import dataclasses
import functools
import json
import resource
import runpy
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from apd_jax import targets
from apd_jax.methods import registry
from apd_jax.methods.base import Method
from apd_jax.network.problem import Problem
from apd_jax.targets.base import Config
from apd_jax.train import parallel
from apd_jax.train.state import TrainState, init_state
from apd_jax.train.step import make_step

ROOT = Path(__file__).parents[1]
WINDOWS = 7


def load_config(file: str, variant: str = "") -> Config:
    """The experiment of a file in configs/."""
    return runpy.run_path(str(ROOT / "configs" / file))["get_config"](*[variant] if variant else [])


def timed(call: Callable[[], Any], windows: int = WINDOWS) -> float:
    """Median seconds of `call`, which must return only when its work is done."""
    return statistics.median(_seconds(call, windows))


def fastest(call: Callable[[], Any], windows: int = WINDOWS) -> float:
    """Least seconds of `call`, which must return only when its work is done."""
    return min(_seconds(call, windows))


def _seconds(call: Callable[[], Any], windows: int) -> list[float]:
    seconds = []
    for _ in range(windows):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return seconds


def looped_s(
    body: Callable[..., Any], carry: Any, fixed: Any, steps: int, clock: Callable = timed
) -> float:
    """Seconds of one `carry = body(carry, i, fixed)`.

    Measured in a scan of `steps` whose buffers are donated, as in training.
    """

    def loop(carry, fixed):  # `fixed` is an argument, so that XLA does not fold it as a constant
        def step(carry, i):
            return body(carry, i, fixed), None

        return jax.lax.scan(step, carry, jnp.arange(steps))[0]

    program = jax.jit(loop, donate_argnums=0)
    held = [jax.block_until_ready(program(jax.tree.map(jnp.copy, carry), fixed))]

    def call():
        held[0] = jax.block_until_ready(program(held[0], fixed))

    return clock(call) / steps


@dataclasses.dataclass(frozen=True)
class Peaks:
    """What this device reached just now, in this process."""

    matmul_gflops: float  # float32, 2048x1000 by 1000x6500
    memory_gb_s: float  # read and write of an array that no cache holds
    elementwise_gops: float  # multiplications and additions in cache
    dispatch_us: float  # one step of a scan with nothing to do


def measure_peaks() -> Peaks:
    a, b = jnp.ones((2048, 1000)), jnp.ones((1000, 6500))
    product = jax.jit(jnp.matmul)
    product(a, b).block_until_ready()
    matmul = 2 * 2048 * 1000 * 6500 / fastest(lambda: product(a, b).block_until_ready(), 5) / 1e9

    large = jnp.ones(2**26, jnp.float32)
    copy = 2 * large.nbytes / looped_s(lambda a, i, _: a + 1.0, large, None, 4, fastest) / 1e9

    def chain(a, i, _):
        for _ in range(32):  # each is a multiplication and an addition
            a = a * 0.999 + 0.001
        return a

    small = jnp.ones(2**16, jnp.float32)
    elementwise = 64 * small.size / looped_s(chain, small, None, 100, fastest) / 1e9
    dispatch = looped_s(lambda a, i, _: jnp.sin(a), jnp.ones(8), None, 10_000, fastest) * 1e6
    return Peaks(matmul, copy, elementwise, dispatch)


@dataclasses.dataclass
class Steps:
    """`steps` train steps of an experiment as one program on all local devices.

    It holds a state, from which `call` continues.
    """

    problem: Problem
    params: Any
    method: Method
    steps: int
    step: Callable  # one step, (state, params, key) -> (state, metrics), for one device
    make_state: Callable[[], TrainState]
    call: Callable[[], Any]  # runs the next `steps` steps; returns their metrics once done
    traced: Callable[[int], Any]  # number of devices -> jaxpr of one step

    @classmethod
    def build(
        cls,
        experiment: Config,
        params: Any = None,
        *,
        steps: int,
        batch_size: int | None = None,
        instances: int = 1,
        num_devices: int | None = None,
    ) -> Steps:
        """Builds the program and its first state.

        Args:
          params: the target's weights; None takes initial ones.
          batch_size: None takes the config's.
          instances: how many runs the program holds, side by side by `jax.vmap`.
          num_devices: None takes all.
        """
        method = registry.of(experiment.apd)
        method = method.replace(batch_size=batch_size or method.batch_size)
        target = targets.build(experiment.target, method.batch_size)
        devices = jax.local_devices()[:num_devices]
        params = target.init_fn(jax.random.key(0)) if params is None else params
        problem = target.problem(params)
        problem.layouts  # noqa: B018 - before params are traced below

        def make_state(key, params):
            return init_state(key, problem.with_params(params), method)

        def make(axis_name):
            return make_step(problem, method, axis_name=axis_name)

        key, many = jax.random.key(0), make(parallel.AXIS)
        if instances > 1:
            key, many = jax.random.split(key, instances), jax.vmap(many, in_axes=(0, None, 0))
            make_state = jax.vmap(make_state, in_axes=(0, None))
        program = parallel.pmap_steps(many, steps, devices)
        make_first = lambda: jax.jit(make_state)(key, params)  # noqa: E731
        held = [parallel.replicate(make_first(), devices)]

        def call():
            held[0], metrics = program(held[0], params, key)
            return jax.block_until_ready((held[0], metrics))[1]

        def traced(size):
            trace = jax.make_jaxpr(make(parallel.AXIS), axis_env=[(parallel.AXIS, size)])
            return trace(make_first(), params, jax.random.key(0)).jaxpr

        return cls(problem, params, method, steps, make(None), make_first, call, traced)

    @functools.cached_property
    def state(self) -> TrainState:
        """A second copy of the first state.

        `call` has its own. From the first use on, this copy adds to the peak memory.
        """
        return self.make_state()

    def ms_and_compile_s(self, windows: int = WINDOWS) -> tuple[float, float]:
        """Median ms of a step, and the seconds that the first call took beyond its steps."""
        first = timed(self.call, 1)
        seconds = timed(self.call, windows) / self.steps
        return seconds * 1e3, max(first - seconds * self.steps, 0.0)


def peak_memory_gib() -> float:
    """Peak use of the accelerator's memory, or on a CPU of main memory, by this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    # Preferred to ru_maxrss, which in a child process starts at the parent's value.
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**20
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def write_json(path: str | Path | None, value: Any) -> None:
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(value, indent=2))


def show(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str],
    *,
    markdown: bool = False,
) -> None:
    """Prints rows as a table, or as Markdown for the docs. Numbers get three digits.

    Args:
      columns: {heading: key in the rows}.
    """

    def text(value: Any) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"

    cells = [[text(row.get(key, "")) for key in columns.values()] for row in rows]
    if markdown:
        lines = [f"**{title}**", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        print("\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)]), end="\n\n")
        return
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in cells:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
