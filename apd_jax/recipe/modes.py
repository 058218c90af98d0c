r"""Modes: directions that many examples share because one mechanism alone is active there.

On one example x a weight W matters along few directions: the gradient of the outputs, along their
own change v = f(θ*, x) - f(0, x), is

  G_l(x) = ∂(v·f)/∂W_l,   of rank one where x passes the layer once:
                          (what the layer reads) ⊗ (how its output counts)

So its leading left singular vector e_l(x) says what the layer reads, and P_l(x) = e_l e_lᵀ W_l is
the least matrix that does on x what the layer does. Examples that need one mechanism alone share
P(x), mixtures of several are scattered: mechanisms are the densest points, the modes, of P(x) over
the data. Every mode becomes a component (`held`), which must do its part whatever else an example
needs. So it reads

  d_i = argmin_d Σ_{x without mode i} (d·e(x))²   where d·e_i = 1

the direction that is blind to all examples without the mode: the beamformer of minimum variance
(Capon 1969).

The gain of a leaf, tr(E pinv(E))/n with E the rows e_i, is how much of what the leaf does on a mode
that mode's part can do alone. It is 1 if the directions are independent. If there are more modes
than dimensions it is (dimensions they span)/n: the modes then share the leaf.

Shapes: N examples, n modes, b matrices of a leaf (1 unless stacked), r dimensions.
Nothing here looks at a ground truth.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import jax
import numpy as np
from jaxtyping import Bool, Float, PRNGKeyArray, PyTree

from apd_jax.network.problem import Problem
from apd_jax.recipe.alike import LEAST_COUNT, NEAR, Alike, leading, purest
from apd_jax.recipe.directions import directions, matrices

NUM_EXAMPLES = 16_384  # that are looked at, `times` over
MOST_KEPT = 8192  # of them that are compared with each other, `times` over
# Examples are left out on which the decomposed weights have less than this share of their mean
# effect on the outputs.
LEAST_EFFECT = 0.1
# A cosine of P(x) above which an example is used up with a mode (`alike.NEAR`: counts for it).
FAR = 0.7
# Of the density that modes usually have, in which each is counted by the square of its own.
LEAST_DENSITY = 0.35
# Singular values of E below this part of the largest are taken as 0: the second part where examples
# then have at most half as many modes, as where they repeat exactly, so that small values are no
# noise.
_CONDITION, _EXACT_CONDITION = 0.03, 1e-3
_NO_EFFECT = 1e-4  # as LEAST_EFFECT: what these examples read is not looked at
# An example has a mode from this share of what it reads on (in the leaf that tells modes apart
# best).
_PRESENT = 0.02
_UNSEEN = 1e-9  # of the largest variance among directions: what varies less is not read

Rows = dict[str, Float[np.ndarray, "N b d_in"]]  # by leaf


@dataclasses.dataclass(frozen=True)
class Modes:
    """The modes, in the order they were found, the densest first.

    ins, reads: e and d of every leaf.
    seen: an orthonormal basis of all that examples read (further columns are 0).
    density: examples near each mode, counted by their effect, at most 1 each.
    unexplained: share of what examples read, in squares, that is no sum of modes, in the leaf where
      it is least.
    active: modes that an example has, the mean over all examples: an estimate of k.
    writes: leaves that are split by what modes write instead: orthonormal directions of outputs.
    condition: the part of the largest singular value of E below which values are taken as 0.
    groups: numbers of modes that are mostly on together, each group perhaps one part of more
      dimensions. active_groups: as `active`, with every group counted once.
    leaks: of every leaf, what modes do on examples without them, of what all do together, in
      squares. Only where something is read whatever the mode, which is to be held beside them.
    """

    ins: dict[str, Float[np.ndarray, "n b d_in"]]
    reads: dict[str, Float[np.ndarray, "n b d_in"]]
    seen: dict[str, Float[np.ndarray, "b d_in r"]]
    density: Float[np.ndarray, " n"]
    unexplained: float = 0.0
    active: float = 0.0
    writes: dict[str, Float[np.ndarray, "n b d_out"]] = dataclasses.field(default_factory=dict)
    condition: float = _CONDITION
    groups: tuple[tuple[int, ...], ...] = ()
    active_groups: float = 0.0
    leaks: dict[str, float] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.density)

    @property
    def gains(self) -> dict[str, float]:
        """The gain of every leaf, the mean over its matrices; 1 where it is split by outputs."""
        gains = {
            name: float(np.mean([dual(e[:, i], self.condition)[1] for i in range(e.shape[1])]))
            for name, e in self.ins.items()
        }
        return gains | dict.fromkeys(self.writes, 1.0)

    def first(self, n: int) -> Modes:
        ins, reads, writes = (
            {name: a[:n] for name, a in arrays.items()}
            for arrays in (self.ins, self.reads, self.writes)
        )
        more = {"ins": ins, "reads": reads, "writes": writes, "density": self.density[:n]}
        return dataclasses.replace(self, **more)


def find(problem: Problem, batch_size: int, key: PRNGKeyArray, *, times: int = 1) -> Modes:
    """The modes of this network on its data.

    The more mechanisms an example needs on average, the rarer are examples that need one alone, and
    the more `times` must be looked.

    Cost: that of `examples`, and of `densest`.
    """
    read, effect = examples(problem, looked_at(problem, batch_size, key, times))
    return densest(read, effect, matrices(problem), most=times * MOST_KEPT)


def looked_at(problem: Problem, batch_size: int, key: PRNGKeyArray, times: int) -> Iterable[PyTree]:
    """Batches of times · NUM_EXAMPLES examples, or as many as data from the host has."""
    return problem.looks(key, math.ceil(times * NUM_EXAMPLES / batch_size))


def examples(
    problem: Problem, batches: Iterable[PyTree]
) -> tuple[dict[str, Float[np.ndarray, "N b d_in"]], Float[np.ndarray, " N"]]:
    """What examples read in every leaf, and their effect: see `directions`.

    Cost: a gradient of the network for each.
    """
    of_batch = jax.jit(lambda params, x: directions(problem.with_params(params), x))
    drawn = [jax.device_get(of_batch(problem.params, x)) for x in batches]
    return jax.tree.map(lambda *a: np.concatenate(a), *drawn)


def densest(
    ins: dict[str, Float[np.ndarray, "N b d_in"]],
    effect: Float[np.ndarray, " N"],
    weights: dict[str, np.ndarray],
    most: int = MOST_KEPT,
    by: str | None = None,
    whole: Rows | None = None,
) -> Modes:
    """The modes of given examples.

    One after the other: the example with most others near it; then all that are not far from it are
    used up. A mode's direction is the leading one of the examples near it, of the quarter of them
    that agrees best.

    Args:
      ins: e, what every example reads in every leaf, of unit length.
      effect: how far the decomposed weights move the outputs, mean over outputs of
        (f(θ*, x) - f(0, x))².
      weights: {leaf: [b, d_in, d_out]}, the target's.
      most: how many examples are compared with each other.
      by: the leaf in which they are compared; None: in all together.
      whole: see `described`.
    Cost: most² products of the directions of every leaf; memory linear in the examples.
    """
    kept = with_effect(effect)[:most]
    count = np.minimum(effect[kept] / max(float(np.mean(effect)), 1e-30), 1).astype(np.float32)
    here = {name: e[kept] for name, e in ins.items()}
    alike = Alike(here if by is None else {by: here[by]}, weights)
    density, left = alike.density(count), np.ones(len(kept), bool)
    members, found = [], []
    while left.any():
        best = int(np.argmax(np.where(left, density, -1)))
        usual = np.sum(np.power(found, 3)) / np.sum(np.square(found)) if found else 0.0
        if density[best] < max(LEAST_COUNT, LEAST_DENSITY * usual):
            break
        found.append(float(density[best]))
        cosine = alike.cosines(np.array([best]), slice(None))[0]
        members.append(purest(here, count, np.flatnonzero(cosine > NEAR)))
        used = left & (cosine > FAR)
        used[best] = True
        left &= ~used
        density[left] -= alike.near(np.flatnonzero(used), left, count)
    found_ins = {
        name: np.array([leading(e[m], count[m]) for m in members]).reshape(-1, *e.shape[1:])
        for name, e in here.items()
    }
    return described(ins, effect, kept, found_ins, np.asarray(found), whole)


def by_richness(
    ins: dict[str, Float[np.ndarray, "N b d_in"]], effect: Float[np.ndarray, " N"]
) -> list[str]:
    """The leaves, those first in which examples read the most directions.

    By (Σ λ)²/Σ λ² of their covariance. Of leaves that read the same, the first.
    """
    kept = with_effect(effect)

    def dimensions(e: Float[np.ndarray, "N b d_in"]) -> float:
        squares = [np.linalg.norm(x.T @ x) ** 2 for x in np.moveaxis(e[kept], 1, 0)]
        return len(kept) ** 2 * len(squares) / max(float(np.sum(squares)), 1e-30)

    found: list[str] = []
    for name in sorted(ins, key=lambda name: -dimensions(ins[name])):
        if not any(np.array_equal(ins[name], ins[other]) for other in found):
            found.append(name)
    return found


def with_effect(effect: Float[np.ndarray, " N"]) -> np.ndarray:
    """The examples on which the decomposed weights have an effect worth looking at."""
    return np.flatnonzero(effect > LEAST_EFFECT * max(float(np.mean(effect)), 1e-30))


def described(
    ins: dict[str, Float[np.ndarray, "N b d_in"]],
    effect: Float[np.ndarray, " N"],
    kept: np.ndarray,
    leading: dict[str, Float[np.ndarray, "n b d_in"]],
    density: Float[np.ndarray, " n"],
    whole: Rows | None = None,
) -> Modes:
    """Modes of these directions: what is blind to the other modes, and which an example has.

    kept: the examples that are looked at. whole: what they read, where `ins` are what is left of
    that without what is read whatever the mode.
    """
    here = {name: e[kept] for name, e in ins.items()}
    counted = effect > _NO_EFFECT * max(float(np.mean(effect)), 1e-30)
    found = []
    for condition in (_CONDITION, _EXACT_CONDITION):
        codes, unexplained = codes_of(here, leading, condition)
        active = float(np.count_nonzero(codes(ins)[counted]) / len(effect))
        found.append((active, unexplained, condition, codes))
    active, unexplained, condition, codes = found[int(found[1][0] <= found[0][0] / 2)]
    on = codes(here) != 0
    if whole is not None:
        here = {name: e[kept] for name, e in whole.items()}
    reads, seen = _reads(here, leading, on)
    leaks = {} if whole is None else {name: _leak(e, reads[name], ~on) for name, e in here.items()}
    more = {"condition": condition, "leaks": leaks}
    return Modes(leading, reads, seen, density, unexplained, active, **more)


def codes_of(
    ins: dict[str, Float[np.ndarray, "N b d"]],
    modes: dict[str, Float[np.ndarray, "n b d"]],
    condition: float,
) -> tuple[Callable[[dict[str, np.ndarray]], Float[np.ndarray, "N n"]], float]:
    """ins -> how much of each mode an example has, 0 where it is not there.

    Told by the leaf that tells modes apart best: whose modes are independent and explain what is
    read.

    Returns: that, and which share of what is read modes do not explain there.
    """
    leaf, best, least = None, -1.0, 1.0
    for name, e in ins.items():
        for i in range(e.shape[1]):
            E = modes[name][:, i]
            hat, gain = dual(E, condition)
            unexplained = float(np.mean(np.sum((e[:, i] - e[:, i] @ hat.T @ E) ** 2, 1)))
            if gain * (1 - unexplained) > best:
                leaf, best, least = (name, i, hat), gain * (1 - unexplained), unexplained
    assert leaf is not None
    name, i, hat = leaf

    def codes(ins: dict[str, np.ndarray]) -> Float[np.ndarray, "N n"]:
        s = ins[name][:, i] @ hat.T
        return np.where(np.abs(s) > _PRESENT, s, 0.0)

    return codes, least


def _reads(
    ins: dict[str, Float[np.ndarray, "N b d"]],
    modes: dict[str, Float[np.ndarray, "n b d"]],
    present: Bool[np.ndarray, "N n"],
) -> tuple[dict[str, Float[np.ndarray, "n b d"]], dict[str, Float[np.ndarray, "b d r"]]]:
    """d of every mode and leaf, and what examples read at all.

    The modes themselves count as examples that have no other mode.

    Cost, per matrix of every leaf: d_in³ for the basis, n solutions of r linear equations.
    """
    reads, seen = {name: np.zeros_like(e) for name, e in modes.items()}, {}
    for name, e in ins.items():
        bases = []
        for i in range(e.shape[1]):
            x, E = e[:, i].astype(np.float64), modes[name][:, i].astype(np.float64)
            variance, basis = np.linalg.eigh(x.T @ x)
            bases.append(basis[:, variance > _UNSEEN * variance[-1]])
            x, E = x @ bases[-1], E @ bases[-1]
            every = x.T @ x + E.T @ E
            for j in range(len(E)):
                own = np.concatenate([x[present[:, j]], E[[j]]])
                without = every - own.T @ own
                without[np.diag_indices_from(without)] += _UNSEEN * max(np.trace(every), 1e-30)
                d = np.linalg.solve(without, E[j])
                reads[name][j, i] = bases[-1] @ (d / max(float(d @ E[j]), 1e-30))
        widest = max(b.shape[1] for b in bases)
        seen[name] = np.stack([np.pad(b, ((0, 0), (0, widest - b.shape[1]))) for b in bases])
    return reads, seen


def _leak(
    e: Float[np.ndarray, "N b d"], d: Float[np.ndarray, "n b d"], absent: Bool[np.ndarray, "N n"]
) -> float:
    """What parts do on examples without their mode, of what all do, in squares of what is read."""
    wrong, whole = 0.0, 0.0
    for x, D in zip(np.moveaxis(e, 1, 0), np.moveaxis(d, 1, 0), strict=True):
        codes, held = x @ D.T, dual(D, 1e-6)[0]
        wrong += float(np.sum(((codes * absent) @ held) ** 2))
        whole += float(np.sum((codes @ held) ** 2))
    return wrong / max(whole, 1e-30)


def dual(
    E: Float[np.ndarray, "n d"], condition: float = _CONDITION
) -> tuple[Float[np.ndarray, "n d"], float]:
    """The dual directions ê, the rows of pinv(Eᵀ), and the mean of e_i·ê_i: tr(E pinv(E))/n."""
    if not len(E):
        return E, 0.0
    u, s, vt = np.linalg.svd(E, full_matrices=False)
    large = s > condition * s[0]
    return (u[:, large] / s[large]) @ vt[large], float(large.mean() * min(E.shape) / len(E))


def unit_rows(rows: Rows) -> Rows:
    """Rows of length 1, or 0."""
    return {
        name: x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
        for name, x in rows.items()
    }


def mixed(
    directions: dict[str, Float[np.ndarray, "n b d"]], seed: int
) -> dict[str, Float[np.ndarray, "n b d"]]:
    """As many directions in the same span, each a mixture of all, the same in every leaf."""
    n = len(next(iter(directions.values()))) if directions else 0
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], n)
    # Cosines of n frequencies, orthogonal, after random signs: no mode has more than its share.
    angles = np.pi * np.outer(np.arange(n), np.arange(n) + 0.5) / n
    mixing = np.cos(angles) * signs
    found = {}
    for name, e in directions.items():
        a = np.einsum("ij,jbd->ibd", mixing, e)
        length = np.maximum(np.linalg.norm(a, axis=-1, keepdims=True), 1e-30)
        found[name] = (a / length).astype(np.float32)
    return found
