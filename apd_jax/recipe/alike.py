"""How alike examples are in what they read, and the direction that alike ones share.

Shapes: N examples, k of them alike, b matrices of a leaf (1 unless stacked).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

NEAR = 0.95  # a cosine of P(x) above which an example counts for a mode's density
LEAST_COUNT = 5  # examples that make a mode


class Alike:
    """How alike examples are: the cosines of their P, every leaf in units of ‖W_l‖.

    They are computed block by block where they are asked for, and none is kept.
    """

    _BLOCK = 512

    def __init__(
        self, ins: dict[str, Float[np.ndarray, "N b d_in"]], weights: dict[str, np.ndarray]
    ):
        self._factors = []
        for name, e in ins.items():
            W = weights[name] / max(float(np.linalg.norm(weights[name])), 1e-30)
            self._factors += [(e[:, i], e[:, i] @ W[i]) for i in range(len(W))]
        squares = sum(np.sum(e**2, 1) * np.sum(v**2, 1) for e, v in self._factors)
        self._length = np.sqrt(np.maximum(squares, 1e-30)).astype(np.float32)

    def cosines(self, rows: np.ndarray, columns: Any) -> Float[np.ndarray, "r c"]:
        inner = sum((e[rows] @ e[columns].T) * (v[rows] @ v[columns].T) for e, v in self._factors)
        return inner / self._length[rows, None] / self._length[None, columns]

    def density(self, count: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        """Of every example, those near it, counted."""
        density = np.zeros_like(count)
        for rows in self._blocks(np.arange(len(count))):
            first, after = rows[0], rows[-1] + 1
            near = (self.cosines(rows, slice(first, None)) > NEAR).astype(np.float32)
            density[rows] += near @ count[first:]
            density[after:] += count[rows] @ near[:, len(rows) :]
        return density

    def near(
        self, rows: np.ndarray, columns: Bool[np.ndarray, " N"], count: Float[np.ndarray, " N"]
    ) -> Any:
        """Of the examples `columns`, those among `rows` that are near, counted."""
        return sum(
            count[some] @ (self.cosines(some, columns) > NEAR).astype(np.float32)
            for some in self._blocks(rows)
        )

    def _blocks(self, rows: np.ndarray) -> list[np.ndarray]:
        return np.array_split(rows, max(1, -(-len(rows) // self._BLOCK)))


def leading(
    e: Float[np.ndarray, "k b d"], count: Float[np.ndarray, " k"]
) -> Float[np.ndarray, "b d"]:
    """The leading direction of several, whatever their signs."""
    lines = np.moveaxis(e * np.sqrt(count)[:, None, None], 0, 1)
    return np.stack([np.linalg.svd(line, full_matrices=False)[2][0] for line in lines])


def purest(
    ins: dict[str, Float[np.ndarray, "N b d"]], count: Float[np.ndarray, " N"], members: np.ndarray
) -> np.ndarray:
    """The half of these examples that is nearest to their leading directions, then half of that.

    Not fewer than LEAST_COUNT.
    """
    for _ in range(2):
        cosine = [
            np.einsum("kbd,bd->kb", e[members], leading(e[members], count[members]))
            for e in ins.values()
        ]
        nearest = np.argsort(-np.sum(np.square(np.concatenate(cosine, 1)), 1), kind="stable")
        members = members[nearest[: max(LEAST_COUNT, len(members) // 2)]]
    return members
