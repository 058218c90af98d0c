"""What a target network provides: its forward pass, its data and its ground truth.

Shapes: B examples, F features, d the length of the vector that a feature's truth is scored on. `params` is a nested dict of arrays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from apd_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Target:
    """A target network as pure functions; everything the decomposition, the evaluation and the pretraining need.

    Outputs of a target have one entry per feature. Samplers are pure functions of `rng` and `step`.
    """

    name: str
    num_features: int  # F
    init_fn: Callable[..., Any]  # key -> params
    apply_fn: Callable[..., Any]  # (params, x [B, F]) -> (outputs [B, F], {name: hidden activations [B, width]})
    attribution_fn: Callable[..., Any] | None  # (params, x) -> outputs: the same function, cheap in its tangents; None: use apply_fn
    loss_fn: Callable[..., Any]  # (params, x) -> scalar that pretraining minimises
    label_fn: Callable[..., Any]  # x -> [B, F], what the target is trained to output
    sample_fn: Callable[..., Any]  # (rng, step) -> x, a batch for the decomposition
    pretrain_sample_fn: Callable[..., Any]  # (rng, step) -> x, a batch for pretraining
    feature_weights: Callable[..., Any]  # (target params, weights like params) -> [F, d], row f the weights that serve feature f
    select: tuple[str, ...]  # glob patterns over dotted paths: the decomposed leaves
    uses: dict[str, int]  # {dotted path: times the forward pass uses the leaf} where it is not 1
    frozen: tuple[str, ...] = ()  # glob patterns: leaves that pretraining leaves as they were drawn
    probe_value: float = 1.0
    monosemantic_fn: Callable[..., Any] | None = None  # x -> [B, F], what one neuron per feature would give, for as many as there are

    @property
    def probes(self) -> Float[Array, "F F"]:
        """One input per feature: the feature alone, at `probe_value`."""
        return self.probe_value * jnp.eye(self.num_features)

    def num_active_fn(self, x: Float[Array, "B F"]) -> Int[Array, " B"]:
        """How many features are truly active (nonzero) in each example."""
        return jnp.sum(x != 0, axis=1, dtype=jnp.int32)


def sparse_features(key: PRNGKeyArray, batch_size: int, num_features: int, probability: float, *, signed: bool) -> Float[Array, "B F"]:
    """Independent features: each is active with `probability`, then uniform in [0, 1], or in [-1, 1] if signed; else 0.

    One 32-bit draw per entry decides both: an entry is active where its bits lie below p·2³², and given that, bits/(p·2³²) is
    again uniform. At p = 0.01 that leaves 4·10⁷ distinct values, more than float32 resolves near 1.
    """
    limit = probability * 2.0**32
    bits = jax.random.bits(key, (batch_size, num_features), jnp.uint32)
    value = bits.astype(jnp.float32) / limit
    return jnp.where(bits <= jnp.uint32(math.ceil(limit) - 1), 2 * value - 1 if signed else value, 0.0)


def feature_sampler(batch_size: int, num_features: int, probability: float, *, signed: bool) -> Callable[..., Float[Array, "B F"]]:
    """(rng, step) -> `sparse_features`, from `fold_in(rng, step)`.

    Raises:
      InputError: a batch below 1, or a probability outside (0, 1].
    """
    at_least_one(batch_size=batch_size)
    if not 0 < probability <= 1:
        raise InputError(f"feature_probability must lie in (0, 1]; got {probability}.")
    return lambda rng, step: sparse_features(jax.random.fold_in(rng, step), batch_size, num_features, probability, signed=signed)


def identity(key: PRNGKeyArray, shape: tuple[int, int]) -> Float[Array, "n m"]:
    """The identity, as an initialiser of a fixed matrix."""
    return jnp.eye(*shape)


def at_least_one(**sizes: int) -> None:
    """Raises InputError for the first size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} must be at least 1; got {size}.")
