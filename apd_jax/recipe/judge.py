"""What components are worth with the mask that they find: loss, activity and simplicity together.

Any components that sum to the network have no loss if all of them are on, and none costs anything
if none is on. So each of the three is measured under one mask, that of `polish` (an attribution
above its threshold) or, to compare two decompositions at equal activity, batch top-k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from apd_jax.components import Components
from apd_jax.methods.apd import APD
from apd_jax.network.problem import Problem
from apd_jax.recipe.numbers import DRAWS, Recipe, filled, stage_method
from apd_jax.recipe.scales import Scales
from apd_jax.train.state import begin_at
from apd_jax.train.step import make_step

BATCHES = 4  # over which components are judged


@dataclasses.dataclass(frozen=True)
class Worth:
    """Means over examples, under one mask.

    loss: distance from the target's outputs, 1 without the decomposed leaves.
    active: components that are on, beside those that always are.
    simplicity: the loss of that name, 1 for the whole network as one component, always on.
    """

    loss: float
    active: float
    simplicity: float

    @property
    def total(self) -> float:
        """1 for nothing, and 1 for the whole network as one component."""
        return self.loss + self.simplicity


class Judge:
    """Measures components of one instance on fresh batches of a problem.

    Cost: attributions and a sparse pass of BATCHES batches; one compilation for each mask and
      number of components that are always on.
    """

    def __init__(self, problem: Problem, method: APD, recipe: Recipe, scales: Scales):
        self._problem, self._method, self._scales = problem, method, scales
        self._recipe = recipe
        self._batches: list[Any] = []
        self._programs: dict[tuple[str, int], Callable[..., Any]] = {}
        key = jax.random.fold_in(jax.random.key(method.seed), DRAWS + 3)
        self._key = key

    def by_threshold(self, components: Components, num_always_on: int, k: float) -> Worth:
        """With the mask of `polish`, whose threshold k sets."""
        return self._measure("threshold", components, num_always_on, k)

    def by_topk(self, components: Components, num_always_on: int, k: float) -> Worth:
        """With the k components per example on average that have the largest attributions."""
        return self._measure("batch_topk", components, num_always_on, k)

    def without(self, components: Components, num_always_on: int) -> Worth:
        """With nothing on but what always is."""
        return self._measure("threshold", components, num_always_on, 0.0)

    def _measure(self, mask: str, components: Components, num_always_on: int, k: float) -> Worth:
        method = filled(self._method.replace(topk=0.0), num_always_on, max(k, 1e-9))
        settings = stage_method(method, self._recipe, "polish", self._scales)
        if (mask, num_always_on) not in self._programs:
            self._programs[mask, num_always_on] = self._program(settings.replace(mask=mask))
        measure = self._programs[mask, num_always_on]
        numbers = {"threshold": settings.threshold, "topk": settings.topk}
        numbers = {name: np.float32(value) for name, value in numbers.items()}
        found = [measure(components, self._problem.params, x, numbers) for x in self._drawn()]
        loss, active, simplicity = np.mean(np.array(found, np.float64), axis=0).tolist()
        return Worth(
            loss / self._scales.minimality,
            active - num_always_on,
            simplicity / self._scales.simplicity,
        )

    def _drawn(self) -> list[Any]:
        if not self._batches:
            self._batches = list(self._problem.looks(self._key, BATCHES))
        return self._batches

    def _program(self, settings: APD) -> Callable[..., Any]:
        settings = settings.replace(
            inactive="drop",
            importance_coeff=0.0,
            faithfulness_coeff=0.0,
            minimality_coeff=1.0,
            hidden_reconstruction_coeff=0.0,
            simplicity_coeff=1.0,
            simplicity_coeff_final=None,
            topk=float(settings.num_components - settings.num_always_on),
            num_instances=1,
        )
        step = make_step(self._problem, settings, fed=True, update=False)

        @jax.jit
        def measure(components: Components, params: Any, x: Any, numbers: Any) -> jax.Array:
            state = begin_at(components, self._problem, settings)
            rows = step(state, params, jax.random.key(0), x, numbers)[1]
            return jnp.stack([rows[name] for name in ("minimality", "mean_active", "simplicity")])

        return measure
