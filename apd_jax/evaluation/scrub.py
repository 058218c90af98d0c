"""Causal scrubbing: does an input need the components of its active features, and no others?

Every active feature is mapped to the component that is top-1 on its one-hot input. Those of the
active features are forced on (scrubbed: should cost little) or off (antiscrubbed: should cost
much), and all others are switched at random.

Shapes: B examples, C components, F features. Losses are per example, mean_o (out - target_out)²,
against the *target's* output.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


def needed(
    x: Float[Array, "B F"], component_of_feature: Int[Array, " F"], num_components: int
) -> Bool[Array, "B C"]:
    """The components of the features that are active (nonzero) in each example."""
    owners = jax.nn.one_hot(component_of_feature, num_components)
    return (x != 0).astype(owners.dtype) @ owners > 0


def scrub(mask: Bool[Array, "B C"], needed: Bool[Array, "B C"]) -> Bool[Array, "B C"]:
    """A mask with the needed components forced on."""
    return mask | needed


def antiscrub(mask: Bool[Array, "B C"], needed: Bool[Array, "B C"]) -> Bool[Array, "B C"]:
    """A mask with the needed components forced off."""
    return mask & ~needed


def draw_masks(rng: PRNGKeyArray, needed: Bool[Array, "B C"]) -> dict[str, Bool[Array, "B C"]]:
    """The masks `scrubbed`, `antiscrubbed` and `random`.

    Each begins with a random half of all components, drawn for it alone.
    """
    draws = jax.random.bernoulli(rng, 0.5, (3, *needed.shape))
    return {
        "scrubbed": scrub(draws[0], needed),
        "antiscrubbed": antiscrub(draws[1], needed),
        "random": draws[2],
    }


def per_example_loss(
    out: Float[Array, "B O"], target_out: Float[Array, "B O"]
) -> Float[Array, " B"]:
    """mean_o (out - target_out)²."""
    return jnp.mean((out - target_out) ** 2, axis=1)


def baselines(
    x: Float[Array, "B F"], target_out: Float[Array, "B F"], monosemantic_fn: Callable
) -> dict[str, Float[Array, " B"]]:
    """Losses without any component.

    zero: the output is 0. monosemantic: each neuron serves one feature, so the output is x but for
      the first features, whose outputs are those of the label.
    """
    return {
        "zero": per_example_loss(jnp.zeros_like(target_out), target_out),
        "monosemantic": per_example_loss(monosemantic_fn(x), target_out),
    }
