"""Cross-entropy against sparsity, of decompositions of one language model at several prices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from apd_jax.evaluation.general import Grid
from apd_jax.report import style

_LINES = {  # of the passes: label, colour
    "rounded_0": ("gates rounded at 0", style.BLUE),
    "gates": ("gates as they are", style.GREEN),
    "stochastic": ("the rest times U(0, 1)", style.ORANGE),
    "adversary": ("adversary", style.VERMILION),
}
_CAPTION = (
    "What a decomposition costs on {text}, ΔCE, against how much of it is active per token; "
    "each point is trained on from the one before, at the price beside it, the first (open) is "
    "the run itself. Good: low and to the left."
)


def figure(points: Sequence[Mapping[str, Any]], text: str) -> Figure:
    """ΔCE of some passes against L0 in rank-one pieces, gates rounded at 0.

    Args:
      points: what `evaluation.language.evaluate` says of each, and its `price`.
      text: what they were evaluated on, in words.
    """
    drawn = style.new_figure(8.0, 5.0, _CAPTION.format(text=text))
    axes = drawn.subplots()
    x = [point["l0_pieces_0"] for point in points]
    for name, (label, color) in _LINES.items():
        y = [point.get(f"delta_ce_{name}") for point in points]
        if None in y:  # gates that only know on and off
            continue
        axes.plot(x, y, "-o", color=color, label=label, linewidth=1.2, markersize=4)
        axes.plot(x[:1], y[:1], "o", color="white", markeredgecolor=color, markersize=6)
    heights = [point["delta_ce_gates"] for point in points]
    for point, here, height in zip(points, x, heights, strict=True):
        offset = {"xytext": (4, 4), "textcoords": "offset points"}
        axes.annotate(f"{point['price']:g}", (here, height), fontsize=7, **offset)
    if max(x) > 3 * min(x) > 0:
        axes.set_xscale("log")
    axes.axhline(0, color=style.GREY, linewidth=0.8)
    style.tidy(axes, xlabel="rank-one pieces active per token", ylabel="ΔCE, nats per token")
    style.legend(axes)
    return drawn


def grid(points: Sequence[Mapping[str, Any]], text: str) -> Grid:
    """The same as a table, a row for each point."""
    columns = ("rounded_0", "gates", "unmasked", "stochastic", "adversary")
    rows = []
    for point in points:
        deltas = [point.get(f"delta_ce_{name}") for name in columns]
        rows.append(
            (
                f"{point['price']:g}",
                str(point["step"]),
                f"{point['l0_components_0']:.1f}",
                f"{point['l0_pieces_0']:.1f}",
                str(point["num_alive_components"]),
                *("" if value is None else f"{value:+.3f}" for value in deltas),
            )
        )
    return Grid(
        title=f"ΔCE in nats on {text}, by price; components and pieces active per token",
        columns=("price", "step", "components", "pieces", "alive", *map(_heading, columns)),
        rows=tuple(rows),
    )


def _heading(name: str) -> str:
    return {"rounded_0": "rounded at 0"}.get(name, name)
