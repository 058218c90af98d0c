"""The least time that a step can take, computed from the shapes in its traced program.

Operations are counted in the jaxpr, before XLA compiles it. XLA may still share or leave out work,
so the bound holds for the program as traced, not for every program with the same result. XLA's own
cost analysis is not used: it counts a loop's body once and misses the products in library calls.

  matmul       2·M·N·K of every dot_general, times the lengths of the loops around it
  memory       8 passes over the components in float32: components, gradient and Adam's two moments
               are each read and written once
  elementwise  one operation per entry of the result of arithmetic, a comparison or a selection;
               RANDOM_OPS per random word
  dispatch     one step of a scan with nothing to do

Loops of unknown length: the search for the mask's threshold counts PASSES times. The others (the
further rounds of the dispatch, which hardly ever run) do not count.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from common import Peaks, fastest, looped_s
from jax.extend.core import ClosedJaxpr, Jaxpr

PASSES = 20  # of a batch top-k over scores without ties
# Per word of Threefry-2x32. Two words take 20 rounds of an addition, a rotation (3 operations) and
# an xor, and the key schedule.
RANDOM_OPS = 55
_NAMES = """add add_any sub mul div max min neg abs sign square sqrt rsqrt pow integer_pow exp log
  tanh logistic erf select_n eq ne lt le gt ge and or xor not convert_element_type"""
ELEMENTWISE = frozenset(_NAMES.split())


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every equation and how often it runs, inner programs included."""
    for eqn in jaxpr.eqns:
        params = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_program)
        inner = [getattr(p, "jaxpr", p) for p in params if _is_program(p)]
        length = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        if eqn.primitive.name == "while":  # the search carries its thresholds as uint32
            is_search = any(getattr(v.aval, "dtype", None) == jnp.uint32 for v in eqn.outvars)
            length = PASSES if is_search else 0
        for program in inner:
            yield from equations(program, times * length)
        if not inner:
            yield eqn, times


def _is_program(param: Any) -> bool:
    return isinstance(param, Jaxpr | ClosedJaxpr)


def dot_flops(eqn: Any) -> int:
    """2·M·N·K of a dot_general."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    summed = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    return 2 * math.prod(eqn.outvars[0].aval.shape) * summed


def count(fn: Callable, *args: Any, axis_env: Any = None) -> dict[str, Any]:
    """Operations of one call.

    Returns:
      {"flops", "elementwise_ops", "dots": {(lhs shape, rhs shape, dimension numbers): times}}.
    """
    dots: Counter = Counter()
    flops = ops = 0
    jaxpr = jax.make_jaxpr(fn, axis_env=axis_env)(*args)
    for eqn, times in equations(jaxpr.jaxpr):
        size = sum(math.prod(v.aval.shape) for v in eqn.outvars if hasattr(v.aval, "shape"))
        if eqn.primitive.name == "dot_general":
            flops += times * dot_flops(eqn)
            dots[(*(v.aval.shape for v in eqn.invars), eqn.params["dimension_numbers"])] += times
        elif eqn.primitive.name in ("random_bits", "threefry2x32"):
            ops += times * size * RANDOM_OPS
        elif eqn.primitive.name in ELEMENTWISE:
            ops += times * size
    return {"flops": flops, "elementwise_ops": ops, "dots": dots}


def dots_ms(dots: Counter, share: float = 0.9) -> float:
    """ms of these products, run one by one at their own shapes.

    The largest are timed, until they make up `share` of the operations. The rest are assumed to
    run at the same speed.
    """

    def flops(dot):
        lhs, rhs, ((contracted, _), (batch, _)) = dot
        summed, repeated = (math.prod(lhs[i] for i in axes) for axes in (contracted, batch))
        out = math.prod(lhs) * math.prod(rhs) // summed**2 // repeated
        return 2 * out * summed * dots[dot]

    total, done, seconds = sum(map(flops, dots)), 0, 0.0
    for dot in sorted(dots, key=flops, reverse=True):
        if done >= share * total:
            break
        lhs, rhs, numbers = dot

        def product(a, b, numbers=numbers):
            return jax.lax.dot_general(a, b, numbers)

        def body(out, i, fixed, product=product):
            # The smaller factor depends on the last product, so XLA cannot leave one out.
            a, b = fixed
            nudge = 1 + 1e-30 * out.reshape(-1)[0]
            return product(a * nudge, b) if a.size < b.size else product(a, b * nudge)

        a, b = jnp.ones(lhs), jnp.ones(rhs)
        out = jnp.zeros(jax.eval_shape(product, a, b).shape)
        steps = max(2, min(50, int(2e9 * dots[dot] / max(flops(dot), 1))))
        seconds += dots[dot] * looped_s(body, out, (a, b), steps, lambda call: fastest(call, 3))
        done += flops(dot)
    return 1e3 * seconds * total / max(done, 1)


def bound(counts: dict[str, Any], num_component_params: int, peaks: Peaks) -> dict[str, Any]:
    """ms that each resource takes at its peak, their sum, and which of them is the largest.

    They are summed because on a CPU XLA runs one operation after another.
    """
    memory = 8 * 4 * num_component_params
    parts = {
        "matmul": counts["flops"] / peaks.matmul_gflops / 1e6,
        "memory": memory / peaks.memory_gb_s / 1e6,
        "elementwise": counts["elementwise_ops"] / peaks.elementwise_gops / 1e6,
        "dispatch": peaks.dispatch_us / 1e3,
    }
    return {
        "gflop": counts["flops"] / 1e9,
        "least_mb": memory / 1e6,
        "elementwise_mop": counts["elementwise_ops"] / 1e6,
        "bound_parts_ms": parts,
        "bound_ms": sum(parts.values()),
        "binds": max(parts, key=lambda part: parts[part]),
    }
