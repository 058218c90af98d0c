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
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree
from scipy import sparse

from apd_jax.network import data
from apd_jax.network.problem import Problem
from apd_jax.recipe.directions import directions, matrices

NUM_EXAMPLES = 16_384  # that are drawn, `times` over; one batch where the data comes from the host
MOST_KEPT = 8192  # of them that are compared with each other, `times` over
# Examples are left out on which the decomposed weights have less than this share of their mean
# effect on the outputs.
LEAST_EFFECT = 0.1
# Cosines of P(x): above NEAR an example counts for a mode's density, above FAR it is used up with
# the mode.
NEAR, FAR = 0.95, 0.7
LEAST_COUNT = 5  # examples that make a mode
# Of the density that modes usually have, in which each is counted by the square of its own.
LEAST_DENSITY = 0.35
_CONDITION = 0.03  # singular values of E below this part of the largest are taken as 0
_NO_EFFECT = 1e-4  # as LEAST_EFFECT: what these examples read is not looked at
# An example has a mode from this share of what it reads on (in the leaf that tells modes apart
# best).
_PRESENT = 0.02
_UNSEEN = 1e-9  # of the largest variance among directions: what varies less is not read


@dataclasses.dataclass(frozen=True)
class Modes:
    """The modes, in the order they were found, the densest first.

    ins, reads: e and d of every leaf.
    seen: an orthonormal basis of all that examples read (further columns are 0).
    density: examples near each mode, counted by their effect, at most 1 each.
    unexplained: share of what examples read, in squares, that is no sum of modes, in the leaf where
      it is least.
    active: modes that an example has, the mean over all examples: an estimate of k.
    """

    ins: dict[str, Float[np.ndarray, "n b d_in"]]
    reads: dict[str, Float[np.ndarray, "n b d_in"]]
    seen: dict[str, Float[np.ndarray, "b d_in r"]]
    density: Float[np.ndarray, " n"]
    unexplained: float = 0.0
    active: float = 0.0

    def __len__(self) -> int:
        return len(self.density)

    @property
    def gains(self) -> dict[str, float]:
        """The gain of every leaf, the mean over its matrices."""
        return {
            name: float(np.mean([dual(e[:, i])[1] for i in range(e.shape[1])]))
            for name, e in self.ins.items()
        }

    def first(self, n: int) -> Modes:
        ins, reads = (
            {name: a[:n] for name, a in arrays.items()} for arrays in (self.ins, self.reads)
        )
        return Modes(ins, reads, self.seen, self.density[:n], self.unexplained, self.active)


def find(problem: Problem, batch_size: int, key: PRNGKeyArray, *, times: int = 1) -> Modes:
    """The modes of this network on its data.

    The more mechanisms an example needs on average, the rarer are examples that need one alone, and
    the more `times` must be looked.

    Cost: times · NUM_EXAMPLES gradients of the network; on the host (times · MOST_KEPT)² products
      of the directions of every leaf.
    """
    if isinstance(problem.sample_fn, data.Batches):
        of_batch = jax.jit(lambda params, x: directions(problem.with_params(params), x))
        drawn = [of_batch(problem.params, problem.example_batch())]
    else:

        @jax.jit
        def of_step(params: PyTree, step: Array) -> tuple[dict[str, Array], Array]:
            return directions(problem.with_params(params), problem.sample_fn(key, step))

        drawn = [
            jax.device_get(of_step(problem.params, jnp.asarray(step)))
            for step in range(math.ceil(times * NUM_EXAMPLES / batch_size))
        ]
    ins, effect = jax.tree.map(lambda *a: np.concatenate(a), *drawn)
    return densest(ins, effect, matrices(problem), most=times * MOST_KEPT)


def densest(
    ins: dict[str, Float[np.ndarray, "N b d_in"]],
    effect: Float[np.ndarray, " N"],
    weights: dict[str, np.ndarray],
    most: int = MOST_KEPT,
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
    """
    relative = effect / max(float(np.mean(effect)), 1e-30)
    kept = np.flatnonzero(relative > LEAST_EFFECT)[:most]
    count = np.minimum(relative[kept], 1).astype(np.float32)
    everyone, ins = ins, {name: e[kept] for name, e in ins.items()}
    near, not_far = _alike(ins, weights)
    density, left = near @ count, np.ones(len(kept), bool)
    centres, found = [], []
    while left.any():
        best = int(np.argmax(np.where(left, density, -1)))
        usual = np.sum(np.power(found, 3)) / np.sum(np.square(found)) if found else 0.0
        if density[best] < max(LEAST_COUNT, LEAST_DENSITY * usual):
            break
        centres.append(best)
        found.append(float(density[best]))
        used = np.zeros_like(left)
        used[[best, *not_far[[best]].indices]] = True
        used &= left
        density -= near[used].T @ count[used]
        left &= ~used
    members = [_purest(ins, count, near[[centre]].indices) for centre in centres]
    leading = {
        name: np.array([_leading(e[m], count[m]) for m in members]).reshape(-1, *e.shape[1:])
        for name, e in ins.items()
    }
    present, unexplained = _present(ins, leading)
    reads, seen = _reads(ins, leading, present(ins))
    active = np.sum(present(everyone)[relative > _NO_EFFECT]) / len(relative)
    return Modes(leading, reads, seen, np.asarray(found), unexplained, float(active))


def _alike(
    ins: dict[str, Float[np.ndarray, "N b d_in"]], weights: dict[str, np.ndarray]
) -> tuple[sparse.csr_array, sparse.csr_array]:
    """Which examples are near each other, and which not far.

    1 where the cosine of their P is large, every leaf in units of ‖W_l‖.
    """
    factors = []
    for name, e in ins.items():
        W = weights[name] / max(float(np.linalg.norm(weights[name])), 1e-30)
        factors += [(e[:, i], e[:, i] @ W[i]) for i in range(len(W))]
    squares = sum(np.sum(e**2, 1) * np.sum(v**2, 1) for e, v in factors)
    length = np.sqrt(np.maximum(squares, 1e-30)).astype(np.float32)
    N = len(length)
    near, not_far = [], []
    for rows in np.array_split(np.arange(N), max(1, N // 512)):
        inner = sum((e[rows] @ e.T) * (v[rows] @ v.T) for e, v in factors)
        cosine = inner / length[rows, None] / length[None]
        near.append(sparse.csr_array((cosine > NEAR).astype(np.float32)))
        not_far.append(sparse.csr_array((cosine > FAR).astype(np.float32)))
    return sparse.csr_array(sparse.vstack(near)), sparse.csr_array(sparse.vstack(not_far))


def _leading(
    e: Float[np.ndarray, "k b d"], count: Float[np.ndarray, " k"]
) -> Float[np.ndarray, "b d"]:
    """The leading direction of several, whatever their signs."""
    lines = np.moveaxis(e * np.sqrt(count)[:, None, None], 0, 1)
    return np.stack([np.linalg.svd(line, full_matrices=False)[2][0] for line in lines])


def _purest(
    ins: dict[str, Float[np.ndarray, "N b d"]], count: Float[np.ndarray, " N"], members: np.ndarray
) -> np.ndarray:
    """The half of these examples that is nearest to their leading directions, then half of that.

    Not fewer than LEAST_COUNT.
    """
    for _ in range(2):
        cosine = [
            np.einsum("kbd,bd->kb", e[members], _leading(e[members], count[members]))
            for e in ins.values()
        ]
        nearest = np.argsort(-np.sum(np.square(np.concatenate(cosine, 1)), 1), kind="stable")
        members = members[nearest[: max(LEAST_COUNT, len(members) // 2)]]
    return members


def _present(
    ins: dict[str, Float[np.ndarray, "N b d"]], modes: dict[str, Float[np.ndarray, "n b d"]]
) -> tuple[Callable[[dict[str, np.ndarray]], Bool[np.ndarray, "N n"]], float]:
    """ins -> which modes each example has; and which share of what is read modes do not explain.

    Both are told by the leaf that tells modes apart best: whose modes are independent and explain
    what is read.
    """
    leaf, best, least = None, -1.0, 1.0
    for name, e in ins.items():
        for i in range(e.shape[1]):
            E = modes[name][:, i]
            hat, gain = dual(E)
            unexplained = float(np.mean(np.sum((e[:, i] - e[:, i] @ hat.T @ E) ** 2, 1)))
            if gain * (1 - unexplained) > best:
                leaf, best, least = (name, i, hat), gain * (1 - unexplained), unexplained
    assert leaf is not None
    name, i, hat = leaf
    return lambda ins: np.abs(ins[name][:, i] @ hat.T) > _PRESENT, least


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


def dual(
    E: Float[np.ndarray, "n d"], condition: float = _CONDITION
) -> tuple[Float[np.ndarray, "n d"], float]:
    """The dual directions ê, the rows of pinv(Eᵀ), and the mean of e_i·ê_i: tr(E pinv(E))/n."""
    if not len(E):
        return E, 0.0
    u, s, vt = np.linalg.svd(E, full_matrices=False)
    large = s > condition * s[0]
    return (u[:, large] / s[large]) @ vt[large], float(large.mean() * min(E.shape) / len(E))
