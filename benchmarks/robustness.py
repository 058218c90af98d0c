r"""How far a setting can be moved before the truth is lost, by the paper's recipe and by ours.

    python benchmarks/robustness.py --json runs/recovery/robustness.json [--seeds 0:5] \
        [--figure docs/images/robustness.png]

The target is TMS 5-2. One setting at a time is multiplied by 0.1, 0.32, 1, 3.2 and 10 (integers
are rounded, to at least 1). Two bars count the seeds:
  features found  every feature has a component of its own, and the mean cosine one to one is at
                  least 0.99; lengths do not matter
  success         as in `benchmarks/recovery.py`: MMCS >= 0.999 and ML2R = 1 ± 0.01
The two recipes name their settings differently; FIELDS says which fields have the same meaning.
Rows that the file already holds are not run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import recovery

from apd_jax.recipe import stages as recipe

FACTORS = (0.1, 10**-0.5, 1.0, 10**0.5, 10.0)
# `told`: k is set, not estimated, so that it can be multiplied.
PAPER, OURS = "tms.py:5-2", "recipe.py:tms,5-2,told"
# {setting: (fields of PAPER, fields of OURS)}
FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "k": (("apd.topk",), ("apd.topk",)),
    "simplicity": (
        ("apd.simplicity_coeff",),
        tuple(
            f"recipe.{s}.{f}"
            for s in recipe.STAGES[:3]
            for f in ("simplicity_coeff", "simplicity_coeff_final")
        ),
    ),
    "minimality": (("apd.minimality_coeff",), ("recipe.minimality_coeff",)),
    "learning rate": (
        ("apd.learning_rate",),
        tuple(f"recipe.{s}.learning_rate" for s in recipe.STAGES),
    ),
    "C": (("apd.num_components",), ("apd.num_components",)),
    "rank": (("apd.rank",), ("apd.rank",)),
}


def changed(name: str, fields: tuple[str, ...], factor: float) -> dict[str, Any]:
    """{field of the config `name`: its value times the factor}."""
    flat = recovery.experiment(name, 0, {}).to_dict()
    values = {}
    for field in fields:
        value: Any = flat
        for part in field.split("."):
            value = value[part]
        values[field] = max(1, round(value * factor)) if isinstance(value, int) else value * factor
    return values


def found(row: dict[str, Any]) -> bool:
    """Whether all features are found: see the docstring of this file."""
    return (
        "error" not in row
        and row["num_features_owned"] == row["num_features"]
        and row["mmcs_one_to_one"] >= 0.99
    )


BARS = {"features found": found, "success": lambda row: row["success"]}


def rates(
    rows: list[dict[str, Any]], met: Callable[[dict[str, Any]], bool]
) -> dict[str, dict[str, list[float]]]:
    """{setting: {config: share of seeds that meet the bar, by factor}}."""

    def share(*key: Any) -> float:
        here = [met(row) for row in rows if (row["config"], row["setting"], row["factor"]) == key]
        return float(np.mean(here)) if here else float("nan")

    return {
        setting: {name: [share(name, setting, f) for f in FACTORS] for name in (PAPER, OURS)}
        for setting in FIELDS
    }


def draw(shares: dict[str, dict[str, dict[str, list[float]]]], path: str) -> None:
    """A panel per setting: the share of seeds that meet a bar, over the factor.

    Colours are the recipes. Filled markers are `success`, open ones `features found`.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, 3, figsize=(9.5, 5.5), sharex=True, sharey=True, layout="constrained"
    )
    for axis, setting in zip(axes.flat, FIELDS, strict=True):
        for name, label, style in ((PAPER, "paper's recipe", "C1o"), (OURS, "our recipe", "C0s")):
            for bar, by_setting in shares.items():
                strict = bar == "success"
                look = {
                    "linestyle": "-" if strict else "--",
                    "markerfacecolor": None if strict else "white",
                    "markersize": 5 if strict else 8,
                }
                axis.semilogx(
                    FACTORS,
                    by_setting[setting][name],
                    style,
                    label=f"{label}: {bar}",
                    zorder=3 if strict else 2,
                    **look,
                )
        axis.set_title(setting)
        axis.set_ylim(-0.05, 1.05)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False
    )
    figure.supxlabel("factor on the shipped value")
    figure.supylabel("share of seeds")
    figure.savefig(path, dpi=120)


def run_all(file: Path, seeds: range) -> list[dict[str, Any]]:
    """Runs what the file does not hold yet, and writes it after each run.

    Returns:
      All rows of the file, with the new ones.
    """
    rows = json.loads(file.read_text()) if file.exists() else []
    done = {(row["config"], row["setting"], row["factor"], row["seed"]): row for row in rows}
    wanted = [
        (name, setting, factor, seed, fields)
        for seed in seeds
        for setting, both in FIELDS.items()
        for name, fields in zip((PAPER, OURS), both, strict=True)
        for factor in FACTORS
    ]
    for name, setting, factor, seed, fields in wanted:
        if (name, setting, factor, seed) in done:
            continue
        # At factor 1 all settings are the shipped ones: one run serves for all.
        same = [(name, other, factor, seed) for other in FIELDS if factor == 1]
        shipped = [done[key] for key in same if key in done]
        row = shipped[0] if shipped else recovery.run(name, seed, changed(name, fields, factor))
        row = row | {"setting": setting, "factor": factor}
        rows.append(row)
        done[name, setting, factor, seed] = row
        met = [bar for bar, met in BARS.items() if met(row)]
        outcome = ", ".join(met) or row.get("error", "lost")
        print(setting, name, f"{factor:.2g}", seed, outcome, flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows, indent=1))
    return rows


def print_shares(by_setting: dict[str, dict[str, list[float]]]) -> None:
    """A line per setting, and the mean of each recipe's shares over all settings and factors."""
    for setting, by_config in by_setting.items():
        each = (
            f"{name}: " + " ".join(f"{share:.2f}" for share in values)
            for name, values in by_config.items()
        )
        print(f"{setting:15}", *each, sep="   ")
    areas = {
        name: float(np.nanmean([by_config[name] for by_config in by_setting.values()]))
        for name in (PAPER, OURS)
    }
    ratio = f"ratio {areas[OURS] / areas[PAPER]:.2f}" if areas[PAPER] else "no ratio to 0"
    print(f"mean share: {areas}, {ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", required=True)
    parser.add_argument("--seeds", default="0:5", help="first:end")
    parser.add_argument("--figure", default=None)
    options = parser.parse_args()
    rows = run_all(Path(options.json), range(*map(int, options.seeds.split(":"))))
    shares = {bar: rates(rows, met) for bar, met in BARS.items()}
    for bar, by_setting in shares.items():
        print(bar)
        print_shares(by_setting)
    if options.figure:
        draw(shares, options.figure)


if __name__ == "__main__":
    main()
