"""A_c(x) of every kind.

Shapes: B examples, C components, T positions, O outputs (all output axes but the first,
flattened), n probes. `params` is where the gradient is taken: the target's weights, or
`components.total(...)` for the sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from apd_jax import components as components_lib
from apd_jax.attributions.ablated import ablated
from apd_jax.attributions.integrated import averaged
from apd_jax.attributions.jacobian import reverse
from apd_jax.attributions.metric import METRICS, Case
from apd_jax.attributions.tangents import forward
from apd_jax.attributions.through_gates import through_gates
from apd_jax.components import Components
from apd_jax.errors import InputError, one_of
from apd_jax.forward.primitives import uses_primitive

KINDS = ("gradient", "integrated_gradient", "ablation", "activation")
MODES = ("auto", "forward", "reverse", "probe")


def squared(
    kind: str,
    apply_fn: Callable,
    params: PyTree,
    components: Components,
    x: PyTree,
    *,
    mode: str = "auto",
    metric: str = "mse",
    valid: Bool[Array, "B T"] | None = None,
    per_position: bool = False,
    num_probes: int = 8,
    rng: Array | None = None,
) -> Float[Array, "B *T C"]:
    """A_c(x)² of any kind. For gradients its derivative is finite where it is 0, unlike A_c(x)'s.

    forward  C tangents of one linearised pass; of components of low rank through their factors.
    reverse  `jax.vjp` over the O outputs, example by example, contracted with every P_c.
    probe    an unbiased estimate from n random output directions: A² = E (v·J P_c)² for v with
             independent signs, since E v vᵀ = 1. One backward pass per probe gives all
             components. The relative standard deviation of A² is at most sqrt(2/n), and
             smaller the more outputs a component moves independently.
    auto     forward unless O = 1 or the network has functions with a custom_vjp; per position
             reverse.

    Args:
      kind: gradient | integrated_gradient | ablation | activation: see the functions so named.
      apply_fn: (params, x) -> outputs [B, ...], or (outputs, hidden). Example b of the output
        depends on example b alone.
      mode: how gradients are taken: forward, reverse, probe or auto.
      metric: mse | kl, how the change of the outputs is measured: see `attributions.metric`.
      valid: which positions of the outputs [B, T, ...] count.
      per_position: how each position's use of the weights matters: [B, T, C]. Gradients in mode
        reverse or probe, or activation.
      num_probes, rng: n, and the key of the signs (or one key per example, [B]); of mode probe.
    Returns: [B, C], or [B, T, C] per position.
    Raises:
      InputError: components and params differ; an unknown kind, mode or metric; options that do
        not go together.
    Cost: forward C·(a forward pass). reverse B·O·(a backward pass + C·|θ|): a tangent costs about
      what a cotangent does, and the contraction alone costs O times as much, so auto takes forward.
      probe n·(a backward pass + B·C·m·(d_in + d_out) per leaf). Chunks of components or examples
      bound the memory, to 4 MiB each on CPU.
    """
    one_of("attribution", kind, KINDS)
    one_of("attribution_mode", mode, MODES)
    one_of("attribution_metric", metric, METRICS)
    _check(kind, mode, per_position, rng)
    leaves = components_lib.decomposed_leaves(components, params)
    case = Case(apply_fn, params, components, x, metric, valid)
    if kind == "activation":
        summed = components_lib.total(components, params)
        case = dataclasses.replace(case, params=summed)
        return through_gates(case, per_position=per_position, flavor="activation")
    if kind == "ablation":
        return ablated(case)
    if kind == "integrated_gradient":
        case = dataclasses.replace(case, moved_fn=averaged(apply_fn, params, components))
    num_outputs = jax.eval_shape(case.measured, leaves, x, valid).shape[1]
    if mode == "probe" or per_position:
        keys = rng if mode == "probe" else None
        return through_gates(case, per_position=per_position, num_probes=num_probes, rng=keys)
    if mode == "auto":
        forwards = num_outputs > 1 and not uses_primitive(apply_fn, params, x)
        mode = "forward" if forwards else "reverse"
    return forward(case) if mode == "forward" else reverse(case)


def _check(kind: str, mode: str, per_position: bool, rng: Array | None) -> None:
    if per_position and (kind in ("integrated_gradient", "ablation") or mode == "forward"):
        raise InputError(
            "attributions per position are gradients in mode auto, reverse or probe, or "
            f"activations; got {kind!r} in mode {mode!r}."
        )
    if mode == "probe" and rng is None:
        raise InputError(
            "attribution mode 'probe' draws random output directions; give it a key as rng."
        )


def gradient(
    apply_fn: Callable, params: PyTree, components: Components, x: PyTree, **options: Any
) -> Float[Array, "B *T C"]:
    r"""How far the outputs move, to first order, when P_c is ablated, in units of the output.

    A_c(x) = sqrt( mean_o ( ∂f_o(x, θ)/∂θ · P_c )² )          (APD eq. 3)

    Args: as in `squared`.
    """
    return jnp.sqrt(squared("gradient", apply_fn, params, components, x, **options))


def integrated_gradient(
    apply_fn: Callable, params: PyTree, components: Components, x: PyTree, **options: Any
) -> Float[Array, "B C"]:
    r"""The gradient averaged over the path on which the decomposed weights grow from 0 to θ.

    A_c(x) = sqrt( mean_o ( ∫₀¹ ∂f_o(x, αθ)/∂θ dα · P_c )² )   (midpoint rule, INTEGRATION_STEPS)

    Complete: the signed terms of components that sum to θ add up to f(x, θ) - f(x, 0). It sees past
    a saturated softmax.

    Args: as in `squared`. Cost: INTEGRATION_STEPS times `gradient`.
    """
    return jnp.sqrt(squared("integrated_gradient", apply_fn, params, components, x, **options))


def ablation(
    apply_fn: Callable, params: PyTree, components: Components, x: PyTree, **options: Any
) -> Float[Array, "B C"]:
    r"""How far the outputs really move when P_c is taken from the component sum.

    A_c(x) = sqrt( mean_o ( f_o(x, Σ_i P_i) - f_o(x, Σ_i P_i - P_c) )² )

    The gradient attribution is its first-order estimate.

    Args: as in `squared`; metric and valid only. Cost: C + 1 forward passes, in chunks of
      components.
    """
    return jnp.sqrt(squared("ablation", apply_fn, params, components, x, **options))


def activation(
    apply_fn: Callable, params: PyTree, components: Components, x: PyTree, **options: Any
) -> Float[Array, "B *T C"]:
    r"""How strongly a component's own part of every matrix product is driven, wherever that leads.

    A_c(x) = sqrt( Σ_uses ‖h P_c‖² ),  h the input of each use of a decomposed leaf in the pass
    with all components

    Uses other than products, convolutions and lookups do not count. Args: as in `squared`. Cost:
      one pass forward and back, with B·C·m·d_in per leaf.
    """
    return jnp.sqrt(squared("activation", apply_fn, params, components, x, **options))
