"""Figures of a sweep, beside the maps that `figures.panel` draws.

Shapes: R runs, m seeds.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from apd_jax.report import style
from apd_jax.report.figures import panel


def criteria(
    values: Mapping[str, Float[np.ndarray, " R"]],
    meanings: Mapping[str, str],
    mmcs: Float[np.ndarray, " R"],
    success: Bool[np.ndarray, " R"],
) -> Figure:
    """Every run's criteria against its MMCS, one panel per criterion.

    Args:
      values: {criterion: its value for every run}.
      meanings: {criterion: what it is, with its unit}.
      success: whether every feature has a component of its own.
    """
    caption = (
        "Every dot is a run; runs whose criterion is not finite are left out. Good: the lower the "
        "criterion, the higher the MMCS, and no failure (orange) lies to the left of the successes "
        "(blue). Then the criterion finds the good runs without knowing the truth."
    )
    figure = style.new_figure(10.0, 7.0, caption)
    grid = figure.subplots(-(-len(values) // 2), 2, sharey=True, squeeze=False).ravel()
    for axes, (name, of_run) in zip(grid, values.items(), strict=False):
        finite = np.isfinite(of_run) & np.isfinite(mmcs)
        for label, color, marker, which in (
            ("failure", style.VERMILION, "x", ~success),
            ("success", style.BLUE, "o", success),
        ):
            shown = finite & which
            axes.plot(
                of_run[shown],
                mmcs[shown],
                marker,
                color=color,
                markersize=4,
                alpha=0.7,
                label=f"{label} ({shown.sum()})",
            )
        if finite.any() and of_run[finite].max() > 10 * of_run[finite].min() > 0:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        style.tidy(
            axes,
            xlabel=meanings[name],
            ylabel="MMCS (1 is the truth)",
            title=name.replace("_", " "),
        )
        style.legend(axes)
    for axes in grid[len(values) :]:
        axes.set_visible(False)
    return figure


def picks(rates: Mapping[str, Float[np.ndarray, " m"]], num_settings: int) -> Figure:
    """Success rate of the chosen run against the number of seeds to choose among.

    Args:
      rates: {name: rate with 1, 2, ..., m seeds}, for every criterion, "chance" and
        "best possible".
    """
    m = len(rates["chance"])
    caption = (
        f"A criterion chooses one of n seeds, n from 1 to {m}. Shown is how often the chosen one "
        f"succeeds, mean over {num_settings} settings. Good: far above chance, and equal to the "
        "best possible, which takes a successful seed wherever there is one."
    )
    figure = style.new_figure(8.0, 4.6, caption)
    axes, x = figure.subplots(), np.arange(1, m + 1)
    axes.plot(
        x,
        rates["best possible"],
        color=style.FAINT,
        linewidth=9,
        solid_capstyle="round",
        label="best possible",
    )
    axes.plot(x, rates["chance"], color=style.GREY, linestyle="--", label="chance")
    named = {name: rate for name, rate in rates.items() if name not in ("chance", "best possible")}
    for i, (name, rate) in enumerate(named.items()):
        width = 1.5 * (len(named) - i)  # ever narrower, because the lines may coincide
        axes.plot(
            x,
            rate,
            color=style.PALETTE[i % len(style.PALETTE)],
            linewidth=width,
            alpha=0.8,
            label=name.replace("_", " "),
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, 1.02)
    style.tidy(
        axes,
        xlabel="seeds to choose among",
        ylabel="success rate of the chosen",
        title="How well the criteria pick",
    )
    style.legend(axes)
    return figure


__all__ = ["criteria", "panel", "picks"]
