"""What tokens are called: a tokenizer, or a list of names, as one function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError, first_line
from apd_jax.network.outputs import outputs
from apd_jax.network.problem import Problem
from apd_jax.network.takes import check_batch

Words = Callable[[int], str]


def of(tokens: Any) -> Words | None:
    """number -> its name; a number without one is shown as it is.

    Args:
      tokens: a list or array of names, {number: name}, or a tokenizer: an object with `decode` (of
        a list of numbers), `id_to_token` or `convert_ids_to_tokens`; or a function.
    Raises:
      InputError: it is none of these, fails on token 0, or is {name: number}.
    """
    if tokens is None:
        return None
    if isinstance(tokens, Mapping) and tokens and all(isinstance(key, str) for key in tokens):
        raise InputError(
            f"tokens must be {{number: name}}; it is {{name: number}}, as {next(iter(tokens))!r} "
            "is one of its keys: give {number: name for name, number in tokens.items()}."
        )
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


def fitting(
    tokens: Any, decomposition: Decomposition, x: PyTree, also: np.ndarray | None = None
) -> Words | None:
    """The same, where a list must fit the network that it is of.

    It needs a name for every number of integer inputs. Where inputs are no integers, or there is an
    output for each of them at every position, it names the outputs and has as many names as these.

    Args:
      x: inputs; None: no outputs are looked at. also: more numbers that are named.
    Raises:
      InputError: as `of`; a list has too few names, or too many.
    Cost: one trace of the network, where it is a list.
    """
    word = of(tokens)
    if not isinstance(tokens, Sequence | np.ndarray):
        return word
    largest = _largest((x, also))
    names = f"tokens has {len(tokens)} names, but"
    instead = "; give one for each, or {number: name} of some."
    if len(tokens) <= largest:
        raise InputError(f"{names} the inputs hold the number {largest}{instead}")
    if x is None:
        return word
    shape = _output_shape(decomposition.problem, jax.tree.map(jnp.asarray, x))
    count = shape[-1]
    if len(tokens) != count and (largest < 0 or (len(shape) > 2 and count > largest)):
        raise InputError(f"{names} the network has {count} outputs{instead}")
    return word if len(tokens) == count else _OfInputs(word)


def _output_shape(problem: Problem, x: PyTree) -> tuple[int, ...]:
    check_batch(problem.apply_fn, problem.params, x)
    shape = outputs(jax.eval_shape(problem.apply_fn, problem.params, x)).shape
    return shape if len(shape) > 1 else (*shape, 1)


@dataclasses.dataclass(frozen=True)
class _OfInputs:
    """Names of inputs that are none of outputs."""

    word: Words | None

    def __call__(self, number: int) -> str:
        return self.word(number) if self.word else str(number)


def of_outputs(words: Words | None, x: PyTree, count: int) -> Words | None:
    """The same for outputs, unless inputs are tokens and there are fewer outputs than tokens."""
    return None if isinstance(words, _OfInputs) or count <= _largest(x) else words


def _largest(x: PyTree) -> int:
    """The largest number of integer inputs; -1 where there are none."""
    tokens = [np.asarray(a) for a in jax.tree.leaves(x)]
    numbers = [a for a in tokens if np.issubdtype(a.dtype, np.integer)]
    return max((int(a.max(initial=0)) for a in numbers), default=-1)


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
