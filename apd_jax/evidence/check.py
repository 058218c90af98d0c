"""What a check is given, what it takes, and what it says."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import wadler_lindig as wl
from jaxtyping import PyTree

from apd_jax import evaluation as evaluation_lib
from apd_jax.components import Components
from apd_jax.decomposition import Decomposition
from apd_jax.evaluation.general import Evaluation
from apd_jax.evidence.subject import Subject, baselines, fired, make, norms
from apd_jax.methods.optimizers import Trained
from apd_jax.targets import scoring
from apd_jax.targets.base import Panel, Target

EVALUATION_BATCHES = 20
FIRING_BATCHES = 10
ERROR_BAR = 0.1  # the error that any permitted ablation may cause, as a part of `Case.scale`


@dataclasses.dataclass(frozen=True)
class Check:
    """One number of the card, with its bar.

    passed is None where there is no bar, or the check was not computed (`why` says so). Number,
    name and title are those of its `Question`.
    """

    number: int = 0
    name: str = ""
    title: str = ""
    passed: bool | None = None
    bar: str = ""
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text: str = ""
    why: str = ""
    budget: str = ""
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    # {heading: a value per row}, for the card
    columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    panels: Mapping[str, Panel] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        return wl.pformat(self)

    def to_json(self) -> dict[str, Any]:
        """All but arrays, columns and figures.

        Values that are not finite are left out: JSON has no word for them.
        """
        fields = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("arrays", "columns", "panels")
        }
        passed = None if self.passed is None else bool(self.passed)
        return fields | {
            "passed": passed,
            "values": {k: float(v) for k, v in self.values.items() if math.isfinite(v)},
        }


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a check takes, in pieces that are timed before it is begun; see `budget.Clock`.

    forward: sparse passes over all examples. gradient: such passes forward and back. gate: times
    that the gate is asked for its choice. programs: compiled, of the size of a sparse pass. runs:
    trainings of the size of this one. shared: (number of a check, programs) that are compiled
    too, unless that check was asked before.
    """

    forward: int | float = 0
    gradient: int | float = 0
    gate: int | float = 0
    programs: int | float = 0
    runs: int | float = 0
    shared: tuple[tuple[int, int | float], ...] = ()

    def __add__(self, other: Cost) -> Cost:
        pairs = ((f.name, getattr(other, f.name)) for f in dataclasses.fields(self))
        return Cost(**{name: getattr(self, name) + more for name, more in pairs})


@dataclasses.dataclass(frozen=True)
class Question:
    """A check before it is asked: a function of the case, with what it would take."""

    number: int
    name: str
    title: str
    ask: Callable[[Case], Check]
    cost: Callable[[Case], Cost]

    def __call__(self, case: Case) -> Check:
        return self.answer(self.ask(case))

    def answer(self, found: Check) -> Check:
        return dataclasses.replace(found, number=self.number, name=self.name, title=self.title)


def asks(
    number: int, name: str, title: str, cost: Callable[[Case], Cost] = lambda case: Cost()
) -> Callable[[Callable[[Case], Check]], Question]:
    """Makes a function Case -> Check one of the nineteen."""
    return lambda ask: Question(number, name, title, ask, cost)


@dataclasses.dataclass(frozen=True)
class Case:
    """All that a check may ask for."""

    subject: Subject
    decomposition: Decomposition
    key: Any  # of every random draw
    draw: Callable[[int], PyTree]  # i -> held-out batch i
    num_batches: int  # how many batches there are to draw
    target: Target | None = None
    seeds: Sequence[Trained] = ()  # other seeds: runs on this target by the same settings
    other: Components | None = None  # another run of this target, to be compared with
    # {step: what was trained} of the other checkpoints
    earlier: Mapping[int, Trained] = dataclasses.field(default_factory=dict)
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bits_per_rank: float = 1.0
    full: bool = False

    @functools.cached_property
    def evaluation(self) -> Evaluation | None:
        """The target's own metrics, on a few batches; None without a target."""
        if self.target is None:
            return None
        d = self.decomposition
        return evaluation_lib.evaluate(
            self.target, d, num_batches=EVALUATION_BATCHES, seed=d.method.seed
        )

    @functools.cached_property
    def scale(self) -> float:
        """The error that all errors are measured by: the less of the two `baselines`."""
        return min(self._baselines)

    @functools.cached_property
    def _baselines(self) -> tuple[float, float]:
        constant, none = baselines(self.subject)
        return float(constant), float(none)

    def relative(self, error: Any) -> float:
        """An error in units of `scale`; the error itself where that is 0."""
        return float(error) / (self.scale or 1.0)

    @functools.cached_property
    def alive(self) -> tuple[np.ndarray, np.ndarray]:
        """Firing rates [C] on held-out batches, and which components live.

        Those that are kept somewhere, with more than ALIVE_NORM of the largest norm.
        """
        rates, s = [fired(self.subject)], self.subject
        for i in range(1, min(FIRING_BATCHES, self.num_batches)):
            rates.append(fired(make(s.setting, s.params, s.trained, self.draw(i))))
        rate = np.mean(jax.device_get(rates), axis=0)
        return rate, scoring.alive_components(rate, np.asarray(norms(s.components)))

    def about(self, subject: Subject) -> Case:
        """The same case about another subject."""
        return dataclasses.replace(self, subject=subject)

    @property
    def examples(self) -> str:
        lead = self.subject.mask.shape[:-1]
        return f"{lead[0]} examples" + (f" of {lead[1]} positions" if len(lead) > 1 else "")

    @property
    def row(self) -> str:
        """What has a mask of its own."""
        return "position" if self.decomposition.method.per_position else "input"

    @property
    def unit(self) -> str:
        """What `scale` is, in words."""
        constant, none = self._baselines
        if none < constant:
            return "error without any component"
        words = {"mse": "output variance", "kl": "best constant output's KL divergence"}
        return words.get(str(self.decomposition.method.distance), "constant output's loss")
