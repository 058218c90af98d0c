"""What a function is made of: its primitives, and the functions inside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, SupportsIndex

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

CUSTOM_VJP = ("custom_vjp_call", "custom_vjp_call_jaxpr")  # they have no forward-mode derivative


def uses_primitive(fn: Callable, *args: Any, names: tuple[str, ...] = CUSTOM_VJP) -> bool:
    """Whether fn(*args) has one of these primitives, in its inner functions too.

    Cost: one trace; nothing is computed, and args may be abstract.
    """
    return _uses(jax.make_jaxpr(fn)(*args).jaxpr, frozenset(names))


def _uses(jaxpr: Jaxpr, names: frozenset[str]) -> bool:
    return any(
        eqn.primitive.name in names or any(_uses(inner, names) for inner in all_inner(eqn))
        for eqn in jaxpr.eqns
    )


def all_inner(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """Every jaxpr among an equation's parameters."""
    return (jaxpr for jaxpr, _ in _functions(eqn))


def called(eqn: JaxprEqn) -> tuple[Jaxpr, Sequence[Any]] | None:
    """The one inner function, with its constants, that maps the operands to the results, if any.

    There is one for jit, checkpoint and functions with derivatives of their own; not for loops and
    branches.
    """
    if eqn.primitive.name in ("scan", "while", "cond"):
        return None
    fits = (len(eqn.invars), len(eqn.outvars))
    found = [
        pair for pair in _functions(eqn) if (len(pair[0].invars), len(pair[0].outvars)) == fits
    ]
    return found[0] if found else None


def ints(axes: Iterable[SupportsIndex]) -> tuple[int, ...]:
    """An operation's axes as plain numbers: some are numpy's."""
    return tuple(int(axis) for axis in axes)


def _functions(eqn: JaxprEqn) -> Iterator[tuple[Jaxpr, Sequence[Any]]]:
    for leaf in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
        if isinstance(leaf, ClosedJaxpr):
            yield leaf.jaxpr, leaf.consts
        elif isinstance(leaf, Jaxpr):
            yield leaf, ()


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, (Jaxpr, ClosedJaxpr))
