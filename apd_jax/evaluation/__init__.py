"""Metrics and evidence: reads a decomposition, changes nothing."""

from apd_jax.evaluation.summary import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
