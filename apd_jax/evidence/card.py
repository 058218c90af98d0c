"""What a reader sees of an evidence: verdict, terminal table, card in Markdown, files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from rich.table import Table

from apd_jax.evidence.check import Check
from apd_jax.paths import user_path
from apd_jax.report import figures

_MARKS = {True: "met", False: "NOT MET", None: "–"}
NEEDED = (1, 2, 3, 4, 5, 6, 16, 19)  # the checks that the claim rests on
MAX_ROWS = 10  # of a check's columns on the card


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The checks of one decomposition, in order, with what they rest on."""

    provenance: Mapping[str, Any]
    checks: Sequence[Check]

    def __repr__(self) -> str:
        return f"<Evidence: {self.verdict}>"

    def __rich__(self) -> Table:
        """What `rich.print` shows."""
        return self.table()

    def _repr_mimebundle_(self, **asked: Any) -> dict[str, str]:
        """What a notebook shows."""
        return self.table()._repr_mimebundle_(**{"include": (), "exclude": ()} | asked)

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    @property
    def verdict(self) -> str:
        """What the checks together allow to be said; nothing about mechanisms."""
        missed = [check for check in self.checks if check.passed is False]
        met = sum(check.passed is True for check in self.checks)
        names = ""
        if missed:
            names = f"; not met: {', '.join(f'{c.title.lower()} ({c.number})' for c in missed)}"
        asked = {check.number: check for check in self.checks}
        warning = asked[16].text if 16 in asked else ""
        loud = f" {warning.split(';')[0]}." if warning.startswith("WARNING") else ""
        return f"{self._claim(asked)}: {met} of {met + len(missed)} bars are met{names}.{loud}"

    def _claim(self, asked: Mapping[int, Check]) -> str:
        """What may be said, in the order in which the claim becomes stronger."""
        unmet = [number for number in NEEDED if number not in asked or not asked[number].passed]
        open_ = [number for number in unmet if number not in asked or asked[number].passed is None]
        beaten = None
        if 16 in asked:
            beaten = asked[16].values.get("trained_on_random_network_bars_failed")
            if unmet == [16] and beaten == 0 and not asked[16].values["fooled"]:
                return (
                    "These components show the structure of the data, not of what this network "
                    "has learned: a decomposition trained on a random network meets the same bars"
                )
        if unmet:
            left = f" (not run: checks {', '.join(map(str, open_))})" if open_ else ""
            return (
                "It is not shown that these components are needed for this behaviour on this "
                f"distribution{left}"
            )
        under = f"under ablations up to this budget ({asked[5].budget})"
        if beaten is None:
            return (
                f"These components do this behaviour on this distribution, {under}; whether they "
                "show more than the structure of the data is open, for the control, a "
                "decomposition trained on a random network, was not run (--full)"
            )
        return f"These components are needed for this behaviour on this distribution, {under}"

    def to_json(self) -> dict[str, Any]:
        return {
            "provenance": dict(self.provenance),
            "verdict": self.verdict,
            "checks": [check.to_json() for check in self.checks],
        }

    def table(self, title: str = "Evidence") -> Table:
        """One row per check."""
        table = Table(title=title, caption=self.verdict, caption_justify="left", show_lines=True)
        for name in ("", "check", "", "what was found"):
            table.add_column(name, overflow="fold")
        for c in self.checks:
            style = {True: "green", False: "bold red", None: "dim"}[c.passed]
            table.add_row(
                str(c.number),
                c.title,
                f"[{style}]{_MARKS[c.passed]}[/]",
                "\n".join(filter(None, (c.text, _why(c)))),
            )
        return table

    def markdown(self, title: str = "Evidence") -> str:
        """The card: the same table with bars and budgets."""
        p = self.provenance
        lines = [f"# {title}", "", self.verdict, ""]
        lines += [
            f"Run `{p['workdir']}`, step {p['step']}, seed {p['seed']}; "
            f"{p['num_devices']} × {p['device']}, JAX {p['jax']}, {p['date']}."
        ]
        lines += [f"Command: `{p['command']}`. Bars with a * are ours.", ""]
        lines += ["| # | check | | bar | what was found | budget |", "|---|---|---|---|---|---|"]
        for c in self.checks:
            cells = (
                str(c.number),
                c.title,
                _MARKS[c.passed],
                c.bar,
                " ".join(filter(None, (c.text, _why(c)))),
                c.budget,
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        for c in self.checks:
            lines += _columns(c) if c.columns else []
        return "\n".join(lines) + "\n"


def _columns(check: Check) -> list[str]:
    """The first rows of a check's columns, as a table of its own."""
    names, rows = list(check.columns), list(zip(*check.columns.values(), strict=True))
    lines = ["", f"{check.title} ({check.number}), {min(len(rows), MAX_ROWS)} of {len(rows)} rows:"]
    lines += ["", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    cells = ([f"{value:.4g}" for value in row] for row in rows[:MAX_ROWS])
    return lines + [f"| {' | '.join(row)} |" for row in cells]


def _why(check: Check) -> str:
    return f"({check.why[0].upper()}{check.why[1:]}.)" if check.why else ""


def save(
    found: Sequence[Evidence], workdir: epath.PathLike, numbers: Sequence[int], *, several: bool
) -> list[epath.Path]:
    """Writes evidence.json, evidence.md, and of each instance evidence.npz and figures.

    Args:
      found: of each instance. evidence.json describes the first; where the run has several, all
        stand in its `instances`.
      numbers: which instances of the run these are. The first has evidence.npz, instance i
        evidence_i.npz, like evaluation.npz; figures are named evidence_*.png.
      several: whether the run has several.
    Returns: the paths of evidence.json and evidence.md.
    """
    folder = user_path(workdir)
    content = found[0].to_json() | ({"instances": [e.to_json() for e in found]} if several else {})
    (folder / "evidence.json").write_text(json.dumps(content, indent=2, ensure_ascii=False))
    titles = [f"Evidence: {folder.name}" + (f", instance {i}" if several else "") for i in numbers]
    (folder / "evidence.md").write_text(
        "\n".join(e.markdown(title) for e, title in zip(found, titles, strict=True))
    )
    for evidence, i in zip(found, numbers, strict=True):
        arrays = {name: array for check in evidence.checks for name, array in check.arrays.items()}
        with (folder / ("evidence.npz" if i == 0 else f"evidence_{i}.npz")).open("wb") as file:
            np.savez_compressed(file, **arrays)
        panels = {
            f"evidence_{name}": panel
            for check in evidence.checks
            for name, panel in check.panels.items()
        }
        drawn = {name: figures.panel(panel) for name, panel in panels.items()}
        figures.save(folder / (f"figures/instance_{i}" if several else "figures"), drawn)
    return [folder / "evidence.json", folder / "evidence.md"]
