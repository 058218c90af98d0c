"""`--mode=harvest`: what components of a language model's run do on its text, into DIR/harvest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from rich.console import Console
from rich.table import Table

from apd_jax.commands.given import Given
from apd_jax.commands.runs import Restored, restore, unfinished
from apd_jax.errors import InputError
from apd_jax.interpretation import clusters, columns, effects
from apd_jax.interpretation import harvest as harvest_lib
from apd_jax.interpretation import labels as labels_lib
from apd_jax.interpretation.harvest import Harvest
from apd_jax.paths import quoted, user_path
from apd_jax.report import text, words
from apd_jax.report.source import Source
from apd_jax.report.text import TextSource
from apd_jax.targets.language import LanguageTarget

NAMES = ("num_tokens",)
FOLDER = "harvest"  # in a run's
PASSAGES = 24  # of held-out text, on a page


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags of this mode say."""

    num_tokens: int


def define_flags() -> Callable[[], Options]:
    """The flags of --mode=harvest; the result reads them."""
    count = flags.DEFINE_integer(
        "num_tokens",
        1_000_000,
        "Of --mode=harvest: how many tokens to count, at most those that the run's text has.",
    )
    return lambda: Options(count.value)


def harvest(
    workdir: epath.PathLike, console: Console, given: Given | None, options: Options
) -> None:
    """Counts, or goes on counting, and prints what was found.

    The text is that which components were found on, in batches of the run's size; each row of it is
    read once at most. Of several instances the first.

    Raises:
      InputError: the folder is no run of a language model.
    """
    if options.num_tokens < 1:
        raise InputError(f"--num_tokens must be at least 1; got {options.num_tokens}.")
    run = restore(workdir, given)
    target, folder = language_target(run, "--mode=harvest"), user_path(workdir) / FOLDER
    if run.step < run.method.num_steps:
        console.print(unfinished(run))
    batches, count = stream(run, target, options.num_tokens)
    one = run.decomposition(0)
    found = harvest_lib.harvest(one, batches, num_batches=count, folder=folder, seed=run.seed)
    if not (folder / effects.FILE).exists():
        effects.save(effects.effects(one, found), found, folder)
    console.print(table(found))
    if found.num_tokens < 0.9 * options.num_tokens:
        console.print(f"The text has no more than {found.num_tokens:,} tokens that count.")
    console.print(f"Harvest: {folder}   Its page: --mode=report", soft_wrap=True)


def stream(
    run: Restored, target: LanguageTarget, num_tokens: int
) -> tuple[Iterator[np.ndarray], int]:
    """Batches of the run's text, and how many of them have so many tokens, or all."""
    rows, size = target.rows, min(run.method.batch_size, len(target.rows))
    per_batch = size * float(np.mean(rows.spans[:, 1] - rows.spans[:, 0] - 1))
    count = min(len(rows) // size, max(1, round(num_tokens / per_batch)))
    return iter(rows.batches(size, run.seed)), count


def page(
    run: Restored,
    folder: epath.Path,
    *,
    evidence: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    live: bool = False,
) -> TextSource:
    """What the page of a run is made from, with passages of its held-out text.

    Raises:
      InputError: its harvest is torn, or of another decomposition.
    """
    target, one = language_target(run, "this page"), run.decomposition(0, run.rows)
    found = harvest_lib.load(folder / FOLDER)
    found.must_be_of(one)
    rows, name = target.held_out, folder.resolve().name
    chosen = np.linspace(0, len(rows) - 1, min(PASSAGES, len(rows))).astype(int)
    source = Source(
        name=name,
        decomposition=one,
        x=rows.take(np.unique(chosen)),
        target=target,
        settings=run.config.to_dict(),
        metrics=metrics or {},
        evidence=evidence,
        evidence_command=f"python -m apd_jax.evidence --workdir={quoted(folder)}",
        words=words.of(target.tokens.tokenizer),
    )
    serve = f"python -m apd_jax.serve --workdir={quoted(folder)}"
    said, labels = labelled(folder, found)
    made = effects.load(folder / FOLDER, found)
    attention = text.partners(one, target.model.config, found)
    groups, grouped_by = grouped(folder / FOLDER, found)
    return TextSource(source, found, made, labels, said, serve, live, attention, groups, grouped_by)


def grouped(folder: epath.Path, found: Harvest) -> tuple[np.ndarray | None, str]:
    """The group of every component, and how they were made; (None, "") where they were not."""
    if not (folder / clusters.FILE).exists():
        return None, ""
    kept = clusters.load(folder, found)
    by = f"alpha = {kept['alpha']:g}"
    if kept["agreement"] is not None:
        by += f", {kept['restarts']} restarts that agree on {kept['agreement']:.0%} of components"
    return kept["partition"], by


def labelled(folder: epath.Path, found: Harvest) -> tuple[str, dict[int, str]]:
    """Who has labelled the components, and how: a model rather than rules."""
    paths = sorted((folder / FOLDER).glob("labels_*.json"))
    if not paths:
        return "", {}
    by_rules = [path.name == "labels_rules.json" for path in paths]
    kept = labels_lib.load(paths[int(np.argmin(by_rules))], found)
    return kept["model"] or "rules", {r["component"]: r["label"] for r in kept["components"]}


def language_target(run: Restored, what: str) -> LanguageTarget:
    """Raises InputError where a run is on something else."""
    if not isinstance(run.target, LanguageTarget):
        raise InputError(
            f"{what} reads runs of configs/language.py; of a network of your own, call "
            "apd_jax.interpretation.harvest.harvest with its tokens."
        )
    return run.target


def kept(run: Restored, folder: epath.Path, console: Console) -> bool:
    """Whether a run's folder holds a finished harvest of it, not of what it was before."""
    if not isinstance(run.target, LanguageTarget) or run.method.num_instances > 1:
        return False
    if not (folder / FOLDER / columns.ABOUT).exists():
        console.print("--mode=harvest, then --mode=report: the page shows components on text.")
        return False
    if harvest_lib.load(folder / FOLDER).is_of(run.decomposition(0)):
        return True
    console.print(
        f"{folder / FOLDER} is of another decomposition, so the page has no text; remove it and "
        "harvest again, by --mode=harvest."
    )
    return False


def table(found: Harvest) -> Table:
    """What was counted, in a few lines."""
    rates = found.firing_rate
    on = rates > 0
    shown = Table("harvest", "", title_justify="left")
    for name, value in {
        "tokens": f"{found.num_tokens:,}",
        "components": f"{found.num_components:,}",
        "ever on": f"{int(on.sum()):,}",
        "on per token": f"{rates.sum():.1f}",
        "median firing rate of those": f"{np.median(rates[on]):.2%}" if on.any() else "",
        "token counts": "exact" if _exact(found) else "of the commonest tokens of each",
    }.items():
        shown.add_row(name, value)
    return shown


def _exact(found: Harvest) -> bool:
    return not (found.input_missed.any() or found.next_missed.any())
