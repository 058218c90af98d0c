"""Intervals that hold a network's outputs under every permitted mask.

A permitted mask is m_c in [g_c, 1], with g_c the gate's value (1 for an active component and 0 for
an inactive one where the gate has no degrees), so every entry of a weight lies in
    Σ_c g_c P_c + (1 - g_c) [min(P_c, 0), max(P_c, 0)].
The operations of the network's jaxpr are bounded one by one. What ties two intervals together (a
weight used twice, one factor in many entries) is forgotten, so the bound is wide but safe, up to
float rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal
from jaxtyping import Array, Float

from apd_jax import components as components_lib
from apd_jax.evidence.subject import Subject
from apd_jax.network.outputs import split_result


class UnboundedError(Exception):
    """The network has something that intervals are not known for; the message says what."""


class Interval(NamedTuple):
    """All values between lo and hi, entry by entry."""

    lo: Any
    hi: Any


# Operations that only place numbers elsewhere, or rise with each of their arguments: their bounds
# are those of the ends.
_INCREASING = {
    *(
        "add",
        "add_any",
        "max",
        "min",
        "exp",
        "tanh",
        "logistic",
        "erf",
        "reduce_sum",
        "reduce_max",
        "reduce_min",
        "cumsum",
    ),
    *(
        "reshape",
        "transpose",
        "broadcast_in_dim",
        "squeeze",
        "convert_element_type",
        "copy",
        "slice",
        "concatenate",
        "rev",
        "select_n",
    ),
}
_CALLS = ("jaxpr", "call_jaxpr")  # where an operation keeps its inner jaxpr


def error_bound(subject: Subject, count: int) -> Float[Array, " n"]:
    """The largest error that any permitted mask may cause, for each of the first `count` examples.

    mse: from the end of every output's interval that is farther from the target.
    kl: Σ_v p_v (log p_v - lo_v) + log Σ_v exp(hi_v).

    Raises:
      UnboundedError: masks per position, or an operation without a rule on something that depends
        on the components.
    Cost: count · (C·|θ| + a few forward passes).
    """
    lo, hi = output_bounds(subject, count)
    target = subject.target_out[:count]
    if subject.setting.method.distance == "kl":
        log_p = jax.nn.log_softmax(target)
        each = jnp.sum(jnp.exp(log_p) * (log_p - lo), axis=-1) + jax.nn.logsumexp(hi, axis=-1)
    elif callable(subject.setting.method.distance):
        raise UnboundedError("there is no bound for a loss that is a function of its own.")
    else:
        each = jnp.maximum((hi - target) ** 2, (lo - target) ** 2)
    return jnp.mean(each.reshape(count, -1), axis=1)


def output_bounds(subject: Subject, count: int) -> Interval:
    """Lowest and highest outputs [count, ...] of the first examples under all permitted masks.

    Raises and cost as in `error_bound`.
    """
    if subject.mask.ndim != 2:
        raise UnboundedError("intervals are worked out for masks per example, not per position")
    apply_fn = subject.setting.problem.apply_fn
    factors = components_lib.aligned(subject.components).factors
    weights = {name: f.weights for name, f in factors.items()}

    def one(values, x):
        active = values.astype(jnp.float32)
        between = {
            name: Interval(
                *(
                    jnp.tensordot(active, P, 1) + jnp.tensordot(1 - active, end(P, 0), 1)
                    for end in (jnp.minimum, jnp.maximum)
                )
            )
            for name, P in weights.items()
        }
        batch = jax.tree.map(lambda a: a[None], x)
        jaxpr, shape = jax.make_jaxpr(apply_fn, return_shape=True)(subject.params, batch)
        args = jax.tree.leaves(
            (components_lib.replace_leaves(subject.params, between), batch),
            is_leaf=lambda a: isinstance(a, Interval),
        )
        found = _evaluate(jaxpr, args)
        result = jax.tree.unflatten(jax.tree.structure(shape), [_Held(a) for a in found])
        out = split_result(result)[0].value
        return tuple(end[0] for end in _ends(out))

    bounded = jax.jit(jax.vmap(one))(
        *jax.tree.map(lambda a: a[:count], (subject.values, subject.x))
    )
    return Interval(*bounded)


class _Held:
    """One leaf, whatever it is made of."""

    def __init__(self, value: Any):
        self.value = value


def _evaluate(closed: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """The outputs of a jaxpr, some of whose inputs are intervals."""
    env = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True)) | dict(
        zip(closed.jaxpr.invars, args, strict=True)
    )

    def read(v):
        return v.val if isinstance(v, Literal) else env[v]

    for eqn in closed.jaxpr.eqns:
        values = [read(v) for v in eqn.invars]
        inner = next(
            (eqn.params[name] for name in _CALLS if isinstance(eqn.params.get(name), ClosedJaxpr)),
            None,
        )
        name, bind = eqn.primitive.name, functools.partial(eqn.primitive.bind, **eqn.params)
        if (
            inner is not None
            and name not in ("scan", "while")
            and len(inner.jaxpr.invars) == len(values)
        ):
            out = _evaluate(inner, values)
        elif not any(isinstance(v, Interval) for v in values):
            out = bind(*values)
        elif name in _RULES:
            out = _RULES[name](bind, *values, **eqn.params)
        elif name in _INCREASING and not (name == "select_n" and isinstance(values[0], Interval)):
            out = Interval(
                bind(*(_ends(v)[0] for v in values)), bind(*(_ends(v)[1] for v in values))
            )
        else:
            raise UnboundedError(f"no interval rule for the operation {name!r}")
        env |= dict(zip(eqn.outvars, out if eqn.primitive.multiple_results else [out], strict=True))
    return [read(v) for v in closed.jaxpr.outvars]


def _ends(value: Any) -> tuple[Any, Any]:
    return (value.lo, value.hi) if isinstance(value, Interval) else (value, value)


def _product(bind: Callable, a: Any, b: Any, **_: Any) -> Interval:
    """Entry by entry: the extremes are among the four products of the ends."""
    products = jnp.stack([bind(x, y) for x in _ends(a) for y in _ends(b)])
    return Interval(jnp.min(products, axis=0), jnp.max(products, axis=0))


def _matrix_product(bind: Callable, a: Any, b: Any, **_: Any) -> Interval:
    """By middle and radius (Rump): m_a m_b ± (|m_a| r_b + r_a |m_b| + r_a r_b).

    Exact if one side is a point.
    """
    (middle_a, radius_a), (middle_b, radius_b) = (
        ((hi + lo) / 2, (hi - lo) / 2) for lo, hi in map(_ends, (a, b))
    )
    middle = bind(middle_a, middle_b)
    radius = bind(jnp.abs(middle_a), radius_b) + bind(radius_a, jnp.abs(middle_b) + radius_b)
    return Interval(middle - radius, middle + radius)


def _quotient(bind: Callable, a: Any, b: Any, **_: Any) -> Interval:
    if isinstance(b, Interval):
        raise UnboundedError(
            "no interval rule for division by something that depends on the components"
        )
    ends = [bind(x, b) for x in _ends(a)]
    return Interval(jnp.minimum(*ends), jnp.maximum(*ends))


def _power(bind: Callable, a: Interval, *, y: int = 2, **_: Any) -> Interval:
    """A whole power: rising if odd, with its least value at 0 if even and above 0."""
    if y < 0:
        raise UnboundedError(f"no interval rule for the power {y}")
    lo, hi = bind(a.lo), bind(a.hi)
    if y % 2:
        return Interval(lo, hi)
    inside = (a.lo <= 0) & (a.hi >= 0)
    return Interval(
        jnp.where(inside, bind(jnp.zeros_like(a.lo)), jnp.minimum(lo, hi)), jnp.maximum(lo, hi)
    )


_RULES: dict[str, Callable[..., Interval]] = {
    "neg": lambda bind, a, **_: Interval(bind(a.hi), bind(a.lo)),
    "sub": lambda bind, a, b, **_: Interval(
        bind(_ends(a)[0], _ends(b)[1]), bind(_ends(a)[1], _ends(b)[0])
    ),
    "mul": _product,
    "dot_general": _matrix_product,
    "div": _quotient,
    "integer_pow": _power,
    "square": _power,
}
