"""A decomposition of a target with one input and one output per feature: metrics and arrays.

The arrays are what figures are drawn from.
Shapes: B examples, C components, F features, V input values. A loss called "per feature" is a mean
over all outputs.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from apd_jax import components as components_lib
from apd_jax import losses
from apd_jax.components import Components
from apd_jax.decomposition import Decomposition
from apd_jax.evaluation import geometry, masks, scrub
from apd_jax.evaluation.general import STREAM, Evaluation, chosen_masks, fired
from apd_jax.forward import sparse
from apd_jax.gates.base import Activity
from apd_jax.methods import observe
from apd_jax.methods.base import Method
from apd_jax.methods.optimizers import Trained
from apd_jax.network.outputs import split_result
from apd_jax.network.problem import Problem
from apd_jax.targets.base import FeatureTarget
from apd_jax.targets.scoring import alive_components

SERVED_GAIN = 0.75  # a feature is served if its top-1 alone has more than this share of the gain
SWEEP_VALUES = 41
KEPT = ("topk", "top1", "all", "gates", "stochastic")  # the masks of minimality_*


@dataclasses.dataclass(frozen=True)
class _Model:
    """A decomposition, as the functions that an evaluation asks."""

    target: FeatureTarget
    method: Method
    problem: Problem
    params: PyTree
    trained: Trained

    @property
    def components(self) -> Components:
        return self.trained.components

    def out(self, x: Array) -> tuple[Array, Any]:
        """The target's outputs [B, F] and hidden activations."""
        return split_result(self.target.apply_fn(self.params, x))

    def activity(self, x: Array) -> Activity:
        return observe.activity(self.method, self.problem, self.trained, self.params, x)

    def sparse(self, mask: Array, x: Array) -> tuple[Array, Any]:
        apply_fn = self.target.apply_fn
        return split_result(sparse.apply(apply_fn, self.params, self.components, mask, x))

    def top1(self, scores: Array) -> Bool[Array, "B C"]:
        """The largest of every example, beside what is always on."""
        return masks.largest(scores, 1, self.method.always_on, each=True)

    @property
    def always_on(self) -> Bool[Array, "1 C"]:
        return masks.always_on(self.method.always_on, self.components.num_components)


def evaluate(
    target: FeatureTarget, decomposition: Decomposition, *, num_batches: int, seed: int
) -> Evaluation:
    """Measures a decomposition on fresh batches, on one-hot probes, and on single features.

    Batches are those of `target.sample_fn`; single features are swept in value.

    Metrics
      faithfulness, simplicity, hidden_reconstruction: as trained, the last two at the mask of
        training, on the evaluation batches.
      relative_parameter_error: Σ_l ‖θ*_l - Σ_c P_{c,l}‖² / Σ_l ‖θ*_l‖² over the decomposed leaves.
      minimality_{topk,top1,all}: MSE to the target's output with the mask of training, with the
        single largest component of every example, and with all; of gates with degrees also with
        {gates,stochastic}, see `general.chosen_masks`.
      num_alive_components: those that fire (are active with a score above 0) in the evaluation
        batches and have more than ALIVE_NORM of the largest component's norm;
        num_dead_components: the others.
      mean_active_components: firing per example.
      top1_share: share of features that one component serves. With the feature alone in the input,
        swept in value, L is the mean squared error to the *label* over all outputs: served if
        L_none - L_top1 > SERVED_GAIN · (L_none - L_target), where "none" has no component and
        "top1" the single largest. In the paper this is read off a figure, "about 80 of 100".
      Those of `geometry.scores`; and where the target has a monosemantic baseline scrub_*, the
        means of `apd_jax.evaluation.scrub`.
    Components that are always on stay on in every mask and are never a feature's own component.

    Args:
      decomposition: of one instance.
    Cost: num_batches · about ten forward passes (C times that where attributions are taken
      forward), in three XLA programs.
    """
    rest, drawn, swept, values = _measured(target, decomposition, num_batches, seed)
    per_example = {name: loss.reshape(-1) for name, loss in drawn["losses"].items()}
    firing_rates = drawn["fired"].sum(axis=0) / len(per_example["topk"])
    alive = alive_components(firing_rates, rest["norms"])
    alone = swept["losses"]
    served = alone["none"] - alone["top1"] > SERVED_GAIN * (alone["none"] - alone["target"])
    kept = {name: per_example[name] for name in KEPT if name in per_example}
    trained_at = [name for name in ("simplicity", "hidden_reconstruction") if name in drawn]
    metrics = {
        **geometry.scores(rest["component_weights"], rest["target_weights"]),
        **{name: float(rest[name]) for name in ("faithfulness", "relative_parameter_error")},
        **{f"minimality_{name}": float(loss.mean()) for name, loss in kept.items()},
        **{name: float(drawn[name].mean()) for name in trained_at},
        "num_components": len(alive),
        "num_alive_components": int(alive.sum()),
        "num_dead_components": int((~alive).sum()),
        "mean_active_components": float(firing_rates.sum()),
        "top1_share": float(served.mean()),
    }
    arrays = _arrays(rest, drawn, swept, values, firing_rates, alive)
    if target.monosemantic_fn is not None:
        scrubs = {
            f"scrub_{name}": loss
            for name, loss in per_example.items()
            if name == "topk" or name not in KEPT
        }
        metrics |= {name: float(loss.mean()) for name, loss in scrubs.items()}
        arrays |= scrubs
    return Evaluation(metrics, arrays)


def _measured(
    target: FeatureTarget, decomposition: Decomposition, num_batches: int, seed: int
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], np.ndarray]:
    """`_at_rest`, `_on_batches` and `_on_sweep`, and the values of the sweep."""
    method, problem = decomposition.method, decomposition.problem
    key = jax.random.fold_in(jax.random.key(seed), STREAM)
    params, trained = problem.params, decomposition.trained

    def model(params: PyTree, trained: Trained) -> _Model:
        return _Model(target, method, problem, params, trained)

    # Three programs: each needs something of the one before.
    rest = jax.jit(lambda p, t: _at_rest(model(p, t)))(params, trained)
    on_batches = jax.jit(lambda p, t, owner: _on_batches(model(p, t), num_batches, key, owner))
    drawn = jax.device_get(on_batches(params, trained, rest["owner"]))
    rest = jax.device_get(rest)
    lowest = -1.0 if drawn["lowest"].min() < 0 else 0.0  # signed inputs: swept over both signs
    values = np.linspace(lowest, 1.0, SWEEP_VALUES, dtype=np.float32) * target.probe_value
    swept = jax.device_get(jax.jit(lambda p, t: _on_sweep(model(p, t), values))(params, trained))
    return rest, drawn, swept, values


def _arrays(
    rest: dict[str, Any],
    drawn: dict[str, Any],
    swept: dict[str, Any],
    values: np.ndarray,
    firing_rates: np.ndarray,
    alive: np.ndarray,
) -> dict[str, np.ndarray]:
    """What figures are drawn from: of `_at_rest`, `_on_batches`, and `_on_sweep` at `values`."""
    each = geometry.per_feature(rest["component_weights"], rest["target_weights"])
    return {
        "feature_weights_target": rest["target_weights"],
        # of the summed model: not the components' sum where they are products of weights
        "feature_weights_sum": rest["sum_weights"],
        "feature_weights_components": rest["component_weights"],
        **{f"{name}_of_feature": scores for name, scores in each.items()},
        "attributions_one_hot": rest["attributions"],
        "mask_one_hot": rest["mask"],
        "component_of_feature": rest["owner"],
        "feature_of_component": np.where(alive, rest["attributions"].argmax(axis=0), -1),
        "firing_rates": firing_rates,
        "component_norms": rest["norms"],
        **{f"per_feature_loss_{name}": loss for name, loss in swept["losses"].items()},
        **{
            f"active_feature_loss_{name}": _mean_where_active(loss, drawn["active"])
            for name, loss in drawn["label_losses"].items()
        },
        "sweep_values": values,
        **{f"sweep_{name}": out for name, out in swept["outputs"].items()},
    }


def _at_rest(model: _Model) -> dict[str, Array]:
    """What needs no data: the weights, and what the gate says of one-hot probes."""
    target, params, components = model.target, model.params, model.components
    scores = model.activity(target.probes).scores
    mask = model.top1(scores)
    return {
        "attributions": scores,
        "mask": mask,
        "owner": jnp.argmax(jnp.where(mask & ~model.always_on, scores, -jnp.inf), axis=1),
        "target_weights": target.feature_weights(params, params),
        "sum_weights": target.feature_weights(params, components_lib.total(components, params)),
        "component_weights": geometry.of_components(
            partial(target.feature_weights, params), components, model.method.always_on
        ),
        "norms": components_lib.norms(components),
        "faithfulness": losses.faithfulness(components, params),
        "relative_parameter_error": components_lib.relative_parameter_error(components, params),
    }


def _on_batches(model: _Model, num_batches: int, key: Array, owner: Array) -> dict[str, Any]:
    """Everything that is measured on the batches, stacked over them: leaves [num_batches, ...]."""
    key_data, key_masks = jax.random.split(key)
    target, method = model.target, model.method
    monosemantic, hidden_coeff = target.monosemantic_fn, method.terms()["hidden_reconstruction"]

    def one(step: Array) -> dict[str, Any]:
        x = target.sample_fn(key_data, step)
        target_out, target_hidden = model.out(x)
        activity = model.activity(x)
        draws = jax.random.fold_in(key_masks, step)
        chosen = chosen_masks(activity, jax.random.fold_in(draws, 1))
        del chosen["none"]
        chosen |= {"top1": model.top1(activity.scores)}
        if monosemantic is not None:
            needed = scrub.needed(x, owner, activity.active.shape[1])
            drawn = scrub.draw_masks(draws, needed)
            chosen |= {name: mask | model.always_on for name, mask in drawn.items()}
        dtype = jnp.result_type(*chosen.values())
        stacked = jnp.stack([mask.astype(dtype) for mask in chosen.values()])
        outs, hidden = jax.lax.map(lambda m: model.sparse(m, x), stacked)  # one trace for all
        by_name = dict(zip(chosen, outs, strict=True))
        at = list(chosen).index("topk")
        measured = {
            "losses": {n: scrub.per_example_loss(out, target_out) for n, out in by_name.items()},
            "label_losses": {
                name: scrub.per_example_loss(out, target.label_fn(x)) @ (x != 0).astype(x.dtype)
                for name, out in (("target", target_out), ("topk", by_name["topk"]))
            },
            "active": jnp.sum(x != 0, axis=0),
            "lowest": jnp.min(x),
            "fired": jnp.sum(fired(activity), axis=0),
            "simplicity": losses.simplicity(model.components, activity.active, method.norm_p),
        }
        if monosemantic is not None:
            measured["losses"] |= scrub.baselines(x, target_out, monosemantic)
        if hidden_coeff.on:
            measured["hidden_reconstruction"] = losses.hidden_reconstruction(
                {name: h[at] for name, h in hidden.items()}, target_hidden
            )
        return measured

    return jax.lax.map(one, jnp.arange(num_batches))


def _on_sweep(model: _Model, values: np.ndarray) -> dict[str, Any]:
    """One feature at a time.

    outputs: of the feature itself, [V, F]; losses: to the label, mean over outputs and values, [F].
    """
    target = model.target

    def at(value: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        x = value * jnp.eye(target.num_features)
        scores = model.activity(x).scores
        outs = {
            "target": model.out(x)[0],
            "top1": model.sparse(model.top1(scores), x)[0],
            "none": model.sparse(jnp.broadcast_to(model.always_on, scores.shape), x)[0],
        }
        label = target.label_fn(x)
        per_feature = {name: scrub.per_example_loss(out, label) for name, out in outs.items()}
        own = {name: jnp.diagonal(out) for name, out in (outs | {"label": label}).items()}
        return own, per_feature

    outputs, per_feature = jax.lax.map(at, jnp.asarray(values))
    return {
        "outputs": outputs,
        "losses": {name: jnp.mean(loss, axis=0) for name, loss in per_feature.items()},
    }


def _mean_where_active(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[F] from sums and counts [num_batches, F]; NaN for a feature that no example had."""
    total, number = sums.sum(axis=0), counts.sum(axis=0)
    return np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)
