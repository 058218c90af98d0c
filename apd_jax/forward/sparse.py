"""f(κ(x), x): the sparse forward pass, for any function.

κ(x) = Σ_c s_c(x) P_c differs from example to example, or from position to position. Three exact routes, equal to float error:

  materialize  forms κ(x_b) for every example: best for tiny leaves, and the plain oracle for the others.
  masked       keeps κ(x) factored, x·κ = Σ_c s_c ((x U_c) V_c), for all B·C pairs: the route for float masks.
  dispatch     computes only the pairs that are kept, as a mixture of experts does. Cost follows k·B, not C·B.

The factored routes run the unmodified function's operations under a vmap over examples: a decomposed leaf is replaced by a
`factored.Kappa`, which is multiplied, convolved and looked up without being formed. Any other use materialises that leaf only.

Shapes: B examples, T positions, C components, S slots.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from apd_jax import components as components_lib
from apd_jax.collectives import over_components
from apd_jax.components import Components
from apd_jax.errors import InputError
from apd_jax.forward import interpret
from apd_jax.forward.dispatch import Plan, make_plan
from apd_jax.forward.kappa import kappa

log = logging.getLogger(__name__)

_MOVING = 40  # to move an entry of a row to its component and back costs about so many multiplications of a product (ResidMLP, CPU)
_TINY_LEAF = 4096  # entries of a matrix up to which forming all weights beats factored products (measured on TMS 40-10, CPU)


def apply(
    apply_fn: Callable,
    params: PyTree,
    components: Components,
    mask: Bool[Array, "B *T C"] | Float[Array, "B *T C"],
    x: PyTree,
    *,
    route: str = "auto",
    slots: int | None = None,
) -> Any:
    """The model with, for every example, only its kept components: f(Σ_c mask_bc P_c, x_b).

    Args:
      apply_fn: (params, x) -> outputs [B, ...], or (outputs, hidden); called with one example at a time, as a batch of 1.
      mask: which components are kept, or the factor of each (partial ablation): [B, C], or [B, T, C] where every position
        uses the weights in its own way. Then the decomposed leaves must only meet activations that have an axis of the T positions.
      x: pytree of arrays with leading B.
      route: materialize | masked | dispatch (bool masks only) | auto: materialize if every decomposed leaf is a tiny matrix, else
        dispatch if `slots` is given, the mask is bool and the rank so large that moving rows about costs less, else masked, and where
        many rows of an example share a mask (positions, patches) its weight is formed if that takes fewer operations. If a factored
        route cannot run this function at all, auto falls back to materialize, with a warning.
      slots: S, examples (positions) per component in the dispatch route; see `dispatch.slots_for`.
    Returns: what apply_fn returns, for the whole batch.
    Raises:
      InputError: unknown route; mask, components and params that do not fit together; a leaf that cannot differ between positions.
    Cost: materialize B·C·|θ|; masked B·C·m·(d_in + d_out) per leaf; dispatch C·S·m·(d_in + d_out) per leaf and round, the
      rounds being ⌈examples of the most often kept component / S⌉, mostly 1. The dispatch route has no forward-mode derivative.
    """
    B, C = jax.tree.leaves(x)[0].shape[0], components.num_components
    if mask.ndim not in (2, 3) or (mask.shape[0], mask.shape[-1]) != (B, C):
        raise InputError(
            f"mask has shape {mask.shape}, but examples and components ask for ({B}, {C}), or ({B}, positions, {C})."
        )
    leaves = components_lib.decomposed_leaves(components, params)
    per_position = mask.ndim == 3
    dispatchable = bool(slots) and mask.dtype == jnp.bool_
    chosen = route
    if route == "auto":
        tiny = (
            all(leaf.size <= _TINY_LEAF and leaf.ndim <= 2 for leaf in leaves.values())
            and not per_position
        )
        rank = max(f.U.shape[-1] for f in components.factors.values())
        cheaper = (
            dispatchable and min(slots, B) * (rank + _MOVING) < mask.size // C * rank
        )  # per component and entry of a row
        chosen = "materialize" if tiny else "dispatch" if cheaper else "masked"
    if chosen not in ("materialize", "masked", "dispatch") or (
        chosen == "dispatch" and not dispatchable
    ):
        raise InputError(
            f"sparse route {route!r} cannot take a {mask.dtype} mask with slots = {slots}; "
            "choose auto, materialize, masked, or dispatch (which needs a bool mask and slots)."
        )
    if chosen == "materialize" and not per_position:
        return _materialized(apply_fn, params, components, mask, x)
    rows = mask.reshape(-1, C)
    plan = make_plan(rows, min(slots, rows.shape[0])) if chosen == "dispatch" and slots else None
    flavor = "dense" if chosen == "materialize" else "cheaper" if route == "auto" else "kept"

    def one(mask_b, x_b):
        return substituted(
            apply_fn,
            params,
            components,
            mask_b,
            plan,
            x_b,
            flavor=flavor,
            num_examples=rows.shape[0],
        )

    try:
        return jax.vmap(one)(mask, x)
    except InputError:
        raise
    except Exception as error:
        if route != "auto" or per_position:
            raise
        log.warning(
            "the factored sparse pass cannot run this function (%s); forming the weights instead.",
            _first_line(error),
        )
        return _materialized(apply_fn, params, components, mask, x)


def substituted(
    apply_fn: Callable,
    params: PyTree,
    components: Components,
    weights: Array,
    plan: Plan | None,
    x_b: PyTree,
    *,
    flavor: str,
    num_examples: int = 1,
) -> Any:
    """apply_fn on one example, with `factored.Kappa` of the given weights [C] or [T, C] for the decomposed leaves."""
    batch = jax.tree.map(lambda a: a[None], x_b)
    result = together(
        apply_fn, params, components, weights, plan, batch, flavor=flavor, num_examples=num_examples
    )
    return jax.tree.map(lambda out: out[0], result)


def together(
    apply_fn: Callable,
    params: PyTree,
    components: Components,
    weights: Array,
    plan: Plan | None,
    batch: PyTree,
    *,
    flavor: str,
    num_examples: int = 1,
) -> Any:
    """The same on a batch that shares the weights."""
    leaves = components_lib.decomposed_leaves(components, params)
    values = {
        name: kappa(
            f,
            weights,
            plan,
            like=leaves[name],
            name=name,
            flavor=flavor,
            per_position=weights.ndim == 2,
            num_examples=num_examples,
        )
        for name, f in components.factors.items()
    }
    closed, result = jax.make_jaxpr(apply_fn, return_shape=True)(params, batch)
    named = [
        (components_lib.path_name(path), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    ]
    args = [*(values.get(name, leaf) for name, leaf in named), *jax.tree.leaves(batch)]
    outs = interpret.arrays(interpret.run(closed.jaxpr, closed.consts, *args))
    return jax.tree.unflatten(jax.tree.structure(result), outs)


def _materialized(apply_fn, params, components, mask, x):
    leaves = components_lib.decomposed_leaves(components, params)
    stacked = {
        name: f.weights.reshape(components.num_components, -1)
        for name, f in components.factors.items()
    }

    def one(mask_b, x_b):
        sums = over_components(
            {name: mask_b.astype(p.dtype) @ p for name, p in stacked.items()}, components.axis
        )
        kappas = {
            name: p.reshape(leaves[name].shape).astype(leaves[name].dtype)
            for name, p in sums.items()
        }
        result = apply_fn(
            components_lib.replace_leaves(params, kappas), jax.tree.map(lambda a: a[None], x_b)
        )
        return jax.tree.map(lambda a: a[0], result)

    return jax.vmap(one)(mask, x)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
