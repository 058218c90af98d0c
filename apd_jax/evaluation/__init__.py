"""Metrics and evidence: reads a decomposition, changes nothing."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import PyTree

from apd_jax.components import Components
from apd_jax.decomposition import Decomposition
from apd_jax.evaluation import features, general
from apd_jax.evaluation.general import Evaluation
from apd_jax.methods.config import Config
from apd_jax.targets.base import FeatureTarget, Target
from apd_jax.targets.scoring import alive_components


def evaluate(target: Target, params: PyTree, components: Components, config: Config) -> Evaluation:
    """All that is known how to measure: see `features.evaluate` for targets made of features, `general.evaluate` for the others.

    A target that has a `score_fn` of its own is asked too.
    """
    measure = features.evaluate if isinstance(target, FeatureTarget) else general.evaluate
    evaluation = measure(target, params, components, config)
    if target.score_fn is None:
        return evaluation
    key = jax.random.fold_in(jax.random.key(config.evaluation.seed), general.STREAM + 1)
    alive = alive_components(
        evaluation.arrays["firing_rates"], evaluation.arrays["component_norms"]
    )
    score = target.score_fn(
        Decomposition(target.problem(params), components, config.apd, []), key, alive
    )
    return dataclasses.replace(
        evaluation,
        metrics=score.metrics | evaluation.metrics,
        labels=score.labels,
        panels=evaluation.panels | score.panels,
    )


__all__ = ["Evaluation", "evaluate"]
