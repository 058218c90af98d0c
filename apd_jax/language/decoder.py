r"""One decoder for several families of language models: what distinguishes them are settings.

  x = E[tokens] (+ E_pos)
  x += attention(norm x);  x += mlp(norm x)     one after the other; or both of the same x, parallel
  logits = norm(x) W_U                          W_U = Eᵀ where they are tied

attention: heads of width d, K of them for keys and values (each serves H/K heads), causal softmax
of q·k/√d; rotary embeddings turn pairs of the first entries of q and k by t·base^(-2j/r) at
position t. mlp: act(x W_gate) ⊙ (x W_up) W_down, or act(x W_up) W_down.

Shapes: B sequences, T positions, V tokens, D the residual width, H and K heads of width d.
Parameters are a flat dict by the names of the file that they come from (`families`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from apd_jax.errors import InputError

SOWN = "intermediates"  # kept of a pass that asks for it: hidden_{i}, keys_{i}, values_{i}
Past = tuple[Any, Any] | None  # keys and values [B, S, K, d] of other positions

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes, and what a family does in its own way.

    names: {role: name in the file}, with {i} for the layer; see `families`.
    biases: the roles that have one. qkv: q, k and v are leaves of their own ("apart"), one leaf
    with all of q first ("packed"), or with q, k, v of one head after another ("per_head").
    """

    vocab_size: int  # V, the rows of E
    d_model: int  # D
    num_layers: int
    num_heads: int  # H
    num_kv_heads: int  # K
    d_head: int  # d
    d_mlp: int
    context: int  # the most positions
    names: dict[str, str]
    biases: tuple[str, ...] = ()
    inputs_first: bool = False  # weights are [in, out]; else [out, in]
    norm: str = "rms"  # rms | layer
    norm_eps: float = 1e-5
    activation: str = "silu"
    qkv: str = "apart"  # apart | packed | per_head
    qk_norm: bool = False  # RMS of every head's q and k
    parallel: bool = False
    rotary: int = 0  # entries of a head that are turned; 0: learned positions
    rope_base: float = 10_000.0
    rope_pairs: str = "halves"  # (j, j + r/2), or "adjacent": (2j, 2j + 1)
    tied: bool = True

    @property
    def gated(self) -> bool:
        return "gate" in self.names

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of all parameters."""
        found = {}
        for role, (d_in, d_out) in self._matrices().items():
            shape = (d_in, d_out) if self.inputs_first else (d_out, d_in)
            for i in range(self.num_layers):
                found[self.name(role, i)] = shape
                if role in self.biases:
                    found[self.bias(role, i)] = (d_out,)
        norms = {"norm_attention": self.d_model, "norm_mlp": self.d_model}
        norms |= {"norm_q": self.d_head, "norm_k": self.d_head} if self.qk_norm else {}
        for role, width in norms.items():
            for i in range(self.num_layers):
                found[self.name(role, i)] = (width,)
                if role in self.biases:
                    found[self.bias(role, i)] = (width,)
        found[self.name("norm_out")] = (self.d_model,)
        if "norm_out" in self.biases:
            found[self.bias("norm_out")] = (self.d_model,)
        found[self.name("embed")] = (self.vocab_size, self.d_model)
        if not self.rotary:
            found[self.name("positions")] = (self.context, self.d_model)
        if not self.tied:
            found[self.name("unembed")] = (self.vocab_size, self.d_model)
        return found

    def _matrices(self) -> dict[str, tuple[int, int]]:
        """{role: (d_in, d_out)} of the matrices of a layer."""
        D, H, K, d = self.d_model, self.num_heads, self.num_kv_heads, self.d_head
        if self.qkv == "apart":
            found = {"q": (D, H * d), "k": (D, K * d), "v": (D, K * d)}
        else:
            found = {"qkv": (D, (H + 2 * K) * d)}
        found |= {"o": (H * d, D), "up": (D, self.d_mlp), "down": (self.d_mlp, D)}
        return found | ({"gate": (D, self.d_mlp)} if self.gated else {})

    def name(self, role: str, layer: int = 0) -> str:
        return self.names[role].replace("{i}", str(layer))

    def bias(self, role: str, layer: int = 0) -> str:
        return self.name(role, layer).removesuffix("weight") + "bias"

    def matrices(self, which: str = "all", layers: Any = None) -> list[str]:
        """Names of the matrices in layers: all, those of "attention", or those of the "mlp".

        layers: their numbers; None: all.
        """
        mlp = ("gate", "up", "down")
        roles = [
            role for role in self._matrices() if which == "all" or (which == "mlp") == (role in mlp)
        ]
        return [
            self.name(role, i)
            for i in (range(self.num_layers) if layers is None else layers)
            for role in roles
        ]


class Decoder(nn.Module):
    """tokens [B, T] -> logits [B, T, V], float32.

    Attributes:
      dtype: of products and activations; norms, softmax and logits are float32 whatever it is.
      remat: compute the activations of a layer again in the backward pass, instead of keeping them.
      body: without the last product, x W_U: what it reads, [B, T, D], in place of logits.
    Raises:
      InputError: more positions than the context.
    Cost: B·T·(weights of layers and W_U) multiply-adds; scores [B, H, T, T].
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    remat: bool = False
    body: bool = False

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T _"]:
        c, T = self.config, tokens.shape[1]
        if c.context < T:
            raise InputError(
                f"the sequences have {T} positions, but this model's context is {c.context}; give "
                "shorter ones."
            )
        embed = self._weight("embed")
        x = self._embedded(embed, tokens, jnp.arange(T)[None])
        block = nn.remat(Decoder._block, static_argnums=(2,)) if self.remat else Decoder._block
        for i in range(c.num_layers):
            self.sow(SOWN, f"hidden_{i}", x)
            x = block(self, x, i)
        if self.body:
            return self._norm(x, "norm_out")
        return self._logits(x, embed if c.tied else self._weight("unembed"))

    def _embedded(self, embed: Array, tokens: Array, places: Array) -> Array:
        x = jnp.take(embed, tokens, axis=0, mode="clip").astype(self.dtype)
        if self.config.rotary:
            return x
        places = jnp.broadcast_to(places, tokens.shape)
        return x + jnp.take(self._weight("positions"), places, axis=0).astype(self.dtype)

    def _logits(self, x: Array, unembed: Array) -> Array:
        return logits(self._norm(x, "norm_out"), unembed, self.dtype)

    def _block(self, x: Array, i: int, past: Past = None, at: Array | None = None) -> Array:
        attended = x + self._attend(self._norm(x, "norm_attention", i), i, past, at)
        if self.config.parallel:
            return attended + self._mlp(self._norm(x, "norm_mlp", i), i)
        return attended + self._mlp(self._norm(attended, "norm_mlp", i), i)

    def _mlp(self, x: Array, i: int) -> Array:
        act = ACTIVATIONS[self.config.activation]
        if self.config.gated:
            hidden = act(self._linear(x, "gate", i)) * self._linear(x, "up", i)
        else:
            hidden = act(self._linear(x, "up", i))
        return self._linear(hidden, "down", i)

    def _attend(self, x: Array, i: int, past: Past, at: Array | None) -> Array:
        """past: of the S positions before x; with at [B], of all S, where x is the one at `at`."""
        c, (B, T) = self.config, x.shape[:2]
        S = 0 if past is None else past[0].shape[1]
        q, k, v = self._heads(x, i)
        if c.qk_norm:
            q = self._scaled(rms(q, c.norm_eps), "norm_q", i)
            k = self._scaled(rms(k, c.norm_eps), "norm_k", i)
        if c.rotary:
            where = (S, None) if at is None else (at, S)
            q, k = (rotate(a, c.rotary, c.rope_base, c.rope_pairs, *where) for a in (q, k))
        if past is not None and at is not None:
            rows = jnp.arange(B)
            k, v = (a.at[rows, at].set(b[:, 0]) for a, b in zip(past, (k, v), strict=True))
        self.sow(SOWN, f"keys_{i}", k)
        self.sow(SOWN, f"values_{i}", v)
        if at is not None:
            causal = jnp.arange(S)[None, None, None, None] <= at[:, None, None, None, None]
        else:
            causal = jnp.tril(jnp.ones((1, 1, 1, T, S + T), bool), S)
        if past is not None and at is None:
            k, v = (jnp.concatenate(pair, axis=1) for pair in zip(past, (k, v), strict=True))
        q = q.reshape(B, T, c.num_kv_heads, -1, c.d_head)
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k).astype(jnp.float32) / math.sqrt(c.d_head)
        pattern = jax.nn.softmax(jnp.where(causal, scores, jnp.finfo(jnp.float32).min))
        mixed = jnp.einsum("bkgts,bskd->btkgd", pattern.astype(self.dtype), v)
        return self._linear(mixed.reshape(B, T, -1), "o", i)

    def _heads(self, x: Array, i: int) -> tuple[Array, Array, Array]:
        """q [B, T, H, d] and k, v [B, T, K, d]."""
        c, lead = self.config, x.shape[:2]
        counts = (c.num_heads, c.num_kv_heads, c.num_kv_heads)
        if c.qkv == "apart":
            parts = [self._linear(x, role, i) for role in ("q", "k", "v")]
        elif c.qkv == "packed":
            cuts = np.cumsum([n * c.d_head for n in counts])[:-1]
            parts = jnp.split(self._linear(x, "qkv", i), cuts, axis=-1)
        else:
            apart = self._linear(x, "qkv", i).reshape(*lead, c.num_heads, 3, c.d_head)
            parts = [apart[..., j, :] for j in range(3)]
        q, k, v = (part.reshape(*lead, n, c.d_head) for part, n in zip(parts, counts, strict=True))
        return q, k, v

    def _linear(self, x: Array, role: str, i: int) -> Array:
        c = self.config
        W = self._weight(role, i).astype(self.dtype)
        y = x.astype(self.dtype) @ (W if c.inputs_first else W.T)
        return y + self._bias(role, i).astype(self.dtype) if role in c.biases else y

    def _norm(self, x: Array, role: str, i: int = 0) -> Array:
        c, x = self.config, x.astype(jnp.float32)
        if c.norm == "layer":
            x -= jnp.mean(x, axis=-1, keepdims=True)
        x = self._scaled(rms(x, c.norm_eps), role, i)
        return (x + self._bias(role, i) if role in c.biases else x).astype(self.dtype)

    def _scaled(self, x: Array, role: str, i: int) -> Array:
        scale = self._parameter(self.config.name(role, i), nn.initializers.ones)
        return (x * scale.reshape(*[1] * (x.ndim - 1), -1)).astype(self.dtype)

    def _weight(self, role: str, i: int = 0) -> Array:
        return self._parameter(self.config.name(role, i), nn.initializers.normal(0.02))

    def _bias(self, role: str, i: int) -> Array:
        return self._parameter(self.config.bias(role, i), nn.initializers.zeros)[None, None]

    def _parameter(self, name: str, init: Any) -> Array:
        return self.param(name, init, self.config.shapes()[name], jnp.float32)


def logits(
    x: Float[Array, "*n D"], unembed: Float[Array, "V D"], dtype: Any
) -> Float[Array, "*n V"]:
    """x W_U, in float32."""
    return (x.astype(dtype) @ unembed.astype(dtype).T).astype(jnp.float32)


def rms(x: Array, eps: float) -> Array:
    """x / √(mean x² + ε) over the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def rotate(
    x: Float[Array, "B T H d"],
    count: int,
    base: float,
    pairs: str,
    start: int | Int[Array, " B"] = 0,
    limit: int | None = None,
) -> Array:
    """Rotary embedding of the first `count` entries; others stay.

    Args:
      start: the position of the first. With `limit`, of the only one of every row, each below it.
    """
    places = start + np.arange(x.shape[1]) if limit is None else np.arange(limit)
    angles = np.outer(places, base ** (-np.arange(0, count, 2) / count))
    cos, sin = (jnp.asarray(f(angles), jnp.float32).astype(x.dtype) for f in (np.cos, np.sin))
    if limit is None:
        cos, sin = cos[None, :, None], sin[None, :, None]
    else:
        cos, sin = cos[start][:, None, None], sin[start][:, None, None]
    turned, rest = x[..., :count], x[..., count:]
    if pairs == "halves":
        a, b = jnp.split(turned, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    else:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
        turned = turned.reshape(*x.shape[:-1], count)
    return jnp.concatenate([turned, rest], axis=-1)
