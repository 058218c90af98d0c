"""Text that a language model goes on with, token by token.

Shapes: B prompts, n tokens of the longest, L positions of the buffer, V tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from apd_jax.errors import InputError, seed_of
from apd_jax.language.tokens import PAD
from apd_jax.network.outputs import outputs

SLACK = 64  # `buffer_length` is a multiple of this: prompts of many lengths share one program


@runtime_checkable
class Steps(Protocol):
    """A network a token at a time. Equal ones share a compiled program."""

    def begin(self, params: PyTree, tokens: Int[Array, "B L"]) -> Any:
        """What is kept of the tokens, from whichever position on it then goes on."""
        ...

    def step(
        self, params: PyTree, kept: Any, tokens: Int[Array, " B"], at: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], Any]:
        """Logits of what follows the tokens at these positions, and what is kept with them."""
        ...


@dataclasses.dataclass(frozen=True)
class _Whole:
    """The tokens are kept, and read again at every step."""

    apply_fn: Callable

    def begin(self, params: PyTree, tokens: Array) -> Array:
        return tokens

    def step(
        self, params: PyTree, kept: Array, tokens: Array, at: Array
    ) -> tuple[Float[Array, "B V"], Array]:
        rows = jnp.arange(len(tokens))
        kept = kept.at[rows, at].set(tokens)
        return outputs(self.apply_fn(params, kept))[rows, at], kept


def generate(
    network: Callable | Steps,
    params: PyTree,
    tokens: Any,
    *,
    num_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    length: int | None = None,
) -> Int[np.ndarray, "B m"]:
    """Every prompt with more tokens, t ~ softmax(logits / temperature); the likeliest at 0.

    Args:
      network: (params, tokens [B, L]) -> logits [B, L, V], causal: a position sees none after it.
        Or `model.steps`, the same network with keys and values kept.
      tokens: [B, n]; PAD behind the end of the shorter ones, each of which goes on from its own.
      seed: draws are a function of the seed, the row and the position.
      length: L, positions of the buffer; calls of one L and B share a program. None:
        n + num_tokens.
    Returns: [B, n + num_tokens], PAD behind the end of the shorter ones.
    Raises:
      InputError: an empty prompt, PAD inside one, no room in the buffer, or a bad number.
    Cost: num_tokens forward passes over B·L positions; of `model.steps` one of them, and num_tokens
      of B positions, whose logits differ by rounding.
    """
    prompt = np.atleast_2d(np.asarray(tokens))
    B, n = prompt.shape
    ends = np.sum(prompt != PAD, axis=1)
    if not np.issubdtype(prompt.dtype, np.integer) or (ends == 0).any():
        raise InputError("generate goes on from tokens: at least one whole number in every row.")
    if (np.where(np.arange(n) < ends[:, None], prompt, 0) < 0).any():
        raise InputError("tokens below 0 stand for padding, which must be behind a prompt's end.")
    if num_tokens < 1 or not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(
            f"generate needs num_tokens of at least 1 and a temperature of at least 0; got "
            f"{num_tokens} and {temperature}."
        )
    whole = n + num_tokens
    L = whole if length is None else length
    if whole > L:
        raise InputError(
            f"a prompt of {n} tokens and {num_tokens} more need {whole} positions; there are {L}."
        )
    buffer = np.zeros((B, L), np.int32)  # tokens that exist, for any network to look up
    buffer[:, :n] = np.maximum(prompt, 0)
    key = jax.random.key(seed_of("seed", seed))
    steps: Any = network if isinstance(network, Steps) else _Whole(network)
    found = _continued(steps, params, buffer, ends, num_tokens, float(temperature), key)
    inside = np.arange(whole) < (ends + num_tokens)[:, None]
    return np.where(inside, np.asarray(found)[:, :whole], PAD)


def buffer_length(needed: int, context: int) -> int:
    """The next multiple of SLACK, or the context where that is less.

    Raises:
      InputError: the context is too short.
    """
    if needed > context:
        raise InputError(
            f"prompt and new tokens need {needed} positions, but this model's context is "
            f"{context}; give a shorter text, or ask for fewer tokens."
        )
    return min(-(-needed // SLACK) * SLACK, context)


@functools.partial(jax.jit, static_argnums=0)
def _continued(
    steps: Steps,
    params: PyTree,
    buffer: Int[Array, "B L"],
    ends: Int[Array, " B"],
    num_tokens: Any,
    temperature: Any,
    key: Array,
) -> Int[Array, "B L"]:
    rows = jnp.arange(buffer.shape[0])

    def once(i: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        buffer, kept = carry
        at = ends + i
        logits, kept = steps.step(params, kept, buffer[rows, at - 1], at - 1)
        keys = jax.vmap(lambda b, t: jax.random.fold_in(jax.random.fold_in(key, b), t))(rows, at)
        drawn = jax.vmap(jax.random.categorical)(keys, logits / jnp.maximum(temperature, 1e-6))
        chosen = jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1))
        return buffer.at[rows, at].set(chosen.astype(buffer.dtype)), kept

    return jax.lax.fori_loop(0, num_tokens, once, (buffer, steps.begin(params, buffer)))[0]
