r"""What modes write, at leaves whose inputs they share.

Where a leaf has fewer inputs than there are modes, no part can read one mode alone. It may yet
write for one alone: of an example with gradient G = ∂(v·f)/∂W (`directions`), r(x) = G ᵀe/‖G ᵀe‖ is
how the leaf's output counts, and where what other modes would write is cut off behind it, r is a
sum over the modes that the example has,

  r(x) ≈ ± Σ_i s_i(x) r_i,   s_i(x) = e(x)·hat_i  of the leaf that tells modes apart best

Shapes: N examples, n modes, b matrices of a leaf (1 unless stacked).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jaxtyping import Float, PyTree

from apd_jax.network.problem import Problem
from apd_jax.recipe.directions import written
from apd_jax.recipe.modes import Modes, codes_of, dual
from apd_jax.recipe.separation import Read, purified

MOST_EXAMPLES = 8192  # that what modes write is told by
_INDEPENDENT = 0.99  # a gain above which what modes write is independent


def split(
    problem: Problem,
    batches: Iterable[PyTree],
    ins: dict[str, Float[np.ndarray, "N b d_in"]],
    effect: Float[np.ndarray, " N"],
    modes: Modes,
    names: Sequence[str],
) -> Modes:
    """The modes with those of the leaves `names` split by what modes write that can be.

    Cost: gradients of MOST_EXAMPLES; a regression on n codes for each of these leaves.
    """
    of_batch = jax.jit(lambda params, x: written(problem.with_params(params), x, tuple(names)))
    drawn: list[dict[str, np.ndarray]] = []
    for x in batches:
        drawn.append(jax.device_get(of_batch(problem.params, x)))
        if sum(len(r[names[0]]) for r in drawn) >= MOST_EXAMPLES:
            break
    out = jax.tree.map(lambda *a: np.concatenate(a), *drawn)
    N = len(out[names[0]])
    s = codes_of(ins, modes.ins, modes.condition)[0]({name: e[:N] for name, e in ins.items()})
    codes = s * np.where(s.sum(axis=1, keepdims=True) < 0, -1, 1)  # e(x) has no sign
    weight = np.sqrt(effect[:N] / max(float(np.mean(effect)), 1e-30)).astype(np.float32)
    found = {}
    for name, r in out.items():
        own = [_directions(r[:, i] * weight[:, None], codes) for i in range(r.shape[1])]
        if all(dual(e)[1] > _INDEPENDENT for e in own):
            found[name] = np.stack(own, 1)
    return dataclasses.replace(modes, writes=modes.writes | found)


def _directions(
    r: Float[np.ndarray, "N d_out"], codes: Float[np.ndarray, "N n"]
) -> Float[np.ndarray, "n d_out"]:
    """r_i by these codes, and then by those of r itself, whose signs are its own."""
    rough = Read(r[:, None], False).regressed(0, codes)
    return Read(r[:, None], True).regressed(0, purified(r, rough))
