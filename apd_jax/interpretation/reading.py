"""Which components are on at every token of some text, as a list for each.

Shapes: B sequences, T positions, n pairs of a position and a component that is on there.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import wadler_lindig as wl
from jaxtyping import Float, Int, UInt8

from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Reading:
    """At position t of sequence b are on component[s[i] : s[i + 1]] with i = b·T + t, s = starts.

    activity: of 255, see `quantised`.
    """

    tokens: Int[np.ndarray, "B T"]
    starts: Int[np.ndarray, " ends"]
    component: Int[np.ndarray, " n"]
    activity: UInt8[np.ndarray, " n"]

    def __repr__(self) -> str:
        return wl.pformat(self)


def read(
    decomposition: Decomposition, tokens: Int[np.ndarray, "B T"], threshold: float = 0.0
) -> Reading:
    """Runs the gate on one batch. Components count as on where g is above the threshold.

    Raises:
      InputError: the gate has one mask for a whole sequence.
    """
    g = np.asarray(jax.device_get(decomposition.activity(tokens).values), np.float32)
    if g.ndim != 3:
        raise InputError("this decomposition has one mask for a sequence, not one for every word.")
    position, component = np.nonzero((g > threshold).reshape(-1, g.shape[-1]))
    starts = np.searchsorted(position, np.arange(tokens.size + 1))
    levels = g.reshape(-1, g.shape[-1])[position, component]
    return Reading(np.asarray(tokens), starts, component, quantised(levels))


def quantised(g: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """g in [0, 1] in 255 steps; what is above 0 stays so."""
    return np.where(g > 0, np.clip(np.round(255 * g), 1, 255), 0).astype(np.uint8)
