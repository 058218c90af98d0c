"""Two runs side by side.

Settings that differ, metrics of both, and which component of the first run is which of the second.

Shapes: C components of the first run, D of the second.
"""

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
from apd_jax.paths import user_path
from apd_jax.report import drawn, html, tables
from apd_jax.targets.scoring import alive_components
from apd_jax.train.workdir import flat

SAME_COSINE = 0.9  # the verdict counts pairs with at least this cosine
MAX_SHOWN = 128  # pairs in the heat map of cosines
AGREEMENT = ("of", "first in second", "second in first", "both as they began")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a comparison reads of one folder. Of several instances it reads the first."""

    folder: epath.Path
    settings: Mapping[str, Any]  # nested
    metrics: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    params: PyTree  # the target's
    components: Components
    firing_rates: Float[np.ndarray, " C"] | None = None  # of a run that has been evaluated
    initial: Components | None = None  # those that it began with, where they are known

    @property
    def name(self) -> str:
        return self.folder.resolve().name


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What differs between two runs, and which components are the same."""

    runs: tuple[Run, Run]
    settings: list[tuple[str, str, str]]  # (field, first's, second's), of those that differ
    metrics: list[tuple[str, str, str]]  # (what it says, first's, second's)
    cosine: Float[np.ndarray, "C D"] | None  # None where components cannot be matched
    # (component of the first, of the second, their cosine, norm of the second's over the first's),
    # by falling cosine
    pairs: list[tuple[int, int, float, float]]
    verdict: str
    # (of what, mean largest cosine first to second, second to first, both at initialisation), where
    # components are outer products
    agreement: list[tuple[str, str, str, str]] = dataclasses.field(default_factory=list)


def compare(first: Run, second: Run) -> Comparison:
    """Compares two runs; components are matched one to one by cosine.

    That needs the same target weights and the same sites; else the verdict says why not.
    """
    runs = (first, second)
    here, there = (flat(run.settings) for run in runs)
    settings, metrics = _different_settings(here, there), _metrics(first, second)
    several = ""
    if any(run.get("apd.num_instances", 1) > 1 for run in (here, there)):
        several = " Of several instances the first is compared."
    if why := _why_not_matched(first, second):
        return Comparison(runs, settings, metrics, None, [], why + several)
    cosine = matching.cosines(first.components, second.components)
    norms = [np.asarray(components_lib.norms(run.components)) for run in runs]
    pairs = [
        (int(c), int(d), float(cosine[c, d]), float(norms[1][d] / max(norms[0][c], 1e-30)))
        for c, d in zip(*matching.one_to_one(cosine), strict=True)
    ]
    same = sum(cos >= SAME_COSINE for *_, cos, _ in pairs)
    verdict = (
        f"Of {len(pairs)} components, matched one to one, {same} point the same way in both runs "
        f"(cosine of {SAME_COSINE} or more); "
        f"the median cosine is {np.median([cos for *_, cos, _ in pairs]):.3f}."
    )
    return Comparison(
        runs, settings, metrics, cosine, pairs, verdict + several, _agreement(first, second)
    )


def _agreement(first: Run, second: Run) -> list[tuple[str, str, str, str]]:
    """Of alive components; at initialisation of those with the same numbers."""
    alive = [
        np.ones(run.components.num_components, bool)
        if run.firing_rates is None
        else alive_components(run.firing_rates, np.asarray(components_lib.norms(run.components)))
        for run in (first, second)
    ]

    def both(a: Components | None, b: Components | None) -> list[dict[str, float]]:
        if a is None or b is None:
            return [{}, {}]
        return [
            matching.mean_max_cosine(a, b, (alive[0], alive[1])),
            matching.mean_max_cosine(b, a, (alive[1], alive[0])),
        ]

    there, back = both(first.components, second.components)
    before = both(first.initial, second.initial)
    says = {"U": "what is read (U)", "V": "what is written (V)", "UV": "the whole piece (UV)"}
    return [
        (
            says[of],
            f"{there[of]:.3f}",
            f"{back[of]:.3f}",
            " and ".join(f"{one[of]:.3f}" for one in before if one) or "–",
        )
        for of in there
    ]


def _different_settings(
    here: Mapping[str, Any], there: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    absent = "absent"
    return [
        (field, str(here.get(field, absent)), str(there.get(field, absent)))
        for field in sorted({*here, *there})
        if here.get(field, absent) != there.get(field, absent)
    ]


def _metrics(first: Run, second: Run) -> list[tuple[str, str, str]]:
    here, there = (
        {label: value for label, value, _ in tables.result_rows(run.metrics, others=True)}
        for run in (first, second)
    )
    return [(label, here.get(label, "–"), there.get(label, "–")) for label in here | there]


def _why_not_matched(first: Run, second: Run) -> str:
    """A sentence, or "" if both runs decompose the same sites of the same weights."""
    leaves = []
    for run in (first, second):
        flat = jax.tree_util.tree_flatten_with_path(run.params)[0]
        leaves.append({components_lib.path_name(path): np.asarray(leaf) for path, leaf in flat})
    if not (
        leaves[0].keys() == leaves[1].keys()
        and all(np.array_equal(leaves[0][name], leaves[1][name]) for name in leaves[0])
    ):
        return (
            "The two runs decompose different target weights, so their components cannot be "
            "matched; start both with the same target.seed, or with the same params."
        )
    if first.components.factors.keys() != second.components.factors.keys():
        return (
            "The two runs decompose different leaves of the target, so their components cannot "
            "be matched."
        )
    return ""


def terminal(comparison: Comparison) -> list[Table | str]:
    """The tables and sentences that the terminal shows."""
    names = [run.name for run in comparison.runs]

    def table(
        title: str, first: str, rows: Sequence[tuple[str, ...]], more: Sequence[str] = ()
    ) -> Table:
        made = Table(title=title)
        for i, column in enumerate((first, *names, *more)):
            made.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
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
    if comparison.agreement:
        made = Table(title="Agreement: mean largest cosine to a piece of the other, of alive ones")
        for column in AGREEMENT:
            made.add_column(column, justify="left" if column == AGREEMENT[0] else "right")
        for row in comparison.agreement:
            made.add_row(*row)
        shown.append(made)
    return [*shown, comparison.verdict]


def write(path: epath.PathLike, comparison: Comparison) -> epath.Path:
    """Writes the comparison as a page, with both runs' losses.

    The heat map of cosines shows the first MAX_SHOWN pairs, the table of pairs all.

    Raises:
      InputError: the page cannot be written there.
    """
    path = user_path(path)
    runs, pairs = comparison.runs, comparison.pairs[:MAX_SHOWN]
    rows, columns = [c for c, *_ in pairs], [d for _, d, *_ in pairs]
    hrefs = [_href(run.folder / "report.html", path.parent) for run in runs]
    losses = [
        {**point, "run": name}
        for run, name in zip(runs, ("first", "second"), strict=True)
        for point in drawn.losses(run.history, 0)
    ]
    page = {
        "comparison": comparison,
        "hrefs": hrefs,
        "limit": MAX_SHOWN,
        "agreement_columns": AGREEMENT,
        "data": {
            "names": [run.name for run in runs],
            "hrefs": hrefs,
            "losses": losses,
            "cosine": None if comparison.cosine is None else comparison.cosine[rows][:, columns],
            "rows": rows,
            "columns": columns,
            "pairs": [_pair(runs, *pair) for pair in comparison.pairs],
        },
    }
    return html.save(path, html.render("compare.html", page))


def _pair(runs: tuple[Run, Run], c: int, d: int, cosine: float, ratio: float) -> dict[str, Any]:
    found = [(run.firing_rates, i) for run, i in zip(runs, (c, d), strict=True)]
    rates = [None if rates is None else float(rates[i]) for rates, i in found]
    return {"first": c, "second": d, "cosine": cosine, "ratio": ratio, "firing_rates": rates}


def _href(report: epath.Path, folder: epath.Path) -> str | None:
    """A run's report, as a link from a page in `folder`; None if it has none."""
    return os.path.relpath(report.resolve(), folder.resolve()) if report.exists() else None
