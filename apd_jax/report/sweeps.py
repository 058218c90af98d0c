"""Figures of a sweep beside the maps that `figures.panel` draws. Shapes: R runs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure

from apd_jax.report import style
from apd_jax.report.figures import panel


def criteria(
    values: Mapping[str, Float[np.ndarray, " R"]],
    meanings: Mapping[str, str],
    mmcs: Float[np.ndarray, " R"],
    success: Bool[np.ndarray, " R"],
) -> Figure:
    """Every run's criteria against its MMCS.

    Args:
      values, meanings: {criterion: of every run}, {criterion: what it is, with its unit}.
      success: whether every feature has a component of its own.
    """
    caption = (
        "Every dot is a run; runs without a finite criterion are left out. Good: the lower the criterion (left), the higher the MMCS, and "
        "no failure (orange) to the left of the successes (blue): then the criterion finds the good runs without knowing the truth."
    )
    figure = style.new_figure(10.0, 7.0, caption)
    grid = figure.subplots(-(-len(values) // 2), 2, sharey=True, squeeze=False).ravel()
    for axes, (name, of_run) in zip(grid, values.items(), strict=False):
        finite = np.isfinite(of_run) & np.isfinite(mmcs)
        for label, color, marker, which in (("failure", style.VERMILION, "x", ~success), ("success", style.BLUE, "o", success)):
            shown = finite & which
            axes.plot(of_run[shown], mmcs[shown], marker, color=color, markersize=4, alpha=0.7, label=f"{label} ({shown.sum()})")
        if (of_run[finite] > 0).all() and finite.any():
            axes.set_xscale("log")
        style.tidy(axes, xlabel=meanings[name], ylabel="MMCS (1 is the truth)", title=name.replace("_", " "))
        style.legend(axes)
    for axes in grid[len(values) :]:
        axes.set_visible(False)
    return figure


__all__ = ["criteria", "panel"]
