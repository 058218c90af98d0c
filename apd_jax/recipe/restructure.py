"""Between two stages: components that are one mechanism are joined, unused ones are cleared.

Gradient descent cannot do either. Two halves of a mechanism, kept on the same inputs, lie in a flat
valley of all losses; a component that is never kept pays no simplicity and may hold anything.
Nothing here looks at a ground truth: joining is judged by the simplicity loss.

Shapes: B examples, C components.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from apd_jax import components as components_lib
from apd_jax.components import Components, Factors
from apd_jax.gates import selection
from apd_jax.methods.apd import APD
from apd_jax.network.problem import Problem
from apd_jax.recipe import places

NUM_EXAMPLES = 20_000  # for the statistics, about
SCHATTEN_P = 0.5  # of the comparison: well below 1, so that one is clearly simpler than two halves
LEAST_GAIN = 0.1  # joining must save at least this share of the two components' simplicity ...
PARALLEL = 0.8  # or their cosine is above this: their attributions are then proportional
LEAST_OVERLAP = 0.3  # ... and one matters on this share of the inputs on which the other does
LEAST_FIRING = 0.01  # an alive component is kept, and matters, on this share of k/C of the inputs
LEAST_STRENGTH = 0.25  # ... and has, where it is kept, this share of the mean squared attribution


class Usage(NamedTuple):
    """On which inputs components matter: have an attribution above the threshold."""

    together: Float[Array, "C C"]  # share of inputs on which both matter; diagonal: each does
    firing: Float[Array, " C"]  # share on which it matters and is kept
    square: Float[Array, " C"]  # mean squared attribution where it matters and is kept; else 0


def measure(
    problem: Problem, method: APD, threshold: float, key: PRNGKeyArray
) -> Callable[[Components], Usage]:
    """How often components (of one instance) matter, alone and in pairs.

    Args:
      threshold: of the attributions, in units of the output.
    Cost: the attributions of NUM_EXAMPLES examples.
    """
    attribute = method.attribute(problem)
    batches = problem.looks(key, max(1, NUM_EXAMPLES // method.batch_size))

    @jax.jit
    def one(components: Components, params: PyTree, x: PyTree, key: PRNGKeyArray) -> Usage:
        A = jnp.sqrt(attribute(components, params, x, key))
        A = A.reshape(-1, components.num_components)
        matters = threshold < A
        flags = matters.astype(jnp.float32)
        fired = matters & selection.batch_topk(A, method.topk)
        return Usage(
            flags.T @ flags / len(flags),
            jnp.mean(fired, axis=0, dtype=jnp.float32),
            jnp.mean(A**2 * fired, axis=0),
        )

    def usage(components: Components) -> Usage:
        found = [
            one(components, problem.params, x, jax.random.fold_in(key, i))
            for i, x in enumerate(batches)
        ]
        return jax.tree.map(lambda *a: jnp.mean(jnp.stack(a), axis=0), *found)

    return usage


def restructure(
    components: Components,
    usage: Usage,
    topk: float,
    *,
    fresh: Components | None = None,
    num_always_on: int = 0,
) -> tuple[Components, Bool[np.ndarray, " C"]]:
    """Joins what is one mechanism, and clears what is unused.

    Components a and b become one number, P_a + P_b, if that is simpler,

      n_{a∪b}·S(P_a + P_b) < (1 - LEAST_GAIN)·(n_a·S(P_a) + n_b·S(P_b))

    with n the inputs on which they matter and S = Σ_l uses_l Σ_j σ_j^SCHATTEN_P the simplicity of
    all leaves; or if they are PARALLEL. The most parallel pair, or else the one that saves most,
    goes first. Sums are cut to each site's rank. Components that hardly ever matter, or matter
    little, are set to 0, or to those of `fresh`.

    Args:
      components: of one instance, on the host. Only those are joined that the same sites hold.
      topk: k, active components per example.
      fresh: freshly drawn ones, from which cleared components begin anew; None leaves them at 0,
        where their gradient is 0 too.
      num_always_on: the first components, which are left as they are.
    Returns: the components, and which of them are alive.
    Cost: one singular value decomposition of 2m x 2m per leaf and pair that matters together.
    """
    C = components.num_components
    given, components = components, _aligned(components)
    fresh = None if fresh is None else _aligned(fresh)
    firing, square = np.asarray(usage.firing), np.asarray(usage.square)
    always = np.arange(C) < num_always_on
    often = firing > LEAST_FIRING * topk / C
    strong = square * firing.sum() >= LEAST_STRENGTH * firing * square.sum()
    alive = ~always & often & strong
    joining = _Joining(components, np.array(usage.together, np.float64), alive)
    groups = joining.all(_pairs(given, range(num_always_on, C)))
    for group in groups:
        alive[list(group[1:])] = False
    whole = _joined(components, groups)
    keep = alive | always

    def rebuilt(old: Factors, f: Factors, other: Factors) -> Factors:
        kept = keep.reshape(-1, *[1] * (f.U.ndim - 1))
        U, V = (np.asarray(a) if fresh is not None else 0 for a in (other.U, other.V))
        f = dataclasses.replace(f, U=np.where(kept, f.U, U), V=np.where(kept, f.V, V))
        f = places.back(f, old)
        return dataclasses.replace(f, U=jnp.asarray(f.U), V=jnp.asarray(f.V))

    others = components if fresh is None else fresh
    return components_lib.map_sites(rebuilt, given, whole, others), alive


def join(components: Components, groups: Sequence[tuple[int, ...]]) -> Components:
    """Components with every group's sum at the place of its first, and zeros at those of the rest.

    Sums are cut to each site's rank.
    Cost: a singular value decomposition of each group and leaf.
    """

    def back(old: Factors, f: Factors) -> Factors:
        f = places.back(f, old)
        return dataclasses.replace(f, U=jnp.asarray(f.U), V=jnp.asarray(f.V))

    return components_lib.map_sites(back, components, _joined(_aligned(components), groups))


def _aligned(components: Components) -> Components:
    return components_lib.aligned(jax.tree.map(jnp.asarray, components))


def _pairs(components: Components, numbers: range) -> list[tuple[int, int]]:
    """Pairs that the same sites hold, with as many columns: one has room for the other."""
    C = components.num_components
    exists = [places.held(f, C) for f in components.factors.values()]
    room = np.concatenate(exists, axis=1)
    return [(a, b) for a, b in itertools.combinations(numbers, 2) if (room[a] == room[b]).all()]


def _joined(components: Components, groups: Sequence[tuple[int, ...]]) -> Components:
    """Every group as one component at the place of its first; zeros at the places of the rest."""
    if not groups:
        return components
    ranks = {name: f.rank for name, f in components.factors.items()}
    joined = components_lib.compact(components_lib.merge(components, *groups), ranks)
    gone = {c for group in groups for c in group if c != min(group)}
    staying = [c for c in range(components.num_components) if c not in gone]
    grouped = np.zeros(components.num_components, bool)
    grouped[[min(group) for group in groups]] = True

    def one(new: Factors, old: Factors) -> Factors:
        U, V = np.array(old.U), np.array(old.V)
        for a, of in ((U, new.U), (V, new.V)):
            a[list(gone)] = 0
            for i, c in enumerate(staying):
                if grouped[c]:
                    a[c] = of[i]
        return dataclasses.replace(old, U=U, V=V)

    return components_lib.map_sites(one, joined, components)


class _Joining:
    """Which components are one mechanism: groups of numbers, found pair by pair."""

    def __init__(
        self, components: Components, together: Float[np.ndarray, "C C"], alive: np.ndarray
    ):
        self._sites = {
            name: (np.asarray(f.U), np.asarray(f.V), f.uses)
            for name, f in components.factors.items()
        }
        self._members = {c: (c,) for c in range(components.num_components)}
        self._together, self._alive = together, alive.copy()
        self._sizes = {c: self._size(c) for c in self._members}

    def all(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
        """The groups of more than one that these pairs make, each with its leader first."""
        gains = {pair: self._gain(*pair) for pair in pairs}
        while gains and max(gains.values()) > LEAST_GAIN:
            a, b = max(gains, key=lambda pair: gains[pair])
            self._join(a, b)
            gains |= {pair: self._gain(*pair) for pair in gains if a in pair or b in pair}
        groups = [group for c, group in self._members.items() if self._alive[c] and len(group) > 1]
        return [tuple(sorted(group)) for group in groups]

    def _join(self, a: int, b: int) -> None:
        t = self._together
        either = np.maximum(t[a], t[b])  # at least; exact where both are kept on the same inputs
        either[a] = t[a, a] + t[b, b] - t[a, b]
        t[a], t[:, a] = either, either
        self._members[a] += self._members[b]
        self._alive[b], self._sizes[a] = False, self._size(a)

    def _parts(self, name: str, *numbers: int) -> tuple[np.ndarray, np.ndarray]:
        U, V, _ = self._sites[name]
        members = [j for c in numbers for j in self._members[c]]
        return (
            np.concatenate([U[j] for j in members], axis=-1),
            np.concatenate([V[j] for j in members], axis=-2),
        )

    def _size(self, *numbers: int) -> float:
        """S of the sum of these."""
        total = 0.0
        for name, (_, _, uses) in self._sites.items():
            s = components_lib.svd_of_product(*self._parts(name, *numbers))[1]
            total += uses * float(np.sum(s**SCHATTEN_P))
        return total

    def _inner(self, a: int, b: int) -> float:
        """⟨P_a, P_b⟩ over all leaves."""
        total = 0.0
        for name in self._sites:
            (Ua, Va), (Ub, Vb) = self._parts(name, a), self._parts(name, b)
            total += float(np.sum((np.swapaxes(Ua, -1, -2) @ Ub) * (Va @ np.swapaxes(Vb, -1, -2))))
        return total

    def _gain(self, a: int, b: int) -> float:
        if not (self._alive[a] and self._alive[b]):
            return 0.0
        norms = max(self._inner(a, a) * self._inner(b, b), 1e-30) ** 0.5
        if (cosine := self._inner(a, b) / norms) > PARALLEL:
            return 1 + cosine
        n_a, n_b, n_ab = (float(self._together[pair]) for pair in ((a, a), (b, b), (a, b)))
        if n_ab <= LEAST_OVERLAP * min(n_a, n_b):
            return 0.0
        apart = n_a * self._sizes[a] + n_b * self._sizes[b]
        return 1 - (n_a + n_b - n_ab) * self._size(a, b) / max(apart, 1e-30)
