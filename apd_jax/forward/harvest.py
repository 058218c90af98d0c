"""Runs a function and hands out chosen activations beside its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from apd_jax.forward import interpret
from apd_jax.forward.positions import Scope
from apd_jax.forward.primitives import called

Seen = dict[int, jax.Array]  # by key


@dataclasses.dataclass
class Watch:
    """Which variables of a jaxpr are handed out, by key, and those of inner ones by equation."""

    here: dict[int, Any] = dataclasses.field(default_factory=dict)
    inner: dict[int, Watch] = dataclasses.field(default_factory=dict)


def harvest(
    jaxpr: Jaxpr,
    consts: Sequence[Any],
    args: Sequence[Any],
    watch: Watch,
    scope: Scope | None = None,
) -> tuple[list[Any], Seen]:
    """The outputs of a jaxpr, and what is watched: of a loop's body, stacked over its steps.

    Arguments may be Kappas; scope: which axes carry positions, where their weights differ there.
    """
    env: dict[Any, Any] = dict(
        zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True)
    )
    seen: Seen = {}

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else env[v]

    for i, eqn in enumerate(jaxpr.eqns):
        values = [read(v) for v in eqn.invars]
        if i in watch.inner:
            outs, found = _inner(eqn, values, watch.inner[i], scope, i)
            seen |= found
        else:
            outs = interpret.outputs(eqn, values, scope, i)
        env.update(zip(eqn.outvars, outs, strict=True))
    seen |= {key: read(v) for key, v in watch.here.items()}
    return [read(v) for v in jaxpr.outvars], seen


def _inner(
    eqn: JaxprEqn, values: list[Any], watch: Watch, scope: Scope | None, i: int
) -> tuple[Sequence[Any], Seen]:
    within = None if scope is None else scope.inner[i][0]
    if eqn.primitive.name == "scan":
        return _scan(values, watch, within, **eqn.params)
    function = called(eqn)
    assert function is not None
    outs, seen = harvest(*function, values, watch, within)
    if eqn.primitive.name in ("jit", "pjit", "closed_call"):
        return outs, seen
    # What has a derivative of its own, or is recomputed, keeps that: the compiler merges the two.
    return interpret.outputs(eqn, values, scope, i), seen


def _scan(
    values: list[Any],
    watch: Watch,
    scope: Scope | None,
    *,
    jaxpr: Any,
    length: int,
    reverse: bool,
    unroll: Any,
    num_consts: int,
    num_carry: int,
    **_: Any,
) -> tuple[list[Any], Seen]:
    fixed, start, stacked = interpret.of_scan(values, length, num_consts, num_carry)

    def body(carry: Any, x: Any) -> Any:
        args = [*fixed, *carry, *x]
        outs, seen = harvest(jaxpr.jaxpr, jaxpr.consts, args, watch, scope)
        outs = interpret.arrays(outs)
        return outs[:num_carry], (outs[num_carry:], seen)

    carry, (ys, seen) = lax.scan(
        body, start, stacked, length=length, reverse=reverse, unroll=unroll
    )
    return [*carry, *ys], seen
