"""What is seen of a batch in the target's own pass: all that gates read, and nothing else.

Shapes: B examples, T positions, C components.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from apd_jax import components as components_lib
from apd_jax.collectives import place
from apd_jax.components import Components
from apd_jax.forward import capture, positions
from apd_jax.gates.base import ATTRIBUTIONS, INPUTS, Activity, Gate, Observation
from apd_jax.methods.base import Method, Scene
from apd_jax.methods.optimizers import Trained
from apd_jax.network.outputs import position_weights, split_result
from apd_jax.network.problem import Problem
from apd_jax.network.takes import check_batch


def scene(
    method: Method,
    problem: Problem,
    gate: Gate,
    components: Components,
    params: PyTree,
    x: PyTree,
    rng: Array | None = None,
    *,
    reads: frozenset[str] | None = None,
    axis_name: str | None = None,
    component_axis: str | None = None,
) -> Scene:
    """The target's outputs on x, and what the gate reads there.

    Args:
      rng: of attributions that are estimated from random directions: a key, or one per example.
      reads: what to compute for it, if not what the gate says itself.
    """
    reads = gate.reads if reads is None else reads
    inputs, here = None, components_lib.split_over(components, component_axis)
    if INPUTS in reads:
        result, inputs = capture.inputs(
            problem.body, params, here, x, per_position=method.per_position
        )
        inputs = lax.stop_gradient(inputs)
    else:
        result = problem.body(params, x)
    out, hidden = split_result(result)

    def attribute(components: Components) -> Float[Array, "B *T C"]:
        return method.attribute(problem)(components, params, x, rng)

    attributions = None
    if ATTRIBUTIONS in reads:
        attributions = jnp.sqrt(attribute(here))
    valid = problem.valid(x)
    of_gate = valid if method.per_position else None
    seen = Observation(x, here, attributions, inputs, of_gate, axis_name, component_axis)
    weights, share = position_weights(valid, axis_name)
    of_hidden = positions.hidden_weights(problem.body, params, x, weights)
    head = problem.head(params)
    return Scene(seen, out, hidden, weights, of_hidden, share, attribute, head)


def example_keys(key: Any, x: PyTree, axis_name: str | None = None) -> Array:
    """One key per example of the whole batch: draws do not depend on the number of devices."""
    size = jax.tree.leaves(x)[0].shape[0]
    first = place(axis_name) * size
    return jax.vmap(lambda b: jax.random.fold_in(key, b))(first + jnp.arange(size))


def activity(
    method: Method, problem: Problem, trained: Trained, params: PyTree, x: PyTree
) -> Activity:
    """What the method's gate says of x: the one definition of the mask of training.

    Where the gate reads nothing, and keeps all, the scores are attributions.

    Raises:
      InputError: the network does not take x.
    """
    check_batch(problem.apply_fn, params, x)
    gate = method.gate(trained.gate, problem)
    reads = gate.reads or frozenset({ATTRIBUTIONS})
    rng = jax.random.key(method.seed)
    seen = scene(method, problem, gate, trained.components, params, x, rng, reads=reads)
    return gate(seen.seen)
