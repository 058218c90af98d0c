"""Which leaves are no matrices for the activations: embeddings, position tables, biases of heads.

The function's jaxpr is read once. What is made of weights alone carries their names; where it meets
activations, the operation tells what the weights are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jaxtyping import PyTree

from apd_jax.components.layout import inner_jaxprs, path_name

# Of a value: the leaves that it is made of, where it is made of nothing else; None: of activations.
Made = frozenset[str] | None
_ADDS = ("add", "add_any", "sub", "concatenate")
_PICKS = ("dynamic_slice", "gather", "cond")  # what picks may depend on activations


def find(apply_fn: Callable, params: PyTree, x: PyTree) -> frozenset[str]:
    """Dotted paths of the leaves that are looked up, or only ever added to activations.

    Looked up are rows, each one vector, by indices that the inputs tell: an embedding, even if its
    transpose is the unembedding too. Rows that are matrices (experts chosen by index) are weights.
    A leaf that is added, and enters no other operation with activations, is a position table, a
    token in front of the others, or a bias.

    Cost: one trace; nothing is computed, and x may be abstract.
    """
    closed = jax.make_jaxpr(apply_fn)(params, x)
    names = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    seen = _Seen(set(), set(), set())
    inputs: list[Made] = [frozenset({name}) for name in names]
    inputs += [None] * (len(closed.jaxpr.invars) - len(names))
    seen.run(closed.jaxpr, inputs)
    return frozenset(seen.looked_up | (seen.added - seen.weights))


class _Seen:
    """The leaves by what they are where they meet activations."""

    def __init__(self, looked_up: set[str], added: set[str], weights: set[str]):
        self.looked_up, self.added, self.weights = looked_up, added, weights

    def run(self, jaxpr: Jaxpr, inputs: Sequence[Made]) -> list[Made]:
        env: dict[Any, Made] = dict(zip(jaxpr.invars, inputs, strict=True))

        def read(var: Any) -> Made:
            return frozenset() if isinstance(var, Literal) else env.get(var, frozenset())

        for eqn in jaxpr.eqns:
            env |= zip(eqn.outvars, self._made(eqn, [read(v) for v in eqn.invars]), strict=True)
        return [read(v) for v in jaxpr.outvars]

    def _made(self, eqn: JaxprEqn, made: list[Made]) -> list[Made]:
        name, count = eqn.primitive.name, len(eqn.outvars)
        if not any(made):  # no weights alone
            return [_together(made)] * count
        if name == "gather" and made[1] is None and made[0] and _rows_are_vectors(eqn):
            self.looked_up |= made[0]
            return [None]
        if name in ("scan", "while"):
            return self._loop(eqn, made)
        if inner := list(inner_jaxprs(eqn, made)):
            found = [self.run(jaxpr, operands) for jaxpr, operands in inner]
            return [_together(outs) for outs in zip(*found, strict=True)]
        if name in _PICKS:
            return [made[0]] * count
        if None in made:
            into = self.added if name in _ADDS else self.weights
            into |= frozenset().union(*filter(None, made))
        return [_together(made)] * count

    def _loop(self, eqn: JaxprEqn, made: list[Made]) -> list[Made]:
        """What a loop carries is what it begins with and what a step makes of it."""
        p = eqn.params
        if eqn.primitive.name == "scan":
            body, first = p["jaxpr"].jaxpr, p["num_consts"]
            count = p["num_carry"]
        else:
            made, body = made[p["cond_nconsts"] :], p["body_jaxpr"].jaxpr
            first = p["body_nconsts"]
            count = len(made) - first
        while True:
            outs = self.run(body, made)
            pairs = zip(made[first : first + count], outs[:count], strict=True)
            carried = [_together(pair) for pair in pairs]
            if carried == made[first : first + count]:
                return [*carried, *outs[count:]]
            made = [*made[:first], *carried, *made[first + count :]]


def _together(made: Sequence[Made]) -> Made:
    return None if None in made else frozenset().union(*filter(None, made))


def _rows_are_vectors(eqn: JaxprEqn) -> bool:
    """Whether a gather takes several rows, of one axis each."""
    numbers = eqn.params["dimension_numbers"]
    operand, indices = (getattr(v.aval, "shape", ()) for v in eqn.invars[:2])
    kept = len(operand) - len(numbers.start_index_map) - len(numbers.operand_batching_dims)
    return len(indices) > 1 and kept == 1
