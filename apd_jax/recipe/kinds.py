"""Kinds of directions that mechanisms may read, as the recipe looks for them.

A kind is a function of examples that gives `Modes`: directions, one per mechanism and leaf; or
several such, one after the other; or None. In the order of what they cost:

  modes       directions that many examples share: needs examples with one mechanism alone
  modes of one leaf   the same, where examples are compared by what they read in the leaf that tells
              most of them apart: in others one mechanism may read several directions, as behind a
              nonlinearity, and different ones nearly the same
  separation  directions of the codes that examples are mixtures of: needs as many dimensions
  units       the entries of what lies between two layers, if a nonlinearity keeps them apart
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from apd_jax.network.problem import Problem
from apd_jax.recipe import modes as modes_lib
from apd_jax.recipe import separation, units
from apd_jax.recipe.directions import matrices
from apd_jax.recipe.modes import Modes, Rows

MOST_LEAVES = 8  # by which examples are compared, one after the other


@dataclasses.dataclass(frozen=True)
class Examples:
    """What a kind of beginning is given: see `modes.examples`.

    signed, whole: see `positions.read` and `constant.read`; None where nothing is known to be read
      whatever an example needs.
    """

    problem: Problem
    batches: Iterable[Any]
    key: Any
    times: int
    ins: dict[str, np.ndarray]
    effect: np.ndarray
    signed: Rows | None = None
    whole: Rows | None = None


def _densest(e: Examples) -> Modes:
    most = e.times * modes_lib.MOST_KEPT
    return modes_lib.densest(e.ins, e.effect, matrices(e.problem), most=most, whole=e.whole)


def _densest_in_one(e: Examples) -> Iterator[Modes]:
    """In the richest leaf; where something is read whatever the mode, in several of them."""
    most, weights = e.times * modes_lib.MOST_KEPT, matrices(e.problem)
    leaves = modes_lib.by_richness(e.ins, e.effect) if len(e.ins) > 1 else []
    for by in leaves[: 1 if e.whole is None else MOST_LEAVES]:
        yield modes_lib.densest(e.ins, e.effect, weights, most=most, by=by, whole=e.whole)


def _separated(e: Examples) -> Modes | None:
    return separation.find(e.problem, e.batches, e.key, e.ins, e.effect, e.signed, e.whole)


def _units(e: Examples) -> Modes | None:
    return units.find(e.problem, e.batches)


KINDS: dict[str, Callable[[Examples], Modes | Iterator[Modes] | None]] = {
    "modes": _densest,
    "modes of one leaf": _densest_in_one,
    "separation": _separated,
    "units": _units,
}
# Single mechanisms that many examples show need no comparison.
SUREST = ("modes", "modes of one leaf")
