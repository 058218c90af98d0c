"""How good each of many runs is: by criteria that need no truth, and against the truth where it is known.

Shapes: R runs, C components, F features, d the length of a feature's vector. Components have a leading R. Every criterion is best small.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from apd_jax.components import Components
from apd_jax.evaluation import geometry
from apd_jax.evaluation.general import STREAM
from apd_jax.evidence import ablate, length
from apd_jax.evidence.subject import Setting, baselines, errors, make
from apd_jax.methods.config import Config
from apd_jax.network.problem import Problem
from apd_jax.targets.base import FeatureTarget, Target
from apd_jax.train import loop as train
from apd_jax.train import step as step_lib

CRITERIA = {
    "reference_loss": "loss at the config's own k, coefficients and p",
    "sparse_error": "error at the config's k, part of that without components",
    "bits": "description length within the error bar, bits per datapoint",
    "worst_error": "worst error found by ablation, part of that without components",
}
TRUTH = ("success", "mmcs", "ml2r", "num_features_owned")
ATTACK_STEPS = 20
BITS_PER_RANK = 1.0


def criteria(
    problem: Problem, config: Config, components: Components, seed: int
) -> dict[str, Float[np.ndarray, " R"]]:
    """Every run by the same measure, whatever it was trained with: on one held-out batch, with the k, coefficients and p of `config`.

    reference_loss: the loss of the last train step, had the run been trained with `config`.
    sparse_error: D(target, sparse) with the config's k, in units of what an output is off that owes the components nothing.
    bits: of the active components (`evidence.length.bits`) at the smallest k whose error is within ERROR_BAR of that unit; infinite if
      there is none.
    worst_error: the same unit with the k of the config, inactive components scaled by the factors in [0, 1] that ATTACK_STEPS of
      projected gradient ascent find, shared over the batch.
    A run whose components or losses are not finite has infinity for all.

    Args:
      config: the reference, not that of the runs.
      seed: of the held-out batch.
    Cost: for every run, one after another, ATTACK_STEPS sparse passes forward and back, and as many passes as values of k.
    """
    key = jax.random.fold_in(jax.random.key(seed), STREAM)
    x = jax.jit(problem.sample_fn)(key, jnp.zeros((), jnp.int32))
    ks = length.grid(config, config.num_components)
    setting, loss = Setting(problem, config), _loss_fn(problem, config)

    def judged(components: Components) -> list[float]:
        total = float(loss(components, problem.params, key, x))
        if not all(
            np.isfinite(leaf).all()
            for leaf in [total, *map(np.asarray, jax.tree.leaves(components))]
        ):
            return [np.inf] * len(CRITERIA)
        subject = make(setting, problem.params, train.finished(components, config), x)
        scale = float(jnp.minimum(*baselines(subject))) or 1.0
        error, bits = map(
            np.asarray, length.over_k(subject, jnp.asarray(ks, jnp.float32), BITS_PER_RANK)
        )
        needed = length.smallest_k(ks, error / scale)
        worst = ablate.attack(subject, key, shared=True, steps=ATTACK_STEPS, starts=1)[-1]
        return [
            total,
            float(jnp.mean(errors(subject, subject.mask.astype(jnp.float32)))) / scale,
            np.inf if needed is None else float(np.interp(needed, ks, bits)),
            float(jnp.mean(worst)) / scale,
        ]

    found = np.array([judged(one) for one in _each(components)], np.float64)
    return dict(zip(CRITERIA, np.where(np.isfinite(found), found, np.inf).T, strict=True))


def _each(components: Components) -> list[Components]:
    count = len(jax.tree.leaves(components)[0])
    return [jax.tree.map(lambda a, i=i: a[i], components) for i in range(count)]


def _loss_fn(problem: Problem, config: Config) -> Callable[..., Float[Array, ""]]:
    """(components, params, key, x) -> the loss of the last train step."""
    return step_lib.make_loss(
        problem.apply_fn,
        config,
        at=config.num_steps - 1,
        attribution_fn=problem.attribution_fn,
        num_active_fn=problem.num_active_fn,
        valid_fn=problem.valid_fn,
    )


def truth(
    target: Target, params: PyTree, components: Components, num_always_on: int = 0
) -> dict[str, Float[np.ndarray, " R"]]:
    """`geometry.scores` of every run, and success: 1 where every feature has a component of its own. Empty where no truth is known.

    Runs that are not finite have NaN, and no success.
    """
    if not isinstance(target, FeatureTarget):
        return {}
    feature_weights = partial(target.feature_weights, params)
    weights = jax.jit(
        lambda runs: jax.lax.map(
            lambda one: geometry.of_components(feature_weights, one, num_always_on), runs
        )
    )(components)
    of_target, found = np.asarray(target.feature_weights(params, params)), []
    for P in np.asarray(weights):
        if np.isfinite(P).all():
            scores = geometry.scores(P, of_target)
            found.append(
                scores | {"success": float(scores["num_features_owned"] == scores["num_features"])}
            )
        else:
            found.append({"success": 0.0, "mmcs": np.nan, "ml2r": np.nan, "num_features_owned": 0})
    return {name: np.array([scores[name] for scores in found], np.float64) for name in TRUTH}
