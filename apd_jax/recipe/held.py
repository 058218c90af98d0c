r"""Components that begin at the modes of a network.

With D the directions d_i that modes read (see `modes`) and t_i the rows of pinv(D)ᵀ, mode i is held
by

  P_i = d_i ⊗ t_iᵀ W,    so that Σ_i P_i is W on the span of the d_i

Where layers read nothing but sums of the e_i, these d_i are their dual basis, and t_i = e_i. A
layer may also read what earlier layers wrote. That need not be a sum of what they write for single
modes. The d_i are blind to it, and what W makes of it belongs to no mode.

Where a leaf is split by what modes write, with E their directions, P_i = W t_i ⊗ e_i.

Shapes: n modes, C components, b matrices of a leaf (1 unless stacked), m rank, R columns of a
component's U at a leaf.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from apd_jax import components as components_lib
from apd_jax.components import Components, Factors
from apd_jax.errors import InputError
from apd_jax.network.problem import Problem
from apd_jax.recipe import places
from apd_jax.recipe.directions import matrices
from apd_jax.recipe.modes import Modes, dual

SHARED = 0.75  # a gain below which modes share a leaf
LEAK = 0.1  # of what modes do there, on examples without them: above, they share a leaf too
_NOTHING = 1e-6  # singular parts of a weight below this part of the largest belong to no component


def components(
    problem: Problem,
    modes: Modes,
    fresh: Components,
    *,
    num_always_on: int = 0,
    whole: Collection[str] | None = None,
) -> Components:
    """Components that sum to the target and begin at the modes, after the always-on ones.

    The always-on components, if there are any, hold the leaves that are whole. They also hold what
    other leaves make of what is read but belongs to no mode. The rest of a leaf, on which it does
    nothing, goes in pieces of rank m to the components that no mode has taken. Without always-on
    components both go to these. Further columns of U are those of `fresh`, with rows of 0 in V, so
    that ranks can grow.

    Args:
      fresh: as `components.init` gives them: shapes and small random values.
      whole: these leaves; None: those that modes share.
    Raises:
      InputError: the always-on components have too small a rank for what they are to hold.
    """
    modes = modes.first(fresh.num_components - num_always_on)
    weights = matrices(problem)
    unsplit = shared(modes) if whole is None else whole
    aligned = components_lib.aligned(fresh).factors

    def make(path: tuple, f: Factors | None) -> Factors | None:
        if f is None:
            return None
        name = components_lib.path_name(path)
        exists = places.held(f, fresh.num_components)
        site = _Site(name, aligned[name], exists, len(weights[name]), num_always_on, len(modes))
        for i, matrix in enumerate(weights[name]):
            if num_always_on and name in unsplit:
                site.hold_whole(i, matrix, f.rank)
            elif name in modes.writes:
                site.hold_writes(i, matrix, modes.writes[name][:, i].astype(np.float64))
            else:
                reads = modes.reads[name][:, i].astype(np.float64)
                site.hold(i, matrix, reads, modes.seen[name][i])
        made = places.back(site.made, f)
        return dataclasses.replace(made, U=jnp.asarray(made.U), V=jnp.asarray(made.V))

    tree = jax.tree_util.tree_map_with_path(make, fresh.tree, is_leaf=components_lib.is_slot)
    return dataclasses.replace(fresh, tree=tree)


def shared(modes: Modes) -> list[str]:
    """The leaves whose gain is below SHARED, or that modes leak in."""
    gains, leaks = modes.gains, modes.leaks
    return [n for n, gain in gains.items() if gain < SHARED or leaks.get(n, 0.0) > LEAK]


def num_for_rest(problem: Problem, modes: Modes, components: Components) -> int:
    """How many components hold between them what modes leave of leaves that they split.

    0 where nothing is known to be read beside them (`Modes.leaks`).
    """
    if not modes.leaks:
        return 0
    needed, weights, whole = [0], matrices(problem), shared(modes)
    for name in (name for name in modes.reads if name not in whole and name not in modes.writes):
        for i, W in enumerate(weights[name]):
            d, seen = modes.reads[name][:, i], modes.seen[name][i]
            left = seen @ (seen.T @ (W - d.T @ (dual(d, 1e-6)[0] @ W)))
            singular = np.linalg.svd(left, compute_uv=False)
            needed.append(-(-int(np.sum(singular > _least(W))) // components.factors[name].rank))
    return max(needed)


def num_to_hold(problem: Problem, name: str, components: Components) -> int:
    """How many components of the rank that these have hold the whole of a leaf between them."""
    m = components.factors[name].rank
    singular = np.linalg.svd(matrices(problem)[name], compute_uv=False)
    return int(-(-np.sum(singular > _NOTHING * singular[:, :1], axis=1).max() // m))


class _Site:
    """The factors of one leaf while they are filled.

    exists: the columns that there are. Numbers from num_always_on on are of the modes.
    """

    def __init__(
        self,
        name: str,
        f: Factors,
        exists: Bool[np.ndarray, "C R"],
        num_matrices: int,
        num_always_on: int,
        num_modes: int,
    ):
        C, R = exists.shape
        self._name, self._factors, self._exists = name, f, exists
        self._num_always_on = num_always_on
        self._taken = slice(num_always_on, num_always_on + num_modes)
        self.U = np.array(f.U).reshape(C, num_matrices, -1, R)
        self.V = np.zeros((C, num_matrices, R, f.V.shape[-1]), self.U.dtype)
        self.U[[c for c in range(C) if not self._taken.start <= c < self._taken.stop]] = 0
        here = np.any(exists, axis=1)
        self._always = [c for c in range(num_always_on) if here[c]]
        self._spare = [c for c in range(self._taken.stop, C) if here[c]]

    @property
    def made(self) -> Factors:
        f = self._factors
        return dataclasses.replace(f, U=self.U.reshape(f.U.shape), V=self.V.reshape(f.V.shape))

    def hold_whole(self, i: int, W: Float[np.ndarray, "d_in d_out"], m: int) -> None:
        """Matrix i by the always-on components alone."""
        self.U[:, i] = 0
        rest = self._spread(i, W, [self._always], _least(W))
        if rest:
            on = self._num_always_on
            rank, room = on * m + rest, on * m
            raise InputError(
                f"{self._name!r} of rank {rank} is shared by all modes, but {on} always-on "
                f"component(s) of rank {m} hold only {room}; set num_always_on to at least "
                f"{-(-rank // m)}, or the rank to at least {-(-rank // on)}."
            )

    def hold(
        self,
        i: int,
        W: Float[np.ndarray, "d_in d_out"],
        d: Float[np.ndarray, "n d_in"],
        seen: Float[np.ndarray, "d_in r"],
    ) -> None:
        """Matrix i by the modes, and what belongs to none of them by the others."""
        left = self._take(i, W, d, dual(d, 1e-6)[0] @ W)
        read = seen @ (seen.T @ left)
        self._spread(i, read, [self._always, self._spare], _least(W))
        self._spread(i, left - read, [self._spare, self._always], _least(W))

    def hold_writes(
        self, i: int, W: Float[np.ndarray, "d_in d_out"], e: Float[np.ndarray, "n d_out"]
    ) -> None:
        """Matrix i by what modes write, and what none writes by the others."""
        left = self._take(i, W, dual(e, 1e-6)[0] @ W.T, e)
        self._spread(i, left, [self._spare, self._always], _least(W))

    def _take(
        self,
        i: int,
        W: Float[np.ndarray, "d_in d_out"],
        d: Float[np.ndarray, "n d_in"],
        v: Float[np.ndarray, "n d_out"],
    ) -> Float[np.ndarray, "d_in d_out"]:
        """Column 0 of the modes' components: d_i ⊗ v_i, as long on both sides. What is left."""
        held = self._exists[self._taken, 0]
        d, v = d * held[:, None], v * held[:, None]
        length = np.maximum(np.linalg.norm(d, axis=1), 1e-30)
        scale = np.sqrt(np.linalg.norm(v, axis=1) / length)[:, None]
        self.U[self._taken, i, :, 0] = d * scale
        self.V[self._taken, i, 0] = v / np.maximum(scale, 1e-30)
        return W - d.T @ v

    def _spread(
        self,
        i: int,
        W: Float[np.ndarray, "d_in d_out"],
        where: Sequence[Sequence[int]],
        least: float,
    ) -> int:
        """Writes the singular parts of W above `least` into free columns, where V is 0.

        One group of components after the other, and in turn within it. Returns how many did not
        fit, the smallest.
        """
        u, s, vt = np.linalg.svd(W, full_matrices=False)
        parts = np.flatnonzero(s > least)
        free = [
            (c, k)
            for group in where
            for k in range(self._exists.shape[1])
            for c in group
            if self._exists[c, k] and not self.V[c, i, k].any()
        ]
        for j, (c, k) in zip(parts, free, strict=False):
            self.U[c, i, :, k], self.V[c, i, k] = u[:, j] * np.sqrt(s[j]), np.sqrt(s[j]) * vt[j]
        return max(0, len(parts) - len(free))


def _least(W: Float[np.ndarray, "d_in d_out"]) -> float:
    return _NOTHING * float(np.linalg.norm(W, 2))
