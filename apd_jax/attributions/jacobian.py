"""Reverse mode: the Jacobian of every example, contracted with every component.

Shapes: B examples, C components, O outputs, n pieces of a site.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from apd_jax import components as components_lib
from apd_jax.attributions.chunks import chunked
from apd_jax.attributions.metric import Case


def reverse(case: Case) -> Float[Array, "B C"]:
    """A². A component's derivative is the sum of those of its pieces, wherever they are."""
    C, sites = case.components.num_components, case.components.factors
    leaves = components_lib.decomposed_leaves(case.components, case.params)
    pieces = {name: f.weights.reshape(f.num_pieces, -1) for name, f in sites.items()}
    num_outputs = jax.eval_shape(case.measured, leaves, case.x, case.valid).shape[1]

    def one(example):
        batch = jax.tree.map(lambda a: a[None], example)
        out, pullback = jax.vjp(lambda leaves: case.measured(leaves, *batch)[0], leaves)
        directions = jnp.eye(num_outputs, dtype=out.dtype)
        jacobian = jax.vmap(lambda cotangent: pullback(cotangent)[0])(directions)
        dots = []  # of every site [O, C]
        for name, f in sites.items():
            of_outputs = jacobian[name].reshape(num_outputs, -1)
            of_pieces = jnp.tensordot(of_outputs, pieces[name], axes=(1, 1))
            dots.append(of_pieces if f.ids is None else f.sums(of_pieces.T, C).T)
        return jnp.sum(sum(dots[1:], dots[0]) ** 2, axis=0)

    size = jax.tree.leaves(case.x)[0].shape[0]
    widest = num_outputs * 4 * sum(leaf.size for leaf in leaves.values())
    return chunked(one, (case.x, case.valid), size, widest)
