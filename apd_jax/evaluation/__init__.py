"""Metrics and evidence: reads a decomposition, changes nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from apd_jax.decomposition import Decomposition
from apd_jax.evaluation import features, general
from apd_jax.evaluation.general import Evaluation
from apd_jax.targets.base import FeatureTarget, Target
from apd_jax.targets.scoring import alive_components


def evaluate(
    target: Target, decomposition: Decomposition, *, num_batches: int, seed: int
) -> Evaluation:
    """All that is known how to measure of one instance, on fresh batches of `target.sample_fn`.

    `features.evaluate` for targets made of features, `general.evaluate` for the others; and a
    target's own `score_fn` where it has one.
    """
    features_known = isinstance(target, FeatureTarget)
    measure: Any = features.evaluate if features_known else general.evaluate
    evaluation = measure(target, decomposition, num_batches=num_batches, seed=seed)
    if target.score_fn is None:
        return evaluation
    key = jax.random.fold_in(jax.random.key(seed), general.STREAM + 1)
    alive = alive_components(
        evaluation.arrays["firing_rates"], evaluation.arrays["component_norms"]
    )
    score = target.score_fn(decomposition, key, alive)
    return dataclasses.replace(
        evaluation,
        metrics=score.metrics | evaluation.metrics,
        labels=score.labels,
        panels=evaluation.panels | score.panels,
    )


__all__ = ["Evaluation", "evaluate"]
