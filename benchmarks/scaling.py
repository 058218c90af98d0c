"""How time and memory of a step grow with components, rank, batch and devices.

    python benchmarks/scaling.py [--json FILE] [--markdown] [--quick]

The network: ResidMLP with 100 features, residual width 256 and 32 neurons, untrained. Operations of
each term are counted in its traced program (`bounds.py`). A cost model is fitted by non-negative
least squares to the relative errors:

  ms = a·attributions + b·sparse pass + c·faithfulness (GFLOP each) + d·component parameters + e

With the model's efficiencies, `pod.py` computes a transformer on paper.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import bounds
import jax
import numpy as np
import pod
from common import Steps, load_config, measure_peaks, show, write_json
from scipy.optimize import nnls

from apd_jax import attributions, losses
from apd_jax.forward import dispatch, sparse
from apd_jax.network.outputs import outputs

BASE = {"C": 64, "rank": 16, "batch": 512}
GRID = {"C": (16, 32, 128, 256), "rank": (4, 8, 32), "batch": (128, 256, 1024, 2048)}
QUICK_GRID = {"C": (8,)}
TERMS = ("attributions", "sparse_pass", "faithfulness")
DEVICES = (1, 2, 4)


def build(point: dict[str, int], steps: int, *, quick: bool, num_devices: int | None = 1) -> Steps:
    experiment = load_config("resid_mlp.py", "1layer,smoke" if quick else "1layer")
    with experiment.unlocked():
        if not quick:
            experiment.target.d_resid, experiment.target.d_mlp = 256, 32
        experiment.apd.num_components, experiment.apd.rank = point["C"], point["rank"]
    return Steps.build(experiment, steps=steps, batch_size=point["batch"], num_devices=num_devices)


def term_gflop(running: Steps) -> dict[str, float]:
    """GFLOP of the products in each term."""
    problem, params, method = running.problem, running.params, running.method
    cs = running.state.components
    x = problem.sample_fn(jax.random.key(0), 0)
    mask = jax.numpy.zeros((method.batch_size, method.num_components), bool)
    slots = dispatch.slots_for(method.num_kept, *mask.shape)

    def sparse_loss(cs):
        out = sparse.apply(problem.apply_fn, params, cs, mask, x, slots=slots)
        return losses.minimality(outputs(out), x)

    programs = {
        "attributions": lambda cs: attributions.squared(
            "gradient", problem.attribution_fn or problem.apply_fn, params, cs, x
        ),
        "sparse_pass": jax.grad(sparse_loss),
        "faithfulness": jax.grad(lambda cs: losses.faithfulness(cs, params)),
    }
    return {name: bounds.count(program, cs)["flops"] / 1e9 for name, program in programs.items()}


def measure(point: dict[str, int], *, quick: bool) -> dict[str, Any]:
    """The row of one point (C, rank and batch): time, memory and operations."""
    running = build(point, 2 if quick else 10, quick=quick)
    ms, _ = running.ms_and_compile_s(2 if quick else 5)
    one = jax.jit(running.step).lower(running.state, running.params, jax.random.key(0)).compile()
    memory = one.memory_analysis()
    cs = running.state.components
    return {
        **point,
        "ms": ms,
        "temporaries_mib": getattr(memory, "temp_size_in_bytes", 0) / 2**20,
        "state_mib": getattr(memory, "argument_size_in_bytes", 0) / 2**20,
        "params_m": sum(leaf.size for leaf in jax.tree.leaves(cs)) / 1e6,
        **term_gflop(running),
    }


def fit(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Coefficients of the cost model, and its relative errors; puts `model_ms` into the rows."""
    columns = [*TERMS, "params_m"]
    design = np.array([[row[name] for name in columns] + [1.0] for row in rows])
    ms = np.array([row["ms"] for row in rows])
    scale = design.max(axis=0)
    found, _ = nnls(design / ms[:, None] / scale, np.ones(len(rows)))
    coefficients = found / scale
    predicted = design @ coefficients
    for row, value in zip(rows, predicted, strict=True):
        row["model_ms"] = float(value)
    return {
        "ms_per_gflop": dict(zip(TERMS, map(float, coefficients), strict=False)),
        "ms_per_million_params": float(coefficients[-2]),
        "constant_ms": float(coefficients[-1]),
        "largest_relative_error": float(np.max(np.abs(predicted / ms - 1))),
        "median_relative_error": float(np.median(np.abs(predicted / ms - 1))),
    }


def efficiencies(model: dict[str, Any], matmul_gflops: float, overall: float) -> dict[str, float]:
    """Share of the matmul peak that each term reaches, at most 1.

    Args:
      model: what `fit` returns.
      overall: the share of the whole step, taken for a term whose fitted time is 0.
    """
    return {
        name: min(1.0, 1e3 / ms / matmul_gflops if ms > 0 else overall)
        for name, ms in model["ms_per_gflop"].items()
    }


def on_devices() -> list[dict[str, Any]]:
    """Data parallel over virtual devices: what is sent, and whether losses equal one device's.

    No times are measured, because the virtual devices share the cores.
    """
    rows: list[dict[str, Any]] = []
    for n in DEVICES:
        running = build(BASE | {"batch": 64, "C": 16}, 3, quick=True, num_devices=n)
        summed = []  # of what is summed over devices, shape and dtype; with one, nothing is sent
        if n > 1:
            summed = [
                v.aval
                for eqn, _ in bounds.equations(running.traced(n))
                if eqn.primitive.name.startswith("psum")
                for v in eqn.invars
            ]
        rows.append(
            {
                "devices": n,
                "gradient_bytes": sum(a.size * a.dtype.itemsize for a in summed if a.ndim),
                "scalars": sum(not a.ndim for a in summed),
                "total": np.asarray(running.call()["total"]).tolist(),
            }
        )
    for row in rows:
        difference = np.abs(np.subtract(row["total"], rows[0]["total"])) / np.abs(rows[0]["total"])
        row["loss_differs_by"] = float(difference.max())
    return rows


def tables(result: dict[str, Any], markdown: bool) -> None:
    columns = {
        "C": "C",
        "rank": "rank",
        "batch": "batch",
        "ms": "ms",
        "model ms": "model_ms",
        "temporaries MiB": "temporaries_mib",
    }
    columns |= {"state MiB": "state_mib", "parameters, M": "params_m"} | {
        f"{name} GFLOP": name for name in TERMS
    }
    show(
        f"Time and memory of a step, {result['device']}", result["rows"], columns, markdown=markdown
    )
    model = result["model"]
    fitted = [
        {
            "term": f"{name}, per GFLOP",
            "ms": ms,
            "peak": f"{result['efficiency'][name]:.0%}"
            + ("" if ms > 0 else " (of the whole step)"),
        }
        for name, ms in model["ms_per_gflop"].items()
    ]
    fitted += [
        {"term": "per million component parameters", "ms": model["ms_per_million_params"]},
        {"term": "constant", "ms": model["constant_ms"]},
    ]
    fitted += [{"term": "model is off by, median", "ms": f"{model['median_relative_error']:.0%}"}]
    fitted += [{"term": "model is off by, at most", "ms": f"{model['largest_relative_error']:.0%}"}]
    show(
        "Fitted cost model",
        fitted,
        {"term": "term", "ms": "ms", "share of matmul peak": "peak"},
        markdown=markdown,
    )
    columns = {
        "devices": "devices",
        "gradient, bytes": "gradient_bytes",
        "scalars in the program": "scalars",
        "loss differs by": "loss_differs_by",
    }
    show(
        "Data parallel over virtual devices: summed per step and device",
        result["devices"],
        columns,
        markdown=markdown,
    )
    columns = {name: name for name in result["pod"][0]}
    show(
        f"On paper: a 124M-parameter transformer on a v5e-{pod.CHIPS}, meshes data x component",
        result["pod"],
        columns,
        markdown=markdown,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", default=None)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, to see whether everything runs"
    )
    parser.add_argument(
        "--devices-only",
        action="store_true",
        help="write only the table of virtual devices, as JSON (this command calls itself so)",
    )
    options = parser.parse_args()
    if options.devices_only:
        write_json(options.json, on_devices())
        return
    base, grid = ({"C": 4, "rank": 2, "batch": 16}, QUICK_GRID) if options.quick else (BASE, GRID)
    points = [base] + [base | {name: value} for name, values in grid.items() for value in values]
    rows = [measure(point, quick=options.quick) for point in points]
    model, peaks = fit(rows), measure_peaks()
    gflop_per_ms = np.median([sum(row[name] for name in TERMS) / row["ms"] for row in rows])
    overall = float(gflop_per_ms) * 1e3 / peaks.matmul_gflops
    efficiency = efficiencies(model, peaks.matmul_gflops, overall)
    result = {
        "device": jax.devices()[0].device_kind,
        "rows": rows,
        "model": model,
        "peaks": dataclasses.asdict(peaks),
        "efficiency": efficiency,
        "devices": devices_in_another_process(),
        "assumptions": dataclasses.asdict(pod.Assumptions()),
        "pod": pod.table(efficiency),
    }
    write_json(options.json, result)
    tables(result, options.markdown)


def devices_in_another_process() -> list[dict[str, Any]]:
    """`on_devices` in a process that begins with virtual devices, which this one cannot add."""
    flags = f"--xla_force_host_platform_device_count={max(DEVICES)}"
    flags = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "devices.json"
        command = [sys.executable, __file__, "--devices-only", "--json", str(file)]
        subprocess.run(command, env=environment, check=True)
        return json.loads(file.read_text())


if __name__ == "__main__":
    main()
