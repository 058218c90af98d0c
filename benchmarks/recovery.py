r"""How often the truth is recovered: many seeds of one config, each with its own target network.

    python benchmarks/recovery.py --config recipe.py:tms,40-10 --seeds 0:20 \
        --json runs/recovery/tms_40-10.json
    python benchmarks/recovery.py --config recipe.py:tms,5-2 \
        --set recipe.polish.learning_rate=1e-2 --seeds 0:5
    python benchmarks/recovery.py --summary runs/recovery/*.json \
        --csv docs/recovery.csv --figure docs/images/recovery.png

A seed is the run of `python -m apd_jax.main --config=configs/FILE --config.seed=S` without figures
and report. Seeds that the file already holds are not run again. A run that fails is a row too.

A seed of TMS succeeds if all of these hold:
  one to one, MMCS >= 0.999 and ML2R = 1 ± 0.01
  every feature has a component of its own
A seed of ResidMLP succeeds if all of these hold:
  every feature has a top-1 component (the one with the largest attribution where the feature is
    alone) that is not another feature's
  with it alone (and those always on), the error to the label is within 10 % of the target's
  what it reads of the feature through W_in of all layers together, compared with the whole network,
    has a cosine >= 0.99 and a length of 1 ± 0.02, both as means over features
  scrubbed error <= 1.5 sparse error, anti-scrubbed error >= 10 scrubbed error
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from common import load_config
from rich.console import Console
from rich.table import Table

from apd_jax import components as components_lib
from apd_jax import evaluation, targets
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError, NonFiniteError
from apd_jax.methods import registry
from apd_jax.recipe import stages
from apd_jax.targets import pretrain
from apd_jax.targets.base import Config
from apd_jax.train import loop

MARGIN = 0.1  # by which a feature's error may exceed the target's, relative to the target's
SHOWN = (
    "mmcs_one_to_one",
    "ml2r_one_to_one",
    "num_features_owned",
    "distinct",
    "within_margin",
    "cosine_w_in",
    "norm_ratio_w_in",
    "relative_parameter_error",
    "mean_active",
)
SCRUBBED = ("minimality_topk", "scrub_scrubbed", "scrub_antiscrubbed", "scrub_monosemantic")
KEPT = (
    "config",
    "changes",
    "seed",
    "success",
    *SHOWN,
    *SCRUBBED,
    "num_features",
    "seconds",
    "seconds_target",
    "device",
)
KEPT += ("date", "error")
# {kind of settings: its colour in the figure}
RECIPES = {"paper's settings": "C1", "recipe with learned masks": "C2", "recipe": "C0"}
# Ranges of the figure's axes. A point outside of them is drawn at the edge.
SHOWN_TMS = (1e-8, 1.0), (1e-5, 1.0)  # 1 - MMCS, |ML2R - 1|
SHOWN_RESID_MLP = (1e-8, 1e-2), (1e-10, 1e-2)  # sparse error, scrubbed error


def experiment(name: str, seed: int, changes: dict[str, Any]) -> Config:
    """The config named e.g. "recipe.py:tms,5-2", with its seed and some fields changed."""
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
    problem, method = target.problem(params), registry.of(config.apd)
    try:
        if "recipe" in config:
            trained, logged, method = stages.fit(problem, method, config.recipe)
        else:
            trained, logged = loop.fit(problem, method)
    except (InputError, NonFiniteError) as error:
        return row | {"error": str(error), "success": False}
    row |= {
        "seconds": time.monotonic() - began,
        "mean_active": logged[-1]["mean_active"] - method.always_on,
    }
    trained = jax.tree.map(jnp.asarray, trained)
    asked = config.evaluation
    found = evaluation.evaluate(
        targets.build(config.target, asked.batch_size),
        Decomposition(problem, trained.components, method, logged, gate=trained.gate),
        num_batches=asked.num_batches,
        seed=asked.seed,
    )
    ratio = found.arrays["per_feature_loss_top1"] / found.arrays["per_feature_loss_target"]
    row |= {key: value for key, value in found.metrics.items() if np.isscalar(value)}
    row |= {
        "within_margin": int(np.sum(ratio <= 1 + MARGIN)),
        "median_loss_ratio": float(np.median(ratio)),
    }
    if config.target.name == "resid_mlp":
        row |= sides(params, trained.components, found.arrays["component_of_feature"])
    return row | {"success": succeeds(config.target.name, row)}


def sides(params: Any, components: Any, owner: np.ndarray) -> dict[str, float]:
    """What a feature's component reads of it (W_in) and writes to it (W_out), apart.

    Both are compared with those of the whole network, over all layers together.

    Args:
      owner: [F], the component with the largest attribution where the feature is alone.
    Returns:
      distinct: number of different components in `owner`.
      cosine_w_{in,out}, norm_ratio_w_{in,out}: component against network, means over features.
    """
    found: dict[str, float] = {"distinct": len(set(owner.tolist()))}
    sites = components_lib.aligned(components).factors
    parts: dict[str, Any] = {name: np.asarray(f.U @ f.V) for name, f in sites.items()}
    for side in ("in", "out"):
        names = sorted(name for name in parts if name.startswith(f"mlp_{side}_"))
        cosine, ratio = [], []
        for f, c in enumerate(owner):
            own, whole = (
                np.concatenate(
                    [
                        params["W_E"][f] @ w[n] if side == "in" else w[n] @ params["W_U"][:, f]
                        for n in names
                    ]
                )
                for w in ({n: parts[n][c] for n in names}, params)
            )
            length, full = np.linalg.norm(own), np.linalg.norm(whole)
            cosine.append(float(own @ whole / (length * full + 1e-30)))
            ratio.append(float(length / full))
        found |= {
            f"cosine_w_{side}": float(np.mean(cosine)),
            f"norm_ratio_w_{side}": float(np.mean(ratio)),
        }
    return found


def succeeds(target: str, row: dict[str, Any]) -> bool:
    """Whether a row meets the conditions in the docstring of this file."""
    owned = row["num_features_owned"] == row["num_features"]
    if target == "resid_mlp":
        apart = row["distinct"] == row["within_margin"] == row["num_features"]
        read = row["cosine_w_in"] >= 0.99 and abs(row["norm_ratio_w_in"] - 1) <= 0.02
        sparse, scrubbed, anti = (
            row[f"scrub_{kind}"] for kind in ("topk", "scrubbed", "antiscrubbed")
        )
        return bool(apart and read and scrubbed <= 1.5 * sparse and anti >= 10 * scrubbed)
    return bool(
        owned and row["mmcs_one_to_one"] >= 0.999 and abs(row["ml2r_one_to_one"] - 1) <= 0.01
    )


def summary(rows: list[dict[str, Any]]) -> Table:
    """A column per config with its changes: mean (min to max) over seeds, failures included."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        heading = "\n".join((row["config"], *(f"{k}={v}" for k, v in row["changes"].items())))
        groups.setdefault(heading, []).append(row)
    table = Table("mean\n(min to max)", *groups)
    table.add_row("seeds", *(str(len(group)) for group in groups.values()))
    succeed = (str(sum(row["success"] for row in group)) for group in groups.values())
    table.add_row("succeed", *succeed)
    for key in (*SHOWN, *SCRUBBED, "seconds"):
        each = [[row[key] for row in group if key in row] for group in groups.values()]
        if any(each):
            table.add_row(
                key,
                *(f"{np.mean(v):.4g}\n({min(v):.4g} to {max(v):.4g})" if v else "" for v in each),
            )
    return table


def recipe_and_target(name: str) -> tuple[str, str]:
    """The kind of settings, one of RECIPES, and the target.

    E.g. ("recipe", "tms,5-2") of "recipe.py:tms,5-2".
    """
    file, _, variant = name.partition(":")
    if file != "recipe.py":
        return "paper's settings", ",".join(filter(None, (file.removesuffix(".py"), variant)))
    target = ",".join(part for part in variant.split(",") if part not in ("told", "learned"))
    return "recipe with learned masks" if "learned" in variant.split(",") else "recipe", target


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """A figure with a panel per target and a point per seed, filled where the seed succeeds.

    Grey is the region in which the two drawn measures allow success.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if not row["changes"] and "error" not in row]
    if not rows:
        raise SystemExit("the figure shows seeds without --set changes or errors: there are none.")
    names = list(dict.fromkeys(recipe_and_target(row["config"])[1] for row in rows))
    names.sort(key=lambda name: not name.startswith("tms"))
    columns = min(4, len(names))
    height = -(-len(names) // columns)
    size = (3 * columns, 3 * height + 0.4)
    figure, axes = plt.subplots(height, columns, figsize=size, layout="constrained", squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        draw_target(axis, name, rows)
    for axis in axes.flat[len(names) :]:
        axis.remove()
    handles = [
        plt.Line2D([], [], marker="o", linestyle="", color=colour, label=kind)
        for kind, colour in RECIPES.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)


def draw_target(axis: Any, name: str, rows: list[dict[str, Any]]) -> None:
    """One panel of the figure: the seeds of a target, by all RECIPES."""
    tms, counts = name.startswith("tms"), []
    limits = SHOWN_TMS if tms else SHOWN_RESID_MLP
    axis.set(xscale="log", yscale="log", xlim=limits[0], ylim=limits[1])
    for kind, colour in RECIPES.items():
        here = [row for row in rows if recipe_and_target(row["config"]) == (kind, name)]
        x = [1 - row["mmcs_one_to_one"] if tms else row["minimality_topk"] for row in here]
        y = [abs(row["ml2r_one_to_one"] - 1) if tms else row["scrub_scrubbed"] for row in here]
        x, y = (np.clip(values, *shown) for values, shown in zip((x, y), limits, strict=True))
        look = {"s": 26, "edgecolors": colour, "linewidths": 1.2, "zorder": 3, "clip_on": False}
        faces = [colour if row["success"] else "none" for row in here]
        axis.scatter(x, y, facecolors=faces, label=kind, **look)
        counts += [f"{sum(row['success'] for row in here)} of {len(here)}"] if here else []
    axis.set_title(f"{name}\n{', '.join(counts)} succeed", fontsize=9)
    axis.set_xlabel("1 - MMCS" if tms else "sparse error")
    axis.set_ylabel("|ML2R - 1|" if tms else "scrubbed error")
    (left, right), (lowest, _) = limits
    edge, allowed = ([left, right], [1.5 * left, 1.5 * right])
    if tms:
        edge, allowed = ([left, 1e-3], [1e-2, 1e-2])
    axis.fill_between(edge, lowest, allowed, color="0.92", zorder=0)


def write_csv(rows: list[dict[str, Any]], path: str) -> None:
    """The fields KEPT of all rows, numbers with six digits."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return f"{value:.6g}"
        return json.dumps(value) if isinstance(value, dict) else value

    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, KEPT, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: short(row[key]) for key in KEPT if key in row} for row in rows)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", help="a file of configs/ with its argument")
    add("--seeds", default="0:20", help="first:end")
    add("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="config fields to change")
    add("--json", default=None, help="file that rows are added to")
    add("--summary", nargs="*", default=[], metavar="FILE", help="only print their table")
    add("--csv", default=None, help="file that the rows of the --summary are written to")
    add("--figure", default=None, help="picture of the rows of the --summary")
    return parser


def run_all(
    config: str, seeds: range, changes: dict[str, Any], file: Path | None, console: Console
) -> list[dict[str, Any]]:
    """Runs the seeds that the file does not hold yet, and writes it after each.

    Returns:
      All rows of the file, with the new ones.
    """
    rows = json.loads(file.read_text()) if file is not None and file.exists() else []
    done = {(row["config"], row["seed"], json.dumps(row["changes"])) for row in rows}
    for seed in seeds:
        if (config, seed, json.dumps(changes)) in done:
            continue
        rows.append(run(config, seed, changes))
        console.print(
            {key: rows[-1].get(key) for key in ("seed", "success", *SHOWN, "seconds", "error")}
        )
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(rows, indent=1))
    return rows


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 240)
    if options.summary:
        rows = [row for file in options.summary for row in json.loads(Path(file).read_text())]
        console.print(summary(rows))
        if options.csv:
            write_csv(rows, options.csv)
        if options.figure:
            draw(rows, options.figure)
        return
    if options.config is None:
        parser.error("give a --config, or files for a --summary.")
    changes = {
        field: ast.literal_eval(value)
        for field, value in (entry.split("=", 1) for entry in options.set)
    }
    file = None if options.json is None else Path(options.json)
    seeds = range(*map(int, options.seeds.split(":")))
    console.print(summary(run_all(options.config, seeds, changes, file, console)))


if __name__ == "__main__":
    main()
