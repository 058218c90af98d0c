"""The figures of the induction target.

Shapes: B sequences, T positions, C components.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from apd_jax.targets.base import Panel

GOOD_ATTENTION = (
    "every token of the first block attends to the one before it",
    "every token that came before attends to the token that followed it there",
)


def attention_panels(
    target: dict[str, Array],
    sparse: dict[str, Array],
    heads: Any,
    tokens: Int[Array, "B T"],
    example: int,
) -> dict[str, Panel]:
    """Attention of the two heads on one sequence, target beside sparse model.

    heads: which head of each layer: `previous` and `induction`. example: the sequence.
    """
    names = ["start", *map(str, tokens[example, 1:].tolist())]
    shown = {0: ("previous-token", heads.previous), 1: ("induction", heads.induction)}
    panels = {}
    for i, (what, head) in shown.items():
        pair = [np.asarray(a[f"attention_{i}"][example, head]) for a in (target, sparse)]
        panels[f"attention_{i}"] = Panel(
            title=f"Layer {i}, the {what} head: target (left) and sparse model (right)",
            caption="Attention on one sequence that repeats, from the token in the row to the "
            f"token in the column. Good: both halves are alike, and {GOOD_ATTENTION[i]}.",
            xlabel="from token (twice)",
            ylabel="at token",
            matrix=np.concatenate(pair, axis=1),
            unit="attention",
            rows=names,
            columns=names * 2,
        )
    return panels


def component_panels(
    lost: Float[np.ndarray, "C 3"], kept: Float[np.ndarray, "3 C"]
) -> dict[str, Panel]:
    """What ablation of every component costs, and at which kinds of position it is kept."""
    order = np.argsort(-lost[:, 0], kind="stable")
    xlabel, columns = "component (ordered by cost in accuracy)", [str(c) for c in order]
    return {
        "mechanisms": Panel(
            title="What an ablated component costs",
            caption="What the model with all components loses when one is taken away. Good: few "
            "components cost anything. One that costs all three holds the whole mechanism. One "
            "that costs the score of one layer only holds that layer's head.",
            xlabel=xlabel,
            ylabel="",
            matrix=lost[order].T,
            unit="fall in accuracy, or in mean attention",
            rows=["accuracy", "previous-token score", "induction score"],
            columns=columns,
        ),
        "kept_by_kind": Panel(
            title="Where in a sequence components are kept",
            caption="Share of positions of each kind that keep a component. Good, with masks per "
            "position: a component is bright in only one of the two upper rows, which need "
            "different heads, and every component is dark in the lowest row.",
            xlabel=xlabel,
            ylabel="",
            matrix=kept[:, order],
            unit="share of positions",
            rows=["first block", "token came before", "no repetition"],
            columns=columns,
        ),
    }
