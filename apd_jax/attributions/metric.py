"""How far outputs move: the metric that all kinds of attribution share.

  mse  A² = mean_o δ_o²
  kl   A² = mean over positions of Σ_v p_v δ_v² - (Σ_v p_v δ_v)²,  p = softmax of the outputs:
       to second order twice the KL divergence

with δ the change of the outputs. Positions that are not `valid` (padding) do not count.

Shapes: B examples, T positions, O outputs (all output axes but the first, flattened).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from apd_jax import components as components_lib
from apd_jax.components import Components
from apd_jax.errors import InputError
from apd_jax.network.outputs import outputs

METRICS = ("mse", "kl")


@dataclasses.dataclass(frozen=True)
class Case:
    """What attributions are taken of.

    apply_fn, params: the network, and the weights at which it is looked at.
    moved_fn: the function that is differentiated, of the same arguments; apply_fn itself, or its
      average over a path of weights.
    """

    apply_fn: Callable
    params: PyTree
    components: Components
    x: PyTree
    metric: str = "mse"
    valid: Bool[Array, "B T"] | None = None
    moved_fn: Callable | None = None

    @property
    def fn(self) -> Callable:
        return self.apply_fn if self.moved_fn is None else self.moved_fn

    def at(self, out: Array, x: PyTree) -> Array:
        """The outputs at which changes are measured: `out` where this is what apply_fn gives."""
        if self.moved_fn is not None:
            out = outputs(self.apply_fn(self.params, x))
        return jax.lax.stop_gradient(out)

    def measured(self, leaves: dict[str, Array], x: PyTree, valid: Any) -> Float[Array, "B O"]:
        """The outputs in the metric, with these leaves in the place of the params' own."""
        out = outputs(self.fn(components_lib.replace_leaves(self.params, leaves), x))
        return in_metric(out, self.at(out, x), self.metric, valid)


def in_metric(
    change: Float[Array, "B ..."], out: Float[Array, "B ..."], metric: str, valid: Any = None
) -> Float[Array, "B O"]:
    """A linear map of changes of the outputs `out`: their squared norm is then the metric's A²."""
    count = math.prod(out.shape[1:])
    weight = None if valid is None else _weights(valid, out)
    if weight is not None:  # what stands at padding may be NaN
        change, out = jnp.where(weight > 0, change, 0), jnp.where(weight > 0, out, 0)
    if metric == "kl":
        p = jax.nn.softmax(out, axis=-1)
        change = jnp.sqrt(p) * (change - jnp.sum(p * change, axis=-1, keepdims=True))
        count = math.prod(out.shape[1:-1])
    if weight is not None:
        change = change * jnp.sqrt(weight).astype(out.dtype)
    return change.reshape(out.shape[0], -1) / math.sqrt(count)


def _weights(valid: Bool[Array, "B T"], out: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
    """Of every position, with mean 1 over each example's; 0 for padding."""
    if out.shape[:2] != valid.shape:
        raise InputError(
            f"valid_fn gives {valid.shape}, but the outputs have {out.shape}; they must agree in "
            "examples and positions."
        )
    weight = valid / jnp.maximum(jnp.mean(valid, axis=1, keepdims=True), 1e-6)
    return weight.reshape(*weight.shape, *[1] * (out.ndim - 2))
