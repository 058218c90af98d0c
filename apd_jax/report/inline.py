"""What a notebook shows of a decomposition: a small table and a map of sizes, without a run."""

from __future__ import annotations

from html import escape

import jax
import numpy as np

from apd_jax import components as components_lib
from apd_jax.decomposition import Decomposition
from apd_jax.report import style
from apd_jax.targets.scoring import large_components

MAX_SITES, MAX_COMPONENTS = 24, 120  # that the map has room for
_CELL, _LABELS = 9, 190  # pixels


def html(decomposition: Decomposition) -> str:
    """A table of what it is, and ‖P_c‖ over the weight's own norm by site and component, as SVG.

    Of several instances the first is drawn. Cost: the norms of the factors.
    """
    one = decomposition.instance(0)
    squares = jax.device_get(components_lib.squared_norms(one.components))
    leaves = components_lib.decomposed_leaves(one.components, one.problem.params)
    whole = np.sqrt(np.maximum(sum(squares.values()), 0))
    shares = {
        name: np.sqrt(np.maximum(square, 0)) / max(float(np.linalg.norm(leaves[name])), 1e-12)
        for name, square in squares.items()
    }
    rows = {
        "method": decomposition.method.name,
        "components": f"{len(whole)}, of which {int(large_components(whole).sum())} are alive",
        "sites": str(len(shares)),
        "instances": str(decomposition.method.num_instances),
    }
    if decomposition.history:
        last = decomposition.history[-1]
        losses = (n for n in last if n not in ("step", "seconds_per_step"))
        rows["steps"] = str(last["step"])
        rows["last losses"] = ", ".join(f"{n} {np.mean(last[n]):.3g}" for n in losses)
    table = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th>"
        f"<td style='text-align:left'>{escape(value)}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table>{table}</table>{_map(shares, whole)}"


def _map(shares: dict[str, np.ndarray], whole: np.ndarray) -> str:
    columns = np.sort(np.argsort(-whole, kind="stable")[:MAX_COMPONENTS])
    names = list(shares)[:MAX_SITES]
    largest = max(float(share.max()) for share in shares.values()) or 1.0
    parts = []
    for i, name in enumerate(names):
        label, y = name if len(name) < 30 else f"…{name[-28:]}", (i + 1) * _CELL
        parts.append(
            f"<text x='{_LABELS - 5}' y='{y - 1}' text-anchor='end'>{escape(label)}</text>"
        )
        parts += [
            f"<rect x='{_LABELS + j * _CELL}' y='{y - _CELL}' width='{_CELL}' height='{_CELL}' "
            f"fill-opacity='{shares[name][c] / largest:.2f}'><title>{escape(name)}, component {c}: "
            f"{shares[name][c]:.3g}</title></rect>"
            for j, c in enumerate(columns)
            if shares[name][c] > 0.01 * largest
        ]
    width, height = _LABELS + len(columns) * _CELL, len(names) * _CELL
    left_out = len(columns) < len(whole) or len(names) < len(shares)
    cut = f"; the {len(columns)} largest components, the first {len(names)} sites" * left_out
    return (
        f"<svg width='{width}' height='{height}' font-size='8' font-family='sans-serif' "
        f"fill='currentColor' role='img' aria-label='sizes by site and component'>"
        f"<g fill='{style.BLUE}'>{''.join(p for p in parts if p.startswith('<rect'))}</g>"
        f"{''.join(p for p in parts if p.startswith('<text'))}</svg>"
        f"<div>Size of every component (columns) at every site (rows), over the weight's own; "
        f"darkest {largest:.3g}{cut}.</div>"
    )
