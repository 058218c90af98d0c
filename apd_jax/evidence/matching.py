"""Two decompositions of one target: which components agree?"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from apd_jax.components import Components
from apd_jax.errors import InputError
from apd_jax.evaluation.general import ALIVE_NORM
from apd_jax.evidence.subject import norms

SAME = 0.9  # cosine from which on two components count as the same


@dataclasses.dataclass(frozen=True)
class Agreement:
    """match: each component's partner, -1 if none. cosine: with it; 0 without. large: which have above ALIVE_NORM of the largest norm."""

    match: Int[np.ndarray, " C"]
    cosine: Float[np.ndarray, " C"]
    large: np.ndarray

    @property
    def mean_cosine(self) -> float:
        return float(self.cosine[self.large].mean()) if self.large.any() else 0.0

    @property
    def share(self) -> float:
        """Of the large components, how many have a partner with a cosine of at least SAME."""
        return float((self.cosine[self.large] >= SAME).mean()) if self.large.any() else 0.0


def agreement(a: Components, b: Components) -> Agreement:
    """Matches components one to one so that the sum of cosines of whole parameter vectors, all leaves together, is largest.

    Raises:
      InputError: the two decompose other leaves, or leaves of other shapes.
    Cost: C²·|θ|, one leaf's P_c in memory at a time, and an assignment of order C³ on the host.
    """
    theirs = {name: f.shape for name, f in b.factors.items()}
    if theirs != {name: f.shape for name, f in a.factors.items()}:
        raise InputError(
            f"the two decompositions are of other leaves or shapes ({', '.join(a.factors)} and {', '.join(theirs)}); "
            "compare runs of one target."
        )
    inner = np.zeros((a.num_components, b.num_components))
    for name, f in a.factors.items():
        P, Q = (np.asarray(jax.device_get(g.weights), np.float64).reshape(g.num_components, -1) for g in (f, b.factors[name]))
        inner += P @ Q.T
    norm = np.asarray(norms(a), np.float64)
    lengths = norm[:, None] * np.asarray(norms(b), np.float64)[None, :]
    cosine = np.divide(inner, lengths, out=np.zeros_like(inner), where=lengths > 0)
    rows, columns = linear_sum_assignment(cosine, maximize=True)
    match, matched = np.full(a.num_components, -1), np.zeros(a.num_components)
    match[rows], matched[rows] = columns, cosine[rows, columns]
    return Agreement(match, matched, norm > ALIVE_NORM * norm.max())
