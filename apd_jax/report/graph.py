"""A prompt graph as one page that opens from disk: positions across, sites up, edges by weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from apd_jax.interpretation.circuit_tracer import errors, rows, shares
from apd_jax.interpretation.prompt_graph import PromptGraph, Pruned
from apd_jax.paths import user_path
from apd_jax.report import html

MOST_EDGES = 400  # that are drawn: the largest shares
_STEP, _ROW, _LEFT, _TOP = 15, 54, 190, 40  # pixels


@dataclasses.dataclass(frozen=True)
class _Places:
    """Where things stand: x, y of the n nodes, the logit, and what is left over at n + 1, ...

    columns, rows: the middle of each.
    """

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
    activation's own value, vermilion where it takes away from it. What nodes leave over at a site
    and a position is a square, where one of the edges that are drawn begins there.

    Raises:
      InputError: not one word for every token.
    """
    graph.must_be_named_by(words)
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
    drawn, left_out = _edges(graph, places, part)
    begins = {edge["source"] for edge in drawn}
    left_over = [
        {
            "x": places.x[i],
            "y": places.y[i],
            "number": i,
            "says": f"what the nodes leave over at {found.sites[s]}, word {t + 1} ({words[t]!r})",
        }
        for i, (t, s) in enumerate(errors(found).tolist(), start=top + 1)
        if i in begins
    ]
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
            "left_over": left_over,
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
    left = errors(found)
    site = np.concatenate([found.site, left[:, 1]])
    position = np.concatenate([found.position, left[:, 0]])
    count = np.zeros((L, T), int)
    np.add.at(count, (site, position), 1)
    widths = np.maximum(4, count.max(axis=0) + 1) * _STEP
    starts = _LEFT + np.concatenate([[0], np.cumsum(widths)])
    middles = starts[:-1] + widths / 2
    heights = [float(_TOP + (L - i) * _ROW) for i in range(L)]
    seen = np.zeros((L, T), int)
    x, y = [], []
    for s, t in zip(site.tolist(), position.tolist(), strict=True):
        x.append(middles[t] + (seen[s, t] - (count[s, t] - 1) / 2) * _STEP)
        y.append(heights[s])
        seen[s, t] += 1
    n = len(found.site)
    return _Places(
        x=np.insert(np.array(x, float), n, middles[graph.position]),
        y=np.insert(np.array(y, float), n, _TOP),
        columns=middles.tolist(),
        rows=heights,
        width=float(starts[-1] + _STEP),
        height=float(_TOP + (L + 1) * _ROW),
    )


def _edges(
    graph: PromptGraph, places: _Places, part: np.ndarray
) -> tuple[list[dict[str, Any]], int]:
    """The strongest edges, weakest first; how many others there are. part: `shares`."""
    n = len(graph.edges.component)
    signs = rows(graph.edges) * np.append(np.sign(graph.edges.activation), 1.0)[:, None]
    targets, columns = np.nonzero(part)
    order = np.argsort(part[targets, columns], kind="stable")
    kept = order[-MOST_EDGES:]
    drawn = []
    for i, j in zip(targets[kept].tolist(), columns[kept].tolist(), strict=True):
        source = j if j < n else j + 1  # the logit stands between nodes and what is left over
        ends = {"x1": places.x[source], "y1": places.y[source], "x2": places.x[i]}
        ends |= {"y2": places.y[i], "source": source, "target": i}
        drawn.append(ends | {"share": part[i, j], "adds": bool(signs[i, j] > 0)})
    return drawn, len(order) - len(kept)
