r"""Directions of mechanisms that take a unit each: an entry of what lies between two leaves.

Where leaf A writes h = a A, and leaf B reads φ(h) with φ acting on every entry by itself, an entry
j is a unit, as a neuron of an MLP is. Its component holds what is written to it and what is read
from it, exactly:

  P_A = A e_j ⊗ e_j,   P_B = e_j ⊗ e_jᵀ B,   so that Σ_j P_A = A and Σ_j P_B = B

Several leaves may write to the same units, as in φ(a A) · (a A'), or read from them. φ is found by
trying: with columns of A at zero, only these entries of what B reads may change; and where these
are h but for a factor and a constant, the basis means nothing, so there are no units. A leaf is
split one way, the first found.

Modes of examples, and their codes, need mechanisms that read different directions of as many
dimensions. Units may read the same few inputs.

Shapes: N examples, n units, d_in, d_out of a leaf, which must be one matrix (b = 1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, PyTree

from apd_jax import components as components_lib
from apd_jax.components.layout import Layout, fold, unfold
from apd_jax.network.problem import Problem
from apd_jax.recipe.directions import inputs, matrices
from apd_jax.recipe.modes import Modes

_CHANGED = 1e-4  # of the largest entry: what differs by less is the same
_ABSENT = 0.3  # of a unit's deviation: what is less is off
# What leaves read, of other columns: {leaf: factor of each} -> {leaf: [N, d_in]}
_Read = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


@dataclasses.dataclass
class _Units:
    """Units, the leaves that write to them, and those that read them."""

    count: int
    writers: list[str]
    readers: list[str]


def find(problem: Problem, batches: Iterable[PyTree]) -> Modes | None:
    """A mode for every unit; None where units do not split every decomposed leaf in one way.

    Cost: for every leaf, 2 log₂ d_out + 1 forward passes of a batch; two passes of all examples.
    """
    weights = matrices(problem)
    if any(len(W) != 1 for W in weights.values()):
        return None
    batches = list(batches)
    program = jax.jit(lambda params, factors, x: _inputs(problem, params, factors, x))

    def reader(batches: list[PyTree]) -> _Read:
        def read(changed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            ones = {name: np.ones(W.shape[2], np.float32) for name, W in weights.items()}
            found = [program(problem.params, ones | changed, x) for x in batches]
            return jax.tree.map(lambda *a: np.concatenate(a)[:, 0], *jax.device_get(found))

        return read

    groups = _found({name: W[0] for name, W in weights.items()}, reader(batches[:1]))
    split = [name for units in groups for name in (*units.writers, *units.readers)]
    if sorted(split) != sorted(weights):  # one is left out, or split two ways
        return None
    return _described(weights, groups, reader(batches))


def _inputs(problem: Problem, params: PyTree, factors: dict[str, jax.Array], x: PyTree) -> PyTree:
    """What leaves read where columns of the leaves are times these factors."""
    leaves = components_lib.named_leaves(params)

    def scaled(name: str) -> jax.Array:
        layout = problem.layouts.get(name, Layout.default(leaves[name].ndim))
        matrix = unfold(leaves[name], layout)
        factor = jnp.expand_dims(factors[name], range(matrix.ndim - 1))
        return fold(matrix * factor, leaves[name].shape, layout)

    changed = components_lib.replace_leaves(params, {name: scaled(name) for name in factors})
    return inputs(problem.with_params(changed), x)


def _found(weights: dict[str, np.ndarray], read: _Read) -> list[_Units]:
    """The units between these leaves."""
    base, groups = read({}), []
    for A, W in weights.items():
        n, taken = W.shape[1], {name for units in groups for name in units.writers}
        fitting = [B for B, x in base.items() if B != A and B not in taken and x.shape[1] == n]
        if A not in base or not fitting:
            continue
        readers = _entry_by_entry(A, base[A] @ W, fitting, base, read)
        same = next((u for u in groups if set(u.readers) & set(readers)), None)
        # A leaf that reads units is split by those, and not by what it writes to the next.
        own = [] if any(A in units.readers for units in groups) else [A]
        if same is not None:
            same.writers += own
            same.readers += [B for B in readers if B not in same.readers]
        elif readers:
            groups.append(_Units(n, own, readers))
    return groups


def _entry_by_entry(
    A: str,
    h: Float[np.ndarray, "N n"],
    readers: list[str],
    base: dict[str, np.ndarray],
    read: _Read,
) -> list[str]:
    """Those whose entry t of what they read depends on column t of A alone, and not as c·h_t."""
    n = h.shape[1]
    zero = read({A: np.zeros(n, np.float32)})

    def differs(a: np.ndarray, b: np.ndarray, of: np.ndarray) -> Bool[np.ndarray, " n"]:
        return np.max(np.abs(a - b), axis=0) > _CHANGED * np.max(np.abs(of))

    def bends(B: str) -> bool:
        change = base[B] - zero[B]
        factor = np.sum(change * h, 0) / np.maximum(np.sum(h * h, 0), 1e-30)
        return bool(differs(change, factor * h, change).any())

    readers = [B for B in readers if bends(B)]
    for kept in _halves(n):
        found = read({A: kept.astype(np.float32)}) if readers else {}
        readers = [B for B in readers if not (differs(found[B], base[B], base[B]) & kept).any()]
    return readers


def _halves(n: int) -> Iterator[Bool[np.ndarray, " n"]]:
    """Subsets of n: of any two numbers, some hold the first alone and some the second."""
    for bit in range(max(1, (n - 1).bit_length())):
        ones = np.arange(n) >> bit & 1 == 1
        yield from (ones, ~ones)


def _described(weights: dict[str, np.ndarray], groups: list[_Units], read: _Read) -> Modes:
    """Modes, the units that are on most first."""
    rest = read({A: np.zeros(weights[A].shape[2], np.float32) for u in groups for A in u.writers})
    every, n = read({}), sum(units.count for units in groups)
    codes = [every[units.readers[0]] - rest[units.readers[0]] for units in groups]
    codes = np.concatenate(codes, 1)
    on = np.abs(codes) > _ABSENT * np.maximum(codes.std(0), 1e-30)
    density = np.sum(np.abs(codes) * on, 0)
    order = np.argsort(-density, kind="stable")
    ins: dict[str, Float[np.ndarray, "n 1 d_in"]] = {}
    writes: dict[str, Float[np.ndarray, "n 1 d_out"]] = {}
    first = 0
    for units in groups:
        own = np.zeros((n, 1, units.count), np.float32)
        own[first : first + units.count, 0] = np.eye(units.count)
        ins |= dict.fromkeys(units.readers, own[order])
        writes |= dict.fromkeys(units.writers, own[order])
        first += units.count
    seen = {name: np.eye(e.shape[2], dtype=np.float32)[None] for name, e in ins.items()}
    active = float(np.mean(np.sum(on, 1)))
    return Modes(ins, ins, seen, density[order], 0.0, active, writes=writes)
