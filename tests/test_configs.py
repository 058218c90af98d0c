"""Every experiment file: the published settings, the variants, and what is refused."""

import itertools

import jax
import pytest
from conftest import ROOT, get_config, method_of

from apd_jax import components, targets
from apd_jax.errors import InputError
from apd_jax.methods import registry
from apd_jax.methods.meanings import default_config
from apd_jax.network.problem import check_function
from apd_jax.recipe import stages

TMS = [
    ",".join(filter(None, v))
    for v in itertools.product(
        ("40-10", "5-2", "8-3", "1-1"), ("", "id", "rotation", "untied"), ("", "smoke")
    )
]
RESID_MLP = [
    ",".join(filter(None, v))
    for v in itertools.product(
        ("1layer", "2layer", "3layer"), ("", "long"), ("", "clean"), ("", "smoke")
    )
]
VARIANTS = [("tms", arg) for arg in TMS] + [("resid_mlp", arg) for arg in RESID_MLP]


@pytest.mark.parametrize(("file", "arg"), VARIANTS)
def test_every_variant_is_valid_and_locked(file, arg):
    config = get_config(file, arg)
    assert config.is_locked and config.target.is_locked and config.apd.is_locked
    assert set(config.apd) == set(default_config())
    method_of(config).check()
    target = targets.build(config.target, config.apd.batch_size)
    params = jax.eval_shape(target.init_fn, jax.random.key(0))
    x = jax.eval_shape(target.sample_fn, jax.random.key(0), 0)
    assert x.shape == (config.apd.batch_size, config.target.num_features)
    assert jax.eval_shape(target.apply_fn, params, x)[0].shape == x.shape


OTHERS = [("linear", ""), ("linear", "4x3"), ("linear", "2x2,smoke")]


@pytest.mark.parametrize(("file", "arg"), OTHERS)
def test_targets_that_are_not_made_of_features(file, arg):
    config = get_config(file, *[arg] if arg else [])
    assert config.is_locked and set(config.apd) == set(default_config())
    method_of(config).check()
    target = targets.build(config.target, config.apd.batch_size)
    problem = target.problem(target.init_fn(jax.random.key(0)))
    check_function(problem)
    assert components.selected_paths(problem.params, problem.select, problem.layouts)


GATED = [
    ("spd", "", "spd"),
    ("spd", "tms,5-2,id,smoke", "spd"),
    ("spd", "resid_mlp,2layer", "spd"),
    ("vpd", "", "vpd"),
    ("vpd", "tms,5-2,smoke", "vpd"),
    ("vpd", "resid_mlp,1layer,whole", "whole"),
    ("vpd", "tms,5-2,nested,smoke", "whole"),
]


@pytest.mark.parametrize(("file", "arg", "name"), GATED)
def test_other_methods_on_the_same_targets(file, arg, name):
    config = get_config(file, *[arg] if arg else [])
    assert config.is_locked and config.apd.method == name
    assert set(config.apd) == set(default_config(name))
    method = method_of(config)
    method.check()
    assert type(method) is registry.METHODS[name]
    targets.build(config.target, config.apd.batch_size)
    # The target is that of its own file, and seeds follow the run's.
    target = arg.split(",")[0] or "tms"
    assert config.target.to_dict().keys() == get_config(target).target.to_dict().keys()
    config.seed = 3
    assert (config.target.seed, config.apd.seed, config.evaluation.seed) == (3, 3, 3)


EXPERIMENTS = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if not p.stem.startswith("_"))


@pytest.mark.parametrize("file", EXPERIMENTS)
def test_every_experiment_file_has_a_default(file):
    """Files whose names begin with _ are shared code."""
    config = get_config(file)
    assert config.is_locked and {"seed", "target", "apd", "evaluation"} <= set(config)
    assert set(config.apd) == set(default_config(config.apd.method))
    if "recipe" in config:
        stages.check(config.apd, config.recipe)
    else:
        method_of(config).check()


@pytest.mark.parametrize(
    ("file", "arg", "expected"),
    [
        # NUMBERS of the paper: C, k, rank, learning rate, coefficients (faithfulness, minimality,
        # simplicity), p, batch, steps.
        ("tms", "40-10", (50, 1.0, 11, 1e-3, 1.0, 10.0, 20.0, 0.9, 2048, 20_000)),
        ("tms", "5-2", (5, 0.211, 3, 0.03, 1.0, 1.0, 0.7, 1.0, 2048, 20_000)),
        ("resid_mlp", "1layer", (130, 1.28, None, 1e-3, 1.0, 1.0, 10.0, 0.9, 256, 10_000)),
        ("resid_mlp", "1layer,long", (130, 1.28, None, 1e-3, 1.0, 1.0, 10.0, 0.9, 2048, 40_000)),
        ("resid_mlp", "2layer", (200, 1.28, None, 1e-3, 1.0, 2.0, 7.0, 0.9, 256, 10_000)),
        # Derived from 40-10: C = 1.25·8, k = 8/40, rank 3 + 1.
        ("tms", "8-3", (10, 0.2, 4, 1e-3, 1.0, 10.0, 20.0, 0.9, 2048, 20_000)),
    ],
)
def test_published_settings(file, arg, expected):
    a = get_config(file, arg).apd
    coefficients = (a.faithfulness_coeff, a.minimality_coeff, a.simplicity_coeff)
    assert (
        a.num_components,
        a.topk,
        a.rank,
        a.learning_rate,
        *coefficients,
        a.schatten_p,
        a.batch_size,
        a.num_steps,
    ) == expected


def test_settings_of_one_run_only():
    assert get_config("tms", "5-2").apd.attributions_at == "components"
    assert get_config("tms", "40-10").apd.attributions_at == "target"
    assert get_config("resid_mlp", "1layer").apd.unit_norm_U
    assert not get_config("resid_mlp", "2layer").apd.unit_norm_U
    assert get_config("resid_mlp", "3layer").target.num_features == 102


def test_hidden_matrix_gets_a_component_wherever_a_feature_is_active():
    # k of 5-2 is 0.211; some feature is active with probability 1 - 0.95⁵ = 0.2262.
    apd = get_config("tms", "5-2,id").apd
    assert apd.num_components == 6
    assert apd.topk == pytest.approx(0.211 + 0.2262, abs=1e-4)
    assert get_config("tms", "5-2,rotation").target.hidden == "rotation"


def test_defaults_and_order_of_variants():
    assert (
        get_config("tms").to_json()
        == get_config("tms", "").to_json()
        == get_config("tms", "40-10").to_json()
    )
    assert (
        get_config("resid_mlp").to_json()
        == get_config("resid_mlp", "").to_json()
        == get_config("resid_mlp", "1layer").to_json()
    )
    assert (
        get_config("tms", "smoke,id,5-2").to_json() == get_config("tms", "5-2,id,smoke").to_json()
    )
    assert (
        get_config("resid_mlp", "smoke").to_json()
        == get_config("resid_mlp", "1layer,smoke").to_json()
    )


@pytest.mark.parametrize("file", ["tms", "resid_mlp"])
def test_seeds_follow_the_runs_unless_set(file):
    config = get_config(file)
    config.seed = 3
    assert (config.target.seed, config.apd.seed, config.evaluation.seed) == (3, 3, 3)
    config.apd.seed = 5
    assert (config.seed, config.target.seed, config.apd.seed, config.evaluation.seed) == (
        3,
        3,
        5,
        3,
    )


@pytest.mark.parametrize(
    ("file", "arg", "message"),
    [
        (
            "tms",
            "5-2,idd",
            r"unknown TMS variant \(sizes F-H or a name\) 'idd'; known: 40-10, 5-2, id, rotation, "
            r"untied, smoke. Did you mean 'id'\?",
        ),
        ("tms", "0-2", "unknown TMS variant"),
        ("tms", "F-H", "unknown TMS variant"),
        ("tms", "id,rotation", "names id and rotation; give one of them"),
        ("tms", "5-2,6-3", "names 5-2 and 6-3; give one of them"),
        (
            "resid_mlp",
            "2layr",
            r"unknown ResidMLP variant '2layr'; known: .*. Did you mean '2layer'\?",
        ),
        ("resid_mlp", "1layer,2layer", "names 1layer and 2layer; give one of them"),
    ],
)
def test_unknown_variants_are_refused(file, arg, message):
    with pytest.raises(ValueError, match=message):
        get_config(file, arg)


@pytest.mark.parametrize(
    ("file", "arg", "own"),
    [
        ("recipe", "tms,40-10,tolld", ("told", "learned", "id", "40-10", "Did you mean 'told'")),
        ("recipe", "resid_mlp,splitt", ("split", "2layer", "Did you mean 'split'")),
        ("spd", "tms,tiedd", ("untied", "tied", "smoke")),
        ("spd", "resid_mlp,tied", ("unknown ResidMLP variant 'tied'",)),
        ("vpd", "tms,nestd", ("whole", "rotation", "Did you mean 'nested'")),
    ],
)
def test_a_mistyped_variant_is_told_all_that_is_allowed_there(file, arg, own):
    with pytest.raises(InputError) as refused:
        get_config(file, arg)
    assert all(word in str(refused.value) for word in own), refused.value
