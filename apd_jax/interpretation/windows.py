"""What a harvest keeps on the device: windows of text, and which components are on together.

Shapes: B sequences, T positions, C components, K windows of W tokens; N = B·T.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from apd_jax.language.tokens import PAD


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Windows:
    """The K windows of largest strength of every component, the largest first; -inf: none."""

    strength: Any  # [C, K]
    tokens: Any  # [C, K, W], PAD outside of the row
    activity: Any  # [C, K, W]

    @staticmethod
    def empty(C: int, K: int, W: int) -> Windows:
        return Windows(
            jnp.full((C, K), -jnp.inf),
            jnp.full((C, K, W), PAD, jnp.int32),
            jnp.zeros((C, K, W)),
        )

    def merged(self, strength: Array, tokens: Array, activity: Array) -> Windows:
        """With others; among equals the older ones stay."""
        both = jnp.concatenate([self.strength, strength], axis=1)
        kept, places = jax.lax.top_k(both, self.strength.shape[1])

        def take(mine: Array, theirs: Array) -> Array:
            joined = jnp.concatenate([mine, theirs], axis=1)
            return jnp.take_along_axis(joined, places[..., None], axis=1)

        return Windows(kept, take(self.tokens, tokens), take(self.activity, activity))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
    """top: at the strongest positions, one of a row; random: at positions drawn uniformly.

    together: on how many positions both components are on.
    """

    top: Any
    random: Any
    together: Any  # [C, C]

    @staticmethod
    def empty(C: int, num_top: int, num_random: int, width: int) -> Kept:
        top, random = Windows.empty(C, num_top, width), Windows.empty(C, num_random, width)
        return Kept(top, random, jnp.zeros((C, C), jnp.int32))


def update(
    kept: Kept,
    g: Float[Array, "B T C"],
    scores: Float[Array, "B T C"],
    active: Bool[Array, "B T C"],
    tokens: Int[Array, "B T"],
    key: Array,
) -> Kept:
    """With a batch.

    A position draws one uniform number for all components. Of the active positions of a component
    those with the largest numbers are a uniform sample, over any number of batches.

    Cost: N·C² multiply-adds for `together`; else a few passes over [N, C].
    """
    (B, T), C = tokens.shape, g.shape[-1]
    strength = jnp.where(active, scores, -jnp.inf)
    best = jnp.argmax(strength, axis=1)  # [B, C]
    by_row = jnp.max(strength, axis=1).T  # [C, B]
    strongest, rows = jax.lax.top_k(by_row, min(B, kept.top.strength.shape[1]))
    places = jnp.take_along_axis(best.T, rows, axis=1)
    top = kept.top.merged(strongest, *_cut(g, tokens, rows, places, kept.top))
    drawn = jax.random.uniform(key, (B, T, 1))
    drawn = jnp.where(active, drawn, -jnp.inf).reshape(B * T, C).T
    lucky, flat = jax.lax.top_k(drawn, min(B * T, kept.random.strength.shape[1]))
    random = kept.random.merged(lucky, *_cut(g, tokens, flat // T, flat % T, kept.random))
    on = active.reshape(B * T, C).astype(jnp.float32)  # sums are exact below 2^24
    return Kept(top, random, kept.together + (on.T @ on).astype(jnp.int32))


def _cut(
    g: Array, tokens: Array, rows: Int[Array, "C k"], places: Int[Array, "C k"], like: Windows
) -> tuple[Array, Array]:
    """Tokens and activity around positions, [C, k, W]."""
    half = like.tokens.shape[-1] // 2
    sides = (half, half)
    wide = jnp.pad(tokens, ((0, 0), sides), constant_values=PAD)
    active = jnp.pad(g, ((0, 0), sides, (0, 0)))
    rows, places = rows[..., None], places[..., None] + jnp.arange(2 * half + 1)[None, None]
    return wide[rows, places], active[rows, places, jnp.arange(g.shape[-1])[:, None, None]]
