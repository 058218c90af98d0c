r"""Windows of text as questions of which the answer is known: is this what the component is on?

  detection  (Paulo et al. 2024)  plain windows, half of them with the component on somewhere, half
             with it off throughout: which are which?                              chance 1/2
  fuzzing    (Paulo et al. 2024)  windows in which it is on, with tokens marked: in half of them
             those on which it is on, in half as many others: which are right?     chance 1/2
  intruder   (Chang et al. 2009)  four windows with what it is on marked, and one in which it is
             off, with as many others marked: which does not belong?               chance 1/5

A score is the mean probability that is given to the right answer, and chance is that of one who
knows nothing. A label or rule is made from `shown`; what is asked about is none of these.

Shapes: C components, n windows of W tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
import wadler_lindig as wl
from jaxtyping import Bool, Float, Int

from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.evaluation.language import counted
from apd_jax.interpretation.harvest import Harvest
from apd_jax.language.tokens import PAD

CHANCE = {"detection": 0.5, "fuzzing": 0.5, "intruder": 0.2}
SHOWN = 30  # windows at most that a label is made from
GROUP = 5  # windows of a question for an intruder
TRIALS = 6  # of these questions


@dataclasses.dataclass(frozen=True)
class Window:
    """tokens: PAD outside of the row, and at its last token, where gates say nothing.

    marked: what is pointed at.
    """

    tokens: Int[np.ndarray, " W"]
    marked: Bool[np.ndarray, " W"]

    def __repr__(self) -> str:
        return wl.pformat(self)

    @property
    def plain(self) -> Bool[np.ndarray, " W"]:
        """The other tokens."""
        return ~self.marked & (self.tokens != PAD)


@dataclasses.dataclass(frozen=True)
class Questions:
    """Of one component. The lists may be empty, where it is on too rarely or everywhere.

    quiet: windows to make a rule from in which it is off. detection, fuzzing: with the answer.
    intruder: with the place of the intruder.
    """

    shown: list[Window]
    quiet: list[Window]
    detection: list[tuple[Window, bool]]
    fuzzing: list[tuple[Window, bool]]
    intruder: list[tuple[list[Window], int]]


@runtime_checkable
class Judge(Protocol):
    """Who answers: a rule, or a language model with a label. None: no answer."""

    def detection(self, windows: Sequence[Window]) -> Sequence[float] | None:
        """The probability that each is on."""
        ...

    def fuzzing(self, windows: Sequence[Window]) -> Sequence[float] | None:
        """The probability that each is marked right."""
        ...

    def intruder(self, groups: Sequence[Sequence[Window]]) -> Sequence[Sequence[float]] | None:
        """Of each window of each group the probability that it is the intruder."""
        ...


def questions(
    harvest: Harvest, quiet: Int[np.ndarray, "C n W"], component: int, seed: int = 0
) -> Questions:
    """Those about one component, a function of the arguments alone.

    Windows that a label is made from are the strongest; those that are asked about are the random
    ones of the harvest, without any that are among the shown.

    Args:
      quiet: see `quiet_windows`; every other one is for making rules.
    """
    rng = np.random.default_rng([seed, component])
    shown = _windows(harvest, "top", component)[:SHOWN]
    known = {window.tokens.tobytes() for window in shown}
    tested = [w for w in _windows(harvest, "random", component) if w.tokens.tobytes() not in known]
    there = [t for t in quiet[component] if t[len(t) // 2] != PAD]
    plain = [Window(t, np.zeros(len(t), bool)) for t in there]
    silent = plain[1::2]
    pairs = min(len(tested), len(silent))
    detection = [(_unmarked(w), True) for w in tested[:pairs]]
    detection += [(w, False) for w in silent[:pairs]]
    return Questions(
        shown,
        plain[::2],
        _shuffled(detection, rng),
        _shuffled(_marked_right_and_wrong(tested, rng), rng),
        _groups(tested, silent, rng),
    )


def scores(asked: Questions, judge: Judge) -> dict[str, float | None]:
    """The judge's score of each kind; None where nothing was asked or answered."""
    found: dict[str, float | None] = dict.fromkeys(CHANCE)
    for kind in ("detection", "fuzzing"):
        pairs = getattr(asked, kind)
        if not pairs:
            continue
        answers = getattr(judge, kind)([window for window, _ in pairs])
        if answers is not None:
            right = [p if true else 1 - p for p, (_, true) in zip(answers, pairs, strict=True)]
            found[kind] = float(np.mean(right))
    if asked.intruder:
        guesses = judge.intruder([group for group, _ in asked.intruder])
        if guesses is not None:
            right = [p[at] for p, (_, at) in zip(guesses, asked.intruder, strict=True)]
            found["intruder"] = float(np.mean(right))
    return found


def quiet_windows(
    decomposition: Decomposition,
    batches: Iterable[Any],
    *,
    count: int = 16,
    width: int = 41,
    threshold: float = 0.0,
    seed: int = 0,
) -> Int[np.ndarray, "C n W"]:
    """Windows of text, `count` of each component, in which it is off throughout: g ≤ threshold.

    Drawn from all such windows of the first batches [B, T] that are needed; PAD where a component
    has fewer. Components that are on together nearly everywhere have none.

    Cost: per batch the gate. Memory: B·T·C floats.
    Raises:
      InputError: masks of whole sequences.
    """
    C, half = decomposition.components.num_components, width // 2
    found, have = np.full((C, count, width), PAD, np.int32), np.zeros(C, np.int64)
    rng = np.random.default_rng(seed)
    for batch in batches:
        tokens = np.asarray(batch)
        values = np.asarray(decomposition.activity(tokens).values)
        if values.ndim != 3:
            raise InputError("labels are of components that are on at positions, not sequences.")
        candidates = np.argwhere(np.asarray(counted(decomposition.problem, jnp.asarray(tokens))))
        near = _near(values > threshold, half)
        wide = np.pad(tokens, ((0, 0), (half, half)), constant_values=PAD)
        order = rng.permutation(len(candidates))
        for c in np.flatnonzero(have < count):
            rows, places = candidates[order].T
            off = np.flatnonzero(~near[rows, places, c])[: count - have[c]]
            for i in off:
                at = places[i]
                found[c, have[c]] = _followed(wide[rows[i], at : at + width])
                have[c] += 1
        if (have == count).all():
            break
    return found


def _near(on: Bool[np.ndarray, "B T C"], half: int) -> Bool[np.ndarray, "B T C"]:
    """Whether it is on anywhere within `half` positions."""
    T = on.shape[1]
    sums = np.pad(np.cumsum(on, axis=1, dtype=np.int32), ((0, 0), (1, 0), (0, 0)))
    places = np.arange(T)
    ends, starts = np.minimum(places + half + 1, T), np.maximum(places - half, 0)
    return sums[:, ends] > sums[:, starts]


def _followed(tokens: Int[np.ndarray, "*n W"]) -> Int[np.ndarray, "*n W"]:
    """Without tokens of which the next is not there: they may be the last of a row."""
    after = np.concatenate([tokens[..., 1:], np.full_like(tokens[..., :1], PAD)], axis=-1)
    return np.where(after != PAD, tokens, PAD)


def _windows(harvest: Harvest, kind: str, component: int) -> list[Window]:
    tokens = _followed(getattr(harvest, f"{kind}_tokens")[component])
    activity = getattr(harvest, f"{kind}_activity")[component]
    return [
        Window(t, (a > harvest.threshold) & (t != PAD))
        for t, a in zip(tokens, activity, strict=True)
        if t[len(t) // 2] != PAD
    ]


def _unmarked(window: Window) -> Window:
    return Window(window.tokens, np.zeros_like(window.marked))


def _others(window: Window, count: int, rng: np.random.Generator) -> Window | None:
    """With `count` other tokens marked instead; None where there are no others."""
    free = np.flatnonzero(window.plain)
    if not len(free):
        return None
    marked = np.zeros_like(window.marked)
    marked[rng.choice(free, min(count, len(free)), replace=False)] = True
    return Window(window.tokens, marked)


def _marked_right_and_wrong(
    windows: list[Window], rng: np.random.Generator
) -> list[tuple[Window, bool]]:
    """As many of the one as of the other, each window once."""
    wrong, right = [], []
    for window in windows:
        other = _others(window, int(window.marked.sum()), rng)
        if len(wrong) <= len(right) and other is not None:
            wrong.append(other)
        else:
            right.append(window)
    pairs = min(len(wrong), len(right))
    return [(w, True) for w in right[:pairs]] + [(w, False) for w in wrong[:pairs]]


def _groups(
    tested: list[Window], silent: list[Window], rng: np.random.Generator
) -> list[tuple[list[Window], int]]:
    found: list[tuple[list[Window], int]] = []
    if len(tested) < GROUP - 1 or not silent:
        return found
    for _ in range(TRIALS):
        members = [tested[i] for i in rng.choice(len(tested), GROUP - 1, replace=False)]
        count = int(members[0].marked.sum())
        intruder = _others(silent[rng.integers(len(silent))], count, rng)
        assert intruder is not None  # the centre of a silent window counts, and is not marked
        at = int(rng.integers(GROUP))
        found.append(([*members[:at], intruder, *members[at:]], at))
    return found


def _shuffled(pairs: list[Any], rng: np.random.Generator) -> list[Any]:
    return [pairs[i] for i in rng.permutation(len(pairs))]


def mean_scores(rows: Iterable[dict[str, Any]]) -> dict[str, float | None]:
    """The mean over components that have a score, of each kind."""
    given = list(rows)
    found: dict[str, float | None] = {}
    for kind in CHANCE:
        values: Float[np.ndarray, " n"] = np.array([r[kind] for r in given if r[kind] is not None])
        found[kind] = float(values.mean()) if len(values) else None
    return found
