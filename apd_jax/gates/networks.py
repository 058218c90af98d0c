"""Gates that read a site's whole input: an MLP, and a transformer over the inputs of all sites.

Shapes: B sequences, T positions, C components, d_s width of site s's input, D `d_model`, H heads.
Parameters are float32 and so is what is returned. Integer inputs (a site that is looked up) are for
the caller to make one-hot.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from apd_jax.errors import InputError

ROPE_BASE = 10_000.0

_gelu = functools.partial(nn.gelu, approximate=False)


def _dense(features: int, name: str, gain: float = 1.0, use_bias: bool = True) -> nn.Dense:
    """Entries ~ N(0, gain/fan-in), biases 0; `gain` 2 before a GELU (as in the released SPD)."""
    init = nn.initializers.variance_scaling(gain, "fan_in", "normal")
    return nn.Dense(features, use_bias=use_bias, kernel_init=init, name=name)


class InputMLP(nn.Module):
    """logits = W_out gelu(… gelu(W_0 x + b_0)) + b_out; without widths linear in x.

    SPD's "shared MLP" of a site: all its components share the hidden layers.
    """

    widths: tuple[int, ...]
    num_components: int

    @nn.compact
    def __call__(self, x: Float[Array, "*B d_in"]) -> Float[Array, "*B C"]:
        for i, width in enumerate(self.widths):
            x = _gelu(_dense(width, f"hidden_{i}", gain=2.0)(x))
        return _dense(self.num_components, "logits")(x)


class GateTransformer(nn.Module):
    """VPD's gate: reads the inputs of all sites at all positions, returns a logit per component.

    x  = W_0 [rms(a_s) for s in sites] + b_0
    x += O concat_heads softmax(RoPE(Q u) · RoPE(K u) / √(D/H)) V u,    u = rms(x)
    x += W_2 gelu(W_1 rms(x) + b_1) + b_2                               both `num_blocks` times
    logits = W_out rms(x) + b_out

    rms(v) = v / √(mean v² + ε) has no weights: a linear map follows each.

    Attributes:
      sites: the order in which inputs are concatenated.
      causal: attend to positions up to one's own only; else to all.
    Raises:
      InputError: heads do not divide `d_model` into even widths; an input missing or of integers.
    Cost: B·T·(Σ_s d_s·D + num_blocks·(4 D² + 2 D·d_ffn) + D·C) multiply-adds, and
      num_blocks·2·B·T²·D in attention; scores [B, H, T, T].
    """

    sites: tuple[str, ...]
    num_components: int
    d_model: int
    num_blocks: int
    num_heads: int
    d_ffn: int
    causal: bool = False

    @nn.compact
    def __call__(
        self,
        inputs: Mapping[str, Array],  # {site: [B, T, d_s]}
        valid: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T C"]:
        """Args: valid: False at padding, which is not attended to; its own logits mean nothing."""
        _check(self, inputs)
        x = jnp.concatenate([rms_normalise(inputs[name]) for name in self.sites], axis=-1)
        x = _dense(self.d_model, "embed")(x)
        for i in range(self.num_blocks):
            x += self._attend(rms_normalise(x), valid, f"block_{i}")
            hidden = _dense(self.d_ffn, f"block_{i}_hidden", gain=2.0)(rms_normalise(x))
            x += _dense(self.d_model, f"block_{i}_out")(_gelu(hidden))
        return _dense(self.num_components, "logits")(rms_normalise(x))

    def _attend(
        self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"] | None, block: str
    ) -> Float[Array, "B T D"]:
        def heads(kind):
            projected = _dense(self.d_model, f"{block}_{kind}", use_bias=False)(x)
            return projected.reshape(*x.shape[:2], self.num_heads, -1)

        mask = None if valid is None else valid[:, None, None, :]
        mixed = jax.nn.dot_product_attention(
            rotate(heads("query")),
            rotate(heads("key")),
            heads("value"),
            mask=mask,
            is_causal=self.causal,
        )
        return _dense(self.d_model, f"{block}_mix", use_bias=False)(mixed.reshape(x.shape))


def _check(net: GateTransformer, inputs: Mapping[str, Array]) -> None:
    if net.d_model % (2 * net.num_heads):
        raise InputError(
            f"d_model = {net.d_model} must be a multiple of twice the number of heads, "
            f"{net.num_heads}: rotary embeddings turn pairs of a head's entries."
        )
    for name in net.sites:
        if name not in inputs:
            raise InputError(f"the gate reads site {name!r}, whose input was not given.")
        if not jnp.issubdtype(inputs[name].dtype, jnp.floating):
            raise InputError(
                f"site {name!r} has integer inputs; give them one-hot, or leave it out."
            )


def rms_normalise(x: Float[Array, "*s d"]) -> Float[Array, "*s d"]:
    """x / √(mean x² + ε) over the last axis, in float32; ε is its machine epsilon, as in torch."""
    x = x.astype(jnp.float32)
    square = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(square + jnp.finfo(jnp.float32).eps)


def rotate(x: Float[Array, "B T H d"]) -> Float[Array, "B T H d"]:
    """Rotary embedding: entries (j, j + d/2) turned by t·ROPE_BASE^(-2j/d) at position t.

    A product of two rotated vectors depends on the difference of their positions only.
    """
    rates = ROPE_BASE ** (-jnp.arange(0.0, x.shape[-1], 2) / x.shape[-1])
    angles = (jnp.arange(float(x.shape[1]))[:, None] * rates[None])[None, :, None]
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
