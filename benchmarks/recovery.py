"""How often the truth is recovered: many seeds of one config, each with a target network of its own, and what each came to.

    python benchmarks/recovery.py --config recipe.py:tms,40-10 --seeds 0:20 --json runs/recovery/tms_40-10.json
    python benchmarks/recovery.py --config recipe.py:tms,5-2 --set recipe.polish.learning_rate=1e-2 --seeds 0:5
    python benchmarks/recovery.py --summary runs/recovery/*.json

A seed is the run of `python -m apd_jax.main --config=configs/FILE --config.seed=S` without figures and report. What is in the file already
is not run again, and a run that fails is a row too. A seed succeeds
    TMS        MMCS >= 0.999 and ML2R = 1 ± 0.01, one to one, and every feature has a component of its own
    ResidMLP   every feature has a top-1 component that is no other's, and with it (and what is always on) alone an error to the label
               within 10 % of the target's; what it reads of the feature through W_in of all layers together has a cosine >= 0.99 and
               a length of 1 ± 0.02 times the network's (means); scrubbed <= 1.5 sparse, anti-scrubbed >= 10 scrubbed
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import load_config
from rich.console import Console
from rich.table import Table

from apd_jax import evaluation, recipe, targets, train
from apd_jax.config import Config
from apd_jax.errors import InputError, NonFiniteError
from apd_jax.targets import pretrain

MARGIN = 0.1  # of a feature's error, relative to the target's own
SHOWN = (
    "mmcs_one_to_one",
    "ml2r_one_to_one",
    "num_features_owned",
    "distinct",
    "within_margin",
    "cosine_w_in",
    "norm_ratio_w_in",
    "relative_parameter_error",
)
SCRUBBED = ("minimality_topk", "scrub_scrubbed", "scrub_antiscrubbed", "scrub_monosemantic")


def experiment(name: str, seed: int, changes: dict[str, Any]) -> Config:
    """The config of a seed, e.g. of "recipe.py:tms,5-2", with some fields changed."""
    file, _, variant = name.partition(":")
    config = load_config(file, variant)
    config.update_from_flattened_dict({"seed": seed} | changes)
    return config


def run(name: str, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
    """One row: settings, metrics, success, seconds of each part."""
    config = experiment(name, seed, changes)
    row: dict[str, Any] = {
        "config": name,
        "seed": seed,
        "changes": changes,
        "device": jax.devices()[0].device_kind,
        "date": time.strftime("%F"),
    }
    began = time.monotonic()
    target = targets.build(config.target, config.apd.batch_size)
    params, _ = pretrain.pretrain(target, config.target)
    row["seconds_target"] = time.monotonic() - began
    began = time.monotonic()
    problem = target.problem(params)
    try:
        if "recipe" in config:
            components, _, settings = recipe.fit(problem, config.apd, config.recipe)
        else:
            (components, _), settings = train.fit(problem, config.apd), config.apd
    except (InputError, NonFiniteError) as error:
        return row | {"error": str(error), "success": False}
    row["seconds"] = time.monotonic() - began
    with config.unlocked():
        config.apd = settings
    found = evaluation.evaluate(targets.build(config.target, config.evaluation.batch_size), params, components, config)
    ratio = found.arrays["per_feature_loss_top1"] / found.arrays["per_feature_loss_target"]
    row |= {key: value for key, value in found.metrics.items() if np.isscalar(value)}
    row |= {"within_margin": int(np.sum(ratio <= 1 + MARGIN)), "median_loss_ratio": float(np.median(ratio))}
    if config.target.name == "resid_mlp":
        row |= sides(params, components, found.arrays["component_of_feature"])
    return row | {"success": succeeds(config.target.name, row)}


def sides(params: Any, components: Any, owner: np.ndarray) -> dict[str, float]:
    """W_in and W_out apart: what a feature's component reads of it, and writes to it, beside the whole network; means over features.

    `owner` is the component with the largest attribution where the feature is alone; `distinct` says how many of them there are.
    """
    found: dict[str, float] = {"distinct": len(set(owner.tolist()))}
    parts: dict[str, Any] = {name: np.asarray(f.U @ f.V) for name, f in components.factors.items()}
    for side in ("in", "out"):
        names = sorted(name for name in parts if name.startswith(f"mlp_{side}_"))
        cosine, ratio = [], []
        for f, c in enumerate(owner):
            own, whole = [
                np.concatenate([params["W_E"][f] @ w[n] if side == "in" else w[n] @ params["W_U"][:, f] for n in names])
                for w in ({n: parts[n][c] for n in names}, params)
            ]
            cosine.append(float(own @ whole / (np.linalg.norm(own) * np.linalg.norm(whole) + 1e-30)))
            ratio.append(float(np.linalg.norm(own) / np.linalg.norm(whole)))
        found |= {f"cosine_w_{side}": float(np.mean(cosine)), f"norm_ratio_w_{side}": float(np.mean(ratio))}
    return found


def succeeds(target: str, row: dict[str, Any]) -> bool:
    owned = row["num_features_owned"] == row["num_features"]
    if target == "resid_mlp":
        apart = row["distinct"] == row["within_margin"] == row["num_features"]
        read = row["cosine_w_in"] >= 0.99 and abs(row["norm_ratio_w_in"] - 1) <= 0.02
        sparse, scrubbed, anti = (row[f"scrub_{kind}"] for kind in ("topk", "scrubbed", "antiscrubbed"))
        return bool(apart and read and scrubbed <= 1.5 * sparse and anti >= 10 * scrubbed)
    return bool(owned and row["mmcs_one_to_one"] >= 0.999 and abs(row["ml2r_one_to_one"] - 1) <= 0.01)


def summary(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "config", "changes", "seeds", "succeed", *SHOWN, *SCRUBBED, "minutes", title="mean (least to most) over seeds, failures included"
    )
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["config"], ", ".join(f"{k}={v}" for k, v in row["changes"].items())), []).append(row)
    for (name, changes), group in groups.items():
        cells = []
        for key in (*SHOWN, *SCRUBBED):
            values = [row[key] for row in group if key in row]
            cells.append(f"{np.mean(values):.4g} ({min(values):.4g} to {max(values):.4g})" if values else "")
        minutes = [row["seconds"] / 60 for row in group if "seconds" in row]
        table.add_row(
            name, changes, str(len(group)), str(sum(row["success"] for row in group)), *cells, f"{np.mean(minutes):.2f}" if minutes else ""
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a file of configs/ with its argument")
    parser.add_argument("--seeds", default="0:20", help="first:end")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of the config to change")
    parser.add_argument("--json", default=None, help="file that rows are added to")
    parser.add_argument("--summary", nargs="*", default=[], metavar="FILE", help="only print the table of these files")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 240)
    if options.summary:
        console.print(summary([row for file in options.summary for row in json.loads(Path(file).read_text())]))
        return
    if options.config is None:
        parser.error("give a --config, or files for a --summary.")
    changes = {field: ast.literal_eval(value) for field, value in (entry.split("=", 1) for entry in options.set)}
    file = None if options.json is None else Path(options.json)
    rows = json.loads(file.read_text()) if file is not None and file.exists() else []
    done = {(row["config"], row["seed"], json.dumps(row["changes"])) for row in rows}
    for seed in range(*map(int, options.seeds.split(":"))):
        if (options.config, seed, json.dumps(changes)) in done:
            continue
        rows.append(run(options.config, seed, changes))
        console.print({key: rows[-1].get(key) for key in ("seed", "success", *SHOWN, "seconds", "error")})
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(rows, indent=1))
    console.print(summary(rows))


if __name__ == "__main__":
    main()
