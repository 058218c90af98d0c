"""How every figure looks: size, colours, caption.

Only matplotlib's object-oriented interface is used: no global state, no display.
"""

from __future__ import annotations

import io
import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

DPI = 150
# Okabe and Ito's palette: told apart with any colour vision.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
GREY, FAINT = "#999999", "#DDDDDD"
PALETTE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK)
MAGNITUDE = "cividis"
SIGNED = "RdBu_r"


class Drawn(Figure):
    """A figure that a notebook shows as it is, without pyplot."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png")
        return content.getvalue()


def new_figure(width: float, height: float, caption: str) -> Figure:
    """An empty figure with a caption under it.

    Args:
      width, height: in inches.
      caption: what the figure shows, and what a good decomposition looks like.
    """
    figure = Drawn(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.supxlabel(textwrap.fill(caption, int(width * 15)), fontsize=8, color="#333333")
    return figure


def tidy(axes: Axes, *, xlabel: str = "", ylabel: str = "", title: str = "") -> Axes:
    """Labels, and no frame at the top and on the right."""
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.set_title(title, fontsize=10)
    axes.tick_params(which="both", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def bare(axes: Axes, title: str = "") -> Axes:
    """A small panel of a grid: a title and no ticks."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=7, pad=2)
    return axes


def corner(axes: Axes, xlabel: str, ylabel: str) -> None:
    """Labels of the axes, for the first panel of a grid: they hold for all."""
    axes.set_xlabel(xlabel, fontsize=6)
    axes.set_ylabel(ylabel, fontsize=6)


def heat(
    axes: Axes, matrix: np.ndarray, *, signed: bool = False, limit: float | None = None
) -> AxesImage:
    """A heat map. Colours run from 0, or if signed from -limit, up to limit.

    NaN is left white. Neighbouring cells are never blended.

    Args:
      limit: None takes the largest magnitude in the matrix.
    """
    top = limit or float(np.abs(matrix[np.isfinite(matrix)]).max(initial=0.0)) or 1.0
    bottom, cmap = (-top, SIGNED) if signed else (0.0, MAGNITUDE)
    return axes.imshow(
        matrix, cmap=cmap, vmin=bottom, vmax=top, aspect="auto", interpolation="nearest"
    )


def colorbar(figure: Figure, image: AxesImage, axes: Any, label: str) -> None:
    """A colour bar beside `axes` (one, or all that share the scale)."""
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def legend(axes: Axes, **options: Any) -> None:
    """A legend without a frame."""
    axes.legend(fontsize=8, frameon=False, **options)
