"""One APD train step, in the paper's order; all of it one XLA program.

Shapes: B examples (of this device), C components. `params` are the target's, θ*; `components` are the P_c.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from apd_jax import attributions as attributions_lib
from apd_jax import components as components_lib
from apd_jax import losses, masks, schedules, sparse
from apd_jax.components import Components
from apd_jax.config import Config
from apd_jax.errors import InputError

Metrics = dict[str, Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes during training; random draws come from `fold_in(key, step)`, so there is no RNG state."""

    step: Int[Array, ""]
    components: Components
    opt_state: optax.OptState


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """The optax optimizer that `config.optimizer` names, at the scheduled learning rate."""
    rate = schedules.learning_rate(config.schedule, config.learning_rate, config.num_steps, config.warmup_fraction)
    if config.optimizer == "adamw":
        return optax.adamw(rate, weight_decay=config.weight_decay)
    return {"adam": optax.adam, "sgd": optax.sgd}[config.optimizer](rate)


def init_state(
    rng: PRNGKeyArray, params: PyTree, config: Config, *, select: components_lib.Select = None, uses: Mapping[str, int] | None = None
) -> TrainState:
    """Step 0 with random components."""
    components = components_lib.init(
        rng, params, num_components=config.num_components, rank=config.rank, init_scale=config.init_scale, select=select, uses=uses
    )
    return TrainState(jnp.zeros((), jnp.int32), components, make_optimizer(config).init(components))


def make_mask_fn(config: Config, *, num_active_fn: Callable | None = None, axis_name: str | None = None) -> Callable:
    """(attributions [B, C], x) -> mask [B, C], bool: which components are kept, as `config.mask` says.

    The first `num_always_on` components are always kept and not counted in k.

    Raises:
      InputError: mask = "exact" for a target that does not know how many features are active.
    """
    if config.mask == "exact" and num_active_fn is None:
        raise InputError(
            "mask = 'exact' keeps as many components as features are active, which this target does not tell; use mask = 'batch_topk'."
        )

    def choose(attributions, x) -> Bool[Array, "B C"]:
        if config.mask == "batch_topk":
            return masks.batch_topk(attributions, config.topk, axis_name=axis_name)
        if config.mask == "topk":
            return masks.topk(attributions, int(config.topk))
        if config.mask == "exact" and num_active_fn is not None:
            num = jnp.sum(num_active_fn(x), dtype=jnp.int32)
            return masks.batch_largest(attributions, num if axis_name is None else lax.psum(num, axis_name), axis_name=axis_name)
        return jnp.ones(attributions.shape, jnp.bool_)

    def mask_fn(attributions: Float[Array, "B C"], x: PyTree) -> Bool[Array, "B C"]:
        n = config.num_always_on
        chosen = choose(attributions[:, n:], x)
        return jnp.concatenate([jnp.ones((chosen.shape[0], n), jnp.bool_), chosen], axis=1)

    return mask_fn


def make_step(
    apply_fn: Callable,
    sample_fn: Callable,
    config: Config,
    *,
    attribution_fn: Callable | None = None,
    num_active_fn: Callable | None = None,
    axis_name: str | None = None,
) -> Callable[[TrainState, PyTree, PRNGKeyArray], tuple[TrainState, Metrics]]:
    """The train step `(state, target_params, key) -> (state, metrics)`, pure and ready for jit, scan, vmap or pmap.

    Args:
      apply_fn: (params, x) -> outputs [B, ...], or (outputs, hidden).
      sample_fn: (key, step) -> x, the batch of *all* devices; each device takes its slice of it.
      attribution_fn: the same function as apply_fn (outputs only), associated so that its tangents are cheaper.
      num_active_fn: x -> [B], number of truly active features (mask = "exact").
      axis_name: the mapped axis over which the batch is split.
    Returns: metrics holds every loss term before its coefficient, their weighted sum `total`, and `mean_active`.
    """
    optimizer = make_optimizer(config)
    mask_fn = make_mask_fn(config, num_active_fn=num_active_fn, axis_name=axis_name)
    attribution_fn = attribution_fn or apply_fn
    use_sparse = config.minimality_coeff > 0 or config.hidden_reconstruction_coeff > 0
    use_lp = config.attribution_lp_coeff > 0
    coefficients = {
        "faithfulness": config.faithfulness_coeff,
        "minimality": config.minimality_coeff,
        "hidden_reconstruction": config.hidden_reconstruction_coeff,
        "simplicity": config.simplicity_coeff,
        "attribution_lp": config.attribution_lp_coeff,
    }

    def attribute(components, params, x):
        at = components_lib.total(lax.stop_gradient(components), params) if config.attributions_at == "components" else params
        return attributions_lib.gradient_squared(attribution_fn, at, components, x, mode=config.attribution_mode)

    def loss_terms(components, params, x, mask) -> Metrics:
        terms = {}
        if config.faithfulness_coeff > 0:
            terms["faithfulness"] = losses.faithfulness(components, params)
        if use_sparse:
            target_out, target_hidden = split_result(apply_fn(params, x))
            slots = None if config.mask == "none" or config.num_always_on else sparse.slots_for(config.topk, mask.shape[0], mask.shape[1])
            result = sparse.apply(apply_fn, params, components, mask, x, route=config.sparse_route, slots=slots)
            sparse_out, sparse_hidden = split_result(result)
            if config.minimality_coeff > 0:
                terms["minimality"] = losses.minimality(sparse_out, target_out, config.minimality_loss)
            if config.hidden_reconstruction_coeff > 0:
                terms["hidden_reconstruction"] = losses.hidden_reconstruction(sparse_hidden, target_hidden)
        active = mask
        if use_lp:  # the one variant in which gradients flow through the attributions
            powers = losses.attribution_lp(attribute(components, params, x), config.attribution_lp_p)
            terms["attribution_lp"] = jnp.mean(jnp.sum(powers, axis=1))
            active = powers if config.mask == "none" else mask
        if config.simplicity_coeff > 0:
            terms["simplicity"] = losses.simplicity(components, active, config.schatten_p)
        return terms

    def step(state: TrainState, params: PyTree, key: PRNGKeyArray) -> tuple[TrainState, Metrics]:
        x = _local_batch(sample_fn(key, state.step), axis_name)
        components = components_lib.normalize_U(state.components) if config.unit_norm_U else state.components

        if config.mask == "none":
            mask = mask_fn(jnp.zeros((jax.tree.leaves(x)[0].shape[0], config.num_components)), x)
        else:
            mask = mask_fn(attribute(components, params, x), x)

        def loss(components):
            terms = loss_terms(components, params, x, mask)
            return sum(coefficients[name] * term for name, term in terms.items()), terms

        (total, terms), gradient = jax.value_and_grad(loss, has_aux=True)(components)
        metrics = {"total": total, **terms, "mean_active": jnp.mean(jnp.sum(mask, axis=1, dtype=jnp.float32))}
        if axis_name is not None:
            gradient, metrics = lax.pmean((gradient, metrics), axis_name)
        if config.unit_norm_U:
            gradient = components_lib.project_U_gradient(gradient, components)

        updates, opt_state = optimizer.update(gradient, state.opt_state, components)
        return TrainState(state.step + 1, optax.apply_updates(components, updates), opt_state), metrics

    return step


def scan_steps(step: Callable, num_steps: int) -> Callable:
    """`num_steps` steps in one program: (state, params, key) -> (state, metrics stacked over steps)."""

    def many(state, params, key):
        return lax.scan(lambda state, _: step(state, params, key), state, None, length=num_steps)

    return many


def split_result(result: Any) -> tuple[Any, Any]:
    """(outputs, hidden) of an `apply_fn` result; hidden is empty when it returns outputs only."""
    return result if isinstance(result, tuple) else (result, {})


def _local_batch(x: PyTree, axis_name: str | None) -> PyTree:
    """This device's slice of the batch. Every device draws the whole batch: the draw is then the same on any number of devices."""
    if axis_name is None:
        return x
    devices, index = lax.axis_size(axis_name), lax.axis_index(axis_name)

    def cut(a):
        size = a.shape[0] // devices
        return lax.dynamic_slice_in_dim(a, index * size, size)

    return jax.tree.map(cut, x)
