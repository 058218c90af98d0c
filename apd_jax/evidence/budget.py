"""Time: what a check would take, told from a small piece of it, and how much is left."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from apd_jax.evidence.check import Case, Cost
from apd_jax.evidence.subject import errors, make

GRADIENT = 3.0  # a pass forward and back, in passes forward
LEAST = 0.2  # seconds of a check from which the others' pace is told


class Clock:
    """A budget that began to run at `started` (of `time.monotonic`), and the pieces of this case.

    Every piece is timed once, when a check first needs it. Where a check took longer than expected,
    all others are expected to be off by as much.
    """

    def __init__(self, case: Case, budget: float, started: float):
        self._case, self._end, self.budget = case, started + budget, budget
        self._slower, self._asked = 1.0, set[int]()

    @property
    def left(self) -> float:
        return max(self._end - time.monotonic(), 0.0)

    def expects(self, cost: Cost) -> int | float:
        """Seconds that a check would take, at the pace of those before."""
        return self._slower * self._by_pieces(cost)

    def learn(self, number: int, cost: Cost, took: float) -> None:
        """What a check took, in seconds."""
        if (alone := self._by_pieces(cost)) > LEAST:
            self._slower = max(self._slower, took / alone)
        self._asked.add(number)

    def _by_pieces(self, cost: Cost) -> int | float:
        passes = cost.forward + GRADIENT * cost.gradient
        found = cost.gate * self._gate if cost.gate else 0.0
        programs = cost.programs + sum(n for i, n in cost.shared if i not in self._asked)
        if passes or programs:
            compiled, forward = self._forward
            found += passes * forward + programs * compiled
        return found + (cost.runs * self._run if cost.runs else 0.0)

    @functools.cached_property
    def _forward(self) -> tuple[float, float]:
        """Seconds to compile a sparse pass over the examples, and to run it."""
        subject = self._case.subject
        first, second = (_timed(lambda: errors(subject, subject.mask)) for _ in range(2))
        return max(first - second, 0.0), second

    @functools.cached_property
    def _gate(self) -> float:
        s = self._case.subject
        return _timed(lambda: make(s.setting, s.params, s.trained, s.x).mask)

    @functools.cached_property
    def _run(self) -> float:
        """Seconds of a training like this one: by its log, else by passes of its size."""
        d = self._case.decomposition
        logged = [row["seconds_per_step"] for row in d.history if "seconds_per_step" in row]
        if logged:
            return d.method.num_steps * float(np.median(logged))
        return d.method.num_steps * (self._gate + 2 * GRADIENT * self._forward[1])


def _timed(work: Callable[[], Any]) -> float:
    began = time.monotonic()
    jax.block_until_ready(jnp.asarray(work()))
    return time.monotonic() - began
