"""Milliseconds per train step of the paper's settings, the share of each part, peak memory, and the original's time.

    python benchmarks/step_time.py --json FILE [--settings tms_5-2_b2048,resid_mlp_1_b256]

Every setting runs in a process of its own, on a target trained as its config says, from the first step on. Time: median of WINDOWS
windows of many steps in one XLA call, compilation apart. Parts are timed alone, each in a loop of its own, so they need not add up
to the step, where XLA shares work between them. The matmul peak (float32, 2048x1000 by 1000x6500) is measured in the same process.
"""

from __future__ import annotations

import json
import resource
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

from apd_jax import attributions, dispatch, losses, parallel, sparse, targets
from apd_jax import step as step_lib
from apd_jax.targets import pretrain

ROOT = Path(__file__).parent.parent
WINDOWS = 7
# setting -> (config file, variant, batch size, steps in a window,
#             the released PyTorch code: ms per step and GiB on 2 CPU cores whose matmul peak was 330 GFLOP/s)
SETTINGS = {
    "tms_5-2_b2048": ("tms.py", "5-2", 2048, 500, (4.6, 0.37)),
    "tms_40-10_b2048": ("tms.py", "40-10", 2048, 50, (57, 0.64)),
    "resid_mlp_1_b256": ("resid_mlp.py", "1layer", 256, 5, (1080, 1.6)),
    "resid_mlp_1_b2048": ("resid_mlp.py", "1layer", 2048, 2, (6800, 6.0)),
    "resid_mlp_2_b256": ("resid_mlp.py", "2layer", 256, 5, (2400, 3.0)),
    "resid_mlp_2_b2048": ("resid_mlp.py", "2layer", 2048, 2, (17800, 15.4)),
}
ORIGINAL_GFLOPS = 330

_JSON = flags.DEFINE_string("json", None, "File to write the rows to.")
_SETTINGS = flags.DEFINE_list("settings", list(SETTINGS), "Which settings to time.")
_ONE = flags.DEFINE_string("one", None, "Time one setting in this process and print its row (used by the others).")


def load_config(file: str, variant: str):
    return runpy.run_path(str(ROOT / "configs" / file))["get_config"](variant)


def timed(call: Callable[[], Any], windows: int = WINDOWS) -> float:
    """Median seconds of `call`, which blocks."""
    seconds = []
    for _ in range(windows):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def matmul_gflops() -> float:
    a, b = jnp.ones((2048, 1000)), jnp.ones((1000, 6500))
    product = jax.jit(jnp.matmul)
    product(a, b).block_until_ready()
    return 2 * 2048 * 1000 * 6500 / min(timed(lambda: product(a, b).block_until_ready(), 1) for _ in range(5)) / 1e9


def looped_ms(body: Callable[..., Any], carry: Any, fixed: Any, steps: int) -> float:
    """ms of one `carry = body(carry, i, fixed)`, in a scan of `steps` whose buffers are donated, as in training."""

    def loop(carry, fixed):  # `fixed` is an argument, lest XLA fold it as a constant
        return jax.lax.scan(lambda carry, i: (body(carry, i, fixed), None), carry, jnp.arange(steps))[0]

    program = jax.jit(loop, donate_argnums=0)
    held = [program(jax.tree.map(jnp.copy, carry), fixed)]

    def call():
        held[0] = jax.block_until_ready(program(held[0], fixed))

    return timed(call) / steps * 1e3


def parts_ms(target, params, state, config, key, steps: int) -> dict[str, float]:
    """The step's parts, each alone. A carry multiplied by 1e-30 keeps XLA from moving the work out of the loop."""
    cs, x = state.components, target.sample_fn(key, 0)
    mask_fn, optimizer = step_lib.make_mask_fn(config), step_lib.make_optimizer(config)
    scores = jax.jit(lambda cs: attributions.squared("gradient", target.attribution_fn, params, cs, x))(cs)
    mask = mask_fn(scores, x)
    fixed = {"params": params, "x": x, "mask": mask, "target": step_lib.split_result(target.apply_fn(params, x))}

    def descend(loss: Callable) -> Callable:
        return lambda cs, i, fixed: jax.tree.map(lambda a, g: a - 1e-30 * g, cs, jax.grad(loss)(cs, fixed))

    def sparse_loss(cs, fixed):
        slots = dispatch.slots_for(config.topk, *mask.shape)
        result = sparse.apply(target.apply_fn, fixed["params"], cs, fixed["mask"], fixed["x"], slots=slots)
        (out, hidden), (target_out, target_hidden) = step_lib.split_result(result), fixed["target"]
        loss = losses.minimality(out, target_out)
        return loss + losses.hidden_reconstruction(hidden, target_hidden) if config.hidden_reconstruction_coeff else loss

    def attribute(carry, i, fixed):
        cs, total = carry
        moved = fixed["x"] * (1 + 1e-30 * total[:1, :1])
        return cs, total + attributions.squared("gradient", target.attribution_fn, fixed["params"], cs, moved)

    def update(carry, i, fixed):
        cs, opt_state = carry
        updates, opt_state = optimizer.update(jax.tree.map(lambda a: 1e-3 * a, cs), opt_state, cs)
        return optax.apply_updates(cs, updates), opt_state

    parts = {
        "data": (lambda total, i, fixed: total + target.sample_fn(key, i).sum(), jnp.zeros(())),
        "attributions": (attribute, (cs, scores)),
        "mask": (lambda a, i, fixed: a + 1e-30 * mask_fn(a, x), scores),
        "sparse_pass": (descend(sparse_loss), cs),
        "faithfulness": (descend(lambda cs, fixed: losses.faithfulness(cs, fixed["params"])), cs),
        "simplicity": (descend(lambda cs, fixed: losses.simplicity(cs, fixed["mask"], config.schatten_p)), cs),
        "optimizer": (update, (cs, state.opt_state)),
    }
    return {name: looped_ms(body, carry, fixed, steps) for name, (body, carry) in parts.items()}


def time_setting(name: str) -> dict[str, Any]:
    file, variant, batch_size, steps, (original_ms, original_gib) = SETTINGS[name]
    experiment = load_config(file, variant)
    with experiment.unlocked():
        experiment.apd.batch_size = batch_size
    config = experiment.apd
    target = targets.build(experiment.target, batch_size)
    params, _ = pretrain.pretrain(target, experiment.target)
    key, devices = jax.random.key(0), jax.local_devices()
    make_state = jax.jit(lambda key: step_lib.init_state(key, params, config, select=target.select, uses=target.uses))
    step = step_lib.make_step(target.apply_fn, target.sample_fn, config, attribution_fn=target.attribution_fn, axis_name=parallel.AXIS)
    program = parallel.pmap_steps(step, steps, devices)
    held = [parallel.replicate(make_state(key), devices)]

    def call():
        held[0], metrics = program(held[0], params, key)
        jax.block_until_ready((held[0], metrics))

    first = timed(call, 1)
    seconds = timed(call) / steps
    peak_rss_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    peak = matmul_gflops()
    ms = seconds * 1e3
    return {
        "setting": name,
        "ms_per_step": ms,
        "compile_s": max(first - seconds * steps, 0.0),
        "peak_rss_gib": peak_rss_gib,
        "matmul_gflops": peak,
        "original_ms_per_step": original_ms,
        "original_peak_rss_gib": original_gib,
        "times_faster": original_ms / ms,
        "times_faster_at_equal_matmul_peak": original_ms / ms * ORIGINAL_GFLOPS / peak,
        "device": devices[0].device_kind,
        "num_devices": len(devices),
        "parts_ms": parts_ms(target, params, make_state(key), config, key, steps),
    }


def tables_of(rows: list[dict[str, Any]]) -> list[Table]:
    whole = Table(title=f"Time of a train step on {rows[0]['num_devices']} x {rows[0]['device']}")
    numbers = {
        "ms per step": "ms_per_step",
        "original": "original_ms_per_step",
        "times faster": "times_faster",
        "at equal matmul peak": "times_faster_at_equal_matmul_peak",
        "peak GiB": "peak_rss_gib",
        "original GiB": "original_peak_rss_gib",
        "compile s": "compile_s",
        "matmul GFLOP/s": "matmul_gflops",
    }
    parts = Table(title="Share of each part, timed alone")
    for table, columns in ((whole, numbers), (parts, rows[0]["parts_ms"])):
        table.add_column("setting", no_wrap=True)
        for column in columns:
            table.add_column(column, justify="right")
    for row in rows:
        whole.add_row(row["setting"], *(f"{row[name]:.3g}" for name in numbers.values()))
        total = sum(row["parts_ms"].values())
        parts.add_row(row["setting"], *(f"{ms / total:.0%}" for ms in row["parts_ms"].values()))
    return [whole, parts]


def main(argv) -> None:
    logging.set_verbosity(logging.WARNING)
    if _ONE.value:
        print(json.dumps(time_setting(_ONE.value)))
        return
    if unknown := set(_SETTINGS.value) - set(SETTINGS):
        print(f"unknown settings {sorted(unknown)}; known: {', '.join(SETTINGS)}.", file=sys.stderr)
        sys.exit(2)
    rows = []
    for name in _SETTINGS.value:
        child = subprocess.run([sys.executable, __file__, f"--one={name}"], stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(child.stdout.splitlines()[-1]))
        print(f"{name}: {rows[-1]['ms_per_step']:.3g} ms per step", file=sys.stderr)
        if _JSON.value:
            Path(_JSON.value).parent.mkdir(parents=True, exist_ok=True)
            Path(_JSON.value).write_text(json.dumps(rows, indent=2))
    Console(width=None if sys.stdout.isatty() else 120).print(*tables_of(rows))


if __name__ == "__main__":
    app.run(main)
