"""What a target network provides: its forward pass, its data and its ground truth.

Shapes: B examples, F features, d the length of a feature's weight vector (in TMS, its row of W).
`params` is a nested dict of arrays.
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

Config = Any  # an experiment's `config.target`, a ConfigDict


@dataclasses.dataclass(frozen=True)
class Panel:
    """One figure as data: a matrix drawn as a heat map, or lines over x.

    The caption says what is shown and what a good decomposition looks like.
    """

    title: str
    caption: str
    xlabel: str
    ylabel: str
    # [rows, columns]. The colours start at 0, or are centred on 0 if an entry is negative.
    matrix: np.ndarray | None = None
    unit: str = ""  # of the matrix's entries
    rows: Sequence[str] = ()  # names of the matrix's rows; () numbers them
    columns: Sequence[str] = ()
    x: np.ndarray | None = None  # [n], for lines
    lines: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # {label: [n]}


@dataclasses.dataclass(frozen=True)
class Score:
    """How a decomposition compares with what is known of its target."""

    metrics: dict[str, float | int]  # flat, by their names in `evaluation.json`
    # {metric: what it says, and its value for a good decomposition}, for the table
    labels: dict[str, str] = dataclasses.field(default_factory=dict)
    panels: dict[str, Panel] = dataclasses.field(default_factory=dict)  # {file name: figure}


@dataclasses.dataclass(frozen=True)
class Target:
    """A target network as pure functions. Samplers are pure functions of `rng` and `step`."""

    name: str
    # key -> params: initial weights, or the finished network where there is no loss_fn
    init_fn: Callable[..., Any]
    # (params, x) -> outputs [B, ...], or (outputs, {name: hidden activations [B, ...]})
    apply_fn: Callable[..., Any]
    # (rng, step) -> x, a batch for the decomposition
    sample_fn: Callable[..., Any]
    # glob patterns over dotted paths: the sites (decomposed leaves)
    select: tuple[str, ...]
    # (params, x) -> outputs: the same function with cheaper directional derivatives;
    # None: apply_fn
    attribution_fn: Callable[..., Any] | None = None
    # (params, batch) -> scalar that pretraining minimises; None: the weights are not trained
    loss_fn: Callable[..., Any] | None = None
    # (rng, step) -> batch for loss_fn
    pretrain_sample_fn: Callable[..., Any] | None = None
    # {dotted path: how often the forward pass uses the leaf}, where that is not once
    uses: Mapping[str, int] = dataclasses.field(default_factory=dict)
    # glob patterns: leaves that pretraining does not change
    frozen: tuple[str, ...] = ()
    # x -> [B], how many features are truly active
    num_active_fn: Callable[..., Any] | None = None
    # (Decomposition, key, alive [C]) -> Score, against the known mechanisms of this target
    score_fn: Callable[..., Score] | None = None
    # params -> params: what pretraining ends with; None leaves them as they are
    finish_fn: Callable[..., Any] | None = None
    # apply_fn's outputs as a list of layers on x [B, F]; () where it is not such a chain
    layers: tuple[Layer, ...] = ()

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
    # (target params, weights like params) -> [F, d]: row f holds the weights that serve feature f
    feature_weights: Callable[..., Any]
    probe_value: float = 1.0
    # x -> [B, F], the outputs if each neuron served one feature: the first features get one each,
    # the features left over get none
    monosemantic_fn: Callable[..., Any] | None = None

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
    """Independent features: each is active with `probability` p, else 0.

    An active one is uniform in [0, 1], or in [-1, 1] if signed.

    One 32-bit draw per entry decides both. An entry is active where its bits lie below p·2³²;
    given that, bits/(p·2³²) is again uniform. At p = 0.01 there are 4·10⁷ distinct values,
    more than float32 resolves near 1.
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
