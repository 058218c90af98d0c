r"""What a train step sends between devices: `jax.pmap` beside meshes ("data", "component").

    python benchmarks/communication.py [--config=configs/resid_mlp.py] [--shards=1,2,4,8] \
        [--json FILE] [--config.apd.batch_size=2048]

The bytes are read off the programs compiled for 8 virtual CPU devices, with random weights. Nothing
is run, so the numbers hold for any 8 devices.

Good: what crosses the component axis does not grow with C. On the data axis nearly everything is
the gradient of a device's own components, 1/M of all, where M is the number of component shards.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from apd_jax import targets
from apd_jax.methods import registry
from apd_jax.train import communication, placement
from apd_jax.train.state import init_state
from apd_jax.train.step import make_step

NUM_DEVICES, NUM_STEPS = 8, 10

_CONFIG = config_flags.DEFINE_config_file(
    "config", str(Path(__file__).parent.parent / "configs/resid_mlp.py"), "Experiment."
)
_SHARDS = flags.DEFINE_list("shards", ["1", "2", "4", "8"], "Values of num_component_shards.")
_JSON = flags.DEFINE_string("json", None, "File to write the rows to.")


def transfers(config: Any, num_component_shards: int) -> list[communication.Transfer]:
    """What one step of this experiment sends on all devices."""
    method = registry.of(config.apd)
    # Rounded up so that it is the same for every number of shards, and divisible by it.
    C = method.num_components + -method.num_components % NUM_DEVICES
    method = method.replace(num_component_shards=num_component_shards, num_components=C)
    target = targets.build(config.target, method.batch_size)
    params = jax.jit(target.init_fn)(jax.random.key(0))
    problem = target.problem(params)
    problem.layouts  # noqa: B018 - before params are traced below
    placed = placement.arrange(method, jax.devices())
    step = make_step(problem, method, **placed.axes)

    def make_state(key: jax.Array, params: Any) -> Any:
        return init_state(key, problem.with_params(params), method)

    state = placed.make(make_state, jax.random.key(0), params)
    params, key = placed.share((params, jax.random.key(1)))
    program = placed.program(step, NUM_STEPS)
    compiled = program.lower(placed.put(state), params, key, (), None).compile()
    return communication.read(compiled.as_text(), placed.shape, num_steps=NUM_STEPS)


def main(_: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    columns = ("devices", "where", "axes", "operation", "times", "bytes per device")
    table = Table(*columns, title="Sent between devices")
    rows = []
    for M in map(int, _SHARDS.value):
        label = f"pmap, {NUM_DEVICES}" if M == 1 else f"mesh, {NUM_DEVICES // M} x {M}"
        for t in transfers(_CONFIG.value, M):
            rows.append({"devices": label} | dataclasses.asdict(t))
            where = "an iteration of a search" if t.per_iteration else "a step"
            count, num_bytes = f"{t.count:.4g}", f"{t.num_bytes:,.0f}"
            table.add_row(label, where, " and ".join(t.axes), t.operation, count, num_bytes)
            label = ""  # only in the first row of a number of shards
        table.add_section()
    Console(width=120).print(table)
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    app.run(main)
