"""Metrics and evidence: reads a decomposition, changes nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from apd_jax.decomposition import Decomposition
from apd_jax.evaluation import features, general, language
from apd_jax.evaluation.general import Evaluation
from apd_jax.targets.base import FeatureTarget, Target
from apd_jax.targets.language import LanguageTarget
from apd_jax.targets.scoring import alive_components


def evaluate(
    target: Target | None,
    decomposition: Decomposition,
    *,
    num_batches: int,
    seed: int,
    thorough: bool = False,
) -> Evaluation:
    """All that is known how to measure of one instance, on fresh batches of `target.fresh_fn`.

    Of a network of one's own, without a target, on batches of the decomposition's data.
    `features.evaluate` for targets made of features, `general.evaluate` for the others, and beside
    it `language.evaluate` for language models; and a target's own `score_fn` where it has one.

    thorough: what costs much more than the rest too, where there is such a thing.
    """
    features_known = isinstance(target, FeatureTarget)
    measure: Any = features.evaluate if features_known else general.evaluate
    evaluation = measure(target, decomposition, num_batches=num_batches, seed=seed)
    if isinstance(target, LanguageTarget):
        batches = language.drawn(target.fresh_fn, num_batches, seed)
        metrics = language.evaluate(
            decomposition, batches, seed=seed, thorough=thorough, num_batches=num_batches
        )
        evaluation = dataclasses.replace(
            evaluation, metrics=metrics | evaluation.metrics, grids=(language.grid(metrics),)
        )
    if target is None or target.score_fn is None:
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
