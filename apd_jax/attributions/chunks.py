"""Many small computations at once, in chunks that fit into memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import Jaxpr
from jaxtyping import Array, PyTree

from apd_jax.forward.primitives import all_inner

# What the largest array of one chunk of tangents or Jacobians may hold. A CPU is fastest when it
# stays in cache (TMS 40-10, batch 2048: a step takes 5.8 ms of processor time with 4 MiB, 8.0 ms
# with 16), an accelerator when it is busy.
CHUNK_BYTES = {"cpu": 4 * 2**20}
CHUNK_BYTES_ELSEWHERE = 512 * 2**20


def chunked(fn: Callable, xs: PyTree, length: int, bytes_each: int) -> Array:
    """`vmap(fn)(xs)` in chunks of bounded size.

    They are of equal size if the length has a divisor near, else the last is shorter.
    """
    most = CHUNK_BYTES.get(jax.default_backend(), CHUNK_BYTES_ELSEWHERE)
    fitting = max(1, most // bytes_each)
    if fitting >= length:
        return jax.vmap(fn)(xs)
    divisor = max(d for d in range(1, fitting + 1) if length % d == 0)
    return jax.lax.map(fn, xs, batch_size=divisor if 2 * divisor > fitting else fitting)


def largest_array(fn: Callable, *args: Any) -> int:
    """Bytes of the largest array that one evaluation of `fn` makes, constants aside."""
    return max(_sizes(jax.make_jaxpr(fn)(*args).jaxpr), default=1)


def _sizes(jaxpr: Jaxpr) -> Iterator[int]:
    """Of the results of all equations, inner jaxprs included."""
    for eqn in jaxpr.eqns:
        for v in eqn.outvars:
            aval: Any = v.aval
            if hasattr(aval, "shape"):
                yield math.prod(aval.shape) * aval.dtype.itemsize
        for inner in all_inner(eqn):
            yield from _sizes(inner)
