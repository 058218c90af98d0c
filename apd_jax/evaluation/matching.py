"""Two decompositions of one target: which component of the one is which of the other?

Shapes: C components of the first, D of the second.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.optimize import linear_sum_assignment

from apd_jax import components as components_lib
from apd_jax.components import Components, Factors
from apd_jax.errors import InputError


def cosines(first: Components, second: Components) -> Float[np.ndarray, "C D"]:
    r"""cos(P_c, Q_d) over all decomposed leaves together; 0 where either is exactly zero.

    ⟨P_c, Q_d⟩ = Σ_l tr(V_{d,l}ᵀ U_{d,l}ᵀ U_{c,l} V_{c,l}), from the factors: no P_c is formed.

    Raises:
      InputError: they have other leaves, or other shapes of them.
    Cost: C·D·m²·(d_in + d_out) per leaf, one component of the first after the other.
    """
    ours, theirs = ({name: f.shape for name, f in one.factors.items()} for one in (first, second))
    if ours != theirs:
        name = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))[0]
        raise InputError(
            f"the two decompositions differ in leaf {name!r}: {ours.get(name, 'absent')} and "
            f"{theirs.get(name, 'absent')}."
        )

    first, second = components_lib.aligned(first), components_lib.aligned(second)

    def inner(a: Factors, b: Factors) -> Array:
        def one(factors: tuple[Array, Array]) -> Array:
            U, V = factors
            gram_u = jnp.einsum("...im,d...in->d...mn", U, b.U)
            gram_v = jnp.einsum("...mo,d...no->d...mn", V, b.V)
            return jnp.sum(gram_u * gram_v, axis=tuple(range(1, gram_u.ndim)))

        return jax.lax.map(one, (a.U, a.V))

    products = jax.jit(
        lambda p, q: sum(inner(f, q.factors[name]) for name, f in p.factors.items())
    )(first, second)
    norms = [np.asarray(components_lib.norms(one)) for one in (first, second)]
    lengths = np.multiply.outer(*norms)
    return np.divide(products, lengths, out=np.zeros(lengths.shape, np.float32), where=lengths > 0)


def one_to_one(
    cosine: Float[np.ndarray, "C D"],
) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
    """The pairs (c, d), no component twice, with the largest sum of cosines.

    Returns: two arrays, of the k = min(C, D) pairs, best first.
    """
    c, d = linear_sum_assignment(cosine, maximize=True)
    best = np.argsort(-cosine[c, d], kind="stable")
    return c[best], d[best]
