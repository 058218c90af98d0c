"""Settings of a decomposition: every field with its default, its meaning and its unit."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from ml_collections import config_dict

from apd_jax import attributions
from apd_jax.errors import InputError, one_of
from apd_jax.methods import schedules

Config = Any  # a ConfigDict, whose own annotations make every field a union of all types

MASKS = ("batch_topk", "topk", "threshold", "learned", "exact", "none")
INACTIVE = ("drop", "uniform")
MASK_PER = ("example", "position")
ATTRIBUTIONS_AT = ("target", "components")
MINIMALITY_LOSSES = ("mse", "kl")
OPTIMIZERS = ("adam", "adamw", "sgd")
SPARSE_ROUTES = ("auto", "materialize", "masked", "dispatch")
TRACEABLE = (  # fields that are numbers in a program rather than its shape: runs that differ in these alone share one program
    "init_scale",
    "topk",
    "threshold",
    "faithfulness_coeff",
    "minimality_coeff",
    "hidden_reconstruction_coeff",
    "simplicity_coeff",
    "simplicity_coeff_final",
    "schatten_p",
    "attribution_lp_coeff",
    "attribution_lp_p",
    "importance_coeff",
    "learning_rate",
    "weight_decay",
)


def default_config() -> config_dict.ConfigDict:
    """The settings that `apd_jax.decompose` reads; locked, so that a mistyped field is an error."""
    c = config_dict.ConfigDict()

    # Components.
    c.num_components = 10
    c.rank = config_dict.placeholder(int)  # m of every factored leaf; None is full rank
    c.init_scale = 1.0  # multiplies the (deliberately small) initial standard deviation
    c.unit_norm_U = False  # keep the columns of U at unit length
    c.num_always_on = 0  # the first components are kept on every input and are not counted in topk
    c.num_instances = 1  # independent decompositions (seeds) trained side by side by vmap

    # Attributions and mask.
    c.topk = 1.0  # k, mean active components per example; 0, with a recipe: found
    c.mask = "batch_topk"  # batch_topk | topk (per example) | threshold | learned | exact (as many as truly active) | none (all kept)
    c.threshold = 0.0  # of mask = "threshold": components with an attribution above it are kept; "learned": where each one's begins
    c.inactive = "drop"  # the others, in the sparse pass: drop | uniform (each times U(0, 1), so that parts of them can be ablated)
    c.attributions_at = "target"  # target | components: the weights that the gradient is taken at
    c.attribution = "gradient"  # gradient | integrated_gradient | ablation | activation
    c.attribution_mode = "auto"  # how gradients are taken: auto | forward | reverse | probe (estimated, for wide outputs)
    c.attribution_metric = (
        "mse"  # mse | kl (outputs are logits): how a change of the outputs is measured
    )
    c.num_probes = 8  # random output directions of attribution_mode = "probe"
    c.mask_per = "example"  # example | position (outputs are [B, T, ...]; every position uses the weights in its own way)

    # Losses: coefficient 0 switches a term off.
    c.faithfulness_coeff = 1.0
    c.minimality_coeff = 1.0
    c.minimality_loss = "mse"  # mse | kl (outputs are logits)
    c.hidden_reconstruction_coeff = 0.0
    c.simplicity_coeff = 1.0
    c.simplicity_coeff_final = config_dict.placeholder(
        float
    )  # where the coefficient ends, in equal factors per step; None: constant
    c.schatten_p = 0.9
    c.attribution_lp_coeff = 0.0  # the paper's alternative without top-k; use with mask = "none"
    c.attribution_lp_p = 0.9
    c.importance_coeff = 0.0  # mask = "learned" only: the price of an active component

    # Optimisation.
    c.seed = 0
    c.num_steps = 10_000
    c.learning_rate = 1e-3
    c.threshold_learning_rate = config_dict.placeholder(
        float
    )  # of the log thresholds of mask = "learned"; None: learning_rate
    c.schedule = "cosine"  # constant | linear | cosine (quarter wave) | exponential
    c.warmup_fraction = 0.05
    c.optimizer = "adam"  # adam | adamw | sgd
    c.weight_decay = 0.0  # adamw only
    c.batch_size = 2048  # examples per step over all devices; what the sampler draws

    # Execution: none of these changes the result beyond float rounding.
    c.sparse_route = "auto"  # auto | materialize | masked | dispatch
    c.num_component_shards = 1  # M: devices that share the components, C/M each, where they do not fit on one; 1: a copy on every device
    c.steps_per_call = 100  # steps in one XLA call
    c.log_every_steps = 100
    c.checkpoint_every_steps = 1000
    c.keep_checkpoints = 2
    return c.lock()


def override(config: Config, settings: Mapping[str, Any] | None) -> Config:
    """The config with the values of some fields of `TRACEABLE` replaced, which may be traced; itself without any."""
    return SimpleNamespace(**(config.to_dict() | dict(settings))) if settings else config


def validate(config: Config) -> None:
    """Checks values that no type check catches.

    Raises:
      InputError: one sentence naming the field, its value and what is allowed.
    """
    choices = {
        "mask": MASKS,
        "inactive": INACTIVE,
        "attributions_at": ATTRIBUTIONS_AT,
        "minimality_loss": MINIMALITY_LOSSES,
        "optimizer": OPTIMIZERS,
        "attribution": attributions.KINDS,
        "attribution_mode": attributions.MODES,
        "attribution_metric": attributions.METRICS,
        "mask_per": MASK_PER,
        "sparse_route": SPARSE_ROUTES,
        "schedule": schedules.KINDS,
    }
    for field, allowed in choices.items():
        one_of(field, config[field], allowed)
    for field in (
        "num_components",
        "num_instances",
        "num_component_shards",
        "num_steps",
        "batch_size",
        "steps_per_call",
        "log_every_steps",
        "checkpoint_every_steps",
        "keep_checkpoints",
        "num_probes",
    ):
        if config[field] < 1:
            raise InputError(f"{field} must be at least 1; got {config[field]}.")
    if config.num_components % config.num_component_shards:
        raise InputError(
            f"num_components = {config.num_components} is not divisible by num_component_shards = {config.num_component_shards}; "
            "every shard holds as many components."
        )
    if config.rank is not None and config.rank < 1:
        raise InputError(f"rank must be at least 1, or None for full rank; got {config.rank}.")
    choosable = config.num_components - config.num_always_on
    if config.num_always_on < 0 or choosable < 1:
        raise InputError(
            f"num_always_on must lie in [0, num_components = {config.num_components}); got {config.num_always_on}."
        )
    if not 0 < config.topk <= choosable:
        raise InputError(
            f"topk must be above 0 and at most {choosable}, the number of components to choose from; got {config.topk}."
        )
    if config.mask == "topk" and config.topk != int(config.topk):
        raise InputError(
            f"topk must be a whole number when mask = 'topk' (per example); got {config.topk}."
        )
    if config.threshold < 0:
        raise InputError(f"threshold must be at least 0; got {config.threshold}.")
    if config.mask == "learned" and config.threshold == 0:
        raise InputError("mask = 'learned' begins at threshold, which must be above 0.")
    if config.mask != "learned" and config.importance_coeff > 0:
        raise InputError(
            f"importance_coeff = {config.importance_coeff} is read by mask = 'learned' only; got mask = {config.mask!r}."
        )
    if config.threshold_learning_rate is not None and not (
        config.mask == "learned" and 0 < config.threshold_learning_rate < float("inf")
    ):
        raise InputError(
            "threshold_learning_rate must be a finite number above 0, and is read by mask = 'learned' only; "
            f"got {config.threshold_learning_rate} and mask = {config.mask!r}."
        )
    if config.simplicity_coeff_final is not None and not (
        config.simplicity_coeff > 0 and 0 < config.simplicity_coeff_final < float("inf")
    ):
        raise InputError(
            "simplicity_coeff and simplicity_coeff_final must both be above 0 for one to become the other; "
            f"got {config.simplicity_coeff} and {config.simplicity_coeff_final}."
        )
    for field in (
        "faithfulness_coeff",
        "minimality_coeff",
        "hidden_reconstruction_coeff",
        "simplicity_coeff",
        "attribution_lp_coeff",
        "importance_coeff",
        "weight_decay",
    ):
        if not 0 <= config[field] < float("inf"):
            raise InputError(f"{field} must be a finite number of at least 0; got {config[field]}.")
    terms = ("faithfulness", "minimality", "hidden_reconstruction", "simplicity", "attribution_lp")
    if not any(config[f"{term}_coeff"] > 0 for term in terms):
        raise InputError(
            f"all loss coefficients are 0; set at least one of {', '.join(f'{term}_coeff' for term in terms)}."
        )
    if config.mask_per == "position" and config.attribution in ("integrated_gradient", "ablation"):
        raise InputError(
            f"attribution = {config.attribution!r} has no form per position; use gradient or activation, or mask_per = 'example'."
        )
    if config.mask_per == "position" and config.attribution_mode == "forward":
        raise InputError(
            "attribution_mode = 'forward' has no form per position; use auto, reverse or probe."
        )
    if config.attribution_lp_coeff > 0 and config.attribution != "gradient":
        raise InputError(
            f"attribution_lp_coeff needs attribution = 'gradient', through which it is trained; got {config.attribution!r}."
        )
    for field in ("learning_rate", "init_scale", "schatten_p", "attribution_lp_p"):
        if not 0 < config[field] < float("inf"):
            raise InputError(f"{field} must be a finite number above 0; got {config[field]}.")
    if not 0 <= config.warmup_fraction < 1:
        raise InputError(f"warmup_fraction must lie in [0, 1); got {config.warmup_fraction}.")
