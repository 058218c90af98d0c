"""What a check says, and what it is given."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import PyTree

from apd_jax.components import Components
from apd_jax.decomposition import Decomposition
from apd_jax.evaluation.general import Evaluation
from apd_jax.evidence.subject import Subject, baselines
from apd_jax.methods.optimizers import Trained
from apd_jax.targets.base import Panel, Target

ERROR_BAR = 0.1  # the error that any permitted ablation may cause, as a part of `Case.scale`


@dataclasses.dataclass(frozen=True)
class Check:
    """One number of the card, with its bar.

    passed is None where there is no bar, or the check was not computed (`why` says so).
    """

    number: int
    name: str
    title: str
    passed: bool | None = None
    bar: str = ""
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text: str = ""
    why: str = ""
    budget: str = ""
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    panels: Mapping[str, Panel] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All but arrays and figures.

        Values that are not finite are left out: JSON has no word for them.
        """
        fields = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("arrays", "panels")
        }
        passed = None if self.passed is None else bool(self.passed)
        return fields | {
            "passed": passed,
            "values": {k: float(v) for k, v in self.values.items() if math.isfinite(v)},
        }


@dataclasses.dataclass(frozen=True)
class Case:
    """All that a check may ask for."""

    subject: Subject
    decomposition: Decomposition
    key: Any  # of every random draw
    draw: Callable[[int], PyTree]  # i -> held-out batch i
    num_batches: int  # how many batches there are to draw
    target: Target | None = None
    evaluation: Evaluation | None = None
    seeds: Sequence[Trained] = ()  # other seeds: runs on this target by the same settings
    other: Components | None = None  # another run of this target, to be compared with
    # {step: what was trained} of the other checkpoints
    earlier: Mapping[int, Trained] = dataclasses.field(default_factory=dict)
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bits_per_rank: float = 1.0
    full: bool = False

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

    @property
    def examples(self) -> str:
        return f"{self.subject.mask.shape[0]} examples"

    @property
    def unit(self) -> str:
        """What `scale` is, in words."""
        constant, none = self._baselines
        if none < constant:
            return "error without any component"
        mse = self.decomposition.method.minimality_loss == "mse"
        return "output variance" if mse else "best constant output's KL divergence"
