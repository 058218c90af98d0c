"""Settings: defaults are valid, a mistyped field is refused, and so is every value out of range.

Each refusal is one sentence that names the field.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_method
from ml_collections import ConfigDict

from apd_jax import default_config
from apd_jax.errors import InputError
from apd_jax.methods import registry
from apd_jax.methods.apd import APD
from apd_jax.methods.base import Annealed, Method, at
from apd_jax.methods.spd import SPD
from apd_jax.methods.vpd import VPD

each_method = pytest.mark.parametrize("name", registry.METHODS)


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text and text.endswith((".", "?"))
    return text


@each_method
def test_defaults_are_valid_and_locked(name):
    registry.of(name).check()
    config = default_config(name)
    assert config.is_locked and config.method == name
    assert set(config) == {"method", *registry.METHODS[name].fields()}
    with pytest.raises(AttributeError, match="learning_rate"):
        config.learnig_rate = 1.0


TOPK = "topk must be above 0 and at most 10, the number of components to choose from; got "


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"mask": "batch_topp"},
            "unknown mask 'batch_topp'; known: batch_topk, topk, threshold, learned, exact, none. "
            "Did you mean 'batch_topk'?",
        ),
        ({"attributions_at": "sum"}, "unknown attributions_at 'sum'; known: target, components."),
        ({"minimality_loss": "mae"}, "unknown minimality_loss 'mae'; known: mse, kl, next_token."),
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
            "unknown schedule 'cosin'; known: constant, linear, cosine, half_cosine, exponential. "
            "Did you mean 'cosine'?",
        ),
        ({"num_components": 0}, "num_components must be at least 1; got 0."),
        ({"num_steps": 0}, "num_steps must be at least 1; got 0."),
        ({"batch_size": -3}, "batch_size must be at least 1; got -3."),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1; got 0."),
        ({"rank": 0}, "rank must be at least 1, or None for full rank; got 0."),
        ({"num_always_on": 10}, "num_always_on must lie in [0, num_components = 10); got 10."),
        ({"num_always_on": -1}, "num_always_on must lie in"),
        ({"topk": 0.0}, TOPK + "0.0."),
        ({"topk": -1.0}, "topk must be above 0"),
        ({"topk": 10.5}, TOPK + "10.5."),
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
        ({"gradient_clip": 0.0}, "gradient_clip must be a finite number above 0; got 0.0."),
        ({"seed": -1}, "seed must lie in [0, 2**32); got -1."),
    ],
)
def test_refused(fields, message):
    with pytest.raises(InputError) as caught:
        make_method(**fields).check()
    assert message in one_sentence(caught)


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
    make_method(**fields).check()


CHECKED = [
    (name, field)
    for name, cls in registry.METHODS.items()
    for field in sorted(cls.fields())
    if field.endswith(("_coeff", "_steps"))
]


@pytest.mark.parametrize(("name", "field"), CHECKED)
def test_every_coefficient_and_duration_is_checked(name, field):
    with pytest.raises(InputError, match=rf"^{field} must be"):
        registry.of(name).replace(**{field: -1}).check()


@each_method
def test_a_run_without_any_loss_is_refused(name):
    method = registry.of(name)
    off = {field: 0.0 for field in method.fields() if field.endswith("_coeff")}
    with pytest.raises(InputError, match="all loss coefficients are 0"):
        method.replace(**off).check()


# Settings as values


def test_a_misspelt_field_is_refused():
    meant = "Did you mean 'learning_rate'?"
    with pytest.raises(InputError, match="unknown setting of apd 'learnig_rate'; known") as error:
        APD().replace(learnig_rate=1.0)
    assert meant in one_sentence(error)
    with pytest.raises(InputError, match="unknown setting of method 'spd' 'learnig_rate'") as error:
        registry.of({"method": "spd", "learnig_rate": 1.0})
    assert meant in one_sentence(error)
    with pytest.raises(InputError, match=r"unknown setting of spd .*mean 'learning_rate'\?"):
        registry.by_name("spd")(learnig_rate=1.0)
    with pytest.raises(InputError, match="unknown method 'sdp'; known: apd, spd, vpd") as error:
        registry.of("sdp")
    assert "Did you mean 'spd'?" in one_sentence(error)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_steps": 1.5}, "num_steps must be int; got 1.5, a float."),
        ({"num_steps": True}, "num_steps must be int; got True, a bool."),
        ({"unit_norm_U": 1}, "unit_norm_U must be bool; got 1, a int."),
        ({"mask": 3}, "mask must be str; got 3, a int."),
        ({"learning_rate": "fast"}, "must be float or int; got 'fast', a str."),
        ({"num_steps": None}, "num_steps must be int; got None, a NoneType."),
        ({"rank": 2.0}, "rank must be int; got 2.0, a float."),
    ],
    ids=str,
)
def test_a_value_of_the_wrong_type_is_refused_in_one_sentence(values, message):
    for given in (values, APD(**values)):
        with pytest.raises(InputError) as caught:
            registry.of(given)
        assert message in one_sentence(caught)


def test_what_is_no_settings_at_all_is_refused():
    with pytest.raises(InputError, match="a settings object or a config; got a int"):
        registry.of(3)


def test_numpy_scalars_are_plain_numbers():
    values = {"num_steps": np.int64(7), "topk": np.float32(1.5), "unit_norm_U": np.bool_(True)}
    values |= {"rank": np.int32(2), "learning_rate": 1}  # an int is a float where one is asked for
    expected = {"num_steps": 7, "topk": 1.5, "unit_norm_U": True, "rank": 2, "learning_rate": 1.0}
    for given in (values, APD(**values)):
        method = registry.of(given)
        for field, value in expected.items():
            found = getattr(method, field)
            assert (found, type(found)) == (value, type(value)), field


def test_a_method_of_ones_own_may_have_fields_of_any_type():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Own(APD):
        layers: tuple[int, ...] = ()
        anything: Any = None

    own = Own(layers=(1, 2), anything="x", topk=2)
    assert registry.of(own).topk == 2.0 and registry.of(own).layers == (1, 2)
    assert set(Own.numbers()) == set(APD.numbers())


@each_method
def test_a_config_and_its_method_are_each_others(name):
    cls = registry.METHODS[name]
    method = registry.of(name)
    assert type(method) is cls and isinstance(method, Method)
    assert registry.of(registry.settings(method)) == method
    assert registry.of(method) is method
    assert registry.of(method.to_dict()) == method
    changed = method.replace(num_components=7, rank=3, seed=5, gradient_clip=0.5)
    assert registry.of(registry.settings(changed)) == changed
    # What stands in a workdir's config.json is the same method.
    assert registry.of(ConfigDict(registry.settings(changed).to_dict())) == changed


def test_replace_makes_another():
    method = APD()
    other = method.replace(topk=3.0)
    assert (method.topk, other.topk) == (1.0, 3.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.topk = 2.0


def test_numbers_are_those_that_may_be_traced():
    assert set(APD.numbers()) == {
        "init_scale",
        "learning_rate",
        "weight_decay",
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
        "threshold_learning_rate",
    }
    assert {"stochastic_coeff", "layerwise_coeff", "importance_p"} <= set(SPD.numbers())
    assert {"adversary_rate", "frequency_coeff"} <= set(VPD.numbers())
    for cls in registry.METHODS.values():
        fixed = {"num_components", "rank", "seed", "num_steps", "batch_size", "mask_per"}
        assert not fixed & set(cls.numbers()) and set(cls.numbers()) < set(cls.fields())


# Numbers that change during training


def test_annealed_goes_between_two_shares_of_training_then_stays():
    # Of 101 steps, from a quarter to three quarters: 25 to 75. 8 until then, 2 afterwards.
    linear = Annealed(8.0, 2.0, start=0.25, end=0.75)
    values = [float(linear.at(step, 101)) for step in (0, 25, 50, 75, 100)]
    np.testing.assert_allclose(values, [8.0, 8.0, 5.0, 2.0, 2.0], rtol=1e-6)
    # Geometric: half the way is the geometric mean, sqrt(8·2) = 4.
    geometric = dataclasses.replace(linear, shape="geometric")
    values = [float(geometric.at(step, 101)) for step in (0, 25, 50, 75, 100)]
    np.testing.assert_allclose(values, [8.0, 8.0, 4.0, 2.0, 2.0], rtol=1e-6)
    # Upwards just as well, over the whole of training; one step alone is the beginning.
    assert float(Annealed(1.0, 3.0).at(5, 11)) == 2.0
    assert float(Annealed(1.0, 3.0).at(0, 1)) == 1.0
    # Traced, as a step and a sweep see it.
    traced = jax.jit(jax.vmap(lambda last, i: Annealed(8.0, last).at(i, 11), in_axes=(0, None)))
    np.testing.assert_allclose(traced(jnp.array([2.0, 6.0]), 5), [5.0, 7.0], rtol=1e-6)


def test_a_plain_number_is_its_own_schedule():
    assert at(0.3, 5, 10) == 0.3
    assert at(Annealed(0.0, 4.0), 5, 11) == 2.0


@pytest.mark.parametrize(
    ("coeff", "on"),
    [(0.0, False), (0.1, True), (Annealed(0.0, 1.0), True), (Annealed(1.0, 0.0), True)],
    ids=str,
)
def test_a_term_is_off_where_its_coefficient_is_0_throughout(coeff, on):
    term = dataclasses.replace(APD().terms()["simplicity"], coeff=coeff)
    assert term.on is on
