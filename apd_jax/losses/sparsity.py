"""What active components cost: their norms, their causal importances, how often they fire, ranks.

Shapes: B examples, T positions, C components, n pieces, m rank.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from apd_jax.collectives import mean_over_batch, over_components
from apd_jax.components import Components
from apd_jax.losses.reconstruction import single, weighted

EPSILON = 1e-16  # inside the powers: a finite gradient at 0 (the released code of APD's value)
LEAST = 1e-12  # added to causal importances before a power (VPD)


@functools.partial(jax.jit, inline=True)
def simplicity(
    components: Components,
    mask: Bool[Array, "B *T C"] | Float[Array, "B *T C"],
    schatten_p: Float[ArrayLike, ""],
) -> Float[Array, ""]:
    r"""Schatten-p norm of the active components, on their factors  (APD eq. 8).

    Σ_l uses_l Σ_b Σ_c Σ_j ( s_c(x_b) ‖U_{c,l}[:, j]‖² ‖V_{c,l}[j, :]‖² )^{p/2} / (N·B)

    with j over the m rank-one parts. An upper bound of the true Schatten norm that is tight at the
    balanced SVD. The released code adds 1e-16 inside the power for *inactive* pairs too, a constant
    without gradient (1e-4 per matrix at p = 0.5); here only active pairs count.

    Args:
      mask: bool, or weights s >= 0 (the L_p variant passes the attributions' powers); [B, T, C]
        averages over positions.
    Cost: norms of the factors, once per step: n·m·(d_in + d_out) per leaf (a float mask adds
      B·n·m).
    """
    total, mask = jnp.zeros(()), mask.reshape(-1, mask.shape[-1])
    rows = float(mask.shape[0])
    for f in components.factors.values():
        squares = jnp.sum(f.U**2, axis=-2) * jnp.sum(f.V**2, axis=-1)  # [n, *batch, m]
        squares = squares.reshape(f.num_pieces, -1)
        if mask.dtype == jnp.bool_:
            active = f.take(jnp.sum(mask, axis=0)).astype(squares.dtype)
            power = active @ jnp.sum((squares + EPSILON) ** (schatten_p / 2), axis=-1)
        else:
            scaled = f.take(mask)[:, :, None] * squares[None]
            power = jnp.sum((scaled + EPSILON) ** (schatten_p / 2))
        total += f.uses * power
    return over_components(jnp.asarray(total), components.axis) / (
        float(components.num_params) * rows  # in floats: the product may exceed a 32-bit integer
    )


def attribution_lp(
    attributions_squared: Float[Array, "B *T C"], p: Float[ArrayLike, ""]
) -> Float[Array, "B *T C"]:
    r"""|A_c(x)|^p per pair, from A_c(x)²: the alternative minimality loss  (APD appendix A.2).

    The loss is its sum over components, averaged over the batch; its gradient flows through the
    attributions.
    """
    return (attributions_squared + EPSILON) ** (p / 2)


def importance(
    g: Float[Array, "B *T C"],
    p: Float[ArrayLike, ""],
    weights: Float[Array, "B T"] | None = None,
) -> Float[Array, " C"]:
    r"""mean over the batch (and positions) of (g_c + 1e-12)^p, of every component  (SPD, VPD).

    Below p = 0.8 the gradient at g near 0 is large; sum it over components for SPD's loss.
    """
    powers = weighted((single(g) + LEAST) ** p, of_rows(weights, g))
    return jnp.mean(powers, axis=tuple(range(g.ndim - 1)))


def smooth_l0(
    g: Float[Array, "B *T C"],
    gamma: Float[ArrayLike, ""],
    weights: Float[Array, "B T"] | None = None,
) -> Float[Array, " C"]:
    r"""mean of ψ(g_c) = (1 + γ²) g² / (g² + γ²): 1 at g = 1, and ever nearer to [g > 0] as γ falls.

    Unlike Σ g^p with a small p its gradient stays bounded, by about 1/γ.
    """
    square, gamma2 = single(g) ** 2, jnp.asarray(gamma) ** 2
    psi = (1 + gamma2) * square / (square + gamma2)
    return jnp.mean(weighted(psi, of_rows(weights, g)), axis=tuple(range(g.ndim - 1)))


def of_rows(weights: Array | None, values: Float[Array, "B *T C"]) -> Array | None:
    """The weights of positions, where values have positions; one value per example has none."""
    return weights if values.ndim == 3 else None


def frequency(
    rates: Float[Array, " C"], count: Float[ArrayLike, ""], axis_name: str | None = None
) -> Float[Array, ""]:
    r"""Σ_c f_c log₂(1 + N f_c), f_c the activity rate of component c over the whole batch.

    With s_c = N f_c, the sum over N rows, this is VPD's (1/N) Σ_c s_c log₂(1 + s_c): a component
    that fires often pays more for every further time. With a fixed N it does not depend on the
    batch size.

    Args:
      rates: this device's, as `importance` or `smooth_l0` give them; averaged over `axis_name`.
      count: N, rows (examples or positions) over all devices.
    """
    rates = mean_over_batch(rates, axis_name)
    return jnp.sum(rates * jnp.log2(1 + count * rates))


def trim(
    components: Components,
    rates: Float[Array, " C"],
    p: Float[ArrayLike, ""] = 0.5,
    least: float = 0.005,
) -> Float[Array, ""]:
    r"""The price of ranks: Σ_l Σ_j (least + rate_c) Σ_r (‖U_r‖² ‖V_r‖² + 1e-8)^{p/2}.

    r runs over the rank-one parts of piece j, c is the component that the piece belongs to, and
    rate_c how often it fires: what fires often must have a low rank.
    """
    total = jnp.zeros(())
    for f in components.factors.values():
        squares = jnp.sum(f.U**2, axis=-2) * jnp.sum(f.V**2, axis=-1)
        sizes = jnp.sum((squares.reshape(f.num_pieces, -1) + 1e-8) ** (p / 2), axis=-1)
        total += f.uses * jnp.sum((least + f.take(rates)) * sizes)
    return over_components(total, components.axis)
