"""How far components are from the target's parameters, and a sparse pass from its outputs.

Shapes: B examples, T positions, L sites.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from apd_jax import components as components_lib
from apd_jax.components import Components
from apd_jax.errors import InputError

DISTANCES = ("mse", "kl")


def single(x: Array) -> Array:
    """x in single precision if it is less precise."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def faithfulness(components: Components, params: PyTree) -> Float[Array, ""]:
    r"""How far the components are from summing to the target.

    Σ_l uses_l ‖θ*_l - Σ_c P_{c,l}‖² / N          (APD eq. 5; VPD's MSE(Δ) where no leaf is tied)

    Cost: one matmul [d_in, n·m] x [n·m, d_out] per leaf.
    """
    leaves = components_lib.decomposed_leaves(components, params)
    errors = [
        f.uses * jnp.sum((components_lib.leaf_total(f) - single(leaves[name])) ** 2)
        for name, f in components.factors.items()
    ]
    return jnp.asarray(sum(errors)) / components.num_params


def relative_faithfulness(components: Components, params: PyTree) -> Float[Array, ""]:
    r"""mean_l ‖θ*_l - Σ_c P_{c,l}‖² / ‖θ*_l‖²: every site in units of its own size."""
    leaves = components_lib.decomposed_leaves(components, params)
    errors = []
    for name, f in components.factors.items():
        leaf = single(leaves[name])
        missing = jnp.sum((components_lib.leaf_total(f) - leaf) ** 2)
        errors.append(missing / jnp.maximum(jnp.sum(leaf**2), 1e-30))
    return jnp.asarray(sum(errors)) / len(errors)


def minimality(
    sparse_out: Float[Array, "B ..."],
    target_out: Float[Array, "B ..."],
    kind: str = "mse",
    weights: Float[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    r"""D(f(θ*, x), f(κ(x), x)), averaged over the batch  (APD eq. 6).

    mse: mean over batch and outputs of the squared difference.
    kl:  mean over batch (and positions) of KL(softmax(target) ‖ softmax(sparse)) over the last
         axis, in nats. A logit that is -inf on both sides adds nothing.

    Args:
      weights: of each position of outputs [B, T, ...], with mean 1: 0 for padding.
    Raises:
      InputError: unknown kind.
    """
    if kind not in DISTANCES:
        raise InputError(f"unknown minimality loss {kind!r}; choose mse or kl.")
    sparse_out = counted(single(sparse_out), weights)
    target_out = counted(single(target_out), weights)
    if kind == "mse":
        return jnp.mean(weighted((sparse_out - target_out) ** 2, weights))
    log_p, log_q = jax.nn.log_softmax(target_out), jax.nn.log_softmax(sparse_out)
    impossible = jnp.isneginf(log_p)  # p = 0: its term is 0, whatever q is
    ratio = jnp.where(impossible, 0.0, log_p) - jnp.where(impossible, 0.0, log_q)
    return jnp.mean(weighted(jnp.sum(jnp.exp(log_p) * ratio, axis=-1), weights))


def weighted(
    values: Float[Array, "B ..."], weights: Float[Array, "B ..."] | None
) -> Float[Array, "B ..."]:
    """values [B, T, ...] times the weights of positions.

    Positions of weight 0 give 0, whatever stands there.

    Args:
      weights: [B, T], or with as many axes as values.
    Raises:
      InputError: values do not lead with examples and positions.
    """
    return values if weights is None else counted(values, weights) * _along(values, weights)


def counted(
    values: Float[Array, "B ..."], weights: Float[Array, "B ..."] | None
) -> Float[Array, "B ..."]:
    """values, and 0 at positions of weight 0: no NaN that stands there reaches a gradient."""
    return values if weights is None else jnp.where(_along(values, weights) > 0, values, 0)


def _along(values: Array, weights: Array) -> Array:
    """Weights of positions, to be multiplied with values."""
    if weights.ndim == values.ndim:
        return weights
    if values.shape[:2] != weights.shape:
        raise InputError(
            f"valid_fn gives {weights.shape}, but the outputs have {values.shape}; they must agree "
            "in examples and positions."
        )
    return weights.reshape(*weights.shape, *[1] * (values.ndim - 2))


def hidden_reconstruction(
    sparse_hidden: Mapping[str, Float[Array, "B ..."]],
    target_hidden: Mapping[str, Float[Array, "B ..."]],
    weights: Mapping[str, Float[Array, "B ..."] | None] | None = None,
) -> Float[Array, ""]:
    r"""mean_b Σ_l ‖h_l(θ*, x_b) - h_l(κ(x_b), x_b)‖² / Σ_l width_l  (APD appendix A.3).

    l runs over the named activations.

    Args:
      weights: of the positions of every activation, with as many axes as it: 0 for padding. See
        `apd_jax.forward.positions.hidden_weights`.
    Raises:
      InputError: the two differ in names, or there are none.
    """
    if not target_hidden or set(target_hidden) != set(sparse_hidden):
        raise InputError(
            "hidden reconstruction needs apply_fn to return (outputs, {name: activations}), alike "
            f"in both passes; got {sorted(sparse_hidden)} and {sorted(target_hidden)}."
        )
    squares = []
    for name, target in target_hidden.items():
        own = None if weights is None else weights[name]
        change = counted(single(sparse_hidden[name]), own) - counted(single(target), own)
        squares.append(jnp.sum(weighted(change**2, own)))
    return jnp.asarray(sum(squares)) / float(sum(h.size for h in target_hidden.values()))
