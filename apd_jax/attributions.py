"""A_c(x): how much a component matters for an input.

Shapes: B examples, C components, O outputs (all output axes but the first, flattened).
`params` is where the gradient is taken: the target's, or `components.total(...)` for the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr
from jaxtyping import Array, Float, PyTree

from apd_jax import components as components_lib
from apd_jax.components import Components
from apd_jax.errors import InputError

# What one chunk of tangents or Jacobians may hold in its largest array: a CPU is fastest when it stays in cache
# (ResidMLP 1 layer, batch 256: 42 ms against 84 ms unchunked), an accelerator when it is busy.
_CHUNK_BYTES = {"cpu": 16 * 2**20}
_CHUNK_BYTES_ELSEWHERE = 512 * 2**20


def outputs(result: Any) -> Array:
    """The outputs of an `apply_fn` result, which may be `outputs` or `(outputs, hidden)`."""
    return result[0] if isinstance(result, tuple) else result


def gradient(apply_fn: Callable, params: PyTree, components: Components, x: PyTree, *, mode: str = "auto") -> Float[Array, "B C"]:
    r"""How far the outputs move, to first order, when P_c is ablated.

    A_c(x) = sqrt( mean_o ( ∂f_o(x, θ)/∂θ · P_c )² )          (APD eq. 3)

    Args:
      apply_fn: (params, x) -> outputs [B, ...], or (outputs, hidden). Example b of the output depends on example b alone.
      mode: forward: C tangents of one linearised pass. reverse: `jax.vjp` over the O output dimensions, example by
        example, contracted with every P_c. auto: forward unless O = 1. Both are exact and agree to float error.
    Returns:
      [B, C], in units of the output.
    Raises:
      InputError: components and params differ, or unknown mode.
    Cost: forward C·(a forward pass); reverse B·O·(a backward pass + C·|θ|), which is why auto takes forward: a tangent
      costs about what a cotangent does, and the contraction alone costs O times as much. Memory is bounded by chunks
      of components (forward) or examples (reverse), at most 16 MiB each on CPU.
    """
    return jnp.sqrt(gradient_squared(apply_fn, params, components, x, mode=mode))


def gradient_squared(apply_fn: Callable, params: PyTree, components: Components, x: PyTree, *, mode: str = "auto") -> Float[Array, "B C"]:
    """A_c(x)²; unlike A_c(x) it has a finite gradient where it is 0."""
    leaves = components_lib.decomposed_leaves(components, params)

    def model(leaves: dict[str, Array], x: PyTree) -> Float[Array, "B O"]:
        out = outputs(apply_fn(components_lib.replace_leaves(params, leaves), x))
        return out.reshape(out.shape[0], -1)

    if mode == "auto":
        mode = "reverse" if jax.eval_shape(model, leaves, x).shape[1] == 1 else "forward"
    if mode not in ("forward", "reverse"):
        raise InputError(f"unknown attribution mode {mode!r}; choose auto, forward or reverse.")
    return (_forward if mode == "forward" else _reverse)(model, leaves, components, x)


def _forward(model, leaves, components, x):
    _, tangent = jax.linearize(lambda leaves: model(leaves, x), leaves)

    def one(factors):
        moved = tangent({name: (f.U @ f.V).reshape(f.shape).astype(leaves[name].dtype) for name, f in factors.items()})
        return jnp.mean(moved**2, axis=1)

    # A component's own weights count several times: they are formed, laid out anew and multiplied.
    widest = max(_largest_array(tangent, leaves), 4 * sum(leaf.nbytes for leaf in leaves.values()))
    return _chunked(one, components.factors, components.num_components, widest).T


def _reverse(model, leaves, components, x):
    stacked = {name: (f.U @ f.V).reshape(-1, *f.shape) for name, f in components.factors.items()}

    def one(example):
        out, pullback = jax.vjp(lambda leaves: model(leaves, jax.tree.map(lambda a: a[None], example))[0], leaves)
        jacobian = jax.vmap(lambda cotangent: pullback(cotangent)[0])(jnp.eye(out.size, dtype=out.dtype))
        dot = sum(jnp.tensordot(jacobian[n].reshape(out.size, -1), p.reshape(p.shape[0], -1), axes=(1, 1)) for n, p in stacked.items())
        return jnp.mean(dot**2, axis=0)  # [O, C] -> [C]

    batch = jax.tree.leaves(x)[0].shape[0]
    num_outputs = jax.eval_shape(model, leaves, x).shape[1]
    return _chunked(one, x, batch, num_outputs * 4 * sum(leaf.size for leaf in leaves.values()))


def ablation(apply_fn: Callable, params: PyTree, components: Components, x: PyTree) -> Float[Array, "B C"]:
    r"""How far the outputs really move when P_c is taken from the component sum.

    A_c(x) = sqrt( mean_o ( f_o(x, Σ_i P_i) - f_o(x, Σ_i P_i - P_c) )² )

    Cost: C + 1 forward passes, in chunks of components. The gradient attribution is its first-order estimate.
    """
    summed = components_lib.total(components, params)
    leaves = components_lib.decomposed_leaves(components, summed)
    whole = outputs(apply_fn(summed, x))

    def one(factors):
        without = {name: leaves[name] - (f.U @ f.V).reshape(f.shape).astype(leaves[name].dtype) for name, f in factors.items()}
        out = outputs(apply_fn(components_lib.replace_leaves(summed, without), x))
        return jnp.sqrt(jnp.mean((out - whole).reshape(out.shape[0], -1) ** 2, axis=1))

    widest = _largest_array(lambda p: apply_fn(p, x), summed)
    return _chunked(one, components.factors, components.num_components, widest).T


def _largest_array(fn: Callable, *args: Any) -> int:
    """Bytes of the largest array that one evaluation of `fn` makes, constants aside (inner jaxprs included)."""

    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in eqn.outvars if hasattr(v.aval, "shape"))
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: isinstance(p, (Jaxpr, ClosedJaxpr))):
                if isinstance(inner, (Jaxpr, ClosedJaxpr)):
                    yield from sizes(getattr(inner, "jaxpr", inner))

    return max(sizes(jax.make_jaxpr(fn)(*args).jaxpr), default=1)


def _chunked(fn: Callable, xs: PyTree, length: int, bytes_each: int) -> Array:
    """`vmap(fn)(xs)` in chunks of bounded size: equal ones if the length has a divisor near, else the last is shorter."""
    fitting = max(1, _CHUNK_BYTES.get(jax.default_backend(), _CHUNK_BYTES_ELSEWHERE) // bytes_each)
    if fitting >= length:
        return jax.vmap(fn)(xs)
    divisor = max(d for d in range(1, fitting + 1) if length % d == 0)
    return jax.lax.map(fn, xs, batch_size=divisor if 2 * divisor > fitting else fitting)
