"""f(κ(x), x): the masked forward pass, for any function.

At site s the weight κ_s(x) = β_s(x) θ*_s + Σ_j w_sj(x) P_sj differs from example to example, or
from position to position. `apply` takes one mask of all components (w = the mask, β = 0), `run`
weights per site. Three exact routes, equal to float error:

  materialize  forms κ(x_b) for every example: best for tiny leaves, and the plain oracle.
  masked       keeps κ(x) factored, x·κ = β x·θ* + Σ_j w_j ((x U_j) V_j), for all B·n pairs.
  dispatch     computes only the pairs that are kept, as a mixture of experts does. Cost follows
               k·B, not n·B. For weights that are False or True.

The factored routes run the unmodified function's operations under a vmap over examples: a site is
replaced by a `Kappa`, which is multiplied, convolved and looked up without being formed. Any other
use materialises that leaf only.

Shapes: B examples, T positions, C components, n pieces of a site, S slots.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from apd_jax import components as components_lib
from apd_jax.collectives import over_components
from apd_jax.components import Components, Factors
from apd_jax.errors import InputError
from apd_jax.forward import interpret, positions
from apd_jax.forward.dispatch import Plan, make_plan
from apd_jax.forward.kappa import kappa

log = logging.getLogger(__name__)

_MOVING = 40  # multiplications that moving an entry to its component and back costs (CPU)
_TINY_LEAF = 4096  # entries up to which forming all weights beats factored products (TMS, CPU),
_LARGER = 3  # if they are no more than so many times those of the factors (40x10, 64x64, CPU)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SiteWeights:
    """What the weight of one site is in a pass: κ(x) = β(x) θ* + Σ_j w_j(x) P_j.

    pieces: w [B, n], or [B, T, n] where every position has weights of its own; bool or float.
    target: β [B], or [B, T]. None: the target's own weight takes no part.
    """

    pieces: Any
    target: Any = None


Weights = Mapping[str, SiteWeights]


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
      mask: which components are kept, or the factor of each (partial ablation): [B, C], or
        [B, T, C] where every position uses the weights in its own way.
      apply_fn, x, route, slots: as in `run`.
    Returns: what apply_fn returns, for the whole batch.
    Raises:
      InputError: a mask that does not fit, and what `run` raises.
    Cost: see `run`.
    """
    B, C = _batch_size(x), components.num_components
    if mask.ndim not in (2, 3) or (mask.shape[0], mask.shape[-1]) != (B, C):
        raise InputError(
            f"mask has shape {mask.shape}, but examples and components ask for ({B}, {C}), or "
            f"({B}, positions, {C})."
        )
    weights = {name: SiteWeights(f.take(mask)) for name, f in components.factors.items()}
    return run(apply_fn, params, components, weights, x, route=route, slots=slots)


def run(
    apply_fn: Callable,
    params: PyTree,
    components: Components,
    weights: Weights,
    x: PyTree,
    *,
    route: str = "auto",
    slots: int | None = None,
) -> Any:
    """The model with weights of its own at every site, for every example (or position).

    Args:
      apply_fn: (params, x) -> outputs [B, ...], or (outputs, hidden); called with one example at a
        time, as a batch of 1.
      weights: {site: SiteWeights}. A site that is absent keeps the target's own weight, at no cost.
        Weights [B, T, n] may only meet activations of which one axis carries the T positions.
      x: pytree of arrays with leading B.
      route: materialize | masked | dispatch (bool weights and `slots` only) | auto: materialize if
        every site is a tiny matrix, else dispatch if it can be and the rank is so large that moving
        rows about costs less, else masked; and where many rows of an example share weights
        (positions, patches) κ is formed if that takes fewer operations. If a factored route cannot
        run this function at all, auto falls back to materialize, with a warning.
      slots: S, examples (positions) per piece in the dispatch route; see `dispatch.slots_for`.
    Returns: what apply_fn returns, for the whole batch.
    Raises:
      InputError: unknown route or site; weights, components and params that do not fit together; a
        leaf that cannot differ between positions.
    Cost per site: materialize B·n·|θ|; masked B·n·m·(d_in + d_out); dispatch n·S·m·(d_in + d_out) a
      round, the rounds being ⌈examples of the most often kept piece / S⌉, mostly 1; β adds the
      target's own product. The dispatch route has no forward-mode derivative.
    """
    factors = {name: f for name, f in components.factors.items() if name in weights}
    leaves = components_lib.decomposed_leaves(components, params)
    per_position = _check(factors, weights, _batch_size(x))
    if not factors:
        return apply_fn(params, x)
    chosen = _choose(route, slots, factors, leaves, weights, per_position)
    if chosen == "materialize" and not per_position:
        return _materialized(apply_fn, params, components, weights, x)
    plans = _plans(weights, slots) if chosen == "dispatch" else {}
    flavor = "dense" if chosen == "materialize" else "cheaper" if route == "auto" else "kept"
    try:
        return _factored(apply_fn, params, factors, leaves, weights, plans, flavor, x)
    except InputError:
        raise
    except Exception as error:
        if route != "auto" or per_position:
            raise
        log.warning(
            "the factored sparse pass cannot run this function (%s); forming the weights instead.",
            _first_line(error),
        )
        return _materialized(apply_fn, params, components, weights, x)


def _factored(
    apply_fn: Callable,
    params: PyTree,
    factors: Mapping[str, Factors],
    leaves: Mapping[str, Array],
    weights: Weights,
    plans: Mapping[str, Plan],
    flavor: str,
    x: PyTree,
) -> Any:
    def one(weights_b: dict[str, tuple[Any, Any]], x_b: PyTree) -> Any:
        values = {
            name: kappa(
                factors[name],
                w,
                plans.get(name),
                like=leaves[name],
                name=name,
                flavor=flavor,
                num_examples=_num_rows(weights[name]),
                target=target,
            )
            for name, (w, target) in weights_b.items()
        }
        return _first(_interpreted(apply_fn, params, values, _batch_of_one(x_b)))

    return jax.vmap(one)(_pairs(weights), x)


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
    """apply_fn on one example, with a `Kappa` of the given weights [C] or [T, C] at every site."""
    result = together(
        apply_fn,
        params,
        components,
        weights,
        plan,
        _batch_of_one(x_b),
        flavor=flavor,
        num_examples=num_examples,
    )
    return _first(result)


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
    if flavor == "activation":
        components = _one_piece_each(components)
    values = {
        name: kappa(
            f,
            f.take(weights),
            plan,
            like=leaves[name],
            name=name,
            flavor=flavor,
            num_examples=num_examples,
        )
        for name, f in components.factors.items()
    }
    return _interpreted(apply_fn, params, values, batch)


def _interpreted(
    apply_fn: Callable, params: PyTree, values: Mapping[str, Any], batch: PyTree
) -> Any:
    """apply_fn on a batch, with Kappas in the place of the leaves of these names."""
    closed, result = jax.make_jaxpr(apply_fn, return_shape=True)(params, batch)
    named = jax.tree_util.tree_flatten_with_path(params)[0]
    own = [values.get(components_lib.path_name(path), leaf) for path, leaf in named]
    inputs = jax.tree.leaves(batch)
    lengths = {value.weights.shape[-2] for value in values.values() if value.per_position}
    scope = None
    if lengths:
        starts = [()] * len(own) + positions.of_inputs(inputs, *lengths)
        scope = positions.track(closed.jaxpr, starts)
    outs = interpret.run(closed.jaxpr, closed.consts, *own, *inputs, scope=scope)
    return jax.tree.unflatten(jax.tree.structure(result), interpret.arrays(outs))


def _one_piece_each(components: Components) -> Components:
    """Sites that hold several pieces of one component as one piece: ‖x·P‖² is no sum over them."""

    def one(f: Factors) -> Factors:
        if f.ids is None or len(set(f.ids)) == len(f.ids):
            return f
        return components_lib.aligned(Components(f, components.num_components)).tree

    return dataclasses.replace(
        components_lib.map_sites(one, components), count=components.num_components
    )


def _materialized(
    apply_fn: Callable, params: PyTree, components: Components, weights: Weights, x: PyTree
) -> Any:
    leaves = components_lib.decomposed_leaves(components, params)
    stacked = {
        name: f.weights.reshape(f.num_pieces, -1)
        for name, f in components.factors.items()
        if name in weights
    }

    def formed(name: str, total: Array, target: Array | None) -> Array:
        leaf = leaves[name]
        total = total.reshape(leaf.shape)
        if target is not None:  # after the sum over devices, which all have it
            total = target.astype(total.dtype) * leaf + total
        return total.astype(leaf.dtype)

    def one(weights_b: dict[str, tuple[Any, Any]], x_b: PyTree) -> Any:
        sums = over_components(
            {name: weights_b[name][0].astype(p.dtype) @ p for name, p in stacked.items()},
            components.axis,
        )
        kappas = {name: formed(name, total, weights_b[name][1]) for name, total in sums.items()}
        replaced = components_lib.replace_leaves(params, kappas)
        return _first(apply_fn(replaced, _batch_of_one(x_b)))

    return jax.vmap(one)(_pairs(weights), x)


# What is asked for


def _check(factors: Mapping[str, Factors], weights: Weights, B: int) -> bool:
    """Whether weights differ between positions. Raises InputError where they do not fit."""
    if unknown := set(weights) - set(factors):
        raise InputError(f"weights for {sorted(unknown)[0]!r}, which is not a decomposed leaf.")
    lengths = set()
    for name, f in factors.items():
        shape, target = weights[name].pieces.shape, weights[name].target
        if len(shape) not in (2, 3) or (shape[0], shape[-1]) != (B, f.num_pieces):
            raise InputError(
                f"the weights of site {name!r} have shape {shape}, but examples and pieces ask for "
                f"({B}, {f.num_pieces}), or ({B}, positions, {f.num_pieces})."
            )
        if target is not None and target.shape != shape[:-1]:
            raise InputError(
                f"the target's weight at site {name!r} has shape {target.shape}, but the pieces "
                f"ask for {shape[:-1]}."
            )
        lengths |= set(shape[1:-1])
    if len(lengths) > 1:
        raise InputError(f"the weights of sites are for {sorted(lengths)} positions; choose one.")
    return bool(lengths)


def _choose(
    route: str,
    slots: int | None,
    factors: Mapping[str, Factors],
    leaves: Mapping[str, Array],
    weights: Weights,
    per_position: bool,
) -> str:
    dtypes = {weights[name].pieces.dtype for name in factors}
    dispatchable = bool(slots) and dtypes == {jnp.dtype(bool)}
    chosen = route
    if route == "auto":
        tiny = all(_is_tiny(f, leaves[name]) for name, f in factors.items())
        rank = max(f.rank for f in factors.values())
        rows = max(_num_rows(own) for own in weights.values())
        B = next(iter(weights.values())).pieces.shape[0]
        # per piece and entry of a row
        moved_less = dispatchable and min(slots or 0, B) * (rank + _MOVING) < rows * rank
        chosen = "materialize" if tiny and not per_position else "masked"
        if chosen == "masked" and moved_less:
            chosen = "dispatch"
    known = ("materialize", "masked", "dispatch")
    if chosen not in known or (chosen == "dispatch" and not dispatchable):
        names = " and ".join(sorted(map(str, dtypes)))
        raise InputError(
            f"sparse route {route!r} cannot take a {names} mask with slots = {slots}; "
            "choose auto, materialize, masked, or dispatch (which needs a bool mask and slots)."
        )
    return chosen


def _is_tiny(f: Factors, leaf: Array) -> bool:
    """Whether κ itself is cheap: small, and not much larger than the factors that make it."""
    return leaf.ndim <= 2 and leaf.size <= min(_TINY_LEAF, _LARGER * f.rank * sum(leaf.shape))


def _plans(weights: Weights, slots: int | None) -> dict[str, Plan]:
    """The plan of every site. Sites that share one mask share its plan."""
    made: dict[int, Plan] = {}
    for own in weights.values():
        if id(own.pieces) not in made:
            rows = own.pieces.reshape(-1, own.pieces.shape[-1])
            made[id(own.pieces)] = make_plan(rows, min(slots or 0, rows.shape[0]))
    return {name: made[id(own.pieces)] for name, own in weights.items()}


def _pairs(weights: Weights) -> dict[str, tuple[Any, Any]]:
    return {name: (own.pieces, own.target) for name, own in weights.items()}


def _num_rows(own: SiteWeights) -> int:
    """Examples, or positions of all examples, that have weights of their own."""
    return math.prod(own.pieces.shape[:-1])


def _batch_size(x: PyTree) -> int:
    return jax.tree.leaves(x)[0].shape[0]


def _batch_of_one(x_b: PyTree) -> PyTree:
    return jax.tree.map(lambda a: a[None], x_b)


def _first(result: PyTree) -> PyTree:
    return jax.tree.map(lambda a: a[0], result)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
