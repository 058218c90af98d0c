"""How good each of many runs is.

By criteria that need no truth, and against the truth where it is known.

Shapes: R runs, C components, F features, d the length of a feature's vector. Components have a
leading R. Every criterion is best small.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree

from apd_jax.components import Components
from apd_jax.decomposition import one_instance
from apd_jax.evaluation import geometry
from apd_jax.evaluation.general import STREAM
from apd_jax.evidence import ablate, length
from apd_jax.evidence.subject import Setting, baselines, errors, make
from apd_jax.methods.base import Method
from apd_jax.methods.optimizers import Trained
from apd_jax.network.problem import Problem
from apd_jax.targets.base import FeatureTarget, Target
from apd_jax.train import loop
from apd_jax.train.step import make_loss

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
    problem: Problem, method: Method, trained: Trained, seed: int
) -> dict[str, Float[np.ndarray, " R"]]:
    """Every run by the same measure, whatever it was trained with.

    On one held-out batch, with the k, coefficients and p of `method`; errors are in units of what
    an output is off that owes the components nothing.

    reference_loss: the loss of the last train step, had the run been trained with `method`.
    sparse_error: D(target, sparse) with the mask of `method`.
    bits: of the active components (`evidence.length.bits`) at the smallest k whose error is within
      ERROR_BAR; infinite if there is none.
    worst_error: with the mask of `method`, inactive components scaled by the factors in [0, 1] that
      ATTACK_STEPS of projected gradient ascent find, shared over the batch.
    A run whose components or losses are not finite has infinity for all.

    Args:
      method: the reference, not that of the runs.
      seed: of the held-out batch.
    Cost: for every run, one after another, ATTACK_STEPS sparse passes forward and back, and as many
      passes as values of k.
    """
    key = jax.random.fold_in(jax.random.key(seed), STREAM)
    x = jax.jit(problem.sample_fn)(key, jnp.zeros((), jnp.int32))
    setting = Setting(problem, method)
    loss = make_loss(problem, method, step=method.num_steps - 1)

    def judged(one: Trained) -> list[float]:
        total = float(loss(one.components, one.gate, problem.params, key, x))
        arrays = [total, *map(np.asarray, jax.tree.leaves(one))]
        if not all(np.isfinite(leaf).all() for leaf in arrays):
            return [np.inf] * len(CRITERIA)
        subject = make(setting, problem.params, loop.finished(one, method), x)
        ks = length.grid(subject.k, subject.num_choosable)
        scale = float(jnp.minimum(*baselines(subject))) or 1.0
        found = length.over_k(subject, jnp.asarray(ks, jnp.float32), BITS_PER_RANK)
        error, bits = map(np.asarray, found)
        needed = length.smallest_k(ks, error / scale)
        worst = ablate.attack(subject, key, shared=True, steps=ATTACK_STEPS, starts=1)[-1]
        return [
            total,
            float(jnp.mean(errors(subject, subject.mask.astype(jnp.float32)))) / scale,
            np.inf if needed is None else float(np.interp(needed, ks, bits)),
            float(jnp.mean(worst)) / scale,
        ]

    runs = len(jax.tree.leaves(trained)[0])
    found = np.array([judged(one_instance(trained, i)) for i in range(runs)], np.float64)
    return dict(zip(CRITERIA, np.where(np.isfinite(found), found, np.inf).T, strict=True))


def truth(
    target: Target, params: PyTree, components: Components, num_always_on: int = 0
) -> dict[str, Float[np.ndarray, " R"]]:
    """`geometry.scores` of every run, and success: 1 where every feature has its own component.

    Empty where no truth is known.

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
            found.append(scores | {"success": float(geometry.all_owned(scores))})
        else:
            found.append({"success": 0.0, "mmcs": np.nan, "ml2r": np.nan, "num_features_owned": 0})
    return {name: np.array([scores[name] for scores in found], np.float64) for name in TRUTH}
