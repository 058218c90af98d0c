"""Sites that hold only some numbers, seen as if they held all of them.

Shapes: C components, n pieces of a site, R columns of a component at a site that holds all of them.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool

from apd_jax.components import Factors


def held(f: Factors, num_components: int) -> Bool[np.ndarray, "C R"]:
    """Which columns of the aligned site are columns of pieces that `f` has.

    See `components.aligned`.
    """
    if f.ids is None:
        return np.ones((num_components, f.rank), bool)
    turns = _turns(f)
    found = np.zeros((num_components, (max(turns) + 1) * f.rank), bool)
    for c, turn in zip(f.ids, turns, strict=True):
        found[c, turn * f.rank : (turn + 1) * f.rank] = True
    return found


def back(whole: Factors, f: Factors) -> Factors:
    """The pieces of `f` with the columns of `whole`, which is `f` aligned but for its values.

    Columns for which `f` has no piece are lost.
    """
    if f.ids is None:
        return whole
    m = f.rank
    columns = [range(turn * m, (turn + 1) * m) for turn in _turns(f)]
    U = np.stack([np.asarray(whole.U)[c][..., k] for c, k in zip(f.ids, columns, strict=True)])
    V = np.stack([np.asarray(whole.V)[c][..., k, :] for c, k in zip(f.ids, columns, strict=True)])
    return dataclasses.replace(f, U=U, V=V)


def _turns(f: Factors) -> list[int]:
    """Of every piece, how many pieces before it have the same number."""
    seen: dict[int, int] = {}
    turns = []
    for c in f.ids or ():
        turns.append(seen.get(c, 0))
        seen[c] = turns[-1] + 1
    return turns
