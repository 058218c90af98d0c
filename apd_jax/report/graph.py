"""A prompt graph as one page that opens from disk: positions across, sites up, edges by weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from apd_jax.interpretation.circuit_tracer import shares
from apd_jax.interpretation.prompt_graph import PromptGraph, Pruned
from apd_jax.paths import user_path
from apd_jax.report import html

MOST_EDGES = 400  # that are drawn: the largest shares
_STEP, _ROW, _LEFT, _TOP = 15, 54, 190, 40  # pixels


@dataclasses.dataclass(frozen=True)
class _Places:
    """Where nodes stand: x, y [n + 1], the logit last; the middle of every column and row."""

    x: np.ndarray
    y: np.ndarray
    columns: list[float]
    rows: list[float]
    width: float
    height: float


def page(
    graph: PromptGraph,
    words: Sequence[str],
    next_word: str,
    *,
    name: str,
    labels: Mapping[int, str] | None = None,
) -> str:
    """The page as text. words: the prompt's tokens; next_word: the one that comes next.

    An edge is as wide as its share of all that arrives at its end, and blue where it adds to the
    activation's own value, vermilion where it takes away from it.
    """
    found, labels, places = graph.edges, labels or {}, _placed(graph)
    top = len(found.component)
    nodes = [
        {
            "x": places.x[i],
            "y": places.y[i],
            "says": f"{labels.get(c, f'component {c}')} at {found.sites[found.site[i]]}, word "
            f"{t + 1} ({words[t]!r}): activation {found.activation[i]:.3g}, g {found.gate[i]:.2f}",
        }
        for i, (c, t) in enumerate(
            zip(found.component.tolist(), found.position.tolist(), strict=True)
        )
    ]
    nodes.append(
        {
            "x": places.x[top],
            "y": places.y[top],
            "says": f"next: {next_word!r}, p = {graph.probability:.3f}",
        }
    )
    part = shares(found)
    drawn, left_out = _edges(graph, places, part[:, :top])
    return html.render(
        "graph.html",
        {
            "name": name,
            "prompt": "".join(words),
            "next_word": next_word,
            "probability": graph.probability,
            "rows": [_row("with an adversary", graph.robust), _row("without", graph.plain)],
            "before": graph.before,
            "nodes": nodes,
            "edges": drawn,
            "left_out": left_out,
            "errors": None if found.rest is None else float(part[-1, top:].sum()),
            "words": list(zip(places.columns, words, strict=True)),
            "sites": list(zip(places.rows, found.sites, strict=True)),
            "width": places.width,
            "height": places.height,
            "data": {},
        },
    )


def write(path: epath.PathLike, graph: PromptGraph, *args: Any, **options: Any) -> epath.Path:
    """Writes `page`; returns where."""
    file = user_path(path)
    file.write_text(page(graph, *args, **options))
    return file


def _row(name: str, pruned: Pruned) -> dict[str, Any]:
    return {
        "name": name,
        "nodes": pruned.num_nodes,
        "kl": pruned.kl,
        "attacked": pruned.kl_attacked,
    }


def _placed(graph: PromptGraph) -> _Places:
    """Nodes of one site and position side by side, every column as wide as its fullest cell."""
    found, T, L = graph.edges, len(graph.tokens), len(graph.edges.sites)
    count = np.zeros((L, T), int)
    np.add.at(count, (found.site, found.position), 1)
    widths = np.maximum(4, count.max(axis=0) + 1) * _STEP
    starts = _LEFT + np.concatenate([[0], np.cumsum(widths)])
    middles = starts[:-1] + widths / 2
    rows = [float(_TOP + (L - i) * _ROW) for i in range(L)]
    seen = np.zeros((L, T), int)
    x, y = [], []
    for s, t in zip(found.site.tolist(), found.position.tolist(), strict=True):
        x.append(middles[t] + (seen[s, t] - (count[s, t] - 1) / 2) * _STEP)
        y.append(rows[s])
        seen[s, t] += 1
    return _Places(
        x=np.array([*x, middles[graph.position]]),
        y=np.array([*y, _TOP]),
        columns=middles.tolist(),
        rows=rows,
        width=float(starts[-1] + _STEP),
        height=float(_TOP + (L + 1) * _ROW),
    )


def _edges(
    graph: PromptGraph, places: _Places, part: np.ndarray
) -> tuple[list[dict[str, Any]], int]:
    """The strongest edges, weakest first; how many others there are. part: shares of edges."""
    found = graph.edges
    assert found.to_output is not None
    signs = np.concatenate(
        [found.weight * np.sign(found.activation)[:, None], found.to_output[None]]
    )
    targets, sources = np.nonzero(part)
    order = np.argsort(part[targets, sources], kind="stable")
    kept = order[-MOST_EDGES:]
    return [
        {
            "x1": places.x[j],
            "y1": places.y[j],
            "x2": places.x[i],
            "y2": places.y[i],
            "share": part[i, j],
            "adds": bool(signs[i, j] > 0),
            "source": j,
            "target": i,
        }
        for i, j in zip(targets[kept].tolist(), sources[kept].tolist(), strict=True)
    ], len(order) - len(kept)
