"""What a network's function returns, and which of its positions count.

Shapes: B examples, T positions.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


def split_result(result: Any) -> tuple[Any, Any]:
    """(outputs, hidden) of an `apply_fn` result; hidden is empty when it returns outputs only."""
    return result if isinstance(result, tuple) else (result, {})


def outputs(result: Any) -> Array:
    """The outputs of an `apply_fn` result, which may be `outputs` or `(outputs, hidden)`."""
    return split_result(result)[0]


def position_weights(
    valid: Bool[Array, "B T"] | None, axis_name: str | None = None
) -> tuple[Float[Array, "B T"] | None, Any]:
    """The weight of every position, and the share of positions that count.

    Weights are 0 for padding and have mean 1 over all devices of `axis_name`. (None, 1) where all
    positions count.
    """
    if valid is None:
        return None, 1.0
    valid = valid.astype(jnp.float32)
    share = jnp.mean(valid) if axis_name is None else lax.pmean(jnp.mean(valid), axis_name)
    share = jnp.maximum(share, 1e-6)
    return valid / share, share


def reaching_outputs(jaxpr: Any) -> set[Any]:
    """The variables that some output may depend on.

    An inner jaxpr counts as needing all its inputs.
    """
    needed = {v for v in jaxpr.outvars if not hasattr(v, "val")}
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            needed.update(v for v in eqn.invars if not hasattr(v, "val"))
    return needed
