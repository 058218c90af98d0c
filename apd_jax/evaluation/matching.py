"""Two decompositions of one target: which component of the one is which of the other?

Shapes: C components of the first, D of the second; n and k pieces at a site.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
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


def mean_max_cosine(
    first: Components,
    second: Components,
    alive: tuple[Bool[np.ndarray, " C"], Bool[np.ndarray, " D"]],
) -> dict[str, float]:
    r"""How near each piece of the first has a like one in the second, where pieces are U_j V_j.

    Mean over the first's pieces of max_k at the same site, over the second's, of
      U   |cos(U_j, U'_k)|, what is read
      V   |cos(V_j, V'_k)|, what is written
      UV  cos(U_j V_j, U'_k V'_k), the product of the two with their signs

    Not symmetric, and higher by chance the more pieces the second has: a control of as many is
    needed beside it.

    Args:
      alive: which components count, of each. A site where either has none is left out.
    Returns: {} where pieces are no outer products of two vectors, or none count.
    Cost: n·k·(d_in + d_out) per site.
    """
    found: dict[str, list[np.ndarray]] = {"U": [], "V": [], "UV": []}
    for name, f in first.factors.items():
        g = second.factors[name]
        if f.rank != 1 or f.U.ndim != 3 or g.rank != 1:
            return {}
        ours, theirs = (_units(h, on) for h, on in zip((f, g), alive, strict=True))
        cos = [a @ b.T for a, b in zip(ours, theirs, strict=True)]
        if cos[0].size:
            found["U"].append(np.abs(cos[0]).max(1))
            found["V"].append(np.abs(cos[1]).max(1))
            found["UV"].append((cos[0] * cos[1]).max(1))
    return {of: float(np.concatenate(rows).mean()) for of, rows in found.items() if rows}


def _units(f: Factors, alive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Directions that the pieces of the components that count read and write, [n, d] each."""
    count = np.asarray(f.take(jnp.asarray(alive)))
    rows = (np.asarray(f.U)[count, :, 0], np.asarray(f.V)[count, 0])
    lengths = [np.linalg.norm(a, axis=1, keepdims=True) for a in rows]
    u, v = (a / np.where(n > 0, n, 1) for a, n in zip(rows, lengths, strict=True))
    return u, v
