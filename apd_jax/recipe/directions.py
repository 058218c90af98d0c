"""What every example reads in every leaf, by the gradient along its own change of the outputs.

Shapes: B examples of a batch, b matrices of a leaf (1 unless stacked).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from apd_jax import components as components_lib
from apd_jax.components.layout import Layout, unfold
from apd_jax.errors import InputError
from apd_jax.forward import capture
from apd_jax.network.outputs import outputs
from apd_jax.network.problem import Problem

_POWER_ITERATIONS = 12
_CHUNK_BYTES = 256 * 2**20  # that the gradients of one chunk of examples may take


def matrices(problem: Problem) -> dict[str, np.ndarray]:
    """The decomposed leaves as [b, d_in, d_out]."""
    sites = problem.sites
    return {n: np.asarray(_matrix(problem, n, leaf), np.float32) for n, leaf in sites.items()}


def shapes(problem: Problem) -> dict[str, tuple[int, ...]]:
    """(b, d_in, d_out) of every decomposed leaf."""
    return {name: _matrix(problem, name, leaf).shape for name, leaf in problem.sites.items()}


def directions(
    problem: Problem, x: PyTree
) -> tuple[dict[str, Float[Array, "B b d_in"]], Float[Array, " B"]]:
    """e_l(x) of every example and leaf, and the effect of these leaves on its outputs.

    With v = f(θ*, x) - f(0, x), e is the leading left singular vector of ∂(v·f)/∂W_l, and the
    effect mean_o v_o².
    """

    def read(gradients: dict[str, Array], change: Array) -> tuple[dict[str, Array], Array]:
        return jax.tree.map(jax.vmap(_leading_left), gradients), jnp.mean(change**2)

    return _of_gradients(problem, x, read)


def written(
    problem: Problem, x: PyTree, names: Sequence[str]
) -> dict[str, Float[Array, "B b d_out"]]:
    """How the output of these leaves counts: the leading right singular vector of ∂(v·f)/∂W_l."""

    def write(gradients: dict[str, Array], _: Array) -> dict[str, Array]:
        return {n: jax.vmap(_leading_left)(jnp.swapaxes(gradients[n], 1, 2)) for n in names}

    return _of_gradients(problem, x, write)


def _of_gradients(problem: Problem, x: PyTree, fn: Callable[..., Any]) -> Any:
    """fn(∂(v·f)/∂W_l of every leaf [b, d_in, d_out], v) of every example."""
    leaves = problem.sites
    apply_fn = problem.attribution_fn or problem.apply_fn

    def one(x_b: PyTree) -> Any:
        batch = jax.tree.map(lambda a: a[None], x_b)

        def model(leaves: dict[str, Array]) -> Array:
            return outputs(apply_fn(components_lib.replace_leaves(problem.params, leaves), batch))

        out, pull = jax.vjp(model, leaves)
        change = out - model(jax.tree.map(jnp.zeros_like, leaves))
        gradients = {
            name: _matrix(problem, name, g).astype(jnp.float32)
            for name, g in pull(change)[0].items()
        }
        return fn(gradients, change.astype(jnp.float32))

    fitting = max(1, _CHUNK_BYTES // sum(4 * leaf.size for leaf in leaves.values()))
    if fitting < jax.tree.leaves(x)[0].shape[0]:
        return jax.lax.map(one, x, batch_size=fitting)
    return jax.vmap(one)(x)


def inputs(problem: Problem, x: PyTree) -> dict[str, Float[Array, "B b d_in"]]:
    """What leaves read that read one row of an example; none where that cannot be told."""
    own = shapes(problem)
    try:
        read = capture.inputs(problem.apply_fn, problem.params, problem.site_names, x)[1]
    except InputError:
        return {}
    rows = {
        name: r.rows
        for name, r in read.items()
        if r.side == "in" and jnp.issubdtype(r.rows.dtype, jnp.floating)
    }
    return {
        name: a.reshape(len(a), *own[name][:2]).astype(jnp.float32)
        for name, a in rows.items()
        if math.prod(a.shape[1:]) == math.prod(own[name][:2])
    }


def _matrix(problem: Problem, name: str, leaf: Array) -> Float[Array, "b d_in d_out"]:
    matrix = unfold(leaf, problem.layouts.get(name, Layout.default(leaf.ndim)))
    return matrix.reshape(-1, *matrix.shape[-2:])


def _leading_left(G: Float[Array, "i o"]) -> Float[Array, " i"]:
    """The leading left singular vector; 0 where G is 0.

    By power iterations on the smaller of GᵀG and GGᵀ. They start at the longest row, which has a
    part along the leading vector.
    """

    def unit(v: Array) -> Array:
        return v / jnp.maximum(jnp.linalg.norm(v), 1e-30)

    wide = G.shape[0] < G.shape[1]
    gram = G @ G.T if wide else G.T @ G
    longest = gram[jnp.argmax(jnp.diagonal(gram))]
    v = jax.lax.fori_loop(0, _POWER_ITERATIONS, lambda _, v: unit(gram @ v), unit(longest))
    return v if wide else unit(G @ v)
