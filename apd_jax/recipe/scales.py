"""The reference points of a target, in which the recipe measures every loss.

A coefficient then means the same on every target.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from apd_jax import components as components_lib
from apd_jax import losses
from apd_jax.errors import InputError
from apd_jax.forward import positions
from apd_jax.network import data
from apd_jax.network.outputs import position_weights, split_result
from apd_jax.network.problem import Problem

BATCHES = 20  # over which a loss is measured
_DRAWS = 0x5EED  # sets these draws apart from those of training


@dataclasses.dataclass(frozen=True)
class Scales:
    """The reference points of a target.

    faithfulness: the loss of components that sum to 0.
    minimality: the distance of the model without the decomposed leaves from the target.
    hidden: the same of the hidden activations; 0 where there are none.
    simplicity: the loss of the whole target as one component, kept on every input:
      Σ_l uses_l Σ_j σ_j(θ*_l)^p / N.
    """

    faithfulness: float
    minimality: float
    hidden: float
    simplicity: float


def measure(problem: Problem, method: Any) -> Scales:
    """The reference points of a problem, on fresh batches.

    Cost: two passes of the network over BATCHES batches.

    Raises:
      InputError: the outputs, or the hidden activations where they count, do not change when the
        decomposed leaves are set to 0; or are not finite.
    """
    whole = components_lib.from_materialized(
        _decomposed(problem), uses=problem.uses, layouts=problem.layouts
    )
    nothing = components_lib.weighted_sum(whole, problem.params, jnp.zeros(1))
    minimality, hidden = distances(problem, method, nothing)
    zero = jax.tree.map(jnp.zeros_like, whole)
    if not np.isfinite([minimality, hidden]).all():
        raise InputError(
            "the outputs are not finite, of the network itself or with all decomposed leaves set "
            "to 0; look at its weights and data."
        )
    if minimality == 0:
        raise InputError(
            "the outputs stay the same when all decomposed leaves are set to 0; there is nothing "
            "to decompose."
        )
    if hidden == 0 and method.hidden_reconstruction_coeff > 0:
        raise InputError(
            "hidden_reconstruction_coeff is above 0, but apply_fn returns no hidden activations "
            "that depend on the decomposed leaves."
        )
    return Scales(
        faithfulness=float(losses.faithfulness(zero, problem.params)),
        minimality=minimality,
        hidden=hidden,
        simplicity=float(losses.simplicity(whole, jnp.ones((1, 1), jnp.bool_), method.schatten_p)),
    )


def distances(problem: Problem, method: Any, params: PyTree) -> tuple[float, float]:
    """How far the network with these parameters is from the target.

    In the outputs, and in the hidden activations (0 without any).
    """

    def of_batch(ends: tuple[PyTree, PyTree], x: PyTree) -> tuple[jax.Array, jax.Array]:
        (out, hidden), (target_out, target_hidden) = [
            split_result(problem.apply_fn(params, x)) for params in ends
        ]
        weights = position_weights(problem.valid(x))[0]
        distance = losses.minimality(out, target_out, method.minimality_loss, weights)
        if not hidden:
            return distance, jnp.zeros(())
        of_hidden = positions.hidden_weights(problem.apply_fn, ends[0], x, weights)
        return distance, losses.hidden_reconstruction(hidden, target_hidden, of_hidden)

    def of_batches(ends: tuple[PyTree, PyTree], key: PRNGKeyArray) -> tuple[jax.Array, jax.Array]:
        drawn = jax.lax.map(
            lambda step: of_batch(ends, problem.sample_fn(key, step)), jnp.arange(BATCHES)
        )
        return jax.tree.map(jnp.mean, drawn)

    ends = (params, jax.tree.map(jnp.asarray, problem.params))
    if isinstance(problem.sample_fn, data.Batches):
        measured = jax.jit(of_batch)(ends, problem.example_batch())
    else:
        key = jax.random.fold_in(jax.random.key(method.seed), _DRAWS)
        measured = jax.jit(of_batches)(ends, key)
    outputs, hidden = map(float, measured)
    return outputs, hidden


def _decomposed(problem: Problem) -> PyTree:
    """params with a leading axis of one component; None where not decomposed."""
    names = problem.site_names
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf[None] if components_lib.path_name(path) in names else None,
        problem.params,
    )
