"""The terms that methods are made of: what a loss of `apd_jax.losses` is taken of in a run.

Each function here makes a score, `Run -> scalar`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from apd_jax import losses
from apd_jax.collectives import num_devices, over_components
from apd_jax.methods.base import HERE, Run, Schedule, at

Score = Callable[[Run], Float[Array, ""]]


def faithfulness(run: Run) -> Float[Array, ""]:
    """Σ_l uses_l ‖θ*_l - Σ_c P_{c,l}‖² / N."""
    return losses.faithfulness(run.components, run.params)


def reconstruction(name: str, kind: losses.Distance) -> Score:
    """D(target, sparse) of a pass; of several runs of it (each site) the mean."""

    def score(run: Run) -> Float[Array, ""]:
        return run.scene_of(name).distance(run.forward(name), kind)

    return score


def hidden_reconstruction(name: str) -> Score:
    """How far the named hidden activations of a pass are from the target's."""

    def score(run: Run) -> Float[Array, ""]:
        scene = run.scene_of(name)
        found = [
            losses.hidden_reconstruction(hidden, scene.hidden, scene.hidden_weights)
            for _, hidden in run.forward(name)
        ]
        return jnp.asarray(sum(found)) / len(found)

    return score


def simplicity(schatten_p: Any, attribution_p: Any = None, stream: str = HERE) -> Score:
    """The Schatten norms of the components, by how active they are.

    With attribution_p, in a run that prices |A_c|^p, these powers take the place of the mask.
    """

    def score(run: Run) -> Float[Array, ""]:
        values = run.activity[stream].values
        if attribution_p is not None and "attribution_lp" in run.on:
            values = losses.attribution_lp(run.squared_attributions, attribution_p)
        share = run.scenes[stream].share if values.ndim == 3 else 1.0
        return losses.simplicity(run.components, values, schatten_p) / share

    return score


def attribution_lp(p: Any) -> Score:
    """Σ_c |A_c|^p, the one term whose gradient flows through the attributions."""

    def score(run: Run) -> Float[Array, ""]:
        powers = losses.attribution_lp(run.squared_attributions, p)
        weights = losses.of_rows(run.scenes[HERE].weights, powers)
        each = jnp.sum(losses.weighted(powers, weights), axis=-1)
        return over_components(jnp.mean(each), run.components.axis)

    return score


def rates(run: Run, stream: str, p: Schedule, num_steps: int) -> Float[Array, " C"]:
    """mean of g^p of every component over this device's examples."""
    p = at(p, run.step, num_steps)
    return losses.importance(run.activity[stream].priced, p, run.scenes[stream].weights)


def importance(p: Schedule, num_steps: int, stream: str = HERE) -> Score:
    """Σ_c mean g_c^p: the price of causal importances  (SPD)."""

    def score(run: Run) -> Float[Array, ""]:
        found = rates(run, stream, p, num_steps)
        return over_components(jnp.sum(found), run.components.axis)

    return score


def smooth_l0(gamma: Schedule, num_steps: int, stream: str = HERE) -> Score:
    """Σ_c mean ψ_γ(g_c), with γ falling over training."""

    def score(run: Run) -> Float[Array, ""]:
        g, scene = run.activity[stream].priced, run.scenes[stream]
        found = losses.smooth_l0(g, at(gamma, run.step, num_steps), scene.weights)
        return over_components(jnp.sum(found), run.components.axis)

    return score


def frequency(p: Schedule, num_steps: int, stream: str = HERE) -> Score:
    """Σ_c f_c log₂(1 + N f_c): what fires often pays more for every further time  (VPD)."""

    def score(run: Run) -> Float[Array, ""]:
        found = rates(run, stream, p, num_steps)
        count = _rows(run, stream)
        loss = losses.frequency(found, count, run.axis_name)
        return over_components(loss, run.components.axis)

    return score


def trim(p: float, stream: str = HERE) -> Score:
    """The price of ranks, by how often a component fires  (nested ranks)."""

    def score(run: Run) -> Float[Array, ""]:
        active = run.activity[stream].active.astype(jnp.float32)
        weights = losses.of_rows(run.scenes[stream].weights, active)
        fired = jnp.mean(losses.weighted(active, weights), axis=tuple(range(active.ndim - 1)))
        return losses.trim(run.components, fired, p)

    return score


def _rows(run: Run, stream: str) -> Any:
    """Examples (positions that count) over all devices that a rate is the mean of."""
    values, share = run.activity[stream].values, run.scenes[stream].share
    rows = float(math.prod(values.shape[:-1])) * (share if values.ndim == 3 else 1.0)
    return rows * num_devices(run.axis_name)
