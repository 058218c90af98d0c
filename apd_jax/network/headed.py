"""Networks whose wide outputs are scored in chunks of positions, so that all never exist at once.

Shapes: B examples, T positions, D the width before the head, V that of the outputs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float, PyTree

from apd_jax.network.outputs import split_result

WIDE = 8192  # outputs beyond so many are scored in chunks ...
CHUNK = 2**22  # ... of so many entries

Head = Callable[[Any], Any]  # [..., D] -> [..., V]


@dataclasses.dataclass(frozen=True)
class Headed:
    """A network whose outputs are head(params, body(params, x)): an `apply_fn` like any other.

    Where V is large, the distances "kl", "mse" and "next_token" of training and of the evaluation
    of language models keep what the head reads, and form outputs in chunks.

    body: (params, x) -> [B, T, D], or ([B, T, D], hidden activations).
    head: (params, [..., D]) -> [..., V], each position by itself, whatever the axes before.
    """

    body: Callable
    head: Callable

    def __call__(self, params: PyTree, x: PyTree) -> Any:
        result = self.body(params, x)
        out, hidden = split_result(result)
        out = self.head(params, out)
        return (out, hidden) if isinstance(result, tuple) else out


def by_rows(
    head: Head, score: Callable[[Any, Any], Any], rows: Float[Array, "*n D"], others: Array
) -> Float[Array, "*n"]:
    """score(head(row), other) of every row, in chunks of CHUNK outputs.

    Args:
      score: ([V], [...]) -> a number.
      others: [*n, ...]; no gradient flows into them.
    Cost: head and score, with their derivative by the row where a gradient is asked for, which is
      kept, [*n, D]. What head and score close over has no derivative here; JAX refuses to take one.
    """
    width = jax.eval_shape(head, jax.ShapeDtypeStruct(rows.shape[-1:], rows.dtype)).shape[-1]

    def one(row: Array, other: Array) -> Array:
        return score(head(row), other)

    def over(fn: Callable) -> Callable:
        size = max(1, CHUNK // width)
        return lambda *arrays: lax.map(lambda pair: fn(*pair), arrays, batch_size=size)

    run = jax.custom_vjp(over(one))
    run.defvjp(over(jax.value_and_grad(one)), lambda slopes, ct: (slopes * ct[:, None], None))
    lead = rows.shape[:-1]
    flat = [a.reshape(math.prod(lead), *a.shape[len(lead) :]) for a in (rows, others)]
    return run(*flat).reshape(lead)
