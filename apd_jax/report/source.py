"""What a report is made from, and the sizes of its components."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from apd_jax import components as components_lib
from apd_jax.decomposition import Decomposition
from apd_jax.report.words import Words
from apd_jax.targets.base import Target


@dataclasses.dataclass(frozen=True)
class Source:
    """What a report is made from.

    Only the name and the decomposition (of one instance) are needed. The page leaves out what
    depends on fields that are not given.
    """

    name: str
    decomposition: Decomposition
    x: PyTree = None  # inputs [B, ...]
    target: Target | None = None
    # the config, nested
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # metrics of the evaluation, and with them step, seed, device and minutes
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # arrays of the evaluation, for targets whose inputs are features
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    evidence: Mapping[str, Any] | None = None  # the content of evidence.json
    evidence_command: str = ""  # the command that makes the evidence, where there is none yet
    figures: Sequence[str] = ()  # paths relative to the page
    # (label, path relative to the page) of every instance, if there are several
    instances: Sequence[tuple[str, str]] = ()
    instance: int = 0
    words: Words | None = None  # what tokens are called: integer inputs, and outputs after them


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Norms and effective ranks of all components."""

    norms: dict[str, np.ndarray]  # {site: [C]}
    ranks: dict[str, np.ndarray]  # {site: [C]}
    target: dict[str, float]  # {site: norm of the target's leaf}

    @classmethod
    def of(cls, d: Decomposition) -> Sizes:
        squares = jax.device_get(components_lib.squared_norms(d.components))
        leaves = components_lib.decomposed_leaves(d.components, d.problem.params)
        return cls(
            {name: np.sqrt(np.maximum(square, 0)) for name, square in squares.items()},
            jax.device_get(components_lib.effective_ranks(d.components)),
            {name: float(np.linalg.norm(leaf)) for name, leaf in leaves.items()},
        )

    @functools.cached_property
    def whole(self) -> np.ndarray:
        """Norm of every component over all its sites, [C]."""
        return np.sqrt(np.sum([norm**2 for norm in self.norms.values()], axis=0))
