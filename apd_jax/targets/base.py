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

from apd_jax.errors import InputError, one_of
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
    # x -> bool [B, T], which positions count; None: all
    valid_fn: Callable[..., Any] | None = None
    # (rng, step) -> x, the second stream of data, of methods that have one
    elsewhere_fn: Callable[..., Any] | None = None
    # (rng, step) -> x, data that no training sees; None: sample_fn, whose draws never come again
    held_out_fn: Callable[..., Any] | None = None
    # run's folder -> None: writes there what `build` is to find again, once the folder is claimed
    keep_fn: Callable[..., Any] | None = None

    @property
    def fresh_fn(self) -> Callable[..., Any]:
        """(rng, step) -> x, a batch for evaluations and reports."""
        return self.held_out_fn or self.sample_fn

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
            valid_fn=self.valid_fn,
            elsewhere=self.elsewhere_fn,
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
    key: PRNGKeyArray,
    batch_size: int,
    num_features: int,
    probability: float | np.ndarray,
    *,
    signed: bool,
) -> Float[Array, "B F"]:
    """Independent features: each is active with `probability` p, or one for each, else 0.

    An active one is uniform in [0, 1], or in [-1, 1] if signed.

    One 32-bit draw per entry decides both. An entry is active where its bits lie below p·2³²;
    given that, bits/(p·2³²) is again uniform. At p = 0.01 there are 4·10⁷ distinct values,
    more than float32 resolves near 1.
    """
    limit = probability * 2.0**32
    bits = jax.random.bits(key, (batch_size, num_features), jnp.uint32)
    value = bits.astype(jnp.float32) / limit
    below = jnp.asarray(np.ceil(limit) - 1, jnp.uint32)
    return jnp.where(bits <= below, 2 * value - 1 if signed else value, 0.0)


VALUES = ("uniform", "binary")


def feature_sampler(
    batch_size: int,
    num_features: int,
    feature_probability: float,
    *,
    signed: bool,
    value: str = "uniform",
    num_on: int = 0,
    frequency_ratio: float = 1.0,
) -> Callable[..., Float[Array, "B F"]]:
    """(rng, step) -> `sparse_features`, from `fold_in(rng, step)`.

    Args:
      value: of an active feature; "binary": 1, or ±1 if signed, instead of uniform.
      num_on: exactly so many features are active in every example, whatever the probability;
        0: each on its own.
      frequency_ratio: of the most frequent feature to the rarest. Between them frequencies fall as
        a power of the feature's rank; their mean is `feature_probability`.
    Raises:
      InputError: a batch below 1, a probability outside (0, 1], or another option out of range.
    """
    at_least_one(batch_size=batch_size)
    one_of("data.value", value, VALUES)
    if not 0 < feature_probability <= 1:
        raise InputError(f"feature_probability must lie in (0, 1]; got {feature_probability}.")
    if not 0 <= num_on <= num_features:
        raise InputError(f"data.num_on must lie in [0, {num_features}]; got {num_on}.")
    p: Any = feature_probability
    if frequency_ratio != 1:
        power = math.log(max(frequency_ratio, 1e-30)) / math.log(max(num_features, 2))
        p = np.arange(1, num_features + 1)[None] ** -power
        p = p * feature_probability / p.mean()
        if not (frequency_ratio > 1 and p.max() <= 1):
            raise InputError(
                "data.frequency_ratio must be at least 1, and no feature more frequent than always;"
                f" got {frequency_ratio} at feature_probability = {feature_probability}."
            )

    def sample(rng: PRNGKeyArray, step: Any) -> Float[Array, "B F"]:
        key = jax.random.fold_in(rng, step)
        x = sparse_features(key, batch_size, num_features, 1.0 if num_on else p, signed=signed)
        if num_on:
            order = jax.random.uniform(jax.random.fold_in(key, 1), x.shape)
            last = jnp.sort(order, axis=1)[:, num_on - 1 : num_on]
            x = jnp.where(order <= last, x, 0.0)
        return jnp.sign(x) if value == "binary" else x

    return sample


def feature_data(config: Config) -> dict[str, Any]:
    """The options of `feature_sampler` that the decomposition's data has: `config.data`.

    Without one (in workdirs of earlier versions), that which the target is trained on.
    """
    if "data" not in config:
        return {"feature_probability": config.feature_probability}
    data = config.data
    return {
        "feature_probability": data.feature_probability,
        "value": data.value,
        "num_on": data.num_on,
        "frequency_ratio": data.frequency_ratio,
    }


def identity(key: PRNGKeyArray, shape: tuple[int, int]) -> Float[Array, "n m"]:
    """The identity, as an initialiser of a fixed matrix."""
    return jnp.eye(*shape)


def at_least_one(**sizes: int) -> None:
    """Raises InputError for the first size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} must be at least 1; got {size}.")
