"""Methods on the two-layer language model of examples/, by the table of language models.

    python benchmarks/two_layer.py --method vpd whole --seeds 0:1 [--set num_steps=1000 ...]

Settings are what `apd_jax.suggest` says, but for --set. Judged on 128 rows of text that was held
out. Beside the measures of `apd_jax.evaluation.language`:

  spans_two   share of alive components with pieces at two matrices or more. A piece counts where
              its norm is at least a tenth of that of the component's largest
  pieces      rank-one pieces that are on per token, at g > 0, of those that count
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import apd_jax
from apd_jax import components as components_lib
from apd_jax.evaluation import language
from apd_jax.targets.scoring import alive_components

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import language_model

ROWS, BATCH, LEAST = 128, 16, 0.1
PASSES = ("unmasked", "gates", "rounded_0", "rounded_0.1", "rounded_0.5", "stochastic")
SHOWN = (
    *(f"ce_recovered_{name}" for name in PASSES),
    *("l0_components_0", "num_alive_components", "spans_two", "pieces", "kl_adversary", "minutes"),
)


def run(method: str, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
    """One row."""
    rows, held, _ = language_model.text()
    model, params = language_model.trained(seed)
    select = "*Block*.kernel"
    settings = apd_jax.suggest(model.apply, params, rows, method, select=select)
    settings = settings.replace(seed=seed, **changes)
    began = time.monotonic()
    found = apd_jax.decompose(model.apply, params, rows, settings, select=select)
    row = {"method": method, "seed": seed, "changes": changes, "date": time.strftime("%F")}
    row |= {"minutes": (time.monotonic() - began) / 60, "device": jax.devices()[0].device_kind}
    batches = held[:ROWS].reshape(-1, BATCH, held.shape[1])
    return row | language.evaluate(found, batches) | spans(found, batches)


def spans(found: Any, batches: np.ndarray) -> dict[str, float]:
    """How many matrices components reach into; see the module."""
    C = found.components.num_components
    sizes = []
    for f in components_lib.aligned(found.components).factors.values():
        sizes.append(np.linalg.norm(np.asarray(f.weights).reshape(C, -1), axis=1))
    size = np.stack(sizes)  # [matrices, C]
    counts = size >= LEAST * size.max(axis=0)
    on = np.concatenate([np.asarray(found.activity(b).values) > 0 for b in batches])
    rates = on.mean(axis=(0, 1))
    alive = alive_components(rates, np.asarray(components_lib.norms(found.components)))
    reach = counts.sum(axis=0)
    return {"spans_two": float(np.mean(reach[alive] >= 2)), "pieces": float(rates @ reach)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--method", nargs="+", required=True)
    parser.add_argument("--seeds", default="0:1", help="first:stop")
    parser.add_argument("--set", nargs="*", default=[], help="field=value of the settings")
    parser.add_argument("--json", type=Path, help="a row per line is added to this file")
    args = parser.parse_args()
    changes = {k: json.loads(v) for k, _, v in (s.partition("=") for s in args.set)}
    first, _, stop = args.seeds.partition(":")
    table = Table("method", "seed", *SHOWN)
    for method in args.method:
        for seed in range(int(first), int(stop)):
            row = run(method, seed, changes)
            table.add_row(method, str(seed), *(f"{row.get(k, float('nan')):.4g}" for k in SHOWN))
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
