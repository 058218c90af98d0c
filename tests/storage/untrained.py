"""Small networks in containers of every kind, with decompositions that were never trained."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from conftest import make_method

from apd_jax import components as components_lib
from apd_jax.decomposition import Decomposition
from apd_jax.network.problem import Problem


def leaf(i, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(i).normal(size=shape), dtype)


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


def nested(x_to_y):
    """(params, apply_fn) of one two-layer network, in a container of every kind."""
    w, v, b = leaf(0, 4, 6), leaf(1, 6, 3), leaf(2, 3)

    def network(w, v, b, x):
        return jnp.tanh(x @ w) @ v + b[None]

    return {
        "dict": (
            {"in": {"w": w}, "out": {"v": v, "b": b}},
            lambda p, x: network(p["in"]["w"], p["out"]["v"], p["out"]["b"], x),
        ),
        "list and tuple": (
            [(w,), {"v": v, "none": None, "b": [b]}],
            lambda p, x: network(p[0][0], p[1]["v"], p[1]["b"][0], x),
        ),
        "named tuple": (
            Pair(w, {"v": v, "b": b}),
            lambda p, x: network(p.first, p.second["v"], p.second["b"], x),
        ),
    }[x_to_y]


ROWS = [{"step": 10, "total": 0.1, "faithfulness": [1e-7, 2.0]}]


def begun(params, apply_fn, method, x):
    """As a method begins on these inputs, with its gate."""
    problem = Problem(apply_fn, params, [np.asarray(x)])

    @jax.jit
    def make(key):
        components = method.make_components(key, problem)
        return components, method.make_gate(key, problem, components)

    components, gate = make(jax.random.key(0))
    return Decomposition(problem, components, method, ROWS, gate=gate)


def side_by_side(one, other):
    """Two instances: of a decomposition, and of the same one with other numbers."""
    trained = jax.tree.map(lambda a, b: jnp.stack([a, b]), one.trained, other)
    method = one.method.replace(num_instances=2)
    return Decomposition(one.problem, trained.components, method, ROWS, gate=trained.gate)


def decomposition(params, apply_fn, select=None, uses=None, layouts=None, **fields):
    """An untrained one."""
    method = make_method(num_components=5, topk=2.0, batch_size=16, rank=2, **fields)
    components = components_lib.init(
        jax.random.key(0),
        params,
        num_components=5,
        rank=2,
        select=select,
        uses=uses,
        init_scale=3.0,
        layouts=layouts,
    )
    problem = Problem(apply_fn, params, None, select=select, uses=uses)
    return Decomposition(problem, components, method, ROWS)
