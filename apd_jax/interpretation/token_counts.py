r"""How often every component fires on every token, in bounded memory.

A table of n_{c,v} for S tokens v of every component c: Misra and Gries' summary, in the mergeable
form of Agarwal et al. (2012). Where a component has seen more than S tokens, the (S+1)-th largest
count is taken from all of its counts, and those at zero are dropped. With m_c the sum of what was
taken, n_{c,v} - m_c <= table <= n_{c,v} and m_c <= n_c / (S + 1), n_c the firings of c. With S at
least the vocabulary nothing is ever taken: counts are exact.

Shapes: C components, V tokens, n pairs.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import wadler_lindig as wl
from jaxtyping import Float, Int

WAITING = 2**22  # pairs that are held before they are added to the table


@dataclasses.dataclass
class TokenCounts:
    """The table, and the pairs that wait for it.

    keys: c·V + v, sorted; counts: of each. taken: m_c. total: [V], how often each token was there.
    Memory: 16 bytes for each of at most C·S entries, five times that while a table is added to.
    """

    num_components: int
    vocab_size: int
    slots: int  # S
    keys: Int[np.ndarray, " n"]
    counts: Int[np.ndarray, " n"]
    taken: Int[np.ndarray, " C"]
    total: Int[np.ndarray, " V"]
    waiting: list[np.ndarray] = dataclasses.field(default_factory=list)

    def __repr__(self) -> str:
        return wl.pformat(self)

    @staticmethod
    def empty(num_components: int, vocab_size: int, slots: int) -> TokenCounts:
        C, V = num_components, vocab_size
        none = np.zeros(0, np.int64)
        return TokenCounts(C, V, slots, none, none, np.zeros(C, np.int64), np.zeros(V, np.int64))

    def add(self, component: np.ndarray, token: np.ndarray, there: np.ndarray) -> None:
        """Counts the pairs (component_i, token_i), and the tokens of all positions in `there`."""
        self.total += np.bincount(there, minlength=self.vocab_size)
        self.waiting.append(component.astype(np.int64) * self.vocab_size + token)
        if sum(map(len, self.waiting)) >= WAITING:
            self.settle()

    def settle(self) -> None:
        """Adds what waits to the table."""
        keys, counts = np.unique(np.concatenate([*self.waiting, self.keys[:0]]), return_counts=True)
        self.waiting = []
        keys, counts = np.append(self.keys, keys), np.append(self.counts, counts)
        order = np.argsort(keys, kind="stable")
        keys, counts = keys[order], counts[order]
        first = np.flatnonzero(np.diff(keys, prepend=-1))
        self.keys, self.counts = (
            keys[first],
            np.add.reduceat(counts, first) if len(first) else first,
        )
        if self.slots < self.vocab_size:
            self._cut()

    def _cut(self) -> None:
        component = self.keys // self.vocab_size
        order = np.lexsort((-self.counts, component))
        ends = np.searchsorted(component, np.arange(self.num_components + 1))
        full = np.flatnonzero(np.diff(ends) > self.slots)
        cut = np.zeros(self.num_components, np.int64)
        cut[full] = self.counts[order[ends[full] + self.slots]]
        left = self.counts - cut[component]
        self.keys, self.counts = self.keys[left > 0], left[left > 0]
        self.taken += cut

    def largest_pmi(
        self, fired: Int[np.ndarray, " C"], num_tokens: int, size: int, min_count: int
    ) -> tuple[Int[np.ndarray, "C M"], Float[np.ndarray, "C M"], Int[np.ndarray, "C M"]]:
        """(tokens, PMI in nats, counts) of largest PMI; -1, 0, 0 where there are fewer.

        PMI_{c,v} = log( n_{c,v} N / (n_c n_v) ), N positions; of tokens with n_{c,v} >= min_count.
        """
        C, V = self.num_components, self.vocab_size
        often = self.counts >= min_count
        keys, counts = self.keys[often], self.counts[often]
        component, token = keys // V, keys % V
        pmi = np.log(counts * float(num_tokens) / (fired[component] * 1.0 * self.total[token]))
        order = np.lexsort((token, -counts, -pmi, component))
        starts = np.searchsorted(component, np.arange(C))
        rank = np.arange(len(order)) - starts[component[order]]
        kept = order[rank < size]
        rows, places = component[kept], rank[rank < size]
        tokens = np.full((C, size), -1, np.int32)
        values, found = np.zeros((C, size), np.float32), np.zeros((C, size), np.int64)
        tokens[rows, places], values[rows, places] = token[kept], pmi[kept]
        found[rows, places] = counts[kept]
        return tokens, values, found

    def arrays(self) -> dict[str, np.ndarray]:
        """The table, for a file; what waits is added first."""
        self.settle()
        return {name: getattr(self, name) for name in ("keys", "counts", "taken", "total")}
