"""The last position's way through a language model's last layers, as a network of its own.

  inputs    tokens [B, T] -> x_T before layer l, and keys and values of the positions before T
  apply_fn  (params, inputs) -> logits [B, V] of what follows token T

The same logits as those of the whole model there. Where only some predictions matter, and only
weights of the layers from l on, everything before is computed once: a pass costs T times less than
one of all positions, in those layers alone, and V logits in place of T·V. What changed weights
write into keys and values of *earlier* positions is not seen: judge edits in the whole model.

Shapes: B sequences, T positions, V tokens, D the residual width, n layers from l on, K heads of
keys and values, of width d.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import wadler_lindig as wl
from jaxtyping import Array, Float

from apd_jax.errors import InputError
from apd_jax.language.decoder import SOWN, Decoder, DecoderConfig

Inputs = Mapping[str, Any]  # hidden [B, D]; keys, values [B, n, T - 1, K, d]


@dataclasses.dataclass(frozen=True)
class LastToken:
    """A network of one position: `apd_jax.decompose(last.apply_fn, last.params, inputs)`.

    params: those of the model that it needs, by their names: `model.params | edited` is a whole.
    inputs: tokens [B, T], T of at least 2, without padding -> what `apply_fn` reads of them.
    """

    params: dict[str, Array]
    apply_fn: Callable[[Any, Inputs], Float[Array, "B V"]]
    inputs: Callable[[Any], dict[str, Array]]

    def __repr__(self) -> str:
        return wl.pformat(self)


class _Rest(Decoder):
    """The layers from `layer` on, of one position."""

    layer: int = 0

    @nn.compact
    def __call__(self, x: Any) -> Float[Array, "B V"]:
        hidden = x["hidden"][:, None]
        for j, i in enumerate(range(self.layer, self.config.num_layers)):
            hidden = self._block(hidden, i, (x["keys"][:, j], x["values"][:, j]))
        return self._logits(hidden, self._weight(_unembed(self.config)))[:, 0]


def _unembed(config: DecoderConfig) -> str:
    return "embed" if config.tied else "unembed"


def of(config: DecoderConfig, params: Mapping[str, Array], layer: int, dtype: Any) -> LastToken:
    """See `LastToken`.

    Raises:
      InputError: there is no such layer.
    """
    if not 0 <= layer < config.num_layers:
        raise InputError(
            f"the model has no layer {layer}; there are {config.num_layers}, counted from 0."
        )
    rest, whole = _Rest(config, dtype, layer=layer), Decoder(config, dtype)

    def apply(params: Any, x: Inputs) -> Any:
        return rest.apply({"params": params}, jax.tree.map(jnp.asarray, x))

    @jax.jit
    def before(params: Any, tokens: Array) -> dict[str, Any]:
        _, kept = whole.apply({"params": params}, tokens, mutable=[SOWN])
        sown = {name: value for name, (value,) in kept[SOWN].items()}
        found: dict[str, Any] = {"hidden": sown[f"hidden_{layer}"][:, -1]}
        for name in ("keys", "values"):
            layers = [sown[f"{name}_{i}"][:, :-1] for i in range(layer, config.num_layers)]
            found[name] = jnp.stack(layers, axis=1)
        return found

    earlier = dataclasses.replace(config, num_layers=layer).shapes()
    needed = {config.name(_unembed(config)), config.name("norm_out")}
    needed |= {config.bias("norm_out")} if "norm_out" in config.biases else set()
    own = {n: a for n, a in params.items() if n in needed or n not in earlier}

    def inputs(tokens: Any) -> dict[str, Any]:
        if np.min(tokens) < 0:
            raise InputError(
                "tokens below 0 stand for padding; last_token reads rows of one length without it."
            )
        return before(dict(params), jnp.asarray(tokens))

    return LastToken(own, apply, inputs)
