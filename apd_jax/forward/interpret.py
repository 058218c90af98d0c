"""Runs a network, operation by operation, on values of which some are a `Kappa`.

An operation that `rules` knows is done on the factors; loops, branches and inner functions are
entered; before any other operation the Kappas that meet it are formed, there only. So every
function that JAX can trace can be run, its custom derivatives kept.

Where weights differ between positions, a `positions.Scope` goes along: it says of every variable
which axes carry them.
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
from apd_jax.forward.positions import Scope
from apd_jax.forward.rules import MEETINGS, VIEWS

Value = Any  # an array or a Kappa
Scopes = Callable[[int], Scope | None]  # of an operation's inner functions


def run(
    jaxpr: Jaxpr, consts: Sequence[Any], *args: Value, scope: Scope | None = None
) -> list[Value]:
    """The outputs of a jaxpr, which may be Kappas where it only looks at its arguments."""
    env: dict[Any, Value] = dict(
        zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True)
    )

    def read(v: Any) -> Value:
        return v.val if isinstance(v, Literal) else env[v]

    for i, eqn in enumerate(jaxpr.eqns):
        outs = outputs(eqn, [read(v) for v in eqn.invars], scope, i)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def arrays(values: Sequence[Value]) -> list[Any]:
    """The values with every Kappa formed."""
    return [value.materialise() if isinstance(value, Kappa) else value for value in values]


def outputs(eqn: JaxprEqn, values: list[Value], scope: Scope | None, i: int) -> Sequence[Value]:
    """The results of operation i of a jaxpr."""
    name, out = eqn.primitive.name, None
    if any(isinstance(value, Kappa) for value in values):
        if name in _INNER:
            return _INNER[name](_scopes(scope, i), *values, **eqn.params)
        if name in MEETINGS:
            positions = None if scope is None else [scope.axes(v) for v in eqn.invars]
            out = MEETINGS[name](positions, *values, **eqn.params)
        elif name in VIEWS:
            out = VIEWS[name](*values, **eqn.params)
    if out is None:
        out = eqn.primitive.bind(*arrays(values), **eqn.primitive.get_bind_params(eqn.params))
    return out if eqn.primitive.multiple_results else [out]


def _scopes(scope: Scope | None, i: int) -> Scopes:
    return lambda k: None if scope is None else scope.inner[i][k]


def _call(scopes: Scopes, *values: Value, jaxpr: Any, **_: Any) -> list[Value]:
    return run(jaxpr.jaxpr, jaxpr.consts, *values, scope=scopes(0))


def _checkpoint(
    scopes: Scopes, *values: Value, jaxpr: Jaxpr, prevent_cse: Any, policy: Any, **_: Any
) -> list[Value]:
    inner = functools.partial(run, jaxpr, (), scope=scopes(0))
    return jax.checkpoint(inner, policy=policy, prevent_cse=bool(np.any(prevent_cse)))(*values)


def _cond(scopes: Scopes, index: Array, *values: Value, branches: Any, **_: Any) -> list[Any]:
    def branch(i: int, closed: Any) -> Callable[[], list[Any]]:
        return lambda: arrays(run(closed.jaxpr, closed.consts, *values, scope=scopes(i)))

    return lax.switch(index, [branch(i, closed) for i, closed in enumerate(branches)])


def _while(
    scopes: Scopes,
    *values: Value,
    cond_jaxpr: Any,
    body_jaxpr: Any,
    cond_nconsts: int,
    body_nconsts: int,
) -> list[Any]:
    fixed = [
        value.before_loop(1) if isinstance(value, Kappa) else value
        for value in values[: cond_nconsts + body_nconsts]
    ]
    go_on, body = (
        functools.partial(run, closed.jaxpr, closed.consts, scope=scopes(i))
        for i, closed in enumerate((cond_jaxpr, body_jaxpr))
    )
    return lax.while_loop(
        lambda state: arrays(go_on(*fixed[:cond_nconsts], *state))[0],
        lambda state: arrays(body(*fixed[cond_nconsts:], *state)),
        arrays(values[cond_nconsts + body_nconsts :]),
    )


def _scan(
    scopes: Scopes,
    *values: Value,
    jaxpr: Any,
    length: int,
    reverse: bool,
    unroll: Any,
    num_consts: int,
    num_carry: int,
    **_: Any,
) -> list[Any]:
    fixed, start, stacked = of_scan(values, length, num_consts, num_carry)

    def body(carry, x):
        outs = arrays(run(jaxpr.jaxpr, jaxpr.consts, *fixed, *carry, *x, scope=scopes(0)))
        return outs[:num_carry], outs[num_carry:]

    carry, ys = lax.scan(body, start, stacked, length=length, reverse=reverse, unroll=unroll)
    return [*carry, *ys]


def of_scan(
    values: Sequence[Value], length: int, num_consts: int, num_carry: int
) -> tuple[list[Value], list[Any], list[Value]]:
    """What all steps of a scan share, what it starts with, and what it goes through.

    Weights that all steps share are formed before the loop where it pays. Stacked ones are sliced
    as they are.
    """
    first = num_consts + num_carry
    fixed = [
        value.before_loop(length) if isinstance(value, Kappa) else value
        for value in values[:num_consts]
    ]
    stacked = [
        value.materialise() if isinstance(value, Kappa) and value.current[0] != "b" else value
        for value in values[first:]
    ]
    return fixed, arrays(values[num_consts:first]), stacked


_INNER = {
    **dict.fromkeys(("jit", "pjit", "closed_call"), _call),
    **dict.fromkeys(("checkpoint", "remat", "remat2"), _checkpoint),
    "cond": _cond,
    "while": _while,
    "scan": _scan,
}
