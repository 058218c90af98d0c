"""Runs a network, operation by operation, on values of which some are a `factored.Kappa`.

An operation that `factored_rules` knows is done on the factors; loops, branches and inner functions are entered; before any other
operation the Kappas that meet it are formed, there only. So every function that JAX can trace can be run, its custom derivatives kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jaxtyping import Array

from apd_jax.forward.kappa import Kappa
from apd_jax.forward.rules import RULES

Value = Any  # an array or a Kappa


def run(jaxpr: Jaxpr, consts: Sequence[Any], *args: Value) -> list[Value]:
    """The outputs of a jaxpr, which may be Kappas where it only looks at its arguments."""
    env: dict[Any, Value] = dict(
        zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True)
    )

    def read(v: Any) -> Value:
        return v.val if isinstance(v, Literal) else env[v]

    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, _outputs(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in jaxpr.outvars]


def arrays(values: Sequence[Value]) -> list[Any]:
    """The values with every Kappa formed."""
    return [value.materialise() if isinstance(value, Kappa) else value for value in values]


def _outputs(eqn: JaxprEqn, values: list[Value]) -> Sequence[Value]:
    if any(isinstance(value, Kappa) for value in values):
        if eqn.primitive.name in _INNER:
            return _INNER[eqn.primitive.name](*values, **eqn.params)
        rule = RULES.get(eqn.primitive.name)
        out = None if rule is None else rule(*values, **eqn.params)
        if out is not None:
            return out if eqn.primitive.multiple_results else [out]
    out = eqn.primitive.bind(*arrays(values), **eqn.primitive.get_bind_params(eqn.params))
    return out if eqn.primitive.multiple_results else [out]


def _call(*values: Value, jaxpr: Any, **_: Any) -> list[Value]:
    return run(jaxpr.jaxpr, jaxpr.consts, *values)


def _checkpoint(
    *values: Value, jaxpr: Jaxpr, prevent_cse: Any, policy: Any, **_: Any
) -> list[Value]:
    return jax.checkpoint(
        functools.partial(run, jaxpr, ()), policy=policy, prevent_cse=bool(np.any(prevent_cse))
    )(*values)


def _cond(index: Array, *values: Value, branches: Any, **_: Any) -> list[Any]:
    def branch(closed: Any) -> Callable[[], list[Any]]:
        return lambda: arrays(run(closed.jaxpr, closed.consts, *values))

    return lax.switch(index, [branch(closed) for closed in branches])


def _while(
    *values: Value, cond_jaxpr: Any, body_jaxpr: Any, cond_nconsts: int, body_nconsts: int
) -> list[Any]:
    fixed = [
        value.before_loop(1) if isinstance(value, Kappa) else value
        for value in values[: cond_nconsts + body_nconsts]
    ]
    go_on, body = (
        functools.partial(run, closed.jaxpr, closed.consts) for closed in (cond_jaxpr, body_jaxpr)
    )
    return lax.while_loop(
        lambda state: arrays(go_on(*fixed[:cond_nconsts], *state))[0],
        lambda state: arrays(body(*fixed[cond_nconsts:], *state)),
        arrays(values[cond_nconsts + body_nconsts :]),
    )


def _scan(
    *values: Value,
    jaxpr: Any,
    length: int,
    reverse: bool,
    unroll: Any,
    num_consts: int,
    num_carry: int,
    **_: Any,
) -> list[Any]:
    """Weights that all steps share are formed before the loop where it pays; stacked ones are sliced as they are."""
    fixed = [
        value.before_loop(length) if isinstance(value, Kappa) else value
        for value in values[:num_consts]
    ]
    stacked = [
        value.materialise() if isinstance(value, Kappa) and value.current[0] != "b" else value
        for value in values[num_consts + num_carry :]
    ]

    def body(carry, x):
        outs = arrays(run(jaxpr.jaxpr, jaxpr.consts, *fixed, *carry, *x))
        return outs[:num_carry], outs[num_carry:]

    start = arrays(values[num_consts : num_consts + num_carry])
    carry, ys = lax.scan(body, start, stacked, length=length, reverse=reverse, unroll=unroll)
    return [*carry, *ys]


_INNER = {
    **dict.fromkeys(("jit", "pjit", "closed_call"), _call),
    **dict.fromkeys(("checkpoint", "remat", "remat2"), _checkpoint),
    "cond": _cond,
    "while": _while,
    "scan": _scan,
}
