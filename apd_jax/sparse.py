"""f(κ(x), x): the sparse forward pass, for any function.

κ(x) = Σ_c s_c(x) P_c differs from example to example. Three exact routes, equal to float error:

  materialize  forms κ(x_b) for every example: best for tiny leaves, and the plain oracle for the others.
  masked       keeps κ(x) factored, x·κ = Σ_c s_c ((x U_c) V_c), for all B·C pairs: the route for float masks.
  dispatch     computes only the pairs that are kept, as a mixture of experts does: every component gathers the examples
               that keep it into `slots` rows. Cost follows k·B, not C·B. If a component is kept by more examples than
               it has slots, the whole pass takes the masked route: never an approximation.

The factored routes run the unmodified function through quax: a decomposed leaf is replaced by an array-like value that
knows how to be multiplied, under a vmap over examples. Any use of a leaf other than a matrix product materialises κ(x_b)
for that leaf only.

Shapes: B examples, C components, S slots, r rows that one example brings to a matrix product (1, or its positions).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import quax
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from apd_jax import components as components_lib
from apd_jax.components import Components, Factors

_TINY_LEAF = 4096  # entries up to which materialising beats factored products (measured on TMS 40-10, CPU)


def apply(
    apply_fn: Callable,
    params: PyTree,
    components: Components,
    mask: Bool[Array, "B C"] | Float[Array, "B C"],
    x: PyTree,
    *,
    route: str = "auto",
    slots: int | None = None,
) -> Any:
    """The model with, for every example, only its kept components: f(Σ_c mask_bc P_c, x_b).

    Args:
      apply_fn: (params, x) -> outputs [B, ...], or (outputs, hidden); called with one example at a time, as a batch of 1.
      mask: which components are kept, or the factor of each (partial ablation).
      x: pytree of arrays with leading B.
      route: materialize | masked | dispatch (bool masks only) | auto: materialize if every decomposed leaf is tiny, else
        dispatch if `slots` is given and the mask is bool, else masked.
      slots: S, examples per component in the dispatch route; see `slots_for`.
    Returns: what apply_fn returns, for the whole batch.
    Raises:
      ValueError: unknown route; mask, components and params that do not fit together.
    Cost: materialize B·C·|θ|; masked B·C·m·(d_in + d_out) per leaf; dispatch C·S·m·(d_in + d_out) per leaf.
    """
    if mask.ndim != 2 or mask.shape[1] != components.num_components or mask.shape[0] != jax.tree.leaves(x)[0].shape[0]:
        raise ValueError(
            f"mask has shape {mask.shape}; x holds {jax.tree.leaves(x)[0].shape[0]} examples and there are {components.num_components} components."
        )
    leaves = components_lib.decomposed_leaves(components, params)
    if route == "auto":
        tiny = all(leaf.size <= _TINY_LEAF for leaf in leaves.values())
        route = "materialize" if tiny else "dispatch" if slots and mask.dtype == jnp.bool_ else "masked"
    if route == "materialize":
        return _materialized(apply_fn, params, components, mask, x)
    if route == "masked":
        return _factored(apply_fn, params, components, mask, x, None)
    if route == "dispatch" and slots and mask.dtype == jnp.bool_:
        plan, fits = _make_plan(mask, min(slots, mask.shape[0]))
        # Without remat, the fallback's [B, C, m] residuals would be allocated also when it is not taken.
        fallback = jax.checkpoint(lambda components, x: _factored(apply_fn, params, components, mask, x, None))
        return lax.cond(fits, lambda components, x: _factored(apply_fn, params, components, mask, x, plan), fallback, components, x)
    raise ValueError(f"route {route!r} with a {mask.dtype} mask and slots = {slots}: choose auto, materialize, masked, or dispatch (bool mask and slots).")


def slots_for(k: float, batch_size: int, num_components: int) -> int:
    """S such that a component kept by Poisson-many examples overflows less than once in 10⁴ steps: mean + 6 deviations."""
    mean = k * batch_size / num_components
    return min(batch_size, 8 * math.ceil((mean + 6 * math.sqrt(mean) + 2) / 8))


def _per_example(apply_fn, params_of, mask, x):
    """vmap over examples of apply_fn(params_of(mask_b), x_b as a batch of one)."""

    def one(mask_b, x_b):
        result = apply_fn(params_of(mask_b), jax.tree.map(lambda a: a[None], x_b))
        return jax.tree.map(lambda a: a[0], result)

    return jax.vmap(one)(mask, x)


def _materialized(apply_fn, params, components, mask, x):
    leaves = components_lib.decomposed_leaves(components, params)
    stacked = {name: (f.U @ f.V).reshape(components.num_components, -1) for name, f in components.factors.items()}

    def params_of(mask_b):
        kappa = {name: (mask_b.astype(p.dtype) @ p).reshape(leaves[name].shape).astype(leaves[name].dtype) for name, p in stacked.items()}
        return components_lib.replace_leaves(params, kappa)

    return _per_example(apply_fn, params_of, mask, x)


class _Plan(NamedTuple):
    """Which example stands in which slot: the inverse of the mask, with B where a slot is empty."""

    example: Int[Array, "C S"]


def _make_plan(mask: Bool[Array, "B C"], slots: int) -> tuple[_Plan, Bool[Array, ""]]:
    B, C = mask.shape
    place = jnp.cumsum(mask, axis=0, dtype=jnp.int32) - 1
    row = jnp.where(mask & (place < slots), place + slots * jnp.arange(C, dtype=jnp.int32)[None], C * slots)
    examples = jnp.broadcast_to(jnp.arange(B, dtype=jnp.int32)[:, None], (B, C))
    filled = jnp.full((C * slots,), B, jnp.int32).at[row.reshape(-1)].set(examples.reshape(-1), mode="drop")
    return _Plan(filled.reshape(C, slots)), jnp.all(place[-1] < slots)


def _factored(apply_fn, params, components, mask, x, plan):
    leaves = components_lib.decomposed_leaves(components, params)

    def params_of(mask_b):
        kappa = {name: _Kappa(f, mask_b, plan, leaves[name].dtype) for name, f in components.factors.items()}
        return components_lib.replace_leaves(params, kappa)

    return _per_example(quax.quaxify(apply_fn), params_of, mask, x)


class _Kappa(quax.ArrayValue):
    """κ(x_b) for one leaf, as masked factors: what the target's function sees in place of the weight."""

    factors: Factors
    mask: Array  # [C], one example's
    plan: _Plan | None
    kind: Any = eqx.field(static=True)

    def aval(self):
        return jax.core.ShapedArray(self.factors.shape, self.kind)

    def materialise(self):
        kept = self.factors.U * self.mask[:, None, None].astype(self.factors.U.dtype)
        return components_lib.leaf_total(dataclasses.replace(self.factors, U=kept)).astype(self.kind)

    def multiply(self, x: Float[Array, "r d"], contracted: int) -> Float[Array, "r e"]:
        """x κ (contracted = 0) or x κᵀ (contracted = 1)."""
        U, V = self.factors.U, self.factors.V
        if contracted == 1:
            U, V = jnp.swapaxes(V, 1, 2), jnp.swapaxes(U, 1, 2)
        return _kept_product(x, U, V, self.mask, self.plan).astype(self.kind)


@jax.custom_batching.custom_vmap
def _kept_product(x, U, V, mask, plan):
    """Σ_c mask_c (x U_c) V_c for one example. x [r, d], mask [C]."""
    C, d, m = U.shape
    inner = jnp.einsum("rd,cdm->rcm", x, U) * mask[None, :, None].astype(x.dtype)
    return inner.reshape(-1, C * m) @ V.reshape(C * m, -1)


@_kept_product.def_vmap
def _kept_product_batched(axis_size, in_batched, x, U, V, mask, plan):
    """The same for a batch: U, V and plan are shared, x [B, r, d] and mask [B, C] are not."""
    x_batched, *_ = in_batched
    if not x_batched:
        x = jnp.broadcast_to(x, (axis_size, *x.shape))
    B, r, d = x.shape
    C, _, m = U.shape
    if plan is None:
        inner = jnp.einsum("brd,cdm->brcm", x, U) * mask[:, None, :, None].astype(x.dtype)
        out = inner.reshape(B * r, C * m) @ V.reshape(C * m, -1)
        return out.reshape(B, r, -1), True
    S = plan.example.shape[1]
    # Empty slots read and write row B, a row of zeros that is cut off at the end.
    gathered = jnp.take(x, plan.example, axis=0, mode="fill", fill_value=0).reshape(C, S * r, d)
    out = ((gathered @ U) @ V).reshape(C * S, r, -1)
    return jnp.zeros((B, r, out.shape[-1]), out.dtype).at[plan.example.reshape(-1)].add(out, mode="drop"), True


def _matrix_product(x, kappa: _Kappa, dimension_numbers, kappa_first: bool):
    """dot_general of an array with κ, or None where the rule does not apply (other layouts, batch axes)."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    x_contract, k_contract = (rhs_contract, lhs_contract) if kappa_first else (lhs_contract, rhs_contract)
    if lhs_batch or rhs_batch or len(kappa.shape) != 2 or len(k_contract) != 1:
        return None
    rows = jnp.moveaxis(x, x_contract[0], -1)
    out = kappa.multiply(rows.reshape(-1, rows.shape[-1]), k_contract[0]).reshape(*rows.shape[:-1], -1)
    return jnp.moveaxis(out, -1, 0) if kappa_first else out


@quax.register(lax.dot_general_p)
def _(lhs: ArrayLike, rhs: _Kappa, *, dimension_numbers, **params):
    out = _matrix_product(lhs, rhs, dimension_numbers, kappa_first=False)
    return lax.dot_general_p.bind(lhs, rhs.materialise(), dimension_numbers=dimension_numbers, **params) if out is None else out


@quax.register(lax.dot_general_p)
def _(lhs: _Kappa, rhs: ArrayLike, *, dimension_numbers, **params):
    out = _matrix_product(rhs, lhs, dimension_numbers, kappa_first=True)
    return lax.dot_general_p.bind(lhs.materialise(), rhs, dimension_numbers=dimension_numbers, **params) if out is None else out


@quax.register(lax.transpose_p)
def _(kappa: _Kappa, *, permutation):
    f = kappa.factors
    if len(f.shape) != 2 or tuple(permutation) != (1, 0):
        return lax.transpose(kappa.materialise(), permutation)
    flipped = dataclasses.replace(f, U=jnp.swapaxes(f.V, 1, 2), V=jnp.swapaxes(f.U, 1, 2), shape=f.shape[::-1])
    return _Kappa(flipped, kappa.mask, kappa.plan, kappa.kind)
