r"""What each part of the recipe is for.

The recipe with one part at a time left out or exchanged, on some seeds of some targets.

    python benchmarks/ablations.py --json runs/recovery/ablations.json \
        --targets tms,40-10 resid_mlp,2layer --seeds 0:3

Rows are those of `benchmarks/recovery.py`, with the part under `without`. Rows that the file
already holds are not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import recovery
from rich.console import Console
from rich.table import Table

from apd_jax.recipe import modes, stages


def reads_of(present: Callable | None) -> Callable:
    """A replacement of `modes._reads`, which finds the direction that every component reads.

    Args:
      present: changes which examples are taken to have a mode, and so to which examples the
        directions are blind. None: the directions are the dual basis of the modes instead.
    """
    reads = modes._reads

    def instead(ins: dict, found: dict, here: np.ndarray) -> tuple[dict, dict]:
        if present is not None:
            return reads(ins, found, present(here))
        dual = {
            name: np.stack([modes.dual(e[:, i])[0] for i in range(e.shape[1])], 1)
            for name, e in found.items()
        }
        return dual, reads(ins, found, here)[1]

    return instead


# {part that is left out or exchanged: (
#    [(module, name of a function, the function in its place)], {setting: its value})}
PARTS: dict[str, tuple[list[tuple[Any, str, Callable]], dict[str, Any]]] = {
    "nothing: the recipe": ([], {}),
    "refining": ([], {"recipe.refine.num_steps": 1}),
    "blind reading: the dual basis of the modes": ([(modes, "_reads", reads_of(None))], {}),
    "the same, and refining": ([(modes, "_reads", reads_of(None))], {"recipe.refine.num_steps": 1}),
    "blind reading: least variance over all examples": (
        [(modes, "_reads", reads_of(np.zeros_like))],
        {},
    ),
    "the purest quarter: all examples near a mode": (
        [(modes, "purest", lambda ins, count, members: members)],
        {},
    ),
    "steps in proportion to √loss: 1e-3": (
        [(stages, "_loss", lambda *_: 1.0)],
        {"recipe.nearly_exact": 2.0, "recipe.refine.learning_rate": 1e-3},
    ),
    "a low threshold: ten times as high": ([], {"recipe.refine.threshold": 1.5}),
    "partial ablation: inactive components dropped": ([], {"recipe.refine.inactive": "drop"}),
    "leaving polish out": ([], {"recipe.nearly_exact": 0.0}),
    "components that are always on": ([], {"recipe.find_always_on": False}),
}
SHOWN = (
    "mmcs_one_to_one",
    "ml2r_one_to_one",
    "within_margin",
    "cosine_w_in",
    "norm_ratio_w_in",
    "minimality_topk",
    "scrub_scrubbed",
)


def run(target: str, part: str, seed: int) -> dict[str, Any]:
    """The row of one run without `part`."""
    replaced, settings = PARTS[part]
    with contextlib.ExitStack() as stack:
        for module, name, other in replaced:
            stack.enter_context(mock.patch.object(module, name, other))
        return recovery.run(f"recipe.py:{target}", seed, settings) | {"without": part}


def table(rows: list[dict[str, Any]], target: str) -> Table:
    """A row per part: how many seeds succeed, and the range of each metric over seeds."""
    title = f"{target}: min to max over seeds, failures included"
    shown = Table("without", "seeds", "succeed", *SHOWN, title=title)
    for part in PARTS:
        here = [
            row for row in rows if row["config"] == f"recipe.py:{target}" and row["without"] == part
        ]
        cells = []
        for key in SHOWN:
            values = [row[key] for row in here if key in row]
            cells.append(f"{min(values):.5g} to {max(values):.5g}" if values else "")
        if here:
            shown.add_row(part, str(len(here)), str(sum(row["success"] for row in here)), *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", required=True)
    parser.add_argument("--targets", nargs="+", default=["tms,40-10", "resid_mlp,2layer"])
    parser.add_argument("--seeds", default="0:3", help="first:end")
    options = parser.parse_args()
    file = Path(options.json)
    rows = json.loads(file.read_text()) if file.exists() else []
    done = {(row["config"], row["without"], row["seed"]) for row in rows}
    seeds = range(*map(int, options.seeds.split(":")))
    for target, seed, part in itertools.product(options.targets, seeds, PARTS):
        if (f"recipe.py:{target}", part, seed) in done:
            continue
        row = run(target, part, seed)
        rows.append(row)
        outcome = "success" if row["success"] else row.get("error", "lost")
        print(target, seed, part, outcome, flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows, indent=1))
    for target in options.targets:
        Console(width=200).print(table(rows, target))


if __name__ == "__main__":
    main()
