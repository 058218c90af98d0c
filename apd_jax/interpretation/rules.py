"""Labels without a language model: the one token, n-gram or place that says best when one is on.

A rule fires at a position. Of the candidates that the shown windows suggest, the best has the
largest balanced accuracy over their positions and those of windows in which the component is off:

  (share of active positions at which it fires + share of others at which it does not) / 2

It is then asked the questions that labels are asked. A label that knows more than a rule must do
better than this.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int

from apd_jax.interpretation.harvest import Harvest
from apd_jax.interpretation.questions import Questions, Window
from apd_jax.language.tokens import PAD

_PLACES = (1, 2, 4, 8, 16)
_COMMONEST = 8  # tokens and n-grams of each kind that are tried


@dataclasses.dataclass(frozen=True)
class Rule:
    """ngram: fires where these tokens end, `behind` positions after their last. first: in the
    first so many positions of a row instead, as far as the window shows where the row begins.
    """

    ngram: tuple[int, ...] = ()
    behind: int = 0
    first: int = 0

    def fires(self, tokens: Int[np.ndarray, "*n W"]) -> Bool[np.ndarray, "*n W"]:
        inside = tokens != PAD
        if self.first:
            return (np.cumsum(inside, axis=-1) <= self.first) & inside & ~inside[..., :1]
        found = inside.copy()
        for back, token in enumerate(reversed(self.ngram)):
            found &= _shifted(tokens, back + self.behind) == token
        return found

    def says(self, strings: Callable[[Sequence[int]], Sequence[str]]) -> str:
        """In words."""
        if self.first:
            return "first token" if self.first == 1 else f"first {self.first} tokens"
        if not self.ngram:
            return "nothing known"
        text = "".join(strings(list(self.ngram))).replace("\n", "\\n")
        return f'after "{text}"' if self.behind else f'"{text}"'

    # As a judge of windows.

    def detection(self, windows: Sequence[Window]) -> list[float]:
        """It is on where the rule fires anywhere."""
        return [float(self.fires(window.tokens).any()) for window in windows]

    def fuzzing(self, windows: Sequence[Window]) -> list[float]:
        """Marks are right if the rule fires more often on them than elsewhere; 1/2 if equally."""
        return [float((1 + np.sign(self._contrast(window))) / 2) for window in windows]

    def intruder(self, groups: Sequence[Sequence[Window]]) -> list[list[float]]:
        """The window in which that holds least; equal ones share the guess."""
        found = []
        for group in groups:
            contrast = np.array([self._contrast(window) for window in group])
            least = contrast == contrast.min()
            found.append((least / least.sum()).tolist())
        return found

    def _contrast(self, window: Window) -> float:
        """Share of marked tokens at which it fires, less that of the others."""
        fires = self.fires(window.tokens)
        return _share(fires, window.marked) - _share(fires, window.plain)


def best_rule(harvest: Harvest, asked: Questions, component: int) -> Rule:
    """The best of the candidates; of equal ones the simplest. Without any, one that never fires."""
    windows = [*asked.shown, *asked.quiet]
    if not asked.shown:
        return Rule()
    tokens = np.stack([window.tokens for window in windows])
    on = np.stack([window.marked for window in windows])
    off = np.stack([window.plain for window in windows])
    seeds = [int(t) for t in harvest.input_token[component] if t >= 0]
    best, most = Rule(), 0.5
    for rule in _candidates(tokens, on, seeds):
        fires = rule.fires(tokens)
        score = (_share(fires, on) + 1 - _share(fires, off)) / 2
        if score > most + 1e-9:
            best, most = rule, score
    return best


def _candidates(
    tokens: Int[np.ndarray, "n W"], on: Bool[np.ndarray, "n W"], seeds: Sequence[int]
) -> Iterator[Rule]:
    """Simple ones first."""
    before = [_shifted(tokens, back)[on] for back in range(3)]
    singles = [t for (t,) in _commonest(before[:1])]
    yield from (Rule((token,)) for token in dict.fromkeys([*singles, *seeds[:_COMMONEST]]))
    yield from (Rule(first=count) for count in _PLACES)
    yield from (Rule(gram, behind=1) for gram in _commonest(before[1:2]))
    yield from (Rule(gram) for gram in _commonest(before[1::-1]))
    yield from (Rule(gram) for gram in _commonest(before[::-1]))
    yield from (Rule(gram, behind=1) for gram in _commonest(before[:0:-1]))


def _commonest(columns: Sequence[np.ndarray]) -> list[tuple[int, ...]]:
    """The commonest n-grams of tokens side by side, without PAD."""
    grams = Counter(zip(*(column.tolist() for column in columns), strict=True))
    ordered = sorted(grams.items(), key=lambda item: (-item[1], item[0]))
    return [gram for gram, _ in ordered if PAD not in gram][:_COMMONEST]


def _shifted(tokens: Int[np.ndarray, "*n W"], back: int) -> Int[np.ndarray, "*n W"]:
    """At each position the token so many before; PAD where the window has none."""
    if back == 0:
        return tokens
    return np.concatenate([np.full_like(tokens[..., :back], PAD), tokens[..., :-back]], axis=-1)


def _share(fires: np.ndarray, where: np.ndarray) -> float:
    return float(fires[where].mean()) if where.any() else 0.0
