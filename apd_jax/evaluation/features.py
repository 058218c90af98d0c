"""A decomposition of a target with one input and one output per feature: its metrics, and the arrays that the figures are drawn from.

Shapes: B examples, C components, F features, V input values. A loss called "per feature" is a mean over all outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PRNGKeyArray, PyTree

from apd_jax import components as components_lib
from apd_jax import losses
from apd_jax.components import Components
from apd_jax.evaluation import geometry, scrub
from apd_jax.evaluation.general import STREAM, Evaluation
from apd_jax.forward import sparse
from apd_jax.methods.config import Config
from apd_jax.targets.base import FeatureTarget
from apd_jax.targets.scoring import alive_components
from apd_jax.train import step as step_lib

SERVED_GAIN = 0.75  # a feature is served by its top-1 component if that alone gives more than this part of the target's gain
SWEEP_VALUES = 41


@dataclasses.dataclass(frozen=True)
class _Model:
    """A decomposition, as the functions that an evaluation asks."""

    target: Callable  # x -> (outputs [B, F], hidden)
    attributions: Callable  # x -> [B, C]
    sparse: Callable  # (mask, x) -> (outputs [B, F], hidden)
    trained_mask: Callable  # (attributions, x) -> mask as in training
    top1: Callable  # the same, of the largest per example
    always_on: Array  # [1, C], the mask of none but the components that are always on


def evaluate(
    target: FeatureTarget, params: PyTree, components: Components, config: Config
) -> Evaluation:
    """Measures a decomposition on fresh batches of `target.sample_fn`, on one-hot probes, and on single features swept in value.

    Metrics
      faithfulness, simplicity, hidden_reconstruction: as trained, the last two at the mask of training, on the evaluation batches.
      relative_parameter_error: Σ_l ‖θ*_l - Σ_c P_{c,l}‖² / Σ_l ‖θ*_l‖² over the decomposed leaves.
      minimality_{topk,top1,all}: MSE to the target's output with the mask of training (batch top-k at `apd.topk` where it trained with
        "none", "exact" or "threshold"), with the single largest component of every example, and with all.
      num_alive_components: those that fire (are kept with an attribution above 0, or above the threshold of "threshold") in the
        evaluation batches and have more than ALIVE_NORM of the largest component's norm; num_dead_components: the others.
      mean_active_components: firing per example.
      top1_share: share of features that one component serves. With the feature alone in the input, swept in value, L is the mean
        squared error to the *label* over all outputs: served if L_none - L_top1 > SERVED_GAIN · (L_none - L_target), where "none" has no
        component and "top1" the single largest. In the paper this is read off a figure, "about 80 of 100".
      Those of `geometry.scores`; and where the target has a monosemantic baseline scrub_*, the means of `apd_jax.evaluation.scrub`.
    Always-on components (`apd.num_always_on`) stay on in every mask and are never a feature's own component.

    Args:
      components: of one instance.
      config: the experiment's; reads `apd` and `evaluation` (num_batches, seed). The batch size is that of `target.sample_fn`.
    Cost: num_batches · about ten forward passes (C times that where attributions are taken forward), in three XLA programs.
    """
    apd = config.apd
    key = jax.random.fold_in(jax.random.key(config.evaluation.seed), STREAM)

    # Three programs: each needs something of the one before.
    rest = jax.jit(
        lambda p, c: _at_rest(_model(target, p, c, apd), target, p, c, apd.num_always_on)
    )(params, components)
    measure = jax.jit(
        lambda p, c, owner: _on_batches(_model(target, p, c, apd), target, c, config, key, owner)
    )
    drawn = jax.device_get(measure(params, components, rest["owner"]))
    rest = jax.device_get(rest)
    lowest = -1.0 if drawn["lowest"].min() < 0 else 0.0  # signed inputs are swept over both signs
    values = np.linspace(lowest, 1.0, SWEEP_VALUES, dtype=np.float32) * target.probe_value
    swept = jax.device_get(
        jax.jit(lambda p, c: _on_sweep(_model(target, p, c, apd), target, values))(
            params, components
        )
    )

    per_example = {name: loss.reshape(-1) for name, loss in drawn["losses"].items()}
    firing_rates = drawn["fired"].sum(axis=0) / len(per_example["topk"])
    alive = alive_components(firing_rates, rest["norms"])
    alone = swept["losses"]
    served = alone["none"] - alone["top1"] > SERVED_GAIN * (alone["none"] - alone["target"])

    metrics = {
        **geometry.scores(rest["component_weights"], rest["target_weights"]),
        **{name: float(rest[name]) for name in ("faithfulness", "relative_parameter_error")},
        **{
            f"minimality_{name}": float(per_example[name].mean())
            for name in ("topk", "top1", "all")
        },
        **{
            name: float(drawn[name].mean())
            for name in ("simplicity", "hidden_reconstruction")
            if name in drawn
        },
        "num_components": len(alive),
        "num_alive_components": int(alive.sum()),
        "num_dead_components": int((~alive).sum()),
        "mean_active_components": float(firing_rates.sum()),
        "top1_share": float(served.mean()),
    }
    arrays = {
        "feature_weights_target": rest["target_weights"],
        "feature_weights_sum": rest[
            "sum_weights"
        ],  # of the summed model: not the components' sum where they are products of weights
        "feature_weights_components": rest["component_weights"],
        **{
            f"{name}_of_feature": values
            for name, values in geometry.per_feature(
                rest["component_weights"], rest["target_weights"]
            ).items()
        },
        "attributions_one_hot": rest["attributions"],
        "mask_one_hot": rest["mask"],
        "component_of_feature": rest["owner"],
        "feature_of_component": np.where(alive, rest["attributions"].argmax(axis=0), -1),
        "firing_rates": firing_rates,
        "component_norms": rest["norms"],
        **{f"per_feature_loss_{name}": loss for name, loss in alone.items()},
        **{
            f"active_feature_loss_{name}": _mean_where_active(loss, drawn["active"])
            for name, loss in drawn["label_losses"].items()
        },
        "sweep_values": values,
        **{f"sweep_{name}": out for name, out in swept["outputs"].items()},
    }
    if target.monosemantic_fn is not None:
        scrubs = {
            f"scrub_{name}": loss
            for name, loss in per_example.items()
            if name not in ("top1", "all")
        }
        metrics |= {name: float(loss.mean()) for name, loss in scrubs.items()}
        arrays |= scrubs
    return Evaluation(metrics, arrays)


def _model(target: FeatureTarget, params: PyTree, components: Components, apd: Config) -> _Model:
    attribute = step_lib.make_attribution_fn(
        target.apply_fn, apd, attribution_fn=target.attribution_fn
    )
    rng = jax.random.key(apd.seed)
    return _Model(
        target=lambda x: target.apply_fn(params, x),
        attributions=lambda x: jnp.sqrt(attribute(components, params, x, rng)),
        sparse=lambda mask, x: sparse.apply(target.apply_fn, params, components, mask, x),
        trained_mask=_mask_fn(apd, mask="topk" if apd.mask == "topk" else "batch_topk"),
        top1=_mask_fn(apd, mask="topk", topk=1.0),
        always_on=jnp.arange(components.num_components)[None, :] < apd.num_always_on,
    )


def _mask_fn(apd: Config, **changes: Any) -> Callable[..., Bool[Array, "B C"]]:
    settings = apd.copy_and_resolve_references()
    settings.update(changes)
    return step_lib.make_mask_fn(settings)


def _at_rest(
    model: _Model, target: FeatureTarget, params: PyTree, components: Components, num_always_on: int
) -> dict[str, Array]:
    """What needs no data: the weights, and the attributions of one-hot probes."""
    x = target.probes
    attributions = model.attributions(x)
    mask = model.top1(attributions, x)
    leaves = components_lib.decomposed_leaves(components, params)
    error = sum(
        jnp.sum((components_lib.leaf_total(f) - leaves[name]) ** 2)
        for name, f in components.factors.items()
    )
    return {
        "attributions": attributions,
        "mask": mask,
        "owner": jnp.argmax(jnp.where(mask & ~model.always_on, attributions, -1.0), axis=1),
        "target_weights": target.feature_weights(params, params),
        "sum_weights": target.feature_weights(params, components_lib.total(components, params)),
        "component_weights": geometry.of_components(
            partial(target.feature_weights, params), components, num_always_on
        ),
        "norms": jnp.sqrt(
            jnp.maximum(sum(components_lib.squared_norms(components).values(), jnp.zeros(())), 0)
        ),
        "faithfulness": losses.faithfulness(components, params),
        "relative_parameter_error": jnp.asarray(error)
        / sum(jnp.sum(leaf**2) for leaf in leaves.values()),
    }


def _on_batches(
    model: _Model,
    target: FeatureTarget,
    components: Components,
    config: Config,
    key: PRNGKeyArray,
    owner: Array,
) -> dict[str, Any]:
    """Everything that is measured on the evaluation batches, stacked over them: leaves [num_batches, ...]."""
    key_data, key_masks = jax.random.split(key)
    apd = config.apd

    def one(step: Array) -> dict[str, Any]:
        x = target.sample_fn(key_data, step)
        target_out, target_hidden = model.target(x)
        attributions = model.attributions(x)
        mask = model.trained_mask(attributions, x)
        chosen = {"topk": mask, "top1": model.top1(attributions, x), "all": jnp.ones_like(mask)}
        if target.monosemantic_fn is not None:
            needed = scrub.needed(x, owner, mask.shape[1])
            drawn = scrub.draw_masks(jax.random.fold_in(key_masks, step), needed)
            chosen |= {name: drawn_mask | model.always_on for name, drawn_mask in drawn.items()}
        outs, hidden = jax.lax.map(
            lambda m: model.sparse(m, x), jnp.stack(list(chosen.values()))
        )  # one trace for all masks
        measured = {
            "losses": {
                name: scrub.per_example_loss(out, target_out)
                for name, out in zip(chosen, outs, strict=True)
            },
            "label_losses": {
                name: scrub.per_example_loss(out, target.label_fn(x)) @ (x != 0).astype(x.dtype)
                for name, out in (("target", target_out), ("topk", outs[0]))
            },
            "active": jnp.sum(x != 0, axis=0),
            "lowest": jnp.min(x),
            "fired": jnp.sum(
                mask & (attributions > (apd.threshold if apd.mask == "threshold" else 0)), axis=0
            ),
            "simplicity": losses.simplicity(components, mask, apd.schatten_p),
        }
        if target.monosemantic_fn is not None:
            measured["losses"] |= scrub.baselines(x, target_out, target.monosemantic_fn)
        if apd.hidden_reconstruction_coeff > 0:
            measured["hidden_reconstruction"] = losses.hidden_reconstruction(
                {name: h[0] for name, h in hidden.items()}, target_hidden
            )
        return measured

    return jax.lax.map(one, jnp.arange(config.evaluation.num_batches))


def _on_sweep(model: _Model, target: FeatureTarget, values: np.ndarray) -> dict[str, Any]:
    """One feature at a time. outputs: of the feature itself, [V, F]; losses: to the label, mean over outputs and values, [F]."""

    def at(value: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        x = value * jnp.eye(target.num_features)
        attributions = model.attributions(x)
        outs = {
            "target": model.target(x)[0],
            "top1": model.sparse(model.top1(attributions, x), x)[0],
            "none": model.sparse(jnp.broadcast_to(model.always_on, attributions.shape), x)[0],
        }
        label = target.label_fn(x)
        per_feature = {name: scrub.per_example_loss(out, label) for name, out in outs.items()}
        return {
            name: jnp.diagonal(out) for name, out in (outs | {"label": label}).items()
        }, per_feature

    outputs, per_feature = jax.lax.map(at, jnp.asarray(values))
    return {
        "outputs": outputs,
        "losses": {name: jnp.mean(loss, axis=0) for name, loss in per_feature.items()},
    }


def _mean_where_active(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[F] from sums and counts [num_batches, F]; NaN for a feature that no example had."""
    total, number = sums.sum(axis=0), counts.sum(axis=0)
    return np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)
