"""Defaults are valid, a mistyped field is refused, and every value out of range is named in one sentence."""

import pytest
from conftest import make_config

from apd_jax.errors import InputError
from apd_jax.methods import config as lib


def test_defaults_are_valid_and_locked():
    config = lib.default_config()
    lib.validate(config)
    assert config.is_locked
    with pytest.raises(AttributeError, match="learning_rate"):
        config.learnig_rate = 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"mask": "batch_topp"},
            "unknown mask 'batch_topp'; known: batch_topk, topk, threshold, learned, exact, none. Did you mean 'batch_topk'?",
        ),
        ({"attributions_at": "sum"}, "unknown attributions_at 'sum'; known: target, components."),
        ({"minimality_loss": "mae"}, "unknown minimality_loss 'mae'; known: mse, kl."),
        (
            {"optimizer": "adamW"},
            "unknown optimizer 'adamW'; known: adam, adamw, sgd. Did you mean 'adam",
        ),
        (
            {"attribution_mode": "backward"},
            "unknown attribution_mode 'backward'; known: auto, forward, reverse, probe.",
        ),
        ({"sparse_route": "dispatched"}, "Did you mean 'dispatch'?"),
        (
            {"schedule": "cosin"},
            "unknown schedule 'cosin'; known: constant, linear, cosine, exponential. Did you mean 'cosine'?",
        ),
        ({"num_components": 0}, "num_components must be at least 1; got 0."),
        ({"num_steps": 0}, "num_steps must be at least 1; got 0."),
        ({"batch_size": -3}, "batch_size must be at least 1; got -3."),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1; got 0."),
        ({"rank": 0}, "rank must be at least 1, or None for full rank; got 0."),
        ({"num_always_on": 10}, "num_always_on must lie in [0, num_components = 10); got 10."),
        ({"num_always_on": -1}, "num_always_on must lie in"),
        (
            {"topk": 0.0},
            "topk must be above 0 and at most 10, the number of components to choose from; got 0.0.",
        ),
        ({"topk": -1.0}, "topk must be above 0"),
        (
            {"topk": 10.5},
            "topk must be above 0 and at most 10, the number of components to choose from; got 10.5.",
        ),
        ({"topk": float("nan")}, "topk must be above 0"),
        ({"topk": 9.0, "num_always_on": 2}, "at most 8"),
        (
            {"topk": 1.5, "mask": "topk"},
            "topk must be a whole number when mask = 'topk' (per example); got 1.5.",
        ),
        ({"mask": "learned"}, "mask = 'learned' begins at threshold, which must be above 0."),
        (
            {"importance_coeff": 0.1},
            "importance_coeff = 0.1 is read by mask = 'learned' only; got mask = 'batch_topk'.",
        ),
        (
            {"threshold_learning_rate": 0.1},
            "read by mask = 'learned' only; got 0.1 and mask = 'batch_topk'.",
        ),
        (
            {"threshold_learning_rate": 0.0, "mask": "learned", "threshold": 0.1},
            "must be a finite number above 0",
        ),
        (
            {"simplicity_coeff": -1.0},
            "simplicity_coeff must be a finite number of at least 0; got -1.0.",
        ),
        ({"faithfulness_coeff": float("inf")}, "faithfulness_coeff must be a finite number"),
        ({"learning_rate": 0.0}, "learning_rate must be a finite number above 0; got 0.0."),
        (
            {"learning_rate": float("nan")},
            "learning_rate must be a finite number above 0; got nan.",
        ),
        ({"schatten_p": -0.9}, "schatten_p must be a finite number above 0; got -0.9."),
        ({"warmup_fraction": 1.0}, "warmup_fraction must lie in [0, 1); got 1.0."),
    ],
)
def test_refused(fields, message):
    with pytest.raises(InputError) as caught:
        lib.validate(make_config(**fields))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"topk": 10.0},
        {"topk": 0.01},
        {"mask": "none", "topk": 1.5},
        {"mask": "topk", "topk": 3.0},
        {"rank": 1},
    ],
)
def test_accepted(fields):
    lib.validate(make_config(**fields))


@pytest.mark.parametrize(
    "field", sorted(name for name in lib.default_config() if name.endswith(("_coeff", "_steps")))
)
def test_every_coefficient_and_duration_is_checked(field):
    with pytest.raises(InputError, match=rf"^{field} must be"):
        lib.validate(make_config(**{field: -1}))


def test_a_run_without_any_loss_is_refused():
    terms = ("faithfulness", "minimality", "hidden_reconstruction", "simplicity", "attribution_lp")
    with pytest.raises(InputError, match="all loss coefficients are 0"):
        lib.validate(make_config(**{f"{term}_coeff": 0.0 for term in terms}))
