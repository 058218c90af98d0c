"""Labels of components, by rules or by a language model, with scores that say what they are worth.

A label is made from the strongest windows, the tokens of largest PMI, and nothing else; its scores
are of windows that it was not made from (`questions`). Rules (`rules`) need no model and are the
baseline. The intruder score of a language model is without its label: it says whether the windows
belong together at all; a rule's is by the rule.

  labels_rules.json, labels_MODEL.json   method, model, version of the prompts, whose harvest,
                                         mean scores with their chance, and a row per component
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int

from apd_jax.errors import InputError, first_line
from apd_jax.interpretation import prompts
from apd_jax.interpretation.endpoint import Endpoint
from apd_jax.interpretation.harvest import Harvest
from apd_jax.interpretation.prompts import Strings
from apd_jax.interpretation.questions import (
    CHANCE,
    GROUP,
    Questions,
    Window,
    mean_scores,
    questions,
    scores,
)
from apd_jax.interpretation.rules import best_rule
from apd_jax.paths import user_path
from apd_jax.train.workdir import write_json


def by_rules(
    harvest: Harvest,
    quiet: Int[np.ndarray, "C n W"],
    strings: Strings,
    *,
    components: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The baseline: of each component the best rule, asked what a label is asked.

    Args:
      quiet: windows in which each component is off, see `questions.quiet_windows`.
      strings: the text of tokens, e.g. `tokenizer.strings`.
      components: their numbers; None: all that are ever on.
    Returns: what a file of labels holds.
    """
    rows = []
    for c in chosen(harvest, components):
        asked = questions(harvest, quiet, c, seed)
        rule = best_rule(harvest, asked, c)
        rows.append(_row(c, rule.says(strings), asked, scores(asked, rule)))
    return _file(_about(harvest, "rules", "", seed), rows)


def by_model(
    harvest: Harvest,
    quiet: Int[np.ndarray, "C n W"],
    strings: Strings,
    endpoint: Endpoint,
    *,
    components: Sequence[int] | None = None,
    seed: int = 0,
    progress: epath.PathLike | None = None,
    num_workers: int = 4,
    on_row: Callable[[dict[str, Any]], Any] | None = None,
) -> dict[str, Any]:
    """The same by a chat model: up to four requests for each component, see `cost`.

    Args:
      progress: a file that keeps what is answered, a line for each component: the same call goes on
        from it. num_workers: components that are asked about at once.
      on_row: told of every component.
    Raises:
      InputError: the endpoint refuses or does not answer, or `progress` is of something else.
    """
    about = _about(harvest, "model", endpoint.model, seed)
    numbers = chosen(harvest, components)
    kept = None if progress is None else _Progress(user_path(progress), about | {"of": numbers})
    rows = [] if kept is None else kept.rows()

    def one(c: int) -> dict[str, Any]:
        asked = questions(harvest, quiet, c, seed)
        judge = _Model(endpoint, strings, _asked_label(harvest, asked, c, strings, endpoint))
        return _row(c, judge.label, asked, scores(asked, judge))

    pool = ThreadPoolExecutor(max_workers=num_workers)
    try:
        for row in pool.map(one, numbers[len(rows) :]):
            rows.append(row)
            if kept is not None:
                kept.add(row)
            if on_row is not None:
                on_row(row)
    finally:
        pool.shutdown(cancel_futures=True)
    return _file(about, rows)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What `by_model` will ask for. Tokens are estimates: four characters each."""

    num_components: int
    num_requests: int
    prompt_tokens: int
    answer_tokens: int  # at most

    def __str__(self) -> str:
        return (
            f"{self.num_components:,} components, {self.num_requests:,} requests, about "
            f"{self.prompt_tokens:,} tokens of prompts, at most {self.answer_tokens:,} of answers"
        )


def cost(
    harvest: Harvest,
    quiet: Int[np.ndarray, "C n W"],
    strings: Strings,
    *,
    components: Sequence[int] | None = None,
    seed: int = 0,
    max_tokens: int = 400,
) -> Cost:
    """The cost of `by_model`, from the very prompts with labels as long as they may be."""
    count = requests = size = 0
    for c in chosen(harvest, components):
        asked = questions(harvest, quiet, c, seed)
        texts = [prompts.label_prompt(harvest, asked, c, strings)]
        texts += _Model(None, strings, "somewhat " * prompts.MOST_WORDS).all_prompts(asked)
        count, requests = count + 1, requests + len(texts)
        size += sum(math.ceil((len(prompts.SYSTEM) + len(text)) / 4) for text in texts)
    return Cost(count, requests, size, requests * max_tokens)


def chosen(harvest: Harvest, components: Sequence[int] | None) -> list[int]:
    """Raises InputError where one does not exist or is never on."""
    alive = np.flatnonzero(harvest.firing_rate > 0).tolist()
    if components is None:
        return alive
    if bad := [c for c in components if c not in set(alive)]:
        raise InputError(f"component {bad[0]} is never on in this harvest, or does not exist.")
    return [int(c) for c in components]


def save(found: dict[str, Any], folder: epath.PathLike) -> epath.Path:
    """Writes labels_rules.json or labels_MODEL.json beside the harvest."""
    path = user_path(folder) / f"labels_{file_name(found['model']) or 'rules'}.json"
    write_json(path, found)
    return path


def file_name(model: str) -> str:
    """A model's name without what cannot be in a file's."""
    return re.sub(r"[^\w.-]+", "-", model)


def load(path: epath.PathLike, harvest: Harvest | None = None) -> dict[str, Any]:
    """What `save` has written: {"components": [{"component", "label", scores, ...}], ...}.

    Raises:
      InputError: there is none, or it is torn or of another harvest.
    """
    where = user_path(path)
    try:
        found = json.loads(where.read_text())
        rows = {row["component"]: row["label"] for row in found["components"]}
        assert rows is not None and found["method"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where} holds no labels ({first_line(error)}).") from None
    if harvest is not None and found["harvest"] != harvest.fingerprint:
        raise InputError(f"{where} holds labels of another decomposition; make them anew.")
    return found


# What is asked of a model


@dataclasses.dataclass(frozen=True)
class _Model:
    """A chat model with a label, as a judge of windows."""

    endpoint: Endpoint | None
    strings: Strings
    label: str

    def all_prompts(self, asked: Questions) -> list[str]:
        """Those of all kinds that there are questions of."""
        found = []
        if asked.detection:
            found.append(self._of(prompts.DETECTION, [self._text(w) for w, _ in asked.detection]))
        if asked.fuzzing:
            found.append(self._of(prompts.FUZZING, [self._text(w) for w, _ in asked.fuzzing]))
        if asked.intruder:
            found.append(self._of(prompts.INTRUDER, [self._group(g) for g, _ in asked.intruder]))
        return found

    def detection(self, windows: Sequence[Window]) -> list[float] | None:
        return self._yes_or_no(prompts.DETECTION, windows)

    def fuzzing(self, windows: Sequence[Window]) -> list[float] | None:
        return self._yes_or_no(prompts.FUZZING, windows)

    def intruder(self, groups: Sequence[Sequence[Window]]) -> list[list[float]] | None:
        prompt = self._of(prompts.INTRUDER, [self._group(group) for group in groups])
        answers = self._numbers(prompt, len(groups), range(1, GROUP + 1))
        if answers is None:
            return None
        return [[float(a == i + 1) for i in range(GROUP)] for a in answers]

    def _yes_or_no(self, template: str, windows: Sequence[Window]) -> list[float] | None:
        prompt = self._of(template, [self._text(window) for window in windows])
        answers = self._numbers(prompt, len(windows), (0, 1))
        return None if answers is None else [float(a) for a in answers]

    def _of(self, template: str, texts: Sequence[str]) -> str:
        return template.format(label=self.label, count=len(texts), texts=prompts.numbered(texts))

    def _text(self, window: Window) -> str:
        return prompts.marked_text(window, self.strings)

    def _group(self, windows: Sequence[Window]) -> str:
        return "group\n" + "\n".join(f"  ({i + 1}) {self._text(w)}" for i, w in enumerate(windows))

    def _numbers(self, prompt: str, count: int, known: Any) -> list[int] | None:
        """So many numbers of the known; asked twice, then None."""
        assert self.endpoint is not None
        for _ in range(2):
            found = prompts.parsed(self.endpoint.ask(prompts.SYSTEM, prompt)).get("answers")
            if isinstance(found, list) and len(found) == count and all(a in known for a in found):
                return [int(a) for a in found]
        return None


def _asked_label(
    harvest: Harvest, asked: Questions, component: int, strings: Strings, endpoint: Endpoint
) -> str:
    answer = endpoint.ask(prompts.SYSTEM, prompts.label_prompt(harvest, asked, component, strings))
    said = prompts.parsed(answer).get("label", answer)
    words = str(said).replace("\n", " ").strip().strip('"').split()
    return " ".join(words[: prompts.MOST_WORDS])


# Files


def _about(harvest: Harvest, method: str, model: str, seed: int) -> dict[str, Any]:
    about = {"method": method, "model": model, "prompts": prompts.VERSION}
    return about | {"harvest": harvest.fingerprint, "seed": seed}


def _row(
    component: int, label: str, asked: Questions, found: dict[str, float | None]
) -> dict[str, Any]:
    counts = {f"num_{kind}": len(getattr(asked, kind)) for kind in CHANCE}
    return {"component": component, "label": label, **found, **counts}


def _file(about: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    return about | {"chance": CHANCE, "mean": mean_scores(rows), "components": rows}


@dataclasses.dataclass(frozen=True)
class _Progress:
    """A line that says of what, then a line for each component in their order."""

    path: epath.Path
    about: dict[str, Any]

    def rows(self) -> list[dict[str, Any]]:
        """Those that are there; the file begins anew where there is none.

        Raises:
          InputError: it is of something else.
        """
        lines = list(self._lines())
        if lines and lines[0] != json.loads(json.dumps(self.about)):
            raise InputError(
                f"{self.path} holds the beginning of other labels; remove it, or ask for the same."
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = lines or [self.about]  # without a torn last line
        self.path.write_text("".join(json.dumps(line) + "\n" for line in whole))
        return lines[1:]

    def add(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _lines(self) -> Iterator[Any]:
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    yield json.loads(line)
                except ValueError:  # torn by a kill
                    return
