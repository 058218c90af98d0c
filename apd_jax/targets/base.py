"""What a target network provides: its forward pass, its data and its ground truth.

Shapes: B examples, F features, d the length of the vector that a feature's truth is scored on. `params` is a nested dict of arrays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from apd_jax.errors import InputError
from apd_jax.network.problem import Problem
from apd_jax.targets.chain import Layer


@dataclasses.dataclass(frozen=True)
class Panel:
    """What one figure of a target shows: a matrix as a heat map, or lines over x. The caption says what good looks like."""

    title: str
    caption: str
    xlabel: str
    ylabel: str
    matrix: np.ndarray | None = (
        None  # [rows, columns], drawn from 0 up, or around 0 if it has negative entries
    )
    unit: str = ""  # of the matrix's entries
    rows: Sequence[str] = ()  # names of the matrix's rows; () numbers them
    columns: Sequence[str] = ()
    x: np.ndarray | None = None  # [n], for lines
    lines: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # {label: [n]}


@dataclasses.dataclass(frozen=True)
class Score:
    """How a decomposition compares with what is known of its target."""

    metrics: dict[str, float | int]  # flat, by the names that `evaluation.json` shall have
    labels: dict[str, str] = dataclasses.field(
        default_factory=dict
    )  # {metric: what it says and what is good}, for the table
    panels: dict[str, Panel] = dataclasses.field(default_factory=dict)  # {file name: figure}


@dataclasses.dataclass(frozen=True)
class Target:
    """A target network as pure functions. Samplers are pure functions of `rng` and `step`."""

    name: str
    init_fn: Callable[
        ..., Any
    ]  # key -> params: fresh weights, or the finished network where there is no loss_fn
    apply_fn: Callable[
        ..., Any
    ]  # (params, x) -> outputs [B, ...], or (outputs, {name: hidden activations [B, ...]})
    sample_fn: Callable[..., Any]  # (rng, step) -> x, a batch for the decomposition
    select: tuple[str, ...]  # glob patterns over dotted paths: the decomposed leaves
    attribution_fn: Callable[..., Any] | None = (
        None  # (params, x) -> outputs: the same function, cheap in its tangents; None: apply_fn
    )
    loss_fn: Callable[..., Any] | None = (
        None  # (params, batch) -> scalar that pretraining minimises; None: built, not trained
    )
    pretrain_sample_fn: Callable[..., Any] | None = None  # (rng, step) -> batch for loss_fn
    uses: Mapping[str, int] = dataclasses.field(
        default_factory=dict
    )  # {dotted path: times the forward pass uses the leaf} where not 1
    frozen: tuple[str, ...] = ()  # glob patterns: leaves that pretraining leaves as they were drawn
    num_active_fn: Callable[..., Any] | None = None  # x -> [B], how many features are truly active
    score_fn: Callable[..., Score] | None = (
        None  # (Decomposition, key, alive [C]) -> Score, against what is known of this target
    )
    layers: tuple[
        Layer, ...
    ] = ()  # the same function as apply_fn's outputs, on x [B, F], where it is such a chain

    def problem(self, params: PyTree) -> Problem:
        """The decomposition of these weights, as `apd_jax.train.fit` takes it."""
        return Problem(
            self.apply_fn,
            params,
            self.sample_fn,
            self.attribution_fn,
            self.num_active_fn,
            select=self.select,
            uses=self.uses,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureTarget(Target):
    """A target whose inputs and outputs have one entry per feature: x [B, F] -> [B, F]."""

    num_features: int  # F
    label_fn: Callable[..., Any]  # x -> [B, F], what the target is trained to output
    feature_weights: Callable[
        ..., Any
    ]  # (target params, weights like params) -> [F, d], row f the weights that serve feature f
    probe_value: float = 1.0
    monosemantic_fn: Callable[..., Any] | None = (
        None  # x -> [B, F], what one neuron per feature would give, for as many as there are
    )

    @property
    def probes(self) -> Float[Array, "F F"]:
        """One input per feature: the feature alone, at `probe_value`."""
        return self.probe_value * jnp.eye(self.num_features)


def num_nonzero(x: Float[Array, "B F"]) -> Int[Array, " B"]:
    """How many features are active (nonzero) in each example."""
    return jnp.sum(x != 0, axis=1, dtype=jnp.int32)


def sparse_features(
    key: PRNGKeyArray, batch_size: int, num_features: int, probability: float, *, signed: bool
) -> Float[Array, "B F"]:
    """Independent features: each is active with `probability`, then uniform in [0, 1], or in [-1, 1] if signed; else 0.

    One 32-bit draw per entry decides both: an entry is active where its bits lie below p·2³², and given that, bits/(p·2³²) is
    again uniform. At p = 0.01 that leaves 4·10⁷ distinct values, more than float32 resolves near 1.
    """
    limit = probability * 2.0**32
    bits = jax.random.bits(key, (batch_size, num_features), jnp.uint32)
    value = bits.astype(jnp.float32) / limit
    return jnp.where(
        bits <= jnp.uint32(math.ceil(limit) - 1), 2 * value - 1 if signed else value, 0.0
    )


def feature_sampler(
    batch_size: int, num_features: int, probability: float, *, signed: bool
) -> Callable[..., Float[Array, "B F"]]:
    """(rng, step) -> `sparse_features`, from `fold_in(rng, step)`.

    Raises:
      InputError: a batch below 1, or a probability outside (0, 1].
    """
    at_least_one(batch_size=batch_size)
    if not 0 < probability <= 1:
        raise InputError(f"feature_probability must lie in (0, 1]; got {probability}.")
    return lambda rng, step: sparse_features(
        jax.random.fold_in(rng, step), batch_size, num_features, probability, signed=signed
    )


def identity(key: PRNGKeyArray, shape: tuple[int, int]) -> Float[Array, "n m"]:
    """The identity, as an initialiser of a fixed matrix."""
    return jnp.eye(*shape)


def at_least_one(**sizes: int) -> None:
    """Raises InputError for the first size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} must be at least 1; got {size}.")
