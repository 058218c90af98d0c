"""Figures of the weights that serve each feature.

In the target, in the sum of the components, and in each component, side by side.

Shapes: C components, F features, n neurons, d the length of a feature's weight vector W_f;
P_{c,f} is component c's part of W_f.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from apd_jax.report import style

MAX_PANELS = 48
LARGEST_PANEL = 1000  # entries; a larger matrix is unreadable as a small panel
DEAD, ALWAYS_ON = -1, -2  # entries of feature_of_component for components that serve no feature
NUM_SHOWN = 10  # features whose neurons are drawn one by one


def component_order(
    feature_of_component: Int[np.ndarray, " C"], attributions: Float[np.ndarray, "F C"]
) -> Int[np.ndarray, " C"]:
    """Order in which components are drawn: by the feature they serve, then DEAD, then ALWAYS_ON.

    Within one feature, and within DEAD and ALWAYS_ON, the larger attribution comes first.
    """
    served_last = np.minimum(feature_of_component, 0)
    return np.lexsort((-attributions.max(axis=0), feature_of_component, -served_last))


def columns(
    target: Float[np.ndarray, "F d"],
    summed: Float[np.ndarray, "F d"],
    components: Float[np.ndarray, "C F d"],
    order: Int[np.ndarray, " C"],
    feature_of_component: Int[np.ndarray, " C"],
) -> Figure:
    """The figure that suits the sizes.

    `polygons` for d = 2, `heat_maps` for up to LARGEST_PANEL weights, else `difference`.
    """
    if target.shape[1] == 2:
        return polygons(target, summed, components, order, feature_of_component)
    if target.size <= LARGEST_PANEL:
        return heat_maps(target, summed, components, order, feature_of_component)
    return difference(target, summed)


def polygons(
    target: Float[np.ndarray, "F 2"],
    summed: Float[np.ndarray, "F 2"],
    components: Float[np.ndarray, "C F 2"],
    order: Int[np.ndarray, " C"],
    feature_of_component: Int[np.ndarray, " C"],
) -> Figure:
    """The W_f of a network with two hidden dimensions, as lines in the plane."""
    shown = order[:MAX_PANELS]
    caption = (
        "The weights of every feature as a line in the two hidden dimensions, one colour per "
        "feature. Open circles mark the ends of the target's lines. Good: the sum reaches all "
        "circles, and each component holds a single line that reaches its circle."
        + _left_out(order, shown)
    )
    figure, panels = _grid(len(shown) + 2, min(7, len(shown) + 2), (1.7, 1.7), caption)
    limit = (
        1.15 * max(float(np.linalg.norm(matrix, axis=1).max()) for matrix in (target, summed))
        or 1.0
    )
    for axes, matrix, title in zip(
        panels,
        [target, summed, *components[shown]],
        _titles(shown, feature_of_component),
        strict=True,
    ):
        for feature, (x, y) in enumerate(matrix):
            color = style.PALETTE[feature % len(style.PALETTE)]
            axes.plot([0, x], [0, y], "-", color=color, linewidth=1.5)
            axes.plot(
                *target[feature],
                "o",
                markerfacecolor="none",
                markeredgecolor=color,
                markersize=5,
                markeredgewidth=0.8,
            )
            axes.plot(x, y, "o", color=color, markersize=2.5)
        axes.axhline(0, color=style.FAINT, linewidth=0.6, zorder=0)
        axes.axvline(0, color=style.FAINT, linewidth=0.6, zorder=0)
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        style.bare(axes, title)
    style.corner(panels[0], "hidden dimension 0", "hidden dimension 1")
    return figure


def heat_maps(
    target: Float[np.ndarray, "F d"],
    summed: Float[np.ndarray, "F d"],
    components: Float[np.ndarray, "C F d"],
    order: Int[np.ndarray, " C"],
    feature_of_component: Int[np.ndarray, " C"],
) -> Figure:
    """Heat maps [F, d] of the target, the sum and the components, all on the target's scale."""
    shown = order[:MAX_PANELS]
    caption = (
        "Weights of every feature (rows) over the hidden dimensions or neurons (columns), on one "
        "scale. Good: the sum equals the target, and each component is a single row, that of its "
        "feature." + _left_out(order, shown)
    )
    figure, panels = _grid(len(shown) + 2, min(10, len(shown) + 2), (1.1, 1.54), caption)
    _draw_heat(
        figure, panels, [target, summed, *components[shown]], _titles(shown, feature_of_component)
    )
    return figure


def difference(target: Float[np.ndarray, "F d"], summed: Float[np.ndarray, "F d"]) -> Figure:
    """Heat maps of the target, of the sum, and of their difference.

    For networks whose components are too large to show one by one.
    """
    caption = (
        "Weights of every feature (rows) over the hidden dimensions or neurons (columns), on one "
        "scale. Good: the sum equals the target, and the difference is blank."
    )
    figure, panels = _grid(3, 3, (3.5, 3.5), caption)
    _draw_heat(
        figure,
        panels,
        [target, summed, summed - target],
        ["target", "sum of components", "sum - target"],
    )
    return figure


def _draw_heat(
    figure: Figure, panels: list[Axes], matrices: list[np.ndarray], titles: list[str]
) -> None:
    limit = float(np.abs(matrices[0]).max())
    images = [
        style.heat(axes, matrix, signed=True, limit=limit)
        for axes, matrix in zip(panels, matrices, strict=True)
    ]
    for axes, title in zip(panels, titles, strict=True):
        style.bare(axes, title)
    style.corner(panels[0], "dimension", "feature")
    style.colorbar(figure, images[0], panels, "weight")


def neuron_contributions(
    target: Float[np.ndarray, "F n"],
    summed: Float[np.ndarray, "F n"],
    components: Float[np.ndarray, "C F n"],
    component_of_feature: Int[np.ndarray, " F"],
) -> Figure:
    """What each neuron carries from a feature's input to its output.

    In the target, in the sum of components, and in the feature's own component. The entries are
    the products of `targets.resid_mlp.neuron_contributions`.
    """
    caption = (
        "Neuron contributions: weight from a feature into a neuron times weight from the neuron "
        "back to the feature. Every dot is a neuron, the larger ones numbered. Good: the feature's "
        "own component shows the same neurons as the target, and both scatter plots lie on the "
        "diagonal."
    )
    figure = style.new_figure(11.0, 6.2, caption)
    panels = figure.subplot_mosaic([["target", "sum"], ["own", "scatter"]], width_ratios=[2.4, 1])
    own = components[component_of_feature, np.arange(len(target))]
    few = slice(0, NUM_SHOWN)
    # Only dots above this are numbered: the numbers of the many small ones would overlap.
    labelled = 0.35 * np.abs(target[few]).max()
    panels["own"].sharey(panels["target"])
    for axes, matrix, title in (
        (panels["target"], target[few], "Target"),
        (panels["own"], own[few], "Own component of each feature"),
    ):
        for feature, row in enumerate(matrix):
            axes.scatter(
                np.full(len(row), feature), row, s=8, c=np.arange(len(row)), cmap="viridis"
            )
            for neuron in np.flatnonzero(np.abs(row) > labelled):
                axes.annotate(str(neuron), (feature + 0.08, row[neuron]), fontsize=6, va="center")
        axes.axhline(0, color=style.FAINT, linewidth=0.6, zorder=0)
        axes.set_xticks(range(len(matrix)))
        style.tidy(axes, xlabel="feature", ylabel="neuron contribution", title=title)
    for axes, matrix, what in (
        (panels["sum"], summed, "sum of components"),
        (panels["scatter"], own, "own component"),
    ):
        _against(axes, target, matrix)
        style.tidy(axes, xlabel="target", ylabel=what, title=f"All features: {what}")
    return figure


def _against(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    axes.plot(ends, ends, color=style.GREY, linewidth=0.8)
    axes.plot(x.ravel(), y.ravel(), ".", color=style.BLUE, markersize=2, alpha=0.5, rasterized=True)


def _titles(shown: np.ndarray, feature_of_component: np.ndarray) -> list[str]:
    names = {DEAD: "dead", ALWAYS_ON: "always on"}
    served = [
        f"{c}: {names.get(int(f), f'feature {f}')}"
        for c, f in zip(shown, feature_of_component[shown], strict=True)
    ]
    return ["target", "sum", *served]


def _left_out(order: np.ndarray, shown: np.ndarray) -> str:
    if len(shown) == len(order):
        return ""
    return f" The first {len(shown)} of {len(order)} components are shown."


def _grid(
    count: int, across: int, size: tuple[float, float], caption: str
) -> tuple[Figure, list[Axes]]:
    """`count` equal panels of a size in inches, `across` of them in a row."""
    rows, (width, height) = -(-count // across), size
    figure = style.new_figure(max(across * width + 0.8, 6.0), rows * (height + 0.25) + 0.7, caption)
    panels = list(figure.subplots(rows, across, squeeze=False).flat)
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]
