"""`--mode=graph`: what a language model owes its next word to, as DIR/graph.json and graph.html."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from rich.console import Console
from rich.table import Table

from apd_jax.commands.given import Given
from apd_jax.commands.harvest import FOLDER, labelled, language_target
from apd_jax.commands.runs import restore, unfinished
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.interpretation import circuit_tracer, columns
from apd_jax.interpretation import harvest as harvest_lib
from apd_jax.interpretation.prompt_graph import PromptGraph, Settings, prompt_graph
from apd_jax.paths import user_path
from apd_jax.report import graph as report
from apd_jax.report import words as words_lib
from apd_jax.targets.language import LanguageTarget

NAMES = ("prompt", "graph_steps", "graph_price")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags of this mode say."""

    prompt: str
    settings: Settings


def define_flags() -> Callable[[], Options]:
    """The flags of --mode=graph; the result reads them."""
    prompt = flags.DEFINE_string(
        "prompt", "", "Of --mode=graph: the text after which the next word is asked for."
    )
    steps = flags.DEFINE_integer(
        "graph_steps", Settings.num_steps, "Of --mode=graph: the steps in which it is pruned."
    )
    price = flags.DEFINE_float(
        "graph_price", Settings.price, "Of --mode=graph: what a node costs; more leaves fewer."
    )
    return lambda: Options(prompt.value, Settings(num_steps=steps.value, price=price.value))


def graph(workdir: epath.PathLike, console: Console, given: Given | None, options: Options) -> None:
    """Prunes the prompt's components with and without an adversary; prints what is left of them.

    Of several instances the first. Where the run has a harvest, what never fired there is left out
    of ablations, and nodes are called by their labels, those of a model before those of rules.

    Raises:
      InputError: the folder is no run of a language model, or a prompt that is empty or too long.
    """
    if not options.prompt:
        raise InputError("--prompt is missing; give a text, e.g. --prompt='She said that'.")
    run = restore(workdir, given)
    target, folder = language_target(run, "--mode=graph"), user_path(workdir)
    tokens = _tokens(target, options.prompt)
    if run.step < run.method.num_steps:
        console.print(unfinished(run))
    one = run.decomposition(0)
    alive, labels = _harvested(folder, one)
    found = prompt_graph(one, tokens, alive=alive, settings=options.settings, seed=run.seed)
    word = words_lib.of(target.tokens.tokenizer)
    assert word is not None
    words, next_word = [word(t) for t in tokens.tolist()], word(found.token)
    named = {"name": folder.name, "labels": labels}
    exported = circuit_tracer.to_json(found, words, next_word, **named)
    (folder / "graph.json").write_text(json.dumps(exported))
    report.write(folder / "graph.html", found, words, next_word, **named)
    console.print(table(found, next_word))
    for file in ("graph.json", "graph.html"):
        console.print(f"Graph: {folder / file}", soft_wrap=True)


def _harvested(folder: epath.Path, one: Decomposition) -> tuple[Any, dict[int, str]]:
    """Which components fired in the run's harvest, and their labels; (None, {}) without one."""
    if not (folder / FOLDER / columns.ABOUT).exists():
        return None, {}
    found = harvest_lib.load(folder / FOLDER)
    if not found.is_of(one):
        return None, {}
    return found.firing_rate > 0, labelled(folder, found)[1]


def _tokens(target: LanguageTarget, prompt: str) -> np.ndarray:
    """As a document that the model was trained on begins."""
    tokenizer, most = target.tokens.tokenizer, target.model.config.context
    first = [] if tokenizer.document is None else [tokenizer.document]
    tokens = np.concatenate([first, tokenizer.encode(prompt)]).astype(np.int32)
    if not len(tokens) or len(tokens) > most:
        raise InputError(f"--prompt has {len(tokens)} tokens; the model takes 1 to {most}.")
    return tokens


def table(found: PromptGraph, next_word: str) -> Table:
    """Nodes and distances of both graphs."""
    shown = Table(
        "pruned",
        "nodes",
        "KL of these alone",
        "KL, attacked",
        title=f"next: {next_word!r}, p = {found.probability:.3f}; {found.before} nodes before",
        title_justify="left",
    )
    for name, pruned in (("with an adversary", found.robust), ("without", found.plain)):
        shown.add_row(name, str(pruned.num_nodes), f"{pruned.kl:.3f}", f"{pruned.kl_attacked:.3f}")
    return shown
