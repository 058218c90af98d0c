"""Which axis carries the positions: followed from the inputs through every operation.

Two axes are linked where an operation lines them up entry by entry: those of operands and result
of an elementwise operation, an axis and its place after a transpose, the free axes of a product
(see `links`). An axis carries the T positions in order if it is linked, over any number of
operations, to axis 1 of an input [B, T, ...]. Links have no direction: the rows of an embedding of
positions, which are looked up by a plain count, are positions because they are added to tokens.

Shapes: B examples, T positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jaxtyping import Array, Float, PyTree

from apd_jax.errors import InputError
from apd_jax.forward.links import links, shape_of
from apd_jax.forward.primitives import called

Node = tuple[int, Any, int]  # a scope, one of its variables, an axis


class _Classes:
    """Sets of linked axes, as a union-find structure."""

    def __init__(self) -> None:
        self.parent: dict[Node, Node] = {}
        self.num_scopes = 0

    def find(self, node: Node) -> Node:
        root = node
        while (above := self.parent.get(root, root)) != root:
            root = above
        while node != root:
            self.parent[node], node = root, self.parent[node]
        return root

    def link(self, a: Node, b: Node) -> None:
        a, b = self.find(a), self.find(b)
        if a != b:
            self.parent[a] = b


@dataclasses.dataclass
class Scope:
    """The variables of one jaxpr, at one place where it is called. inner: by equation."""

    classes: _Classes
    number: int
    inner: dict[int, list[Scope]] = dataclasses.field(default_factory=dict)
    marked: set[Node] = dataclasses.field(default_factory=set)

    def axes(self, var: Any) -> frozenset[int]:
        """Which axes of a variable carry what was marked."""
        roots = {self.classes.find(node) for node in self.marked}
        return frozenset(
            axis
            for axis in range(0 if isinstance(var, Literal) else len(shape_of(var)))
            if self.classes.find((self.number, var, axis)) in roots
        )

    def entered(self) -> Scope:
        """A scope of its own for a jaxpr that is called here."""
        self.classes.num_scopes += 1
        return Scope(self.classes, self.classes.num_scopes, {}, self.marked)


def track(jaxpr: Jaxpr, starts: Sequence[Iterable[int]]) -> Scope:
    """The scope of a jaxpr of which these axes of each argument carry the positions.

    Cost: one walk over the jaxpr, without any array.
    """
    scope = Scope(_Classes(), 0)
    _walk(jaxpr, scope)
    for var, axes in zip(jaxpr.invars, starts, strict=True):
        scope.marked |= {(0, var, axis) for axis in axes}
    return scope


def of_inputs(leaves: Sequence[Any], num_positions: int) -> list[tuple[int, ...]]:
    """The axes of inputs [B, ...] that carry the positions: axis 1, where it has their number."""
    return [(1,) if leaf.shape[1:2] == (num_positions,) else () for leaf in leaves]


def of_outputs(apply_fn: Callable, params: PyTree, x: PyTree, num_positions: int) -> PyTree:
    """The axis of every output of apply_fn(params, x) that carries the positions.

    It is None where none or several axes do, or it is not known; so look at leaves with
    `is_leaf=lambda axis: axis is None`.

    Args:
      x: pytree of arrays with leading B, or of their shapes. The function is traced with one
        example, as the sparse pass runs it.
    Returns: pytree like the result of apply_fn.
    Cost: one trace; nothing is computed.
    """
    found = _axes_of_outputs(apply_fn, params, x, num_positions)
    return jax.tree.map(lambda axes: next(iter(axes)) if len(axes) == 1 else None, found)


def _axes_of_outputs(
    apply_fn: Callable, params: PyTree, x: PyTree, num_positions: int
) -> PyTree[frozenset[int]]:
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), x)
    closed, result = jax.make_jaxpr(apply_fn, return_shape=True)(params, one)
    num_params = len(jax.tree.leaves(params))
    starts = [()] * num_params + of_inputs(jax.tree.leaves(one), num_positions)
    scope = track(closed.jaxpr, starts)
    found = [scope.axes(var) for var in closed.jaxpr.outvars]
    return jax.tree.unflatten(jax.tree.structure(result), found)


def hidden_weights(
    apply_fn: Callable, params: PyTree, x: PyTree, weights: Float[Array, "B T"] | None
) -> dict[str, Array | None] | None:
    """The weights of positions, along the axes of every hidden activation that carry them.

    An activation with two such axes (an attention pattern) counts where both positions do; one
    without any counts whole.

    Returns: {name: weights with as many axes as the activation, or None}; None without weights.
    Raises:
      InputError: an axis has as many entries as there are positions, and cannot be followed.
    Cost: one trace, where there are weights.
    """
    if weights is None:
        return None
    B, T = weights.shape
    found = _axes_of_outputs(apply_fn, params, x, T)
    if not isinstance(found, tuple):
        return {}
    hidden = jax.eval_shape(apply_fn, params, x)[1]
    result: dict[str, Array | None] = {}
    for name, axes in found[1].items():
        shape = hidden[name].shape
        if not axes and T in shape[1:]:
            raise InputError(
                f"activation {name!r} of shape {shape} has an axis of {T} entries, as many as "
                "there are positions, that cannot be followed to them; leave it out of what "
                "apply_fn returns, or give no valid_fn."
            )
        product = None
        for axis in sorted(axes):
            along = weights.reshape(B, *(T if i == axis else 1 for i in range(1, len(shape))))
            product = along if product is None else product * along
        result[name] = None if product is None else jnp.broadcast_to(product, shape)
    return result


def _walk(jaxpr: Jaxpr, scope: Scope) -> None:
    for i, eqn in enumerate(jaxpr.eqns):
        name = eqn.primitive.name
        inner = called(eqn)
        if name in _INNER:
            _INNER[name](eqn, scope, i)
        elif inner is not None:
            _enter(scope, i, inner[0], eqn.invars, eqn.outvars)
        else:
            for k, a, j, b in links(eqn):
                _same(scope, eqn.invars[k], a, scope, eqn.outvars[j], b)


def _same(scope: Scope, x: Any, a: int, other: Scope, y: Any, b: int) -> None:
    """Links axis a of x with axis b of y, if they have one size and neither is a constant."""
    if isinstance(x, Literal) or isinstance(y, Literal) or shape_of(x)[a] != shape_of(y)[b]:
        return
    scope.classes.link((scope.number, x, a), (other.number, y, b))


def _all_axes(scope: Scope, xs: Iterable[Any], other: Scope, ys: Iterable[Any], cut: int = 0):
    """Links variables with variables, which have `cut` leading axes less."""
    for x, y in zip(xs, ys, strict=True):
        for axis in range(len(shape_of(y))):
            _same(scope, x, axis + cut, other, y, axis)


def _enter(scope: Scope, i: int, inner: Jaxpr, operands: Sequence[Any], results: Sequence[Any]):
    within = scope.entered()
    scope.inner.setdefault(i, []).append(within)
    _walk(inner, within)
    _all_axes(scope, operands, within, inner.invars)
    _all_axes(scope, results, within, inner.outvars)


def _scan(eqn: JaxprEqn, scope: Scope, i: int) -> None:
    body = eqn.params["jaxpr"].jaxpr
    num_consts, num_carry = eqn.params["num_consts"], eqn.params["num_carry"]
    first = num_consts + num_carry
    within = scope.entered()
    scope.inner[i] = [within]
    _walk(body, within)
    _all_axes(scope, eqn.invars[:first], within, body.invars[:first])
    _all_axes(scope, eqn.invars[num_consts:first], within, body.outvars[:num_carry])
    _all_axes(scope, eqn.outvars[:num_carry], within, body.outvars[:num_carry])
    stacked = [*eqn.invars[first:], *eqn.outvars[num_carry:]]
    _all_axes(scope, stacked, within, [*body.invars[first:], *body.outvars[num_carry:]], cut=1)
    for var in stacked[1:]:  # one step, one entry of all of them
        _same(scope, stacked[0], 0, scope, var, 0)


def _while(eqn: JaxprEqn, scope: Scope, i: int) -> None:
    n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry = eqn.invars[n + m :]
    go_on, body = (eqn.params[name].jaxpr for name in ("cond_jaxpr", "body_jaxpr"))
    for jaxpr, consts in ((go_on, eqn.invars[:n]), (body, eqn.invars[n : n + m])):
        within = scope.entered()
        scope.inner.setdefault(i, []).append(within)
        _walk(jaxpr, within)
        _all_axes(scope, [*consts, *carry], within, jaxpr.invars)
    _all_axes(scope, carry, within, body.outvars)
    _all_axes(scope, eqn.outvars, within, body.outvars)


def _cond(eqn: JaxprEqn, scope: Scope, i: int) -> None:
    for branch in eqn.params["branches"]:
        _enter(scope, i, branch.jaxpr, eqn.invars[1:], eqn.outvars)


_INNER = {"scan": _scan, "while": _while, "cond": _cond}
