"""Runs a function and hands out chosen activations beside its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from apd_jax.forward.primitives import called

Seen = dict[int, jax.Array]  # by key


@dataclasses.dataclass
class Watch:
    """Which variables of a jaxpr are handed out, by key, and those of inner ones by equation."""

    here: dict[int, Any] = dataclasses.field(default_factory=dict)
    inner: dict[int, Watch] = dataclasses.field(default_factory=dict)


def harvest(
    jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], watch: Watch
) -> tuple[list[Any], Seen]:
    """The outputs of a jaxpr, and what is watched: of a loop's body, stacked over its steps."""
    env: dict[Any, Any] = dict(
        zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True)
    )
    seen: Seen = {}

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else env[v]

    for i, eqn in enumerate(jaxpr.eqns):
        values = [read(v) for v in eqn.invars]
        if i in watch.inner:
            outs, found = _inner(eqn, values, watch.inner[i])
            seen |= found
        else:
            outs = _bound(eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))
    seen |= {key: read(v) for key, v in watch.here.items()}
    return [read(v) for v in jaxpr.outvars], seen


def _bound(eqn: JaxprEqn, values: Sequence[Any]) -> Sequence[Any]:
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return out if eqn.primitive.multiple_results else [out]


def _inner(eqn: JaxprEqn, values: list[Any], watch: Watch) -> tuple[Sequence[Any], Seen]:
    if eqn.primitive.name == "scan":
        return _scan(values, watch, **eqn.params)
    function = called(eqn)
    assert function is not None
    outs, seen = harvest(*function, values, watch)
    if eqn.primitive.name in ("jit", "pjit", "closed_call"):
        return outs, seen
    # What has a derivative of its own, or is recomputed, keeps that: the compiler merges the two.
    return _bound(eqn, values), seen


def _scan(
    values: list[Any],
    watch: Watch,
    *,
    jaxpr: Any,
    length: int,
    reverse: bool,
    unroll: Any,
    num_consts: int,
    num_carry: int,
    **_: Any,
) -> tuple[list[Any], Seen]:
    fixed, first = values[:num_consts], num_consts + num_carry

    def body(carry: Any, x: Any) -> Any:
        outs, seen = harvest(jaxpr.jaxpr, jaxpr.consts, [*fixed, *carry, *x], watch)
        return outs[:num_carry], (outs[num_carry:], seen)

    start, stacked = values[num_consts:first], values[first:]
    carry, (ys, seen) = lax.scan(
        body, start, stacked, length=length, reverse=reverse, unroll=unroll
    )
    return [*carry, *ys], seen
