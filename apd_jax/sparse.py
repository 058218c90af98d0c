"""f(κ(x), x): the sparse forward pass, for any function.

κ(x) = Σ_c s_c(x) P_c differs from example to example. Three exact routes, equal to float error:

  materialize  forms κ(x_b) for every example: best for tiny leaves, and the plain oracle for the others.
  masked       keeps κ(x) factored, x·κ = Σ_c s_c ((x U_c) V_c), for all B·C pairs: the route for float masks.
  dispatch     computes only the pairs that are kept, as a mixture of experts does: every component gathers the examples
               that keep it into `slots` rows. Cost follows k·B, not C·B. If a component is kept by more examples than
               it has slots, further rounds take the rest: exact for every mask, the number of slots is only a speed.

The factored routes run the unmodified function through quax: a decomposed leaf is replaced by an array-like value that
knows how to be multiplied, under a vmap over examples. Any use of a leaf other than a matrix product materialises κ(x_b)
for that leaf only; weights stacked for a `lax.scan` over layers materialise all leaves.

Shapes: B examples, C components, S slots, r rows that one example brings to a matrix product (1, or its positions).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import quax
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from apd_jax import components as components_lib
from apd_jax.components import Components, Factors
from apd_jax.errors import InputError

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
      InputError: unknown route; mask, components and params that do not fit together.
    Cost: materialize B·C·|θ|; masked B·C·m·(d_in + d_out) per leaf; dispatch C·S·m·(d_in + d_out) per leaf and round, the
      rounds being ⌈examples of the most often kept component / S⌉, mostly 1. The dispatch route has no forward-mode derivative.
    """
    fitting = (jax.tree.leaves(x)[0].shape[0], components.num_components)
    if mask.shape != fitting:
        raise InputError(f"mask has shape {mask.shape}, but examples and components ask for {fitting}.")
    leaves = components_lib.decomposed_leaves(components, params)
    dispatchable = bool(slots) and mask.dtype == jnp.bool_
    if route == "auto":
        tiny = all(leaf.size <= _TINY_LEAF for leaf in leaves.values())
        route = "materialize" if tiny else "dispatch" if dispatchable else "masked"
    if route not in ("materialize", "masked", "dispatch") or (route == "dispatch" and not dispatchable):
        raise InputError(
            f"sparse route {route!r} cannot take a {mask.dtype} mask with slots = {slots}; "
            "choose auto, materialize, masked, or dispatch (which needs a bool mask and slots)."
        )
    if route == "materialize":
        return _materialized(apply_fn, params, components, mask, x)
    plan = _make_plan(mask, min(slots, mask.shape[0])) if route == "dispatch" and slots else None
    try:
        return _factored(apply_fn, params, components, mask, x, plan)
    except _ScannedLeafError:
        return _materialized(apply_fn, params, components, mask, x)


def slots_for(k: float, batch_size: int, num_components: int) -> int:
    """S such that components kept by Poisson-many examples hardly ever need a second round: mean + 6 deviations, to 8 rows."""
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
    """The mask turned round: the examples that keep each component, in order, padded with B."""

    example: Int[Array, "R C S"]  # by round
    rounds: Int[Array, ""]  # how many of the R rounds hold any example, at least 1


def _make_plan(mask: Bool[Array, "B C"], slots: int) -> _Plan:
    B, C = mask.shape
    R = math.ceil(B / slots)
    place = jnp.cumsum(mask, axis=0, dtype=jnp.int32) - 1  # of example b among those that keep c
    component = jnp.arange(C, dtype=jnp.int32)[None]
    position = (place // slots) * (C * slots) + component * slots + place % slots
    example = jnp.broadcast_to(jnp.arange(B, dtype=jnp.int32)[:, None], (B, C))
    flat = jnp.full((R * C * slots,), B, jnp.int32).at[jnp.where(mask, position, R * C * slots)].set(example, mode="drop")
    return _Plan(flat.reshape(R, C, slots), 1 + jnp.maximum(jnp.max(place[-1]), 0) // slots)


def _factored(apply_fn, params, components, mask, x, plan):
    leaves = components_lib.decomposed_leaves(components, params)

    def params_of(mask_b):
        kappa = {name: _Kappa(f, mask_b, plan, leaves[name].dtype) for name, f in components.factors.items()}
        return components_lib.replace_leaves(params, kappa)

    return _per_example(quax.quaxify(apply_fn), params_of, mask, x)


class _ScannedLeafError(Exception):
    """A `lax.scan` over stacked weights took a slice of κ(x_b): of its factors, that is, which means something else."""


class _Kappa(quax.ArrayValue):
    """κ(x_b) for one leaf, as masked factors: what the target's function sees in place of the weight."""

    factors: Factors
    mask: Array  # [C], one example's
    plan: _Plan | None
    kind: Any = eqx.field(static=True)

    def aval(self):
        return jax.core.ShapedArray(self.factors.shape, self.kind)

    def _check(self):
        if self.mask.ndim != 1:
            raise _ScannedLeafError

    def materialise(self):
        self._check()
        kept = self.factors.U * self.mask[:, None, None].astype(self.factors.U.dtype)
        return components_lib.leaf_total(dataclasses.replace(self.factors, U=kept)).astype(self.kind)

    def multiply(self, x: Float[Array, "r d"], contracted: int) -> Float[Array, "r e"]:
        """x κ (contracted = 0) or x κᵀ (contracted = 1)."""
        self._check()
        U, V = self.factors.U, self.factors.V
        if contracted == 1:
            U, V = jnp.swapaxes(V, 1, 2), jnp.swapaxes(U, 1, 2)
        return _kept_product(x, U, V, self.mask, self.plan).astype(self.kind)


@jax.custom_batching.custom_vmap
def _kept_product(x, U, V, mask, plan):
    """Σ_c mask_c (x U_c) V_c for one example. x [r, d], mask [C]."""
    C, _, m = U.shape
    inner = jnp.einsum("rd,cdm->rcm", x, U) * mask[None, :, None].astype(x.dtype)
    return inner.reshape(-1, C * m) @ V.reshape(C * m, -1)


@_kept_product.def_vmap
def _kept_product_batched(axis_size, in_batched, x, U, V, mask, plan):
    """The same for a batch: U, V and plan are shared, x [B, r, d] and mask [B, C] are not."""
    if in_batched[1] or in_batched[2] or not in_batched[3]:  # not the axis of examples: nothing to gain, the plan is not for it
        axes = jax.tree.map(lambda batched: 0 if batched else None, tuple(in_batched))
        return jax.vmap(_kept_product.fun, in_axes=axes)(x, U, V, mask, plan), True
    if not in_batched[0]:
        x = jnp.broadcast_to(x, (axis_size, *x.shape))
    B, r, _ = x.shape
    C, _, m = U.shape
    if plan is None:
        inner = jnp.einsum("brd,cdm->brcm", x, U) * mask[:, None, :, None].astype(x.dtype)
        out = inner.reshape(B * r, C * m) @ V.reshape(C * m, -1)
        return out.reshape(B, r, -1), True
    return _dispatched(x, U, V, plan), True


@jax.custom_vjp
def _dispatched(x: Float[Array, "B r d"], U: Float[Array, "C d m"], V: Float[Array, "C m e"], plan: _Plan) -> Float[Array, "B r e"]:
    """Σ_{c kept by b} (x_b U_c) V_c. Its own derivative, because the number of rounds is only known at run time."""
    return _sum_rounds(plan, lambda example: _scatter((_gather(x, example) @ U) @ V, example, x))


def _dispatched_fwd(x, U, V, plan):
    return _dispatched(x, U, V, plan), (x, U, V, plan)


def _dispatched_bwd(residuals, g):
    x, U, V, plan = residuals

    def weights(example):
        rows, g_rows = _gather(x, example), _gather(g, example)
        dU = jnp.einsum("csd,csm->cdm", rows, g_rows @ jnp.swapaxes(V, 1, 2))
        dV = jnp.einsum("csm,cse->cme", rows @ U, g_rows)
        return dU, dV

    def inputs(example):
        g_rows = _gather(g, example)
        return _scatter((g_rows @ jnp.swapaxes(V, 1, 2)) @ jnp.swapaxes(U, 1, 2), example, x)

    # Two loops, so that the one for x vanishes where x does not depend on the components (the first layer).
    dU, dV = _sum_rounds(plan, weights)
    return _sum_rounds(plan, inputs), dU, dV, None


_dispatched.defvjp(_dispatched_fwd, _dispatched_bwd)


def _gather(x: Float[Array, "B r d"], example: Int[Array, "C S"]) -> Float[Array, "C Sr d"]:
    return jnp.take(x, example, axis=0, mode="fill", fill_value=0).reshape(example.shape[0], -1, x.shape[-1])


def _scatter(rows: Float[Array, "C Sr e"], example: Int[Array, "C S"], like: Float[Array, "B r d"]) -> Float[Array, "B r e"]:
    B, r = like.shape[:2]
    return jnp.zeros((B, r, rows.shape[-1]), rows.dtype).at[example.reshape(-1)].add(rows.reshape(example.size, r, -1), mode="drop")


def _sum_rounds(plan: _Plan, one_round: Callable[[Int[Array, "C S"]], PyTree]) -> PyTree:
    def body(state):
        i, total = state
        return i + 1, jax.tree.map(jnp.add, total, one_round(plan.example[i]))

    return lax.while_loop(lambda state: state[0] < plan.rounds, body, (1, one_round(plan.example[0])))[1]


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
