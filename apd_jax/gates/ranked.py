"""Gates on attributions: by rank, by a threshold, by a learned threshold per component; and all.

Shapes: B examples, T positions, C components. Padding keeps nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from apd_jax.collectives import num_devices
from apd_jax.errors import InputError
from apd_jax.gates import selection
from apd_jax.gates.base import (
    ATTRIBUTIONS,
    Activity,
    Observation,
    Rule,
    at_valid,
    count_over,
    hard,
    in_words,
    rows_of,
)

SLOPE = 8.0
_LEAST = 1e-20  # below any attribution
_READS = frozenset({ATTRIBUTIONS})


def _scores(seen: Observation) -> Float[Array, "B *T C"]:
    assert seen.attributions is not None, "this gate reads attributions"
    return seen.attributions


def _flat_valid(seen: Observation, scores: Array) -> Array | None:
    return None if seen.valid is None or scores.ndim == 2 else seen.valid.reshape(-1)


@dataclasses.dataclass(frozen=True)
class BatchTopK:
    """The ⌊k·B⌋ largest attributions of the whole batch (APD): k per example on average."""

    k: Any
    reads = _READS

    @property
    def says(self) -> str:
        return f"k = {in_words(self.k)}"

    def rule(self) -> Rule:
        return Rule()

    def __call__(self, seen: Observation) -> Activity:
        scores = _scores(seen)
        rows = math.prod(scores.shape[:-1]) * num_devices(seen.axis_name)
        if not isinstance(self.k, Tracer) and self.k * rows < 1:
            raise InputError(
                f"batch top-k with k = {self.k:g} keeps {self.k * rows:.2g} pairs of a batch of "
                f"{rows}, so none; give larger batches, or judge inputs alone by "
                "mask(x, cut=decomposition.cut(many))."
            )
        mask = selection.batch_topk(
            rows_of(scores), self.k, valid=_flat_valid(seen, scores), **seen.axes
        )
        return hard(mask.reshape(scores.shape), scores)


@dataclasses.dataclass(frozen=True)
class TopK:
    """The k largest attributions of every example, or of every position."""

    k: Any
    reads = _READS

    @property
    def says(self) -> str:
        return f"k = {in_words(self.k)} of every input"

    def rule(self) -> Rule:
        return Rule(top=int(self.k))

    def __call__(self, seen: Observation) -> Activity:
        scores = _scores(seen)
        mask = selection.topk(rows_of(scores), self.k, component_axis=seen.component_axis)
        return hard(at_valid(mask.reshape(scores.shape), seen.valid), scores)


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Attributions above a threshold, in units of the output."""

    threshold: ArrayLike
    reads = _READS

    @property
    def says(self) -> str:
        return f"threshold {in_words(self.threshold, '.3g')}"

    def rule(self) -> Rule:
        return Rule(cuts=float(self.threshold))

    def __call__(self, seen: Observation) -> Activity:
        scores = _scores(seen)
        return hard(at_valid(scores > self.threshold, seen.valid), scores)


@dataclasses.dataclass(frozen=True)
class Exact:
    """As many of the whole batch as features are truly active, which a toy target can tell.

    num_active_fn: x -> [B].
    """

    num_active_fn: Callable
    reads = _READS
    says = "as many as features are active"

    def rule(self) -> Rule:
        return Rule()

    def __call__(self, seen: Observation) -> Activity:
        scores = _scores(seen)
        num = count_over(self.num_active_fn(seen.x), seen.axis_name)
        valid, rows = _flat_valid(seen, scores), rows_of(scores)
        if valid is not None:  # padding takes nobody's place
            rows = jnp.where(valid[:, None], rows, -jnp.inf)
        mask = selection.batch_largest(rows, num, **seen.axes)
        return hard(at_valid(mask.reshape(scores.shape), seen.valid), scores)


@dataclasses.dataclass(frozen=True)
class All:
    """Every component on every input: for losses that choose otherwise (APD's L_p variant).

    like: the shape [B, *T, C] where no attributions are taken.
    """

    reads = frozenset[str]()
    says = "all"
    like: Callable[[Observation], tuple[int, ...]] | None = None

    def rule(self) -> Rule:
        return Rule(everything=True)

    def __call__(self, seen: Observation) -> Activity:
        if seen.attributions is not None:
            scores = seen.attributions
        else:
            B = jax.tree.leaves(seen.x)[0].shape[0]
            shape = (B, seen.components.num_components) if self.like is None else self.like(seen)
            scores = jnp.zeros(shape)
        mask = jnp.ones(scores.shape, jnp.bool_)
        return hard(at_valid(mask, seen.valid), scores)


@dataclasses.dataclass(frozen=True)
class LearnedThreshold:
    """g_c(x) = σ(SLOPE · log(A_c(x) / τ_c)), with a trained threshold τ_c per component.

    0.5 where the attribution A_c is τ_c, 0.996 at 2 τ_c, 0.004 at τ_c/2. In the sparse pass g_c
    takes the place of 0 and 1, so τ_c feels what dropping costs; a price on Σ_c g_c(x) makes it
    feel what keeping costs. This is a causal importance (SPD, Bushnaq et al. 2025) for components
    of the whole network. Attributions count as constants.
    """

    log_thresholds: Float[Array, " C"]
    reads = _READS
    says = "learned thresholds"

    def rule(self) -> Rule:
        return Rule(cuts=jnp.exp(self.log_thresholds))

    def __call__(self, seen: Observation) -> Activity:
        scores = _scores(seen)
        # A component that another gate keeps on (-inf here) must not make NaN of the gradient.
        known = jnp.maximum(lax.stop_gradient(scores), _LEAST)
        tau = self.log_thresholds.reshape(*[1] * (scores.ndim - 1), -1)
        g = at_valid(jax.nn.sigmoid(SLOPE * (jnp.log(known) - tau)), seen.valid)
        active = at_valid(scores > jnp.exp(tau), seen.valid)
        return Activity(g, active, scores, g)
