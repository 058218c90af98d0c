"""Two decompositions of one target: which components agree?"""

from __future__ import annotations

import dataclasses

import numpy as np
import wadler_lindig as wl
from jaxtyping import Float, Int

from apd_jax.components import Components
from apd_jax.evaluation.matching import cosines, one_to_one
from apd_jax.evidence.subject import norms
from apd_jax.targets.scoring import large_components

SAME = 0.9  # cosine from which on two components count as the same


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How the components of one decomposition are found in another.

    match: each component's partner, -1 if none. cosine: with it; 0 without. large: which have above
    ALIVE_NORM of the largest norm.
    """

    match: Int[np.ndarray, " C"]
    cosine: Float[np.ndarray, " C"]
    large: np.ndarray

    def __repr__(self) -> str:
        return wl.pformat(self)

    @property
    def mean_cosine(self) -> float:
        return float(self.cosine[self.large].mean()) if self.large.any() else 0.0

    @property
    def share(self) -> float:
        """Of the large components, how many have a partner with a cosine of at least SAME."""
        return float((self.cosine[self.large] >= SAME).mean()) if self.large.any() else 0.0

    def carried(self, change: Float[np.ndarray, " C"]) -> float:
        """Of what ablating components one by one changes, the share of those found again."""
        found = self.large & (self.cosine >= SAME)
        return float(change[found].sum() / max(change.sum(), 1e-30))


def agreement(a: Components, b: Components) -> Agreement:
    """Matches components one to one so that the sum of their cosines is largest.

    Cosines are of whole parameter vectors, all leaves together.

    Raises:
      InputError: the two decompose other leaves, or leaves of other shapes.
    Cost: that of `cosines`, and an assignment of order C³ on the host.
    """
    cosine = cosines(a, b)
    rows, columns = one_to_one(cosine)
    norm = np.asarray(norms(a), np.float64)
    match, matched = np.full(a.num_components, -1), np.zeros(a.num_components)
    match[rows], matched[rows] = columns, cosine[rows, columns]
    return Agreement(match, matched, large_components(norm))
