"""The real change of the outputs when one component is taken from the sum.

Shapes: B examples, C components.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from apd_jax import components as components_lib
from apd_jax.attributions.chunks import chunked, largest_array
from apd_jax.attributions.groups import group_by_group
from apd_jax.attributions.metric import Case, in_metric
from apd_jax.components import Components
from apd_jax.network.outputs import outputs


def ablated(case: Case) -> Float[Array, "B C"]:
    """A². `case.params` are not used where they are decomposed: the sum of components is."""
    summed = components_lib.total(case.components, case.params)
    whole = outputs(case.apply_fn(summed, case.x))
    widest = largest_array(lambda p: case.apply_fn(p, case.x), summed)

    def of_group(own: Components) -> Float[Array, "C B"]:
        leaves = components_lib.decomposed_leaves(own, summed)

        def one(factors):
            without = {
                name: leaves[name] - f.weights.astype(leaves[name].dtype)
                for name, f in factors.items()
            }
            params = components_lib.replace_leaves(summed, without)
            change = outputs(case.apply_fn(params, case.x)) - whole
            return jnp.sum(in_metric(change, whole, case.metric, case.valid) ** 2, axis=1)

        return chunked(one, own.factors, own.num_components, widest)

    return group_by_group(case.components, of_group)
