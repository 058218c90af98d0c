"""The two leaky hard sigmoids that make a causal importance g in [0, 1] of a gate's logit x.

Both are clamp(x, 0, 1) but for what leaks. Masks use `lower_leaky`, so that a component that is off
everywhere can come back; the price on importances uses `upper_leaky`, so that logits above 1 feel
it too.    (SPD, Bushnaq et al. 2025, section 2; VPD, Bushnaq et al. 2026)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LEAK = 0.01  # slope outside of [0, 1]


@jax.custom_vjp
def lower_leaky(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """clamp(x, 0, 1), with a gradient below 0 where descent would raise x.

    x̄ = ḡ        0 < x <= 1
        0        1 < x
        LEAK·ḡ   x <= 0 and ḡ < 0, else 0    (VPD, "mask sigmoid"; SPD leaks for either sign of ḡ)

    Cost: elementwise; the backward pass keeps x. No forward-mode derivative (jvp).
    """
    return jnp.clip(x, 0, 1)


def _lower_leaky_fwd(x):
    return jnp.clip(x, 0, 1), x


def _lower_leaky_bwd(x, g):
    return (jnp.where(x <= 0, LEAK * jnp.minimum(g, 0), jnp.where(x <= 1, g, 0)),)


lower_leaky.defvjp(_lower_leaky_fwd, _lower_leaky_bwd)


def upper_leaky(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """clamp(x, 0, 1) up to 1, and 1 + LEAK·(x − 1) above.    (SPD, VPD)

    Derivative: 0 below 0, 1 on [0, 1], LEAK above. By `where`: jnp.clip's is 1/2 at 0 and at 1.
    """
    return jnp.where(x < 0, 0, jnp.where(x <= 1, x, 1 + LEAK * (x - 1)))
