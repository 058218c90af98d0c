"""A language model a token at a time, with the keys and values of the tokens before kept.

Shapes: B rows, L positions, V tokens, K heads of keys and values, of width d.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from apd_jax.language.decoder import SOWN, Decoder

Kept = tuple[tuple[Any, Any], ...]  # of every layer keys and values [B, L, K, d]


class _Step(Decoder):
    """One position of every row."""

    @nn.compact
    def __call__(self, tokens: Any, at: Any = None, kept: Kept = ()) -> Float[Array, "B V"]:
        embed = self._weight("embed")
        x = self._embedded(embed, tokens[:, None], at[:, None])
        for i, past in enumerate(kept):
            x = self._block(x, i, past, at)
        return self._logits(x, embed if self.config.tied else self._weight("unembed"))[:, 0]


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: its config is not
class Stepwise:
    """What `sampling.generate` takes for a model; see `sampling.Steps`."""

    whole: Decoder

    def begin(self, params: PyTree, tokens: Int[Array, "B L"]) -> Kept:
        """Cost: a forward pass over B·L positions, without the logits where it is compiled."""
        return self._sown(self.whole.apply({"params": params}, tokens, mutable=[SOWN]))[1]

    def step(
        self, params: PyTree, kept: Kept, tokens: Int[Array, " B"], at: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], Kept]:
        """Cost: B positions of all layers; attention to L. Rows may be at different positions."""
        own = _Step(self.whole.config, self.whole.dtype)
        given = (jnp.asarray(tokens), at, kept)
        return self._sown(own.apply({"params": params}, *given, mutable=[SOWN]))

    def _sown(self, result: tuple[Any, Any]) -> tuple[Any, Kept]:
        logits, found = result
        layers = range(self.whole.config.num_layers)
        sown = {name: value for name, (value,) in found[SOWN].items()}
        return logits, tuple((sown[f"keys_{i}"], sown[f"values_{i}"]) for i in layers)
