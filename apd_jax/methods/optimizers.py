"""The optimizers of a method, for its components and its gate."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from apd_jax.components import Components
from apd_jax.methods import schedules

KINDS = ("adam", "adamw", "sgd")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trained:
    """What gradients are taken of."""

    components: Components
    gate: PyTree = ()


def one_instance(tree: PyTree, i: int) -> PyTree:
    """Instance i of arrays with a leading axis of instances."""
    return jax.tree.map(lambda a: a[i], tree)


def instances(tree: PyTree, method: Any) -> list[PyTree]:
    """Without an axis of instances: one, or as many as were trained side by side."""
    count = method.num_instances
    return [tree] if count == 1 else [one_instance(tree, i) for i in range(count)]


def make(method: Any, gate_learning_rate: Any = None) -> optax.GradientTransformation:
    """The optax optimizer that `method.optimizer` names, at the scheduled learning rate.

    The components' gradient is first cut to `method.gradient_clip` in norm, the gate's never. A
    gate with a learning rate of its own has that rate's share of every update.
    """
    rate = schedules.learning_rate(
        method.schedule, method.learning_rate, method.num_steps, method.warmup_fraction
    )
    if method.optimizer == "adamw":
        steps = [optax.adamw(rate, weight_decay=method.weight_decay)]
    else:
        steps = [{"adam": optax.adam, "sgd": optax.sgd}[method.optimizer](rate)]
    if method.gradient_clip is not None:
        steps.insert(0, optax.stateless(_clipped(method.gradient_clip)))
    if gate_learning_rate is not None:
        steps.append(optax.stateless(_gate_times(gate_learning_rate / method.learning_rate)))
    return steps[0] if len(steps) == 1 else optax.chain(*steps)


def _clipped(most: float) -> Any:
    def clip(updates: Trained, _: Any) -> Trained:
        norm = optax.tree.norm(updates.components)
        factor = jnp.minimum(1.0, most / (norm + 1e-6))
        components = jax.tree.map(lambda g: g * factor, updates.components)
        return dataclasses.replace(updates, components=components)

    return clip


def _gate_times(factor: Any) -> Any:
    def scale(updates: Trained, _: Any) -> Trained:
        return dataclasses.replace(updates, gate=jax.tree.map(lambda g: factor * g, updates.gate))

    return scale
