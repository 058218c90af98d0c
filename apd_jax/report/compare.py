"""Two runs side by side: settings that differ, metrics of both, and which component of the one is which of the other."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, PyTree
from rich.table import Table

from apd_jax import components as components_lib
from apd_jax.components import Components
from apd_jax.evaluation import matching
from apd_jax.report import html, tables
from apd_jax.train.workdir import flat

SAME_COSINE = 0.9  # two components count as the same from this cosine on
MAX_SHOWN = 128  # pairs in the heat map of cosines


@dataclasses.dataclass(frozen=True)
class Run:
    """What a comparison reads of one workdir; of several instances the first."""

    folder: epath.Path
    settings: Mapping[str, Any]  # nested
    metrics: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    params: PyTree  # the target's
    components: Components
    firing_rates: Float[np.ndarray, " C"]

    @property
    def name(self) -> str:
        return self.folder.resolve().name


@dataclasses.dataclass(frozen=True)
class Comparison:
    """pairs: (component of the first, of the second, cosine, norm of the second's over the first's), best first."""

    runs: tuple[Run, Run]
    settings: list[tuple[str, str, str]]  # (field, here, there), of those that differ
    metrics: list[tuple[str, str, str]]  # (what it says, here, there)
    cosine: Float[np.ndarray, "C D"] | None
    pairs: list[tuple[int, int, float, float]]
    verdict: str


def compare(first: Run, second: Run) -> Comparison:
    """Components are matched by cosine, one to one, where both runs decompose the same weights; else the verdict says why not."""
    runs = (first, second)
    here, there = (flat(run.settings) for run in runs)
    absent = "absent"
    settings = [
        (field, str(here.get(field, absent)), str(there.get(field, absent)))
        for field in sorted(here | there)
        if here.get(field, absent) != there.get(field, absent)
    ]
    values = [
        {label: value for label, value, _ in tables.result_rows(run.metrics, others=True)}
        for run in runs
    ]
    metrics = [
        (label, values[0].get(label, "–"), values[1].get(label, "–"))
        for label in values[0] | values[1]
    ]
    several = (
        " Of several instances the first is compared."
        if any(run.get("apd.num_instances", 1) > 1 for run in (here, there))
        else ""
    )
    if why := _why_not_matched(first, second):
        return Comparison(runs, settings, metrics, None, [], why + several)
    cosine = matching.cosines(first.components, second.components)
    norms = [_norms(run.components) for run in runs]
    pairs = [
        (int(c), int(d), float(cosine[c, d]), float(norms[1][d] / max(norms[0][c], 1e-30)))
        for c, d in zip(*matching.one_to_one(cosine), strict=True)
    ]
    same = sum(cos >= SAME_COSINE for *_, cos, _ in pairs)
    verdict = (
        f"Of {len(pairs)} components, matched one to one, {same} point the same way in both runs (cosine of {SAME_COSINE} or more); "
        f"the median cosine is {np.median([cos for *_, cos, _ in pairs]):.3f}."
    )
    return Comparison(runs, settings, metrics, cosine, pairs, verdict + several)


def _why_not_matched(first: Run, second: Run) -> str:
    """Empty if both decompose the same leaves of the same weights."""
    leaves = []
    for run in (first, second):
        flat = jax.tree_util.tree_flatten_with_path(run.params)[0]
        leaves.append({components_lib.path_name(path): np.asarray(leaf) for path, leaf in flat})
    if not (
        leaves[0].keys() == leaves[1].keys()
        and all(np.array_equal(leaves[0][name], leaves[1][name]) for name in leaves[0])
    ):
        return "The two runs decompose different target weights, so their components cannot be matched; start both with the same target.seed."
    if first.components.factors.keys() != second.components.factors.keys():
        return "The two runs decompose different leaves of the target, so their components cannot be matched."
    return ""


def _norms(components: Components) -> np.ndarray:
    return np.sqrt(
        np.maximum(sum(jax.device_get(components_lib.squared_norms(components)).values()), 0)
    )


def terminal(comparison: Comparison) -> list[Table | str]:
    """What the terminal shows of it."""
    names = [run.name for run in comparison.runs]

    def table(
        title: str, first: str, rows: Sequence[tuple[str, ...]], more: Sequence[str] = ()
    ) -> Table:
        made = Table(title=title)
        for i, column in enumerate((first, *names, *more)):
            made.add_column(column, justify="left" if i == 0 else "right")
        for row in rows:
            made.add_row(*row)
        return made

    shown = [
        table("Settings that differ", "field", comparison.settings)
        if comparison.settings
        else "All settings are the same."
    ]
    shown.append(table("Metrics", "metric", comparison.metrics))
    if comparison.pairs:
        rows = [
            (str(i), str(c), str(d), f"{cos:.4f}", f"{ratio:.3f}")
            for i, (c, d, cos, ratio) in enumerate(comparison.pairs)
        ]
        shown.append(
            table("Components, matched one to one", "pair", rows, ("cosine", "norm ratio"))
        )
    return [*shown, comparison.verdict]


def write(path: epath.PathLike, comparison: Comparison) -> epath.Path:
    """The same as a page, with both runs' losses and the cosines of all components.

    Raises:
      InputError: the page cannot be written there.
    """
    path = epath.Path(path)
    runs, pairs = comparison.runs, comparison.pairs[:MAX_SHOWN]
    rows, columns = [c for c, *_ in pairs], [d for _, d, *_ in pairs]
    hrefs = [_href(run.folder / "report.html", path.parent) for run in runs]
    losses = [
        {**point, "run": name}
        for run, name in zip(runs, ("first", "second"), strict=True)
        for point in html.losses(run.history, 0)
    ]
    page = {
        "comparison": comparison,
        "hrefs": hrefs,
        "limit": MAX_SHOWN,
        "data": {
            "names": [run.name for run in runs],
            "hrefs": hrefs,
            "losses": losses,
            "cosine": None if comparison.cosine is None else comparison.cosine[rows][:, columns],
            "rows": rows,
            "columns": columns,
            "pairs": [
                {
                    "first": c,
                    "second": d,
                    "cosine": cosine,
                    "ratio": ratio,
                    "firing_rates": [
                        float(runs[0].firing_rates[c]),
                        float(runs[1].firing_rates[d]),
                    ],
                }
                for c, d, cosine, ratio in comparison.pairs
            ],
        },
    }
    return html.save(path, html.render("compare.html", page))


def _href(report: epath.Path, folder: epath.Path) -> str | None:
    """A run's report, as a link from a page in `folder`; None if it has none."""
    return os.path.relpath(report.resolve(), folder.resolve()) if report.exists() else None
