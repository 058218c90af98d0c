"""Tables for the terminal. Each function returns a `rich.table.Table`; nothing is printed here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, PyTree
from rich.table import Table

from apd_jax import components as components_lib
from apd_jax.components import Components
from apd_jax.evaluation.general import Grid

# metric -> (what it says, what good looks like), in the order of the table
_RESULTS = {
    "mmcs": ("MMCS, best cosine per feature", "1"),
    "ml2r": ("ML2R, norm ratio of that component", "1"),
    "mmcs_one_to_one": ("MMCS, no component twice", "1"),
    "ml2r_one_to_one": ("ML2R, no component twice", "1"),
    "num_features_owned": ("features with a component of their own", "all"),
    "top1_share": ("share of features that one component serves", "1"),
    "faithfulness": ("faithfulness loss", "0"),
    "relative_parameter_error": ("|target - sum|² / |target|²", "0"),
    "minimality_topk": ("distance to the target, mask of training", "0"),
    "minimality_gates": ("distance to the target, gates of training as they are", "0"),
    "minimality_stochastic": ("distance to the target, the others times U(0, 1)", "0"),
    "minimality_top1": ("distance to the target, top-1", "0"),
    "minimality_all": ("distance to the target, all components", "0"),
    "minimality_none": ("distance to the target, no component", "large"),
    "hidden_reconstruction": ("hidden reconstruction loss", "0"),
    "simplicity": ("simplicity loss", "small"),
    "scrub_topk": ("scrubbing: batch top-k", "0"),
    "scrub_scrubbed": ("scrubbing: scrubbed", "near top-k"),
    "scrub_antiscrubbed": ("scrubbing: antiscrubbed", "large"),
    "scrub_random": ("scrubbing: random mask", ""),
    "scrub_zero": ("scrubbing: output 0", ""),
    "scrub_monosemantic": ("scrubbing: monosemantic baseline", "above scrubbed"),
    "num_alive_components": ("alive components", ""),
    "num_dead_components": ("dead components", ""),
    "total_rank": ("effective rank of the alive components, summed", "small"),
    "mean_active_components": ("active components per example", "k"),
}
# What evaluation.json holds beside metrics.
_PROVENANCE = ("seed", "step", "num_devices", "minutes_decomposition", "peak_rss_gib")
# {count: the metric that says of how many}
_OUT_OF = {"num_features_owned": "num_features", "num_alive_components": "num_components"}


def results_table(
    metrics: Mapping[str, float | int],
    minutes: float | None = None,
    *,
    labels: Mapping[str, str] | None = None,
    title: str = "Results",
) -> Table:
    """The metrics of an evaluation, one per row, with the value of a good decomposition.

    Metrics that are neither in `_RESULTS` nor in `labels` are left out.

    Args:
      metrics: `Evaluation.metrics`.
      labels: {metric: what it says, and its value for a good decomposition}, of the metrics that
        only this target has. They come first.
      minutes: wall-clock time of the run.
    """
    table = Table(title=title)
    table.add_column("metric", overflow="fold")
    table.add_column("value", justify="right", overflow="fold")
    table.add_column("good", style="dim", overflow="fold")
    for name, label in (labels or {}).items():
        table.add_row(label, number(metrics[name]), "")
    for row in result_rows(metrics):
        table.add_row(*row)
    if minutes is not None:
        table.add_row("minutes", f"{minutes:.1f}", "")
    return table


def result_rows(metrics: Mapping[str, Any], *, others: bool = False) -> list[tuple[str, str, str]]:
    """(what it says, value, value of a good decomposition) of the metrics in `_RESULTS`, in order.

    Args:
      others: put the numbers that only this target has first, by their names.
    """
    rows = []
    if others:
        known = {*_RESULTS, *_OUT_OF.values(), *_PROVENANCE}
        rows = [
            (name.replace("_", " "), number(value), "")
            for name, value in metrics.items()
            if name not in known and isinstance(value, int | float)
        ]
    for name, (label, good) in _RESULTS.items():
        if name in metrics:
            whole = f" of {number(metrics[_OUT_OF[name]])}" if name in _OUT_OF else ""
            rows.append((label, number(metrics[name]) + whole, good))
    return rows


def components_tables(
    components: Components,
    firing_rates: Float[np.ndarray, " C"] | None,
    feature_of_component: Int[np.ndarray, " C"] | None,
    width: int,
) -> list[Table]:
    """One row per component: norm and effective rank in every leaf, firing rate, served feature.

    The firing rate is a share of examples. It and the feature are left out where either is None.
    As many tables as it takes for all leaves to fit into a terminal of this width.

    Cost: one SVD per component and leaf.
    """
    norms = {
        name: np.sqrt(np.maximum(squares, 0))
        for name, squares in jax.device_get(components_lib.squared_norms(components)).items()
    }
    ranks = jax.device_get(components_lib.effective_ranks(components))
    cells = {n: [f"{x:.3g} ({r})" for x, r in zip(norms[n], ranks[n], strict=True)] for n in norms}
    known = firing_rates is not None and feature_of_component is not None
    widest = max([len("norm (rank)"), *(len(cell) for column in cells.values() for cell in column)])
    room = width - len("| component |") - (len(" firing rate | feature |") if known else 0)
    per_table = max(1, room // (widest + len(" | ")))
    names, tables = list(norms), []
    for first in range(0, len(names), per_table):
        shown = names[first : first + per_table]
        table = Table(title=f"{components.num_components} components")
        for head in ("component", *(f"{name}\nnorm (rank)" for name in shown)):
            table.add_column(head, justify="right", overflow="fold")
        for head in ("firing rate", "feature") if known else ():
            table.add_column(head, justify="right", overflow="fold")
        for c in range(components.num_components):
            row, style = [cells[name][c] for name in shown], None
            if firing_rates is not None and feature_of_component is not None:
                alive = feature_of_component[c] >= 0
                served = str(feature_of_component[c]) if alive else "dead"
                row, style = [*row, f"{firing_rates[c]:.4f}", served], None if alive else "dim"
            table.add_row(str(c), *row, style=style)
        tables.append(table)
    return tables


def grid_table(grid: Grid) -> Table:
    """A table of an evaluation."""
    table = Table(title=grid.title)
    for i, column in enumerate(grid.columns):
        table.add_column(column, justify="right" if i else "left")
    for row in grid.rows:
        table.add_row(*row)
    return table


def tree_table(tree: PyTree, *, title: str = "Leaves") -> Table:
    """Dotted path, shape, dtype and number of entries of every leaf, and the total of entries.

    Leaves may be arrays or `jax.ShapeDtypeStruct`.
    """
    table = Table(title=title, show_footer=True)
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    total = f"{sum(leaf.size for _, leaf in leaves):,}"
    table.add_column("path", footer="total", overflow="fold")
    table.add_column("shape", overflow="fold")
    table.add_column("dtype", overflow="fold")
    table.add_column("entries", justify="right", footer=total, overflow="fold")
    for path, leaf in leaves:
        table.add_row(
            components_lib.path_name(path),
            "x".join(map(str, leaf.shape)) or "scalar",
            str(leaf.dtype),
            f"{leaf.size:,}",
        )
    return table


def number(value: float | int) -> str:
    """Whole numbers as they are, others with four significant digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
