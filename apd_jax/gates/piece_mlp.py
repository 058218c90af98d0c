r"""One small GELU MLP per component, which reads the component's own inner activation: SPD's gate.

γ_c(h) = Σ_k w_out[c,k] · gelu(z_k) + b_out[c],   z_k = w_in[c,k] h_c + b_in[c,k]
                                                          (SPD, Bushnaq et al. 2025, section 2)
gelu(z) = z Φ(z),   gelu'(z) = Φ(z) + z φ(z);   Φ, φ: distribution and density of N(0, 1)

Shapes: B rows (any leading axes), C components, d hidden units.

A training step spends much of its time here: an einsum writes [B, C, d] to memory several times.
Here a sum over units is one loop over [B, C], with one unit at a time in registers; the backward
pass keeps h and computes the rest again. How XLA is brought to do that is said at each function.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from apd_jax import components as components_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PieceMLP:
    """The weights of C MLPs. Transformations may add leading axes (instances under vmap)."""

    w_in: Array  # [C, d]
    b_in: Array  # [C, d]
    w_out: Array  # [C, d]
    b_out: Array  # [C]


def init(
    keys: Mapping[str, PRNGKeyArray], num_components: Mapping[str, int], d_hidden: int
) -> dict[str, PieceMLP]:
    """Of every site. Kaiming normal as in the released SPD: w_in ~ N(0, 2), w_out ~ N(0, 1/d).

    Biases are 0. The variances are gain²/fan-in: gain √2 (of a ReLU) and fan-in 1, then gain 1 and
    fan-in d.
    """
    shapes = {name: (C, d_hidden) for name, C in num_components.items()}
    halves = _halves([keys[name] for name in shapes])
    drawn = components_lib.normals(
        {
            (name, which): (key, shapes[name], jnp.float32, scale)
            for name, own in zip(shapes, halves, strict=True)
            for which, key, scale in zip(("in", "out"), own, (math.sqrt(2), 1.0), strict=True)
        }
    )
    return {
        name: PieceMLP(
            w_in=drawn[name, "in"],
            b_in=jnp.zeros(shape),
            w_out=drawn[name, "out"] / math.sqrt(d_hidden),
            b_out=jnp.zeros(shape[0]),
        )
        for name, shape in shapes.items()
    }


@jax.jit
def _halves(keys: Sequence[Array]) -> list[tuple[Array, Array]]:
    return [(half[0], half[1]) for half in lax.map(jax.random.split, jnp.stack(keys))]


def apply(mlp: PieceMLP, h: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    """γ_c(h_c) of every row and component.

    Computes and returns float32, whatever the types given; gradients have the type of what they
    are of. Reverse mode only, and once; may be vmapped.

    Cost: B·C·d GELUs forward, 2·B·C·d with slopes backward: 5 and 14 ms of one CPU core (Zen 5) for
    B = 4096, C = 200, d = 16; loops use two threads where there are. An einsum takes 41 and 290.
    Peak backward: 2.3 arrays [B, C] (an einsum 112). Few components want B a multiple of 16.
    """
    mlp, rows = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (mlp, h))
    num_rows, C = math.prod(h.shape[:-1]), h.shape[-1]
    # Loops run along components. A few are too short for vectors: rows are put side by side.
    together = math.gcd(num_rows, _NARROW // 8) if C < _NARROW else 1
    mlp = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * together), mlp)
    return _apply(mlp, rows.reshape(num_rows // together, together * C)).reshape(h.shape)


_NARROW = 128  # components; fewer than 8 times the width of vectors


@jax.custom_vjp
def _apply(mlp, h):
    def unit(w_in, b_in, w_out):
        return w_out * _gelu(h * w_in + b_in)[0]

    return _sum_over_units(unit, h, mlp) + mlp.b_out[None]


def _apply_fwd(mlp, h):
    return _apply(mlp, h), (mlp, h)


def _apply_bwd(residuals, g):
    """With ḡ the cotangent, and sums over k for h̄, over rows for the others:

    h̄     = ḡ Σ w_out w_in gelu'(z)    b̄_in  = w_out Σ ḡ gelu'(z)
    w̄_out = Σ ḡ gelu(z)                w̄_in  = w_out Σ ḡ h gelu'(z)    b̄_out = Σ ḡ
    """
    mlp, h = residuals

    def unit(w_in, b_in, w_out):
        return w_out * w_in * _gelu(h * w_in + b_in)[1]

    h_bar = g * _sum_over_units(unit, h, mlp)
    values, slopes, slopes_h = _sums_over_rows(mlp, h, g)
    return PieceMLP(
        w_in=mlp.w_out * slopes_h,
        b_in=mlp.w_out * slopes,
        w_out=values,
        b_out=jnp.sum(g, axis=0),
    ), h_bar


_apply.defvjp(_apply_fwd, _apply_bwd)


def _sum_over_units(unit: Callable[..., Array], h: Array, mlp: PieceMLP) -> Array:
    """Σ_k unit(w_in[:, k], b_in[:, k], w_out[:, k]), each [1, C]: [B, C] like h.

    A loop over pairs of units whose body is one loop over [B, C]. Two things keep LLVM from
    vectorising the inner one (twice to eight times slower) and are avoided: weights with a stride,
    which is how XLA reads a transpose unless it is what an outer loop iterates over; and two slices
    of one array at a running index, so the units of a pair are in arrays of their own.
    """
    weights = [w.T for w in (mlp.w_in, mlp.b_in, mlp.w_out)]  # [d, C]
    odd = len(weights[0]) % 2
    first = unit(*(w[:1] for w in weights)) if odd else jnp.zeros_like(h)

    def step(total, pair):
        return total + sum(unit(*(w[None] for w in of_unit)) for of_unit in pair), None

    pairs = [[w[start::2] for w in weights] for start in (odd, odd + 1)]
    return lax.scan(step, first, pairs)[0]


_FOLD = 4  # 2 is as fast, 8 eight times slower: too long for LLVM to unroll, hence to vectorise


def _sums_over_rows(mlp: PieceMLP, h: Array, g: Array) -> tuple[Array, Array, Array]:
    """Σ ḡ gelu(z), Σ ḡ gelu'(z), Σ ḡ h gelu'(z) over rows, [C, d] each.

    To compute the GELU once for all three: a loop of XLA's writes several arrays on CPU only if it
    is a reduction of several operands, so rows are folded to [_FOLD, B/_FOLD, C] and summed over
    the first axis; then as usual. Such a loop has one thread, so there are two units to a step.
    """
    missing = -len(h) % _FOLD
    h, g = (
        jnp.pad(x, ((0, missing), (0, 0))).reshape(_FOLD, -(-len(x) // _FOLD), x.shape[1])
        for x in (h, g)
    )

    def of_unit(_, weights):
        w_in, b_in = (w[None, None] for w in weights)
        value, slope = _gelu(h * w_in + b_in)
        terms = (g * value, g * slope, h * (g * slope))
        folded = lax.reduce(terms, (np.float32(0),) * 3, _add, (0,))
        return None, [jnp.sum(x, axis=0) for x in folded]

    _, (values, slopes, slopes_h) = lax.scan(of_unit, None, (mlp.w_in.T, mlp.b_in.T), unroll=2)
    return values.T, slopes.T, slopes_h.T


def _add(a: Sequence[Array], b: Sequence[Array]) -> tuple[Array, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _gelu(z: Array) -> tuple[Array, Array]:
    """gelu(z), gelu'(z)."""
    distribution, density = _normal(z)
    return z * distribution, distribution + z * density


# Φ(-a) exp(a²/2) = Σ_i _TAIL[i] t^(i+1), t = 1/(1 + _TAIL_AT a): the form of Abramowitz & Stegun
# 7.1.26. A minimax fit of Φ(-a)·max(a, 1) on a >= 0, error 1.3e-8; sums to Φ(0) = 1/2 at t = 1.
_TAIL_AT = 0.28
_TAIL = (0.11665314, 0.06671818, 0.27072537, -0.23909078, 0.39107504, -0.10608102)

# 2^-r = Σ_i _EXP2[i] r^i for |r| <= 1/2: a minimax fit, relative error 9e-8, exact at 0.
_EXP2 = (1.0, -0.693147, 0.24022242, -0.05550734, 0.009671513, -0.0013264723)


def _normal(z: Array) -> tuple[Array, Array]:
    """Φ(z), φ(z) of float32, to 1e-7, from one exponential.

    φ(z) = exp(-z²/2)/√(2π),   Φ(-|z|) = exp(-z²/2) · tail(|z|)

    With `lax.erf` and `jnp.exp` gelu takes the same time and gelu' 1.6 times; with the tanh form
    (which is another function) the same and 1.4 times.
    """
    density = _exp_half_square(z)
    t = 1 / (1 + _TAIL_AT * jnp.abs(z))
    tail = density * (t * _polynomial(_TAIL, t))
    return jnp.where(z > 0, 1 - tail, tail), density * (1 / math.sqrt(2 * math.pi))


def _exp_half_square(z: Array) -> Array:
    """exp(-z²/2) = 2^-n 2^-r with an integer n and |r| <= 1/2, not below 2^-125.

    Half the time of `jnp.exp`, which has to serve all floats.
    """
    exponent = jnp.minimum(z * z * (0.5 / math.log(2)), 125)
    n = lax.round(exponent, lax.RoundingMethod.TO_NEAREST_EVEN)
    bits = lax.bitcast_convert_type(_polynomial(_EXP2, exponent - n), jnp.int32)
    # From 2^23 on a float's lowest bit is worth 1: n as an integer, faster than by conversion. The
    # shift leaves n alone, as an exponent: subtracted from the bits of a float it divides by 2^n.
    n_bits = lax.bitcast_convert_type(n + 1.5 * 2**23, jnp.int32)
    return lax.bitcast_convert_type(bits - (n_bits << 23), jnp.float32)


def _polynomial(coefficients: Sequence[float], x: Array) -> Array:
    """Σ_i coefficients[i] x^i, by Horner's rule."""
    value = coefficients[-1] * x + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        value = value * x + coefficient
    return value
