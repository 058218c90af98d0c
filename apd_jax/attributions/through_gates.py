"""Through gates: what moves with s at s = 0 in f(θ + Σ_c s_c P_c), for all components at once.

One backward pass per output direction gives every component, and every position where each has
gates of its own.

Shapes: B examples, T positions, C components, O outputs, n probes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from apd_jax.attributions.chunks import chunked, largest_array
from apd_jax.attributions.metric import Case, in_metric
from apd_jax.errors import InputError
from apd_jax.forward import sparse
from apd_jax.network.outputs import outputs


def through_gates(
    case: Case,
    *,
    per_position: bool,
    flavor: str = "gradient",
    num_probes: int = 0,
    rng: Array | None = None,
) -> Float[Array, "B *T C"]:
    """A² of gradients, or what flavor "activation" of the sparse pass hands back instead.

    rng: one key, or one per example, of random output directions. None takes all O directions one
      after the other, which is exact.
    """
    shape = jax.eval_shape(lambda: outputs(case.fn(case.params, case.x))).shape
    if per_position and len(shape) < 2:
        raise InputError(
            f"attributions per position need outputs [B, T, ...]; apply_fn gives {shape}."
        )
    C = case.components.num_components
    gates = jnp.zeros((*shape[1:2], C) if per_position else (C,))
    keys = rng
    if rng is not None and not rng.ndim:
        keys = jax.vmap(lambda b: jax.random.fold_in(rng, b))(jnp.arange(shape[0]))

    def one(example: Any) -> Float[Array, "*T C"]:
        x_b, valid_b, key = example
        z, pullback = jax.vjp(lambda gates: _moved(case, gates, x_b, valid_b, flavor), gates)
        if flavor == "activation":  # the "derivative" is the answer itself, whatever comes back
            return pullback(jnp.ones_like(z))[0]
        if key is None:
            every = jnp.eye(z.size, dtype=z.dtype)
            return jnp.sum(jax.lax.map(lambda v: pullback(v)[0], every) ** 2, axis=0)
        signs = jax.random.rademacher(key, (num_probes, z.size), z.dtype)
        # By vmap: what the probes share is computed once.
        return jnp.mean(jax.vmap(lambda v: pullback(v)[0])(signs) ** 2, axis=0)

    examples = (case.x, case.valid, keys)
    first = jax.eval_shape(lambda: jax.tree.map(lambda a: a[0], examples))
    return chunked(one, examples, shape[0], largest_array(one, first))


def _moved(case: Case, gates: Array, x_b: Any, valid_b: Any, flavor: str) -> Float[Array, " O"]:
    """The outputs of one example in the metric, with P_c added as the gates say."""
    out = sparse.substituted(case.fn, case.params, case.components, gates, None, x_b, flavor=flavor)
    out = outputs(out)[None]
    at = case.at(out, jax.tree.map(lambda a: a[None], x_b))
    return in_metric(out, at, case.metric, None if valid_b is None else valid_b[None])[0]
