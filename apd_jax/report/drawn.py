"""What a report draws: matrices, behaviour, attribution map and losses, as its scripts read them.

Shapes: B examples, T positions (only with a mask per position), C components.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from apd_jax.evaluation import components_view
from apd_jax.evaluation.components_view import Behaviour, Matrix
from apd_jax.report import words as words_lib
from apd_jax.report.source import Source
from apd_jax.report.words import Words
from apd_jax.train.progress import loss_names

MATRIX_BYTES = 1_200_000  # for the components' matrices, which are shown in part if they need more
SIDES = (64, 48, 32, 24, 16, 12, 8)  # rows and columns shown of a matrix: the first that fits
MAX_MAP = (128, 256)  # inputs and components of the attribution map
MAX_INPUT = 4096  # entries of an input that is shown
MAX_POINTS = 400  # of a loss curve


def matrices(source: Source, whole: np.ndarray) -> tuple[list[dict[str, Any]], list[int]]:
    """The matrices of the components, and which components they are given for.

    Within MATRIX_BYTES: first fewer rows and columns are shown of each matrix, then only the
    components with the largest norm.

    Args:
      whole: norm of every component, [C].
    """
    d, a, C = source.decomposition, source.arrays, len(whole)
    shapes = [
        (f.U.shape[-2], f.V.shape[-1])
        for f in d.components.factors.values()
        for _ in range(math.prod(f.U.shape[1:-2]))
    ]
    shapes += [a["feature_weights_target"].shape] if "feature_weights_target" in a else []
    # Bytes of one component: 4 per entry, times 4/3 in base64.
    each = {
        side: sum(min(rows, side) * min(columns, side) for rows, columns in shapes) * 16 / 3
        for side in SIDES
    }
    side = next((side for side in SIDES if C * each[side] <= MATRIX_BYTES), SIDES[-1])
    pages = np.sort(np.argsort(-whole)[: max(1, int(MATRIX_BYTES / each[side]))])
    found = components_view.matrices(d, side, pages)
    # With the shape of the first leaf, the feature weights are that leaf itself.
    if "feature_weights_target" in a and a["feature_weights_target"].shape != found[0].shape:
        names = [f"feature_weights_{part}" for part in ("components", "target", "sum")]
        parts, target, total = (jax.numpy.asarray(a[name]) for name in names)
        label = "feature to neuron to feature"
        own = components_view.shown(label, parts[pages], _itself, target, total, side)
        found.insert(0, own)
    return [_packed(matrix) for matrix in found], pages.tolist()


def _itself(matrix: jax.Array) -> jax.Array:
    return matrix


def _packed(matrix: Matrix) -> dict[str, Any]:
    return {
        **dataclasses.asdict(matrix),
        "target_rows": matrix.target_rows.tolist(),
        "target_columns": matrix.target_columns.tolist(),
        "shape": list(matrix.shape),
    }


def behaviour(acts: Behaviour, x: PyTree, words: Words | None = None) -> dict[str, Any]:
    """Per component: the examples with its largest attributions, and the change of the outputs.

    An example that several components need is embedded once. words: what tokens are called.
    """
    used, index = np.unique(acts.examples, return_inverse=True)
    index = index.reshape(acts.examples.shape)
    strongest = _strongest(acts.attributions)
    kept = _strongest(acts.mask & (acts.attributions > 0))
    each = np.arange(len(acts.examples))[:, None]
    top = np.argsort(-np.abs(acts.change), axis=1)[:, :10]
    kind, inputs = _inputs(x, used)
    positions = None
    if acts.attributions.ndim == 3:  # one mask per position
        positions = np.asarray(acts.attributions[acts.examples, :, each]).argmax(axis=-1).tolist()
    of_outputs = words_lib.of_outputs(words, x, acts.change.shape[1])
    return {
        "kind": kind,
        "inputs": inputs,
        "words": _named(words, inputs if kind == "tokens" else None),
        "names": _named(of_outputs, top),
        "examples": index.tolist(),
        "attributions": strongest[acts.examples, each],
        "kept": kept[acts.examples, each].tolist(),
        "positions": positions,
        "outputs": top.tolist(),
        "change": np.take_along_axis(acts.change, top, axis=1),
    }


def _named(words: Words | None, numbers: np.ndarray | None) -> dict[int, str]:
    if words is None or numbers is None:
        return {}
    return {number: words(number) for number in np.unique(numbers).tolist()}


def _strongest(values: np.ndarray) -> np.ndarray:
    """[B, *T, C] -> [B, C], the largest over positions."""
    return values.reshape(len(values), -1, values.shape[-1]).max(axis=1)


def _inputs(x: PyTree, used: np.ndarray) -> tuple[str, np.ndarray | None]:
    """How the page draws inputs, and the used ones; ("other", None) if it does not draw them."""
    leaves = jax.tree.leaves(x)
    if len(leaves) != 1 or leaves[0][0].size > MAX_INPUT:
        return "other", None
    inputs, shape = np.asarray(leaves[0])[used], leaves[0].shape[1:]
    if len(shape) == 2 or (len(shape) == 3 and shape[-1] == 1):
        return "image", inputs.reshape(-1, *shape[:2])
    if len(shape) < 2:
        kind = "tokens" if np.issubdtype(inputs.dtype, np.integer) else "vector"
        return kind, inputs.reshape(len(used), -1)
    return "other", None


def attribution_map(
    source: Source, acts: Behaviour | None, is_features: bool
) -> dict[str, Any] | None:
    """Attributions of inputs (rows) by component (columns), at most MAX_MAP, the largest ones.

    Features stay in order, and components are ordered by the feature with their largest
    attribution. Where inputs are not features, components stay in order and inputs are ordered by
    their component.
    """
    if is_features:
        rows, label = source.arrays["attributions_one_hot"], "feature alone in the input"
    elif acts is not None:
        rows, label = _strongest(acts.attributions), "input"
    else:
        return None
    columns = np.argsort(-rows.max(axis=0), kind="stable")[: MAX_MAP[1]]
    names = np.argsort(-rows.max(axis=1), kind="stable")[: MAX_MAP[0]]
    if is_features:
        names = np.sort(names)
        main = rows[names].argmax(axis=0)[columns]
        columns = columns[np.argsort(main, kind="stable")]
    else:
        names = names[np.argsort(rows[names].argmax(axis=1), kind="stable")]
        columns = np.sort(columns)
    return {
        "values": rows[np.ix_(names, columns)],
        "rows": names.tolist(),
        "columns": columns.tolist(),
        "label": label,
    }


def losses(
    history: Sequence[Mapping[str, Any]], instance: int | None = None
) -> list[dict[str, Any]]:
    """{name, step, value} of every loss in the log, at MAX_POINTS steps at most.

    Values of 0 are left out: the axis is logarithmic.

    Args:
      instance: which one is drawn, where the log holds a list per loss, one value per instance.
    """
    rows = history
    if len(history) > MAX_POINTS:
        rows = [history[i] for i in np.linspace(0, len(history) - 1, MAX_POINTS).astype(int)]
    names, read = loss_names(history), []
    for row in rows:
        for name in filter(row.__contains__, names):
            value = row[name]
            if isinstance(value, list):
                value = 0.0 if instance is None else value[instance]  # 0 is not drawn
            read.append((name, row["step"], value))
    return [
        {"name": name.replace("_", " "), "step": step, "value": value}
        for name, step, value in read
        if value > 0
    ]
