r"""Components that begin at the singular directions of what they decompose.

  W = Σ_k s_k u_k v_kᵀ,   piece j of rank m holds the k from j m to (j+1) m - 1, each as
  (√s_k u_k)(√s_k v_kᵀ)

Shapes: n pieces of rank m at a site, d_in, d_out of its matrix.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from apd_jax.components.factors import Components, Factors, is_slot, named_leaves
from apd_jax.components.initial import factored
from apd_jax.components.layout import matrix_shape, path_name


def holds_all(f: Factors) -> bool:
    """Whether a site's pieces are enough for all singular directions of its matrices."""
    return f.num_pieces * f.rank >= min(matrix_shape(f.shape, f.axes))


def at_singular(components: Components, params: PyTree) -> Components:
    """The same pieces at the singular directions of their leaves, the largest first.

    The sum is then the leaf, but for the smallest directions where n m is less than its rank. Of
    the pieces that are left over U stays as it is, and V is 0.

    Cost: one SVD per matrix. May be traced.
    """
    leaves = named_leaves(params)

    def one(path: tuple, f: Factors | None) -> Factors | None:
        if f is None:
            return None
        U, V = factored(leaves[path_name(path)], None, f.axes)
        n, m = f.num_pieces, f.rank
        kept = min(n * m, U.shape[-1])
        missing = n * m - kept

        def pieces(a: Array) -> Array:
            """[*batch, d, n m] as [n, *batch, d, m]."""
            return jnp.moveaxis(a.reshape(*a.shape[:-1], n, m), -2, 0)

        own = jnp.moveaxis(f.U, 0, -2).reshape(*f.U.shape[1:-1], n * m)
        right = jnp.swapaxes(V, -1, -2)[..., :kept]
        right = jnp.pad(right, [(0, 0)] * (right.ndim - 1) + [(0, missing)])
        left = jnp.concatenate([U[..., :kept], own[..., kept:]], axis=-1)
        return dataclasses.replace(
            f,
            U=pieces(left).astype(f.U.dtype),
            V=jnp.swapaxes(pieces(right), -1, -2).astype(f.V.dtype),
        )

    tree = jax.tree_util.tree_map_with_path(one, components.tree, is_leaf=is_slot)
    return dataclasses.replace(components, tree=tree)
