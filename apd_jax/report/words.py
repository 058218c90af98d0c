"""What tokens are called: a tokenizer, or a list of names, as one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from apd_jax.errors import InputError, first_line

Words = Callable[[int], str]


def of(tokens: Any) -> Words | None:
    """number -> its name; a number without one is shown as it is.

    Args:
      tokens: a list or array of names, {number: name}, or a tokenizer: an object with `decode` (of
        a list of numbers), `id_to_token` or `convert_ids_to_tokens`; or a function.
    Raises:
      InputError: it is none of these, or fails on token 0.
    """
    if tokens is None:
        return None
    if isinstance(tokens, str) or not (asked := _ways(tokens)):
        raise InputError(
            "tokens must be a list of names, {number: name}, or a tokenizer with decode or "
            f"id_to_token; got a {type(tokens).__name__}."
        )

    def word(number: int) -> str:
        for way in asked:
            if (found := way(number)) not in (None, ""):  # decode leaves out special tokens
                return str(found).replace("\n", "⏎").replace("\t", "⇥")
        return str(number)

    try:
        word(0)
    except Exception as error:
        raise InputError(f"tokens cannot name token 0: {first_line(error)}.") from error
    return word


def of_outputs(words: Words | None, x: PyTree, count: int) -> Words | None:
    """The same for outputs, unless inputs are tokens and there are fewer outputs than tokens."""
    tokens = [a for a in jax.tree.leaves(x) if jnp.issubdtype(a.dtype, jnp.integer)]
    return words if all(count > int(a.max(initial=0)) for a in tokens) else None


def _ways(tokens: Any) -> list[Callable[[int], Any]]:
    ways: list[Callable[[int], Any]] = []
    if hasattr(tokens, "decode"):
        ways.append(lambda number: tokens.decode([number]))
    for name in ("id_to_token", "convert_ids_to_tokens"):
        if hasattr(tokens, name):
            ways.append(getattr(tokens, name))
    if ways:
        return ways
    if isinstance(tokens, Mapping):
        return [tokens.get]
    if hasattr(tokens, "__getitem__") and hasattr(tokens, "__len__"):
        return [lambda number: tokens[number] if 0 <= number < len(tokens) else None]
    return [tokens] if callable(tokens) else []
