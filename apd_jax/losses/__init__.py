"""The losses of APD, each a scalar function of arrays.

Shapes: B examples, C components, m rank. N = entries of the decomposed matrices, a tied one counted as often as it
is used (`Components.num_params`). The paper's coefficients assume these normalisations, which are the released code's.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PyTree

from apd_jax import components as components_lib
from apd_jax.collectives import over_components
from apd_jax.components import Components
from apd_jax.errors import InputError

TERMS = (
    "faithfulness",
    "minimality",
    "simplicity",
    "hidden_reconstruction",
    "attribution_lp",
    "importance",
)  # of a step's loss
EPSILON = (
    1e-16  # inside the powers, so that their gradient is finite at 0 (the released code's value)
)


def faithfulness(components: Components, params: PyTree) -> Float[Array, ""]:
    r"""How far the components are from summing to the target: Σ_l uses_l ‖θ*_l - Σ_c P_{c,l}‖² / N  (APD eq. 5).

    Cost: one matmul [d_in, C·m] x [C·m, d_out] per leaf.
    """
    leaves = components_lib.decomposed_leaves(components, params)
    errors = [
        f.uses * jnp.sum((components_lib.leaf_total(f) - leaves[name]) ** 2)
        for name, f in components.factors.items()
    ]
    return jnp.asarray(sum(errors)) / components.num_params


def minimality(
    sparse_out: Float[Array, "B ..."],
    target_out: Float[Array, "B ..."],
    kind: str = "mse",
    weights: Float[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    r"""D(f(θ*, x), f(κ(x), x)): the sparse model's distance from the target, averaged over the batch  (APD eq. 6).

    mse: mean over batch and outputs of the squared difference.
    kl:  mean over batch (and positions) of KL(softmax(target) ‖ softmax(sparse)) over the last axis, in nats.

    Args:
      weights: of each position of outputs [B, T, ...], with mean 1: 0 for padding.
    Raises:
      InputError: unknown kind.
    """
    if kind == "mse":
        return jnp.mean(weighted((sparse_out - target_out) ** 2, weights))
    if kind == "kl":
        log_p, log_q = jax.nn.log_softmax(target_out), jax.nn.log_softmax(sparse_out)
        return jnp.mean(weighted(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1), weights))
    raise InputError(f"unknown minimality loss {kind!r}; choose mse or kl.")


def weighted(
    values: Float[Array, "B ..."], weights: Float[Array, "B T"] | None
) -> Float[Array, "B ..."]:
    """values [B, T, ...] times the weights of positions; values without such an axis as they are."""
    if weights is None or values.shape[:2] != weights.shape:
        return values
    return values * weights.reshape(*weights.shape, *[1] * (values.ndim - 2))


def hidden_reconstruction(
    sparse_hidden: Mapping[str, Float[Array, "B ..."]],
    target_hidden: Mapping[str, Float[Array, "B ..."]],
    weights: Float[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    r"""mean_b Σ_l ‖h_l(θ*, x_b) - h_l(κ(x_b), x_b)‖² / Σ_l width_l over the named activations l  (APD appendix A.3).

    Args:
      weights: as in `minimality`; activations without an axis of positions are taken as they are.
    Raises:
      InputError: the two differ in names, or there are none.
    """
    if not target_hidden or set(target_hidden) != set(sparse_hidden):
        raise InputError(
            f"hidden reconstruction needs apply_fn to return (outputs, {{name: activations}}), alike in both passes; "
            f"got {sorted(sparse_hidden)} and {sorted(target_hidden)}."
        )
    squares = sum(
        jnp.sum(weighted((sparse_hidden[name] - target_hidden[name]) ** 2, weights))
        for name in target_hidden
    )
    return jnp.asarray(squares) / sum(h.size for h in target_hidden.values())


def simplicity(
    components: Components,
    mask: Bool[Array, "B *T C"] | Float[Array, "B *T C"],
    schatten_p: Float[ArrayLike, ""],
) -> Float[Array, ""]:
    r"""Schatten-p norm of the active components, on their factors  (APD eq. 8).

    Σ_l uses_l Σ_b Σ_c Σ_j ( s_c(x_b) ‖U_{c,l}[:, j]‖² ‖V_{c,l}[j, :]‖² )^{p/2} / (N·B),   j over the m rank-one parts

    An upper bound of the true Schatten norm that is tight at the balanced SVD. The released code adds 1e-16 inside the
    power for *inactive* pairs too, a constant without gradient (1e-4 per matrix at p = 0.5); here only active pairs count.

    Args:
      mask: bool, or weights s >= 0 (the Lp variant passes the attributions' powers); [B, T, C] averages over positions.
    Cost: norms of the factors, once per step: C·m·(d_in + d_out) per leaf (a float mask adds B·C·m).
    """
    total, mask = 0.0, mask.reshape(-1, mask.shape[-1])
    for f in components.factors.values():
        squares = jnp.sum(f.U**2, axis=-2) * jnp.sum(f.V**2, axis=-1)  # [C, *batch, m]
        squares = squares.reshape(f.num_components, -1)
        if mask.dtype == jnp.bool_:
            active = jnp.sum(mask, axis=0).astype(squares.dtype)
            power = active @ jnp.sum((squares + EPSILON) ** (schatten_p / 2), axis=-1)
        else:
            power = jnp.sum((mask[:, :, None] * squares[None] + EPSILON) ** (schatten_p / 2))
        total += f.uses * power
    return over_components(jnp.asarray(total), components.axis) / (
        components.num_params * mask.shape[0]
    )


def attribution_lp(
    attributions_squared: Float[Array, "B C"], p: Float[ArrayLike, ""]
) -> Float[Array, "B C"]:
    r"""|A_c(x)|^p per pair, from A_c(x)²: the terms of the alternative minimality loss  (APD appendix A.2).

    The loss is its sum over components, averaged over the batch; its gradient flows through the attributions.
    """
    return (attributions_squared + EPSILON) ** (p / 2)
