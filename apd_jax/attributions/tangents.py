"""Forward mode: a tangent of the network's pass per component.

Shapes: B examples, C components, O outputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from apd_jax import components as components_lib
from apd_jax.attributions.chunks import chunked, largest_array
from apd_jax.attributions.groups import group_by_group
from apd_jax.attributions.metric import Case, in_metric
from apd_jax.components import Components
from apd_jax.forward import sparse
from apd_jax.network.outputs import outputs

_TWO_PRODUCTS = 4  # how much cheaper one product must be than the two through the factors


def forward(case: Case) -> Float[Array, "B C"]:
    """A². Components of low rank pass through their factors, others are formed."""

    def of_group(own: Components) -> Float[Array, "C B"]:
        factored = case.moved_fn is None and is_low_rank(own)
        return _factored(case, own) if factored else _formed(case, own)

    return group_by_group(case.components, of_group)


def _formed(case: Case, components: Components) -> Float[Array, "C B"]:
    leaves = components_lib.decomposed_leaves(components, case.params)
    _, tangent = jax.linearize(lambda leaves: case.measured(leaves, case.x, case.valid), leaves)

    def one(factors):
        moved = {name: f.weights.astype(leaves[name].dtype) for name, f in factors.items()}
        return _row_sums(tangent(moved) ** 2)

    formed = sum(leaf.nbytes for leaf in leaves.values())  # a component's own weights
    widest = max(largest_array(tangent, leaves), formed)
    return chunked(one, components.factors, components.num_components, widest)


def is_low_rank(components: Components) -> bool:
    """Whether activations pass U and V with fewer operations than the P_c that these make.

    By a factor that makes up for two products instead of one.
    """
    factors = components.factors.values()
    through = sum(f.U[0].size + f.V[0].size for f in factors)
    return _TWO_PRODUCTS * through < sum(f.num_params for f in factors)


def _factored(case: Case, components: Components) -> Float[Array, "C B"]:
    """The same tangents with no P_c formed.

    x·dP_c = (x U_c) V_c wherever the leaf meets activations in a product.
    """

    def one(factors):
        component = jax.tree.map(lambda a: a[None], factors)

        def moved(s):
            out = outputs(
                sparse.together(
                    case.apply_fn, case.params, component, s, None, case.x, flavor="tangent"
                )
            )
            return in_metric(out, jax.lax.stop_gradient(out), case.metric, case.valid)

        return _row_sums(jax.jvp(moved, (jnp.zeros(1),), (jnp.ones(1),))[1] ** 2)

    first = jax.eval_shape(lambda: jax.tree.map(lambda a: a[0], components))
    return chunked(one, components, components.num_components, largest_array(one, first))


def _row_sums(squares: Float[Array, "B O"]) -> Float[Array, " B"]:
    """Sums over the last axis, as a product with ones.

    XLA on CPU adds up short rows several times slower than it multiplies. Accelerators would round
    the squares if they were not told otherwise.
    """
    return jnp.dot(squares, jnp.ones(squares.shape[1], squares.dtype), precision="highest")
