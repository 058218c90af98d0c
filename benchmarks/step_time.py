r"""Milliseconds per train step of the paper's settings.

Beside them stand a lower bound, and time and memory of the released PyTorch code.

    python benchmarks/step_time.py [--json FILE] [--markdown] [--quick] \
        [--settings tms_5-2_b2048,resid_mlp_1_b256]

Every setting runs in a process of its own, on a target trained as its config says, from the first
step on.
  time   median of 7 windows of many steps in one XLA call, without compilation
  bound  by `bounds.py`, at the peaks measured in the same process
  parts  each timed alone, in a loop of its own; they need not add up to the step, in which XLA may
         share work between them
`--quick` takes a small version of one setting with an untrained target. It shows that everything
runs; its numbers mean nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bounds
import jax
import jax.numpy as jnp
import optax
from absl import app, flags, logging
from common import Steps, load_config, looped_s, measure_peaks, peak_memory_gib, show, write_json

from apd_jax import attributions, losses, targets
from apd_jax.forward import dispatch, sparse
from apd_jax.gates.base import Observation
from apd_jax.methods.base import Method
from apd_jax.methods.optimizers import Trained
from apd_jax.network.outputs import split_result
from apd_jax.network.problem import Problem
from apd_jax.targets import pretrain

# setting -> (config file, variant, batch size, steps in a window, steps of a published run,
#             (ms per step, peak GiB) of the released PyTorch code on 2 CPU cores whose matmul peak
#             was ORIGINAL_GFLOPS)
SETTINGS = {
    "tms_5-2_b2048": ("tms.py", "5-2", 2048, 500, 20_000, (4.6, 0.37)),
    "tms_40-10_b2048": ("tms.py", "40-10", 2048, 50, 20_000, (57, 0.64)),
    "resid_mlp_1_b256": ("resid_mlp.py", "1layer", 256, 5, 10_000, (1080, 1.6)),
    "resid_mlp_1_b2048": ("resid_mlp.py", "1layer", 2048, 2, 40_000, (6800, 6.0)),
    "resid_mlp_2_b256": ("resid_mlp.py", "2layer", 256, 5, 10_000, (2400, 3.0)),
    "resid_mlp_2_b2048": ("resid_mlp.py", "2layer", 2048, 2, 10_000, (17800, 15.4)),
}
QUICK = ("resid_mlp_1_b256",)
ORIGINAL_GFLOPS = 330
# Parts of the names of profiled events that are not single operations of the program.
NO_OPERATION = ("Execut", "while", "::", "$", "(", " ")

_JSON = flags.DEFINE_string("json", None, "File to write the rows to.")
_SETTINGS = flags.DEFINE_list("settings", list(SETTINGS), "Which settings to time.")
_MARKDOWN = flags.DEFINE_bool("markdown", False, "Print tables for the docs.")
_QUICK = flags.DEFINE_bool("quick", False, "Small versions, to see whether everything runs.")
_ONE = flags.DEFINE_string(
    "one", None, "Time one setting in this process, print its row (this command calls itself so)."
)


def parts_ms(running: Steps, key: jax.Array, steps: int) -> dict[str, float]:
    """ms of each part of the step, timed alone.

    Every iteration depends on the one before, where needed through a term times 1e-30. So XLA
    cannot move the work out of the loop.
    """
    problem, params, method = running.problem, running.params, running.method
    cs, opt_state = running.state.components, running.state.opt_state
    x = problem.sample_fn(key, 0)
    gate, optimizer = method.gate((), problem), method.transformation()

    def mask_of(scores):
        return gate(Observation(x, cs, scores)).active

    def squared(params, cs, x):
        fn = problem.attribution_fn or problem.apply_fn
        return attributions.squared("gradient", fn, params, cs, x)

    scores = jax.jit(squared)(params, cs, x)
    mask = mask_of(scores)
    fixed = {
        "params": params,
        "x": x,
        "mask": mask,
        "target": split_result(problem.apply_fn(params, x)),
    }

    def descend(loss: Callable) -> Callable:
        def body(cs, i, fixed):
            return jax.tree.map(lambda a, g: a - 1e-30 * g, cs, jax.grad(loss)(cs, fixed))

        return body

    def attribute(carry, i, fixed):
        cs, total = carry
        moved = fixed["x"] * (1 + 1e-30 * total[:1, :1])
        return cs, total + squared(fixed["params"], cs, moved)

    def update(carry, i, fixed):
        trained, opt_state = carry
        gradient = jax.tree.map(lambda a: 1e-3 * a, trained)
        updates, opt_state = optimizer.update(gradient, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state

    parts = {
        "data": (lambda total, i, fixed: total + problem.sample_fn(key, i).sum(), jnp.zeros(())),
        "attributions": (attribute, (cs, scores)),
        "mask": (lambda a, i, fixed: a + 1e-30 * mask_of(a), scores),
        "sparse_pass": (descend(make_sparse_loss(problem, method, mask.shape)), cs),
        "faithfulness": (descend(lambda cs, fixed: losses.faithfulness(cs, fixed["params"])), cs),
        "simplicity": (
            descend(lambda cs, fixed: losses.simplicity(cs, fixed["mask"], method.norm_p)),
            cs,
        ),
        "optimizer": (update, (Trained(cs), opt_state)),
    }
    return {
        name: 1e3 * looped_s(body, carry, fixed, steps) for name, (body, carry) in parts.items()
    }


def make_sparse_loss(problem: Problem, method: Method, mask_shape: tuple[int, int]) -> Callable:
    """(components, {params, x, mask, target: the target's outputs}) -> loss of the sparse pass."""
    slots = dispatch.slots_for(method.num_kept, *mask_shape)

    def sparse_loss(cs, fixed):
        params, mask, x = fixed["params"], fixed["mask"], fixed["x"]
        result = sparse.apply(problem.apply_fn, params, cs, mask, x, slots=slots)
        (out, hidden), (target_out, target_hidden) = split_result(result), fixed["target"]
        loss = losses.minimality(out, target_out)
        if method.terms()["hidden_reconstruction"].on:
            loss += losses.hidden_reconstruction(hidden, target_hidden)
        return loss

    return sparse_loss


def largest_operations(call: Callable[[], Any], steps: int, num: int = 5) -> list[dict[str, Any]]:
    """The operations of the compiled program that take longest, by `jax.profiler`."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        file = next(Path(folder).rglob("*.xplane.pb"))
        planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
        on_device = [plane for plane in planes if plane.name.startswith("/device:")]
        took: collections.Counter = collections.Counter()
        for plane in on_device or planes:
            for line in plane.lines:
                for event in line.events:
                    if not any(word in event.name for word in NO_OPERATION):
                        took[event.name] += event.duration_ns
    return [
        {"operation": name, "ms_per_step": ns / 1e6 / steps} for name, ns in took.most_common(num)
    ]


def floor_gib() -> float:
    """Peak GiB of a process that only imports jax and these modules, and adds two numbers."""
    code = (
        "import common, jax; jax.numpy.add(1, 1).block_until_ready(); "
        "print(common.peak_memory_gib())"
    )
    command, here = [sys.executable, "-c", code], Path(__file__).parent
    done = subprocess.run(command, cwd=here, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def time_setting(name: str, quick: bool) -> dict[str, Any]:
    """The row of one setting."""
    file, variant, batch_size, steps, full_run, (original_ms, original_gib) = SETTINGS[name]
    experiment = load_config(file, f"{variant},smoke" if quick else variant)
    batch_size, steps, windows = (32, 2, 2) if quick else (batch_size, steps, 7)
    params = None
    if not quick:
        target = targets.build(experiment.target, batch_size)
        params, _ = pretrain.pretrain(target, experiment.target)
    running = Steps.build(experiment, params, steps=steps, batch_size=batch_size)
    ms, compile_s = running.ms_and_compile_s(windows)
    used = peak_memory_gib()
    peaks = measure_peaks()
    counts = bounds.count(running.step, running.state, running.params, jax.random.key(0))
    components = running.state.components
    limits = bounds.bound(counts, sum(leaf.size for leaf in jax.tree.leaves(components)), peaks)
    products_ms = bounds.dots_ms(counts["dots"])  # at their own shapes, which may be slow ones
    at_equal_peak = ORIGINAL_GFLOPS / peaks.matmul_gflops
    return {
        "setting": name,
        "ms_per_step": ms,
        "compile_s": compile_s,
        "peak_rss_gib": used,
        "floor_gib": floor_gib(),
        **dataclasses.asdict(peaks),
        "original_ms_per_step": original_ms,
        "original_peak_rss_gib": original_gib,
        "times_faster": original_ms / ms,
        "times_faster_at_equal_matmul_peak": original_ms / ms * at_equal_peak,
        "full_run_minutes": full_run * ms / 6e4,
        **limits,
        "times_bound": ms / limits["bound_ms"],
        "share_of_matmul_peak": limits["gflop"] / ms / peaks.matmul_gflops * 1e3,
        "products_alone_ms": products_ms,
        "products_alone_gflops": limits["gflop"] / products_ms * 1e3,
        "device": jax.local_devices()[0].device_kind,
        "num_devices": jax.local_device_count(),
        "largest_operations": largest_operations(running.call, steps),
        "parts_ms": parts_ms(running, jax.random.key(0), steps),
    }


def tables(rows: list[dict[str, Any]], markdown: bool) -> None:
    for row in rows:
        quarter = row["original_peak_rss_gib"] / 4
        row["quarter"] = f"{quarter:.2f}" + (
            " (below the floor)" if quarter < row["floor_gib"] else ""
        )
        row["share"] = f"{row['share_of_matmul_peak']:.0%}"
        row |= {f"{part} bound": ms for part, ms in row["bound_parts_ms"].items()}
        row |= {f"part {name}": ms for name, ms in row["parts_ms"].items()}
    where = f"{rows[0]['num_devices']} x {rows[0]['device']}"
    columns = {
        "setting": "setting",
        "ms per step": "ms_per_step",
        "original": "original_ms_per_step",
        "times faster": "times_faster",
        "at equal matmul peak": "times_faster_at_equal_matmul_peak",
        "peak GiB": "peak_rss_gib",
        "original GiB": "original_peak_rss_gib",
        "a quarter of it": "quarter",
        "floor GiB": "floor_gib",
        "compile s": "compile_s",
        "full run, min": "full_run_minutes",
    }
    show(f"Time of a train step on {where}", rows, columns, markdown=markdown)
    columns = {
        "setting": "setting",
        "GFLOP": "gflop",
        "matmul ms": "matmul bound",
        "memory ms": "memory bound",
        "elementwise ms": "elementwise bound",
        "bound ms": "bound_ms",
        "largest": "binds",
        "reached ms": "ms_per_step",
        "times bound": "times_bound",
        "of matmul peak": "share",
        "products alone, ms": "products_alone_ms",
    }
    show("The least a step can take, from its shapes", rows, columns, markdown=markdown)
    columns = {
        "setting": "setting",
        "matmul GFLOP/s": "matmul_gflops",
        "products at their own shapes": "products_alone_gflops",
        "memory GB/s": "memory_gb_s",
        "elementwise Gop/s": "elementwise_gops",
        "empty scan step, µs": "dispatch_us",
    }
    show("Peaks measured in the same process", rows, columns, markdown=markdown)
    columns = {"setting": "setting"} | {name: f"part {name}" for name in rows[0]["parts_ms"]}
    show("ms of each part, timed alone", rows, columns, markdown=markdown)
    operations = [
        {"setting": row["setting"], **operation}
        for row in rows
        for operation in row["largest_operations"]
    ]
    show(
        "The five largest operations",
        operations,
        {"setting": "setting", "operation": "operation", "ms per step": "ms_per_step"},
        markdown=markdown,
    )


def main(argv) -> None:
    logging.set_verbosity(logging.WARNING)
    if _ONE.value:
        print(json.dumps(time_setting(_ONE.value, _QUICK.value)))
        return
    if unknown := set(_SETTINGS.value) - set(SETTINGS):
        print(f"unknown settings {sorted(unknown)}; known: {', '.join(SETTINGS)}.", file=sys.stderr)
        sys.exit(2)
    rows = []
    for name in _SETTINGS.value:
        if _QUICK.value and name not in QUICK:
            continue
        command = [sys.executable, __file__, f"--one={name}", f"--quick={_QUICK.value}"]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(child.stdout.splitlines()[-1]))
        print(f"{name}: {rows[-1]['ms_per_step']:.3g} ms per step", file=sys.stderr)
        write_json(_JSON.value, rows)
    if rows:
        tables(rows, _MARKDOWN.value)


if __name__ == "__main__":
    app.run(main)
