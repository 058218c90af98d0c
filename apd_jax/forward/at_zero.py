"""Products with θ* + Σ_j s_j P_j at s = 0: the target's own, with derivatives in s of their own.

They give attributions: how outputs move when a piece is added (`gradient` by reverse mode,
`tangent` by forward mode), or how strongly a piece is driven (`activation`).

Shapes: p positions with an s of their own, r rows that share it, n pieces, d inputs, e outputs.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from apd_jax.forward.dispatch import is_lookup, read, read_all

AT_ZERO = ("gradient", "tangent", "activation")


@jax.custom_jvp
def moved_from_zero(x, U, V, s, base):
    """x·(base + Σ_j s_j U_j V_j) at s = 0. Only x and s have tangents.

    x [p, r, d] or integers [p, r]; U [n, d, m]; V [n, m, e]; s [p, n]; base [d, e] -> [p, r, e].
    """
    return read(x, base)


@moved_from_zero.defjvp
def _(primals, tangents):
    x, U, V, _, base = primals
    dx, _, _, ds, _ = tangents
    moved = jnp.einsum("prcm,pc,cme->pre", read_all(x, U), ds, V)
    out = read(x, base)
    return out, (moved if is_lookup(x) else moved + dx @ base).astype(out.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def at_zero(activation: bool, x, U, V, s, base):
    """The same with a derivative in s by reverse mode.

    With `activation` this "derivative" is Σ_r ‖x U_j V_j‖², whatever comes back.
    """
    return read(x, base)


def _forth(activation, x, U, V, s, base):
    return read(x, base), (x, U, V, s, base)


def _back(activation, residuals, g):
    x, U, V, s, base = residuals
    inner = read_all(x, U)
    if activation:
        gram = jnp.einsum("cme,cne->cmn", V, V)
        ds = jnp.einsum("prcm,cmn,prcn->pc", inner, gram, inner)
    else:
        ds = jnp.sum(inner * jnp.einsum("pre,cme->prcm", g, V), axis=(1, 3))
    dx = None if is_lookup(x) else (g @ base.T).astype(x.dtype)
    return dx, jnp.zeros_like(U), jnp.zeros_like(V), ds.astype(s.dtype), jnp.zeros_like(base)


at_zero.defvjp(_forth, _back)
