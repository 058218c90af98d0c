"""The figures of one decomposition, as in the papers.

One function per figure, from arrays to a matplotlib Figure; `save_all` draws and writes them.

Shapes: C components, F features, d the length of a feature's weight vector, V input values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from apd_jax.decomposition import Decomposition
from apd_jax.evaluation.general import Evaluation
from apd_jax.evaluation.geometry import norm_ratios
from apd_jax.paths import user_path
from apd_jax.report import columns, style
from apd_jax.targets.base import Panel
from apd_jax.train.progress import loss_names

NUM_SWEPT = 8  # features whose response is drawn
LOOKS = {  # of the outputs in `responses`: label, colour, line style, width
    "label": ("label", style.GREY, "-", 3.0),
    "target": ("target", style.BLACK, "-", 1.5),
    "top1": ("single best component", style.VERMILION, "--", 1.5),
}


def save_all(
    folder: epath.PathLike,
    evaluation: Evaluation,
    decomposition: Decomposition,
) -> list[epath.Path]:
    """Writes every figure that this evaluation has the arrays for as a PNG.

    Args:
      decomposition: of one instance; its history may be empty.
    Returns:
      The paths, in the order of a report.
    """
    figures = {}
    if "attributions_one_hot" in evaluation.arrays:
        figures = _feature_figures(evaluation, decomposition)
    figures |= {name: panel(one) for name, one in evaluation.panels.items()}
    if decomposition.history:
        figures["losses"] = losses(decomposition.history)
    return save(folder, figures)


def save(folder: epath.PathLike, figures: Mapping[str, Figure]) -> list[epath.Path]:
    """Writes figures as PNG files named by their keys."""
    folder = user_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        with paths[name].open("wb") as file:  # matplotlib itself only opens local paths
            figure.savefig(file)
    return list(paths.values())


def _feature_figures(evaluation: Evaluation, decomposition: Decomposition) -> dict[str, Figure]:
    """The figures of a target with one input and one output per feature."""
    a, method = evaluation.arrays, decomposition.method
    serves = a["feature_of_component"]
    k = evaluation.metrics["mean_active_components"] if method.k is None else method.k
    always_on = np.arange(len(serves)) < method.always_on
    serves = np.where(always_on, columns.ALWAYS_ON, serves)
    order = columns.component_order(serves, a["attributions_one_hot"])
    W, total, P = (a[f"feature_weights_{name}"] for name in ("target", "sum", "components"))
    figures = {
        "columns": columns.columns(W, total, P, order, serves),
        "attributions": attributions(
            a["attributions_one_hot"], a["mask_one_hot"], order, norm_ratios(P, W)
        ),
        "per_feature_loss": per_feature_loss(
            {name: a[f"per_feature_loss_{name}"] for name in ("target", "top1", "none")},
            {name: a[f"active_feature_loss_{name}"] for name in ("target", "topk")},
            float(k),
        ),
        "responses": responses(
            a["sweep_values"], {name: a[f"sweep_{name}"] for name in ("label", "target", "top1")}
        ),
    }
    scrubs = {
        name.removeprefix("scrub_"): loss for name, loss in a.items() if name.startswith("scrub_")
    }
    if scrubs:
        figures["neuron_contributions"] = columns.neuron_contributions(
            W, total, P, a["component_of_feature"]
        )
        figures["scrub"] = scrub(scrubs)
    return figures


def panel(shown: Panel) -> Figure:
    """A heat map or lines, as a target describes them."""
    figure = _lines(shown) if shown.matrix is None else _heat_map(shown, shown.matrix)
    style.tidy(figure.axes[0], xlabel=shown.xlabel, ylabel=shown.ylabel, title=shown.title)
    return figure


def _heat_map(shown: Panel, matrix: np.ndarray) -> Figure:
    rows, width = matrix.shape
    figure = style.new_figure(min(4 + 0.25 * width, 14), min(2.4 + 0.22 * rows, 10), shown.caption)
    axes = figure.subplots()
    image = style.heat(axes, matrix, signed=bool((matrix < 0).any()))
    for names, ticks in ((shown.rows, axes.set_yticks), (shown.columns, axes.set_xticks)):
        if names:
            ticks(range(len(names)), list(names))
    if len(shown.columns) > 12 or max(map(len, shown.columns), default=0) > 3:
        axes.tick_params(axis="x", labelrotation=90)
    style.colorbar(figure, image, axes, shown.unit)
    return figure


def _lines(shown: Panel) -> Figure:
    figure = style.new_figure(8.0, 4.6, shown.caption)
    axes = figure.subplots()
    x = np.arange(len(next(iter(shown.lines.values())))) if shown.x is None else shown.x
    marker = "o" if len(x) < 30 else ""
    looks = ("-", "--", ":", "-.")
    for i, (label, values) in enumerate(shown.lines.items()):
        color = style.PALETTE[i % len(style.PALETTE)]
        look = looks[i // len(style.PALETTE) % len(looks)]
        axes.plot(x, values, look, color=color, label=label, marker=marker)
    style.legend(axes)
    return figure


def attributions(
    attributions: Float[np.ndarray, "F C"],
    mask: Bool[np.ndarray, "F C"],
    order: Int[np.ndarray, " C"],
    norm_ratio: Float[np.ndarray, "C F"],
) -> Figure:
    """Which component serves which feature.

    Attributions and top-1 mask where one feature is alone in the input, and norms of the weights.
    """
    caption = (
        "Each feature alone in the input (rows) against every component (columns). Components are "
        "ordered by the feature that they serve, then come the dead ones, last those that are "
        "always on. Good: one bright diagonal in all three panels, a single component for each "
        "feature and nothing beside it."
    )
    figure = style.new_figure(12.0, 4.6, caption)
    panels = figure.subplots(1, 3)
    shown = (
        (attributions[:, order], "Attribution", "attribution (units of the output)"),
        (mask[:, order].astype(float), "Top-1 mask", ""),
        (norm_ratio.T[:, order], "Weights", "norm of the component's part / norm in the target"),
    )
    for axes, (matrix, title, unit) in zip(panels, shown, strict=True):
        image = style.heat(axes, matrix)
        style.tidy(
            axes,
            xlabel="component (ordered)",
            ylabel="feature" if axes is panels[0] else "",
            title=title,
        )
        if unit:
            style.colorbar(figure, image, axes, unit)
    return figure


def per_feature_loss(
    alone: Mapping[str, Float[np.ndarray, " F"]],
    active: Mapping[str, Float[np.ndarray, " F"]],
    topk: float,
) -> Figure:
    """Mean squared error to the label by feature: of the target and of the sparse model.

    Args:
      alone: {"target", "top1", "none": [F]}, where the feature is alone in the input.
      active: {"target", "topk": [F]}, on training inputs in which the feature is active (NaN if
        there were none).
    """
    caption = (
        "Every dot is a feature, ordered by the target's own loss. Good: the sparse model's dots "
        "lie on or below the target's. A dot far above is a feature that is not reproduced by its "
        "best component (left), or by the components that the mask of training keeps (right). "
        "Grey: the loss without any component."
    )
    figure = style.new_figure(10.0, 4.2, caption)
    left, right = figure.subplots(1, 2, sharey=True)
    named = {
        "target": ("target", style.BLACK, "o"),
        "top1": ("single best component", style.VERMILION, "^"),
        "none": ("no component", style.GREY, "_"),
    }
    _dots(left, {named[name]: loss for name, loss in alone.items()}, np.argsort(alone["target"]))
    style.tidy(
        left,
        xlabel="feature (ordered)",
        ylabel="mean squared error to the label",
        title="Feature alone in the input",
    )
    named = {
        "target": ("target", style.BLACK, "o"),
        "topk": (f"top-k, k = {topk:.3g}", style.BLUE, "^"),
    }
    _dots(right, {named[name]: loss for name, loss in active.items()}, np.argsort(active["target"]))
    style.tidy(right, xlabel="feature (ordered)", title="Training inputs with the feature active")
    return figure


def _dots(axes: Axes, series: Mapping[tuple[str, str, str], np.ndarray], order: np.ndarray) -> None:
    largest = [np.nanmax(loss) for loss in series.values() if np.isfinite(loss).any()]
    floor = 1e-6 * max(largest, default=1.0) or 1e-12  # a log axis has no 0
    for (label, color, marker), loss in series.items():
        axes.plot(
            np.arange(len(order)),
            np.maximum(loss[order], floor),
            marker,
            color=color,
            markersize=3.5,
            label=label,
        )
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    style.legend(axes)


def responses(
    values: Float[np.ndarray, " V"],
    outputs: Mapping[str, Float[np.ndarray, "V F"]],
    num_features: int = NUM_SWEPT,
) -> Figure:
    """Output of a feature against its own input, all other inputs at 0.

    Args:
      outputs: {"label", "target", "top1": [V, F]}.
      num_features: how many features are drawn, spread evenly over all.
    """
    caption = (
        "Output of a feature against its own input, all others at 0. Good: the single best "
        "component (dashed) follows the target (solid). The label (grey) is what the target was "
        "trained to output."
    )
    count = outputs["target"].shape[1]
    chosen = np.unique(np.linspace(0, count - 1, min(num_features, count)).round().astype(int))
    across = len(chosen) if len(chosen) <= 5 else 4
    rows = -(-len(chosen) // across)
    figure = style.new_figure(10.0, 1.2 + 2.3 * rows, caption)
    panels = figure.subplots(rows, across, sharex=True, sharey=True, squeeze=False).ravel()
    for index, (axes, feature) in enumerate(zip(panels, chosen, strict=False)):
        for name, out in outputs.items():
            label, color, line, width = LOOKS[name]
            axes.plot(values, out[:, feature], line, color=color, linewidth=width, label=label)
        below, first = index + across >= len(chosen), index % across == 0
        style.tidy(
            axes,
            xlabel="input" if below else "",
            ylabel="output" if first else "",
            title=f"feature {feature}",
        )
        axes.tick_params(labelbottom=below)
    for axes in panels[len(chosen) :]:
        axes.set_visible(False)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=len(LOOKS),
        fontsize=8,
        frameon=False,
    )
    return figure


def scrub(losses: Mapping[str, Float[np.ndarray, " n"]]) -> Figure:
    """Histograms of the loss per example with the components of inactive features set at random.

    Args:
      losses: {"topk", "scrubbed", "antiscrubbed", "random", "zero", "monosemantic": [n]}, each
        the mean squared error to the target's output.
    """
    caption = (
        "Mean squared error to the target network, per example. Components of active features are "
        "forced on (scrubbed) or off (antiscrubbed), all others are on or off at random. Good: "
        "scrubbed lies close to top-k, and left of both the antiscrubbed losses and the "
        "monosemantic mean (one neuron per feature). Losses of exactly 0, as on inputs without "
        "any feature, count in the means but cannot be drawn on this axis."
    )
    figure = style.new_figure(8.0, 4.6, caption)
    axes = figure.subplots()
    looks = {
        "topk": ("top-k", style.BLACK),
        "scrubbed": ("scrubbed", style.BLUE),
        "antiscrubbed": ("antiscrubbed", style.VERMILION),
    }
    drawn = np.concatenate([losses[name][losses[name] > 0] for name in looks])
    low, high = (np.quantile(drawn, 0.005), drawn.max()) if len(drawn) else (1e-6, 1.0)
    bins = np.geomspace(low / 1.1, high * 1.1, 60).tolist()
    for name, (label, color) in looks.items():
        share, mean = np.full(len(losses[name]), 1 / len(losses[name])), losses[name].mean()
        axes.hist(
            losses[name], bins=bins, weights=share, histtype="stepfilled", color=color, alpha=0.25
        )
        axes.hist(
            losses[name],
            bins=bins,
            weights=share,
            histtype="step",
            color=color,
            label=f"{label}, mean {mean:.2e}",
        )
        axes.axvline(max(mean, bins[0]), color=color, linestyle=":", linewidth=1)
    mean = losses["monosemantic"].mean()
    axes.axvline(
        max(mean, bins[0]),
        color=style.GREEN,
        linestyle="--",
        linewidth=1.5,
        label=f"monosemantic, mean {mean:.2e}",
    )
    axes.set_xscale("log")
    style.tidy(
        axes,
        xlabel="mean squared error to the target's output (means dotted)",
        ylabel="share of examples",
    )
    style.legend(axes)
    return figure


def losses(history: Sequence[Mapping[str, float | int]]) -> Figure:
    """Every loss of the training log against the step."""
    caption = (
        "Losses during the decomposition, without their coefficients (total: with them). Good: "
        "faithfulness falls by orders of magnitude and stays low, minimality follows it, and "
        "simplicity levels off."
    )
    figure = style.new_figure(8.0, 4.6, caption)
    axes = figure.subplots()
    names = loss_names(history)
    palette = [style.BLACK, *style.PALETTE]
    colors = {name: palette[i % len(palette)] for i, name in enumerate(names)}
    for name in names:
        points = [(row["step"], row[name]) for row in history if name in row and row[name] > 0]
        if points:
            width = 2.0 if name == "total" else 1.2
            axes.plot(
                *zip(*points, strict=True),
                color=colors[name],
                linewidth=width,
                label=name.replace("_", " "),
            )
    axes.set_yscale("log")
    style.tidy(axes, xlabel="step", ylabel="loss")
    if axes.lines:
        style.legend(axes, ncols=2)
    return figure
