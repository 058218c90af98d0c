r"""Directions of mechanisms where examples are mixtures: independent component analysis of reads.

Where a layer reads a sum of what mechanisms bring,

  x = Σ_i s_i(x) a_i,   with codes s_i that are independent and mostly near 0,

no example need have one mechanism alone. But every projection of x onto another direction than the
dual ones is a sum of several codes, and so nearer to a Gaussian: the a_i and s_i are found as the
projections that are the least Gaussian (FastICA, Hyvärinen 1999), by how sparse or how lopsided
they are. Two that it left halfway, as (s_i ± s_j)/√2, are turned back, and it goes on from there.
Then codes near 0 are taken as 0, and the a_i fitted anew, by turns. Examples that have one
mechanism alone are a special case, and rare mechanisms are no harder than others, since every code
has unit variance here.

What a leaf reads is its input; where it reads several rows of one example, e(x) (`directions`)
times √effect, which has no sign of its own and is given the one that fits.

Codes of a mechanism that reads a plane, or more dimensions, are independent of others only as a
group, and mostly on together: such groups are told along with the modes.

The codes are found in the one leaf where they are sparsest, and are those of all sites: what
mechanism i reads in another leaf is the regression of what it reads on the codes. So a mechanism is
one number across layers. At most as many are found as dimensions are read in that leaf.

Shapes: N examples, n mechanisms, b matrices of a leaf (1 unless stacked).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, PRNGKeyArray, PyTree

from apd_jax.network.problem import Problem
from apd_jax.recipe.directions import inputs
from apd_jax.recipe.modes import Modes, Rows, described, with_effect

MOST_EXAMPLES = 32_768  # that codes are found on
_UNREAD = 1e-4  # of the largest variance among directions: what varies less is not read
MOST_TURNED = 4096  # and pairs of them compared on
_SPARSER = 0.98  # E|s| of a pair that is turned, of what it was
_ITERATIONS = 200
_SIGNS = 5  # turns in which directions and signs are
_ABSENT = 0.3  # of a code's deviation: what is less is taken as 0
_TURNS = 20  # in which codes and directions are fitted to each other
_TOGETHER = 0.5  # of the examples that have one of two codes: what more have both of is together
_SELDOM = 0.5  # of all examples: codes that more have are together by chance
_CLEARLY = 1.01  # times the negentropy of what log cosh finds: codes by skewness are taken above
_GAUSSIAN = (2 / np.pi) ** 0.5  # E|s| of a code that is Gaussian, of unit variance


def find(
    problem: Problem,
    batches: Iterable[PyTree],
    key: PRNGKeyArray,
    ins: dict[str, Float[np.ndarray, "N b d_in"]],
    effect: Float[np.ndarray, " N"],
    signed: Rows | None = None,
    whole: Rows | None = None,
) -> Modes | None:
    """The modes of examples, by the codes that they are mixtures of; None where there are none.

    Args:
      batches, ins, effect: of `modes.examples`, and what it gave. key: of the first guess.
      signed: what leaves read, as long as it is there; None: their inputs. whole: see `described`.
    Cost: a forward pass of every example; for every matrix of d read dimensions, a few dozen
      products of N · d².
    """
    N = min(len(effect), MOST_EXAMPLES)
    weight = np.sqrt(effect[:N] / max(float(np.mean(effect)), 1e-30)).astype(np.float32)
    read = {name: Read(e[:N] * weight[:, None, None], False) for name, e in ins.items()}
    if signed is None:
        of_batch = jax.jit(lambda params, x: inputs(problem.with_params(params), x))
        drawn = [jax.device_get(of_batch(problem.params, x)) for x in batches]
        signed = {name: np.concatenate([d[name] for d in drawn]) for name in drawn[0]}
    read |= {name: Read(x[:N], True) for name, x in signed.items()}
    seed = int(jax.random.bits(key, dtype=jnp.uint32))
    found = [r.codes(i, seed) for r in read.values() for i in range(r.x.shape[1])]
    codes = found[int(np.argmax([np.sum(_GAUSSIAN - _length(s)) for s in found]))]
    if not codes.shape[1]:
        return None
    directions = {
        name: np.stack([r.regressed(i, codes) for i in range(r.x.shape[1])], 1)
        for name, r in read.items()
    }
    weights = np.sum(np.abs(codes), 0)
    order = np.argsort(-weights, kind="stable")
    directions = {name: a[order] for name, a in directions.items()}
    modes = described(ins, effect, with_effect(effect), directions, weights[order], whole)
    groups, share = together(codes[:, order] != 0)
    return dataclasses.replace(modes, groups=groups, active_groups=share * modes.active)


def together(on: Bool[np.ndarray, "N n"]) -> tuple[tuple[tuple[int, ...], ...], float]:
    """Groups of codes that more examples have together than apart; the most so are joined first.

    Returns: groups of two or more, and (groups on)/(codes on), a code of no group as one.
    """
    flags = on.astype(np.float32)
    members: dict[int, tuple[int, ...]] = {i: (i,) for i in range(on.shape[1])}
    both = flags.T @ flags
    while True:
        each = np.diag(both)
        either = each[:, None] + each[None] - both
        share = both / np.maximum(either, 1)
        seldom = (each > 0) & (each < _SELDOM * len(on))
        share[~(seldom[:, None] & seldom[None])] = 0
        np.fill_diagonal(share, 0)
        a, b = sorted(int(i) for i in np.unravel_index(np.argmax(share), share.shape))
        if share[a, b] <= _TOGETHER:
            break
        members[a] += members.pop(b)
        flags[:, a], flags[:, b] = np.maximum(flags[:, a], flags[:, b]), 0
        both = flags.T @ flags
    groups = tuple(tuple(sorted(group)) for group in members.values() if len(group) > 1)
    return groups, float(flags.sum() / max(on.sum(), 1))


@dataclasses.dataclass(frozen=True)
class Read:
    """What examples read in a leaf. signed: with the sign that it has there."""

    x: Float[np.ndarray, "N b d_in"]
    signed: bool

    def codes(self, i: int, seed: int) -> Float[np.ndarray, "N n"]:
        """The codes of matrix i, in units of their deviation, 0 where they are near it."""
        x = self.x[:, i] * self._signs(i)[:, None]
        variance, basis = np.linalg.eigh(np.atleast_2d(np.cov(x, rowvar=False)))
        x = x @ basis[:, variance > _UNREAD * max(variance[-1], 1e-30)]
        if x.shape[1] < 2 or len(x) <= x.shape[1]:
            return np.zeros((len(x), 0), np.float32)
        unmixing = unmixed(x, seed)
        return purified(x, np.linalg.pinv(unmixing).T)

    def regressed(self, i: int, codes: Float[np.ndarray, "N n"]) -> Float[np.ndarray, "n d_in"]:
        """a_i, of unit length, of x ≈ Σ_i s_i a_i."""
        x, sign = self.x[:, i], self._signs(i)
        gram = np.linalg.pinv(codes.T @ codes)
        a = gram @ (codes.T @ (x * sign[:, None]))
        for _ in range(0 if self.signed else _SIGNS):
            sign = np.where(np.sum(x * (codes @ a), 1) < 0, -1, 1)
            a = gram @ (codes.T @ (x * sign[:, None]))
        return (a / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), 1e-30)).astype(np.float32)

    def _signs(self, i: int) -> Float[np.ndarray, " N"]:
        """One sign for what all have in common."""
        x = self.x[:, i]
        if self.signed:
            return np.ones(len(x), np.float32)
        leading = np.linalg.eigh(x.T @ x)[1][:, -1]
        return np.where(x @ leading < 0, -1, 1).astype(np.float32)


def _length(codes: Float[np.ndarray, "N n"]) -> Float[np.ndarray, " n"]:
    """E|s| of codes, in units of √E s²: small where they are sparse."""
    return np.mean(np.abs(codes), 0) / np.maximum(np.mean(codes**2, 0) ** 0.5, 1e-30)


def unmixed(x: Float[np.ndarray, "N d"], seed: int) -> Float[np.ndarray, "d d"]:
    """The projections that are the least Gaussian, in units of their deviation.

    By log cosh, which sees how sparse codes are, or where it tells clearly more, by skewness: codes
    from 0 up that are on for two examples in five are as sparse as a Gaussian, but lopsided.
    """
    unmixing, start = np.eye(x.shape[1]), None
    for _ in range(2):  # again from where pairs have been turned
        ica = _fitted(x, "logcosh", seed, start)
        unmixing = _turned(x, ica.components_)
        start = unmixing @ np.linalg.pinv(ica.whitening_)
    try:
        lopsided = _fitted(x, _skewness, seed, start).components_
    except ValueError:  # no code is lopsided
        return unmixing
    clearly = _CLEARLY * _negentropy(x @ unmixing.T)
    return lopsided if _negentropy(x @ lopsided.T) > clearly else unmixing


def _fitted(x: Float[np.ndarray, "N d"], contrast: Any, seed: int, start: Any) -> Any:
    from sklearn.decomposition import FastICA  # here, because it takes a second

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it did not converge: what it found is judged
        settings = {"max_iter": _ITERATIONS, "random_state": seed, "w_init": start}
        return FastICA(whiten="unit-variance", fun=contrast, **settings).fit(x)


def _skewness(u: Float[np.ndarray, "... N"]) -> tuple[np.ndarray, np.ndarray]:
    """The derivative of u³/3, and the mean of its own."""
    return u**2, 2 * u.mean(axis=-1)


def _negentropy(codes: Float[np.ndarray, "N n"]) -> float:
    """How far from Gaussian codes are: Σ skewness²/12 + (excess kurtosis)²/48."""
    s = (codes - codes.mean(0)) / np.maximum(codes.std(0), 1e-30)
    skewness, excess = np.mean(s**3, 0), np.mean(s**4, 0) - 3
    return float(np.sum(skewness**2 / 12 + excess**2 / 48))


def _turned(
    x: Float[np.ndarray, "N d"], unmixing: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, "n d"]:
    """The unmixing with pairs turned by 45° where that makes their codes sparser.

    Halfway between two codes is where FastICA comes to rest without being at its goal.
    """
    few = x[:MOST_TURNED]
    unmixing = unmixing.copy()
    for i in range(len(unmixing)):
        for _ in range(len(unmixing)):
            codes = few @ unmixing.T
            one, others = codes[:, [i]], codes[:, i + 1 :]
            if not others.shape[1]:
                break
            apart = _length(one) + _length(others)
            halfway = _length(one + others) + _length(one - others)
            j = int(np.argmin(halfway - apart))
            if halfway[j] > _SPARSER * apart[j]:
                break
            a, b = unmixing[i].copy(), unmixing[i + 1 + j].copy()
            unmixing[i], unmixing[i + 1 + j] = (a + b) / 2**0.5, (a - b) / 2**0.5
    return unmixing


def purified(
    x: Float[np.ndarray, "N d"], directions: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, "N n"]:
    """Codes that are 0 where they are near it, and directions fitted to them, by turns."""
    codes = x
    for _ in range(_TURNS):
        codes = x @ np.linalg.pinv(directions)
        codes = codes / np.maximum(codes.std(0), 1e-30)
        codes = np.where(np.abs(codes) > _ABSENT, codes, 0.0).astype(np.float32)
        directions = np.linalg.pinv(codes.T @ codes) @ (codes.T @ x)
    return codes
