r"""Whole-network components out of those of single sites, by minimum description length.

A group of components fires where any of its parts does. To say which of k groups fire at all
positions, and by which ranks, takes

  L = Σ_i s_i (log2 k + α r_i)      s_i how often group i fires, r_i its ranks   (MDL clustering)

Merging i and j changes it, with s_∪ = s_i + s_j - s_ij how often either fires, and S = Σ_i s_i, by

  ΔL = (S - s_i - s_j)(log2(k-1) - log2 k) + s_∪ log2(k-1) - (s_i + s_j) log2 k
       + α (s_∪ (r_i + r_j) - s_i r_i - s_j r_j)
     = S (log2(k-1) - log2 k) - s_ij log2(k-1) + α (s_∪ (r_i + r_j) - s_i r_i - s_j r_j)

A clustering goes from single components to one group, a merge at a time, and keeps the partition of
least L on its way. Of the P = k(k-1)/2 pairs in the order of ΔL it takes number

  J = ⌊-ln(1 - u (1 - e^{-γP})) / γ⌋,  u ~ U(0, 1)          mostly one of the first few

and begins several times. The first time it always takes the best pair: with few groups left the
draw is nearly uniform, and loses what is plain. Components that only act together across positions
are not found: L asks what fires at one position. Those that never fire stay alone, and are no
groups.

Shapes: C components, N counted positions, k groups, R restarts.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import wadler_lindig as wl
from etils import epath
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment

from apd_jax import components as components_lib
from apd_jax.components import Components
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError, first_line
from apd_jax.interpretation.harvest import Harvest
from apd_jax.paths import user_path
from apd_jax.train.progress import ProgressDisplay

FILE = "clusters.json"
_BLOCK = 8192  # words of 64 positions that are unpacked at once, over all components


@dataclasses.dataclass(frozen=True)
class Firings:
    """Where components fire: N·C/8 bytes.

    packed: [C, words] of uint64, a bit for each position (the last ones of a batch may be padding).
    ranks: of every component, its rank-one parts at all sites.
    """

    packed: np.ndarray
    ranks: Int[np.ndarray, " C"]
    num_positions: int

    def __repr__(self) -> str:
        return wl.pformat(self)

    @staticmethod
    def of(fired: Bool[np.ndarray, "N C"], ranks: Int[np.ndarray, " C"] | Sequence[int]) -> Firings:
        return Firings(_packed(fired), np.asarray(ranks, np.int64), len(fired))

    @property
    def counts(self) -> Int[np.ndarray, " C"]:
        """s_i."""
        return np.bitwise_count(self.packed).sum(axis=1, dtype=np.int64)

    @property
    def together(self) -> Int[np.ndarray, "C C"]:
        """s_ij, at how many positions both fire; s_i on the diagonal. Cost: N·C² as products."""
        C, words = self.packed.shape
        step = max(1, _BLOCK // max(1, C))
        total = np.zeros((C, C), np.int64)
        for first in range(0, words, step):
            part = np.ascontiguousarray(self.packed[:, first : first + step])
            bits = np.unpackbits(part.view(np.uint8), axis=1).astype(np.float32)
            total += (bits @ bits.T).astype(np.int64)  # exact: at most 2^19 of each
        return total


def firings(
    decomposition: Decomposition, batches: Iterable[Any], threshold: float = 0.01
) -> Firings:
    """Where the gate of a decomposition says more than `threshold`, over batches of inputs.

    Positions that are padding (or predict nothing) do not count; of masks per example, examples do.

    Raises:
      InputError: nothing counts.
    Cost: the gate; N·C/8 bytes.
    """
    parts, count = [], 0
    for batch in batches:
        x = jnp.asarray(batch)
        values = np.asarray(decomposition.activity(x).values)
        fired = (values > threshold).reshape(-1, values.shape[-1])
        valid = decomposition.problem.valid(x)
        if valid is not None and values.ndim == 3:
            fired = fired[np.asarray(valid).reshape(-1)]
        parts.append(_packed(fired))
        count += len(fired)
    if not count:
        raise InputError("there is no position that counts, so nothing fires; give more batches.")
    return Firings(np.concatenate(parts, axis=1), _ranks(decomposition.components), count)


def _packed(fired: Bool[np.ndarray, "N C"]) -> np.ndarray:
    whole = np.pad(fired, ((0, -len(fired) % 64), (0, 0)))
    return np.packbits(np.ascontiguousarray(whole.T), axis=1).view(np.uint64)


def _ranks(components: Components) -> Int[np.ndarray, " C"]:
    total = np.zeros(components.num_components, np.int64)
    for f in components.factors.values():
        numbers = range(f.num_pieces) if f.ids is None else f.ids
        np.add.at(total, np.asarray(numbers), f.rank)
    return total


@dataclasses.dataclass(frozen=True)
class Clustering:
    """partition: the group of every component, numbered by their first members; length: its L.

    partitions, lengths: those of all restarts. distance: the mean over pairs of restarts of
    `hamming`, of the components that fire; NaN for one restart. single: L with every component
    alone.
    """

    partition: Int[np.ndarray, " C"]
    length: float
    partitions: Int[np.ndarray, "R C"]
    lengths: Float[np.ndarray, " R"]
    distance: float
    single: float

    def __repr__(self) -> str:
        return wl.pformat(self)

    @property
    def num_groups(self) -> int:
        return int(self.partition.max()) + 1


def length(firings: Firings, partition: Int[np.ndarray, " C"], alpha: float) -> float:
    """L of any partition, in bits."""
    of = np.asarray(partition)
    counts, ranks = [], []
    for group in np.unique(of[firings.counts > 0]):
        members = of == group
        union = np.bitwise_or.reduce(firings.packed[members], axis=0)
        counts.append(int(np.bitwise_count(union).sum(dtype=np.int64)))
        ranks.append(int(firings.ranks[members & (firings.counts > 0)].sum()))
    return _length(np.array(counts, np.float64), np.array(ranks, np.float64), alpha)


def _length(s: Float[np.ndarray, " k"], r: Float[np.ndarray, " k"], alpha: float) -> float:
    return float(np.sum(s * (np.log2(max(len(s), 1)) + alpha * r)))


def gains(
    together: Float[np.ndarray, "k k"], ranks: Float[np.ndarray, " k"], alpha: float
) -> Float[np.ndarray, "k k"]:
    """ΔL of every pair of groups, in bits; negative where merging them makes L shorter."""
    s, k = np.diag(together), len(together)
    whole = s.sum() * (np.log2(k - 1) - np.log2(k)) - together * np.log2(k - 1)
    return whole + alpha * _ranked_more(together, s[:, None], ranks[:, None], s, ranks)


def _ranked_more(
    together: np.ndarray, s: np.ndarray, r: np.ndarray, others: np.ndarray, of_others: np.ndarray
) -> np.ndarray:
    """s_∪ (r_i + r_j) - s_i r_i - s_j r_j."""
    return (s + others - together) * (r + of_others) - s * r - others * of_others


def cluster(
    firings: Firings,
    *,
    alpha: float = 1.0,
    restarts: int = 12,
    gamma: float = 0.2,
    seed: int = 0,
) -> Clustering:
    """Groups of components that fire together.

    Args:
      alpha: bits that a rank costs, where it fires. Two components of equal rank r and firing count
        that share a part `co` of it are merged if α < co / (1 - co) · log2(k) / (2 r), nearly.
      gamma: how greedy: the larger, the more often the best pair is merged.
    Returns: the partition of least L of all restarts.
    Raises:
      InputError: no component fires, or settings out of range.
    Cost: s_ij once (N·C² multiply-adds), then per restart C³/3 steps of numpy and N·C²/16 bytes
      read; memory N·C/8 bytes for a copy of the firings and 32·C² for tables of pairs.
    """
    if restarts < 1 or not gamma > 0 or not alpha >= 0:
        raise InputError(
            "clusters need at least 1 restart, gamma above 0 and alpha of at least 0; got "
            f"restarts = {restarts}, gamma = {gamma}, alpha = {alpha}."
        )
    fires = np.flatnonzero(firings.counts)
    if not len(fires):
        raise InputError("no component fires anywhere, so there is nothing to cluster.")
    together = firings.together[np.ix_(fires, fires)].astype(np.float64)
    found, merges = [], len(fires) - 1
    with ProgressDisplay("clusters", restarts * merges) as display:
        for i in range(restarts):
            rng, greed = np.random.default_rng([seed, i]), gamma if i else np.inf

            def merged(count: int, bits: float, before: int = i * merges) -> None:
                display.update(before + count, {"bits": bits})

            found.append(_path(firings, fires, together, alpha, greed, rng, merged))
    lengths = np.array([own for _, own in found])
    partitions = np.stack([partition for partition, _ in found])
    best, pairs = int(np.argmin(lengths)), list(itertools.combinations(partitions, 2))
    ranks = firings.ranks[fires].astype(np.float64)
    return Clustering(
        partition=partitions[best],
        length=float(lengths[best]),
        partitions=partitions,
        lengths=lengths,
        distance=float(np.mean([hamming(a[fires], b[fires]) for a, b in pairs]))
        if pairs
        else float("nan"),
        single=_length(np.diag(together), ranks, alpha),
    )


def _path(
    firings: Firings,
    fires: Int[np.ndarray, " k"],
    together: Float[np.ndarray, "k k"],
    alpha: float,
    gamma: float,
    rng: np.random.Generator,
    merged: Callable[[int, float], None],
) -> tuple[Int[np.ndarray, " C"], float]:
    """From single components to one group: (the partition of least L, its L)."""
    masks, ranks = firings.packed[fires], firings.ranks[fires].astype(np.float64)
    together, s = together.copy(), np.diag(together)
    more = alpha * _ranked_more(together, s[:, None], ranks[:, None], s, ranks)
    np.fill_diagonal(more, np.inf)
    room = np.empty(together.size)
    members = [[int(c)] for c in fires]
    groups = np.arange(len(firings.packed))
    best, least = groups.copy(), _length(np.diag(together), ranks, alpha)
    for k in range(len(fires), 1, -1):
        table = room[: k * k].reshape(k, k)  # `gains`, but for what is the same for all pairs
        np.multiply(together[:k, :k], -np.log2(k - 1), out=table)
        table += more[:k, :k]
        i, j = sorted(_ranked(table, _draw(k * (k - 1) // 2, gamma, rng)))
        masks[i] |= masks[j]
        ranks[i] += ranks[j]
        groups[members[j]] = groups[members[i][0]]
        members[i] += members[j]
        last = k - 1  # group j gives its place to the last one
        masks[j], ranks[j], members[j] = masks[last], ranks[last], members[last]
        together[j, :k], together[:k, j] = together[last, :k], together[:k, last]
        together[j, j] = together[last, last]
        more[j, :k], more[:k, j] = more[last, :k], more[:k, last]
        more[j, j] = np.inf
        shared = np.bitwise_count(masks[:last] & masks[i]).sum(axis=1, dtype=np.int64)
        together[i, :last] = together[:last, i] = shared
        s, r = np.diag(together)[:last], ranks[:last]
        more[i, :last] = more[:last, i] = alpha * _ranked_more(shared, s[i], r[i], s, r)
        more[i, i] = np.inf
        here = _length(s, r, alpha)
        if here < least:
            best, least = groups.copy(), here
        merged(len(fires) - last, least)
    return _dense(best), least


def _draw(pairs: int, gamma: float, rng: np.random.Generator) -> int:
    """J: below `pairs`, with a probability that falls by e^{-γ} from one to the next."""
    u = rng.random()
    return min(int(-np.log1p(u * np.expm1(-gamma * pairs)) / gamma), pairs - 1)


def _ranked(table: Float[np.ndarray, "k k"], number: int) -> tuple[int, int]:
    """The pair that has so many smaller ones, in a table that has every pair twice.

    The m least values are in the m rows with the least minima.
    """
    least, k = table.min(axis=1), len(table)
    rows = np.argpartition(least, min(2 * number + 1, k - 1))[: 2 * number + 2]
    values = table[rows].ravel()
    at, j = divmod(int(np.argpartition(values, 2 * number)[2 * number]), k)
    return int(rows[at]), j


def _dense(groups: Int[np.ndarray, " C"]) -> Int[np.ndarray, " C"]:
    """Groups numbered 0, 1, ... in the order of their first members."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def hamming(first: Int[np.ndarray, " C"], second: Int[np.ndarray, " D"]) -> float:
    """The share of components that are in another group, whatever groups are called.

    1 - max over one-to-one namings of (components whose groups have one name) / C.
    """
    if len(first) != len(second):
        raise InputError(
            f"the two partitions are of {len(first)} and {len(second)} components; they must be of "
            "the same."
        )
    shared = np.zeros((int(first.max()) + 1, int(second.max()) + 1), np.int64)
    np.add.at(shared, (first, second), 1)
    return 1 - shared[linear_sum_assignment(shared, maximize=True)].sum() / len(first)


def save(found: Clustering, folder: epath.PathLike, harvest: Harvest, alpha: float) -> epath.Path:
    """Writes `FILE` into a folder. harvest: of the same decomposition."""
    path = user_path(folder) / FILE
    about = {
        "harvest": harvest.fingerprint,
        "alpha": alpha,
        "restarts": len(found.lengths),
        "length": found.length,
        "single": found.single,
        "agreement": None if len(found.lengths) == 1 else 1 - found.distance,
        "lengths": found.lengths.tolist(),
        "partition": found.partition.tolist(),
    }
    path.write_text(json.dumps(about))
    return path


def load(folder: epath.PathLike, harvest: Harvest) -> dict[str, Any]:
    """What `save` has written there; "partition" is [C], the group of every component.

    Raises:
      InputError: there is none, or it is torn or of another decomposition.
    """
    where = user_path(folder) / FILE
    try:
        found = json.loads(where.read_text())
        found["partition"] = np.asarray(found["partition"], np.int64)
        of = found["harvest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where} holds no clusters ({first_line(error)}).") from None
    if of != harvest.fingerprint:
        raise InputError(f"{where} holds clusters of another decomposition; make them anew.")
    return found


def merged(decomposition: Decomposition, partition: Any) -> Decomposition:
    """The decomposition whose components are the groups of a partition.

    No array changes. A component's gate is the OR of its parts': the largest of their causal
    importances. It can be used, saved and trained like any other.

    Args:
      partition: [C] whole numbers, e.g. `Clustering.partition`.
    Raises:
      InputError: not one number per component, or a gate that ranks attributions: that one judges
        merged components by their own attributions, so `components.relabel` is all it takes.
    """
    method, components = decomposition.method, decomposition.components
    if "clusters" not in method.fields():
        raise InputError(
            f"the gate of method {method.name!r} has no parts that could be joined; components "
            "with learned gates can be merged."
        )
    joined = components_lib.relabel(components, np.asarray(partition).tolist())
    groups = np.unique(np.asarray(partition), return_inverse=True)[1]
    known = getattr(method, "clusters", ())
    clusters = tuple(int(groups[c]) for c in known or range(components.num_components))
    found = dataclasses.replace(
        decomposition, components=joined, method=method.replace(clusters=clusters)
    )
    gate: Any = found.method.gate(found.gate, found.problem)
    parts = gate.parts(joined).factors
    if not known and any(f.ids != parts[name].ids for name, f in components.factors.items()):
        raise InputError(
            "the components were renumbered after they were trained, so their gates are not those "
            "of their numbers; merge the components as they were trained."
        )
    return found
