r"""Pieces of methods with learned gates, begun where the recipe begins: at what mechanisms read.

The recipe's beginning (`beginning`) has the same numbers at every site. Where a method has them
too, it is taken as it is. Where sites have numbers of their own, a site takes the parts of all
numbers that have one there, the largest first. Both sum to the target, but for what there was no
room for.

Shapes: n pieces of rank m at a site, C components of the beginning.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from apd_jax import components as components_lib
from apd_jax.components import Components, Factors
from apd_jax.errors import InputError
from apd_jax.methods.apd import APD
from apd_jax.methods.gated import Gated
from apd_jax.network.problem import Problem
from apd_jax.recipe import scales
from apd_jax.recipe.beginning import NoneFound, accepted
from apd_jax.recipe.numbers import default_recipe

log = logging.getLogger("apd_jax.recipe")

# Of the loss without the decomposed leaves, that parts which write for one mode each may lose under
# one mask for all sites: gates that are learned will tell where each is needed.
_MOST_LOST = 0.1


def found(problem: Problem, method: Gated) -> Components:
    """The components that this method begins with, of all instances.

    Raises:
      InputError: no kind of beginning is accepted.
    Cost: see `beginning.accepted`, with as many components as the method has; where sites have
      numbers of their own, with twice as many as the largest has.
    """
    like = jax.eval_shape(lambda key: method.make_components(key, problem), jax.random.key(0))
    C, select = like.num_components, problem.chosen
    if method.own_numbers:
        C = 2 * max(f.num_pieces for f in like.factors.values())
        select = {name: {"rank": f.rank} for name, f in like.factors.items()}
    settings = APD(
        num_components=C,
        rank=method.rank,
        topk=0.0,
        mask_per=method.mask_per,
        minimality_loss=method.minimality_loss,
        batch_size=method.batch_size,
        seed=method.seed,
        num_instances=method.num_instances,
    )
    alike = dataclasses.replace(problem, select=select, elsewhere=None)
    recipe, reference = default_recipe(), scales.measure(alike, settings)
    try:
        begun = accepted(alike, settings, recipe, reference, most_lost=_MOST_LOST)
    except NoneFound as error:
        raise InputError(
            f"initial = 'found', but there is nothing to begin at: {error.why} Mend that, or "
            "begin at 'svd' or 'random'."
        ) from None
    assert begun is not None
    if not method.own_numbers:
        return dataclasses.replace(begun.components, count=like.count)
    drawn, sizes = _drawn(problem, method), _sizes(begun.components, method.num_instances)
    whole = begun.components.factors
    made = {n: _largest(n, whole[n], sizes[n], f) for n, f in drawn.factors.items()}
    named = {id(f): made[name] for name, f in drawn.factors.items()}
    return components_lib.map_sites(lambda f: named[id(f)], drawn)


def _drawn(problem: Problem, method: Gated) -> Components:
    """As the method draws them."""

    def make(key: Any) -> Components:
        return method.make_components(key, problem)

    keys = jax.random.split(jax.random.key(method.seed), method.num_instances)
    return jax.jit(jax.vmap(make) if len(keys) > 1 else lambda keys: make(keys[0]))(keys)


def _sizes(components: Components, num_instances: int) -> dict[str, np.ndarray]:
    """‖P_c‖² at every site, of every instance where there are several."""
    of_one = components_lib.squared_norms
    return jax.device_get((of_one if num_instances == 1 else jax.vmap(of_one))(components))


def _largest(
    name: str, whole: Factors, size: Float[np.ndarray, "*instances C"], f: Factors
) -> Factors:
    """The pieces of `f` at the largest parts of `whole`; of the others U as it is, and V = 0."""
    n, many = f.num_pieces, size.ndim > 1
    order = np.argsort(-size, axis=-1, kind="stable")
    parts = int(np.max(np.sum(size > 0, axis=-1)))
    if parts > n:
        lost = np.take_along_axis(size, order[..., n:], -1).sum() / size.sum()
        log.warning(
            "%s: room for %d of %d parts; those left out have %.2g of the squared norms. More "
            "components would hold them.",
            *(name, n, parts, lost),
        )

    def one(f: Factors, whole: Factors, size: Any, order: Any) -> Factors:
        there = size[order[:n]] > 0
        U, V = whole.U[order[:n]], whole.V[order[:n]]
        U = jnp.where(jnp.expand_dims(there, range(1, U.ndim)), U, f.U)
        V = jnp.where(jnp.expand_dims(there, range(1, V.ndim)), V, 0.0)
        return dataclasses.replace(f, U=U.astype(f.U.dtype), V=V.astype(f.V.dtype))

    return (jax.vmap(one) if many else one)(f, whole, size, order)
