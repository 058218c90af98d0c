"""The library call, on networks of the reader's own: Flax Linen, Flax NNX, a plain dict."""

import json
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close, make_method
from flax import nnx

import apd_jax
from apd_jax import components as components_lib
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.methods import registry
from apd_jax.network.problem import Problem


def sample_fn(key, step):
    return jax.random.uniform(jax.random.fold_in(key, step), (16, 4))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(6)(x)))


class MLPNNX(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def linen():
    model = MLP()
    return (
        model.apply,
        model.init(jax.random.key(0), jnp.zeros((1, 4))),
        ["params.Dense_0.kernel", "params.Dense_1.kernel"],
    )


def flax_nnx():
    graph, state = nnx.split(MLPNNX(nnx.Rngs(0)))
    return lambda state, x: nnx.merge(graph, state)(x), state, ["first.kernel", "second.kernel"]


def plain_fn(params, x):
    """One object for every test, so that runs of the same settings share their programs."""
    return jnp.tanh(x @ params["w"]) @ params["v"]


def plain():
    rng = np.random.default_rng(0)  # numpy arrays do as well
    params = {
        "w": rng.normal(size=(4, 6)).astype(np.float32),
        "v": rng.normal(size=(6, 3)).astype(np.float32),
    }
    return plain_fn, params, ["v", "w"]


PLAIN = {name: jnp.asarray(leaf) for name, leaf in plain()[1].items()}


def method_of(**fields):
    small = {"num_components": 5, "topk": 2.0, "num_steps": 30, "batch_size": 16}
    return make_method(**small | {"learning_rate": 1e-2, "init_scale": 3.0} | fields)


@pytest.mark.parametrize("network", [linen, flax_nnx, plain])
def test_any_network(network):
    apply_fn, params, leaves = network()
    found = apd_jax.decompose(apply_fn, params, sample_fn, method_of())
    names = [name.removesuffix(".value") for name in found.components.factors]
    assert names == leaves
    assert found.history[-1]["step"] == 30
    x = sample_fn(jax.random.key(9), 0)
    scores, mask = found.attributions(x), found.mask(x)
    np.testing.assert_array_equal(mask, apd_jax.masks.batch_topk(scores, 2.0))
    # With everything kept the sparse model is the component sum; P_0 + ... + P_4 is that sum on the
    # decomposed leaves.
    total = components_lib.total(found.components, found.problem.params)
    close(found.sparse_output(x, np.ones((16, 5), bool)), apply_fn(total, x))
    parts = [jax.device_get(found.component(i)) for i in range(5)]
    summed = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    for name, leaf in components_lib.decomposed_leaves(found.components, summed).items():
        close(leaf, components_lib.decomposed_leaves(found.components, total)[name])
    # Ablating all but 1 and 3 is keeping these two.
    kept = np.tile([False, True, False, True, False], (16, 1))
    close(found.ablate([0, 2, 4], x), found.sparse_output(x, kept))
    assert found.sparse_output(x).shape == (16, 3)


def test_training_makes_it_faithful():
    apply_fn, params = plain_fn, PLAIN
    method = method_of(schedule="cosine", simplicity_coeff=0.01, num_steps=800)
    history = apd_jax.decompose(apply_fn, params, sample_fn, method).history
    assert history[-1]["faithfulness"] < 0.05 * history[0]["faithfulness"]
    assert history[-1]["minimality"] < history[0]["minimality"]


def test_the_same_call_gives_the_same_components():
    apply_fn, params = plain_fn, PLAIN
    one, two = (apd_jax.decompose(apply_fn, params, sample_fn, method_of()) for _ in range(2))
    other = apd_jax.decompose(apply_fn, params, sample_fn, method_of(seed=1))
    assert all(
        jnp.array_equal(a, b)
        for a, b in zip(
            jax.tree.leaves(one.components), jax.tree.leaves(two.components), strict=True
        )
    )
    assert not jnp.array_equal(one.components.factors["w"].U, other.components.factors["w"].U)


def test_instances():
    apply_fn, params = plain_fn, PLAIN
    both = apd_jax.decompose(apply_fn, params, sample_fn, method_of(num_instances=2))
    x = sample_fn(jax.random.key(9), 0)
    one = both.instance(1)
    assert one.components.factors["w"].U.shape == (5, 4, 4)  # full rank: min(4, 6)
    assert one.sparse_output(x).shape == (16, 3)
    assert one.instance(0) is one
    with pytest.raises(InputError, match="instance 2 does not exist; there are 2"):
        both.instance(2)
    for ask in (both.mask, both.attributions, both.sparse_output, lambda x: both.ablate([0], x)):
        with pytest.raises(InputError, match=r"this holds 2 decompositions; take one.*instance\(0"):
            ask(x)
    for ask in (lambda: both.component(0), lambda: both.edit({0: 0.0})):
        with pytest.raises(InputError, match="this holds 2 decompositions"):
            ask()


def test_select_and_uses():
    apply_fn, params = plain_fn, PLAIN
    found = apd_jax.decompose(apply_fn, params, sample_fn, method_of(), select="v", uses={"v": 2})
    assert list(found.components.factors) == ["v"] and found.components.num_params == 2 * 18
    np.testing.assert_array_equal(
        components_lib.total(found.components, found.problem.params)["w"], params["w"]
    )


def test_public_names():
    assert all(hasattr(apd_jax, name) for name in apd_jax.__all__)


def test_a_workdir_of_other_settings_is_refused(tmp_path):
    params = {"w": jnp.ones((3, 2))}

    def run(**fields):
        small = {"num_components": 2, "num_steps": 2, "batch_size": 4, "steps_per_call": 1}
        return apd_jax.decompose(
            lambda p, x: x @ p["w"],
            params,
            lambda key, step: jnp.ones((4, 3)),
            make_method(**small | fields),
            workdir=tmp_path,
        )

    first = run()
    np.testing.assert_array_equal(
        run().components.factors["w"].U, first.components.factors["w"].U
    )  # resumed at its end
    with pytest.raises(InputError, match=r"schatten_p is 0.9 there and 1.0 here"):
        run(schatten_p=1.0)


# Components by number


@pytest.fixture(scope="module")
def untrained():
    """Five components of the plain network, as they begin."""
    apply_fn, params = plain_fn, PLAIN
    problem = Problem(apply_fn, params, sample_fn)
    method = method_of()
    components = jax.jit(lambda key: method.make_components(key, problem))(jax.random.key(0))
    return Decomposition(problem, components, method)


X = sample_fn(jax.random.key(9), 0)


def test_edit_moves_the_networks_own_weights(untrained):
    """The untrained components are far from summing to θ*, which is where an edit begins."""
    params, parts = untrained.problem.params, [untrained.component(i) for i in (1, 3)]
    edited = untrained.edit({1: 0.0, 3: 2.5})
    jax.tree.map(lambda e, p, a, b: close(e, p - a + 1.5 * b), edited, params, *parts)
    same = untrained.edit({})
    jax.tree.map(np.testing.assert_array_equal, same, params)
    for bad in ({99: 0.0}, {1: np.nan}):
        with pytest.raises(InputError, match="component"):
            untrained.edit(bad)


def test_ablate_by_numbers_or_by_a_mask(untrained):
    by_numbers = untrained.ablate([0, 2, 4], X)
    for same in ((4, 0, 2, 0), np.array([2, 4, 0]), np.array([True, False, True, False, True])):
        np.testing.assert_array_equal(untrained.ablate(same, X), by_numbers)
    total = components_lib.total(untrained.components, untrained.problem.params)
    close(untrained.ablate([], X), untrained.problem.apply_fn(total, X))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([1, 5], "component 5 does not exist; there are 5, counted from 0 to 4."),
        ([-1], "component -1 does not exist; there are 5, counted from 0 to 4."),
        (np.ones(4, bool), r"a mask of components must have shape \(5,\); got \(4,\)."),
        (np.ones((16, 5), bool), r"a mask of components must have shape \(5,\); got \(16, 5\)."),
        (np.array([0.5]), "components are chosen by whole numbers or by a bool mask; got float64."),
    ],
)
def test_ablate_refuses_what_does_not_exist(untrained, given, sentence):
    with pytest.raises(InputError, match=f"^{sentence}$"):
        untrained.ablate(given, X)


@pytest.mark.parametrize("i", [-1, 5])
def test_a_component_that_does_not_exist_is_refused(untrained, i):
    with pytest.raises(InputError, match=f"component {i} does not exist; there are 5"):
        untrained.component(i)


# Which method


def test_a_method_by_name_by_object_or_by_config():
    """All three ways train the same; the object that comes back holds the settings."""
    apply_fn, params = plain_fn, PLAIN
    few = {"num_steps": 1, "batch_size": 16, "num_components": 2}
    config = apd_jax.default_config("spd")
    config.update(few)
    method = apd_jax.SPD(**few)
    found = [
        apd_jax.decompose(apply_fn, params, sample_fn, config),
        apd_jax.decompose(apply_fn, params, sample_fn, method),
        apd_jax.decompose(apply_fn, params, sample_fn, method=method),
    ]
    for one in found:
        assert one.method == method
        jax.tree.map(np.testing.assert_array_equal, one.trained, found[0].trained)
    assert found[0].components.num_components == 4  # two of each site
    assert found[0].config == method
    activity = found[0].activity(X)
    assert activity.values.shape == (16, 4) and not activity.hard


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        ({"config": apd_jax.APD(), "method": "apd"}, "give config or method, not both"),
        ({"method": "sdp"}, r"unknown method 'sdp'; .*Did you mean 'spd'\?"),
        ({"config": {"method": "lda"}}, "unknown method 'lda'"),
        ({"config": {"method": "spd", "topk": 1.0}}, "unknown setting of method 'spd' 'topk'"),
        ({"config": {"rank": 2.5}}, "rank must be int; got 2.5, a float"),
        ({"config": [("rank", 2)]}, "settings must be a method's name, a settings object or a con"),
        ({"config": apd_jax.APD(), "on_log": 5}, "on_log must be a function of a row .*; got 5"),
        (
            {"config": apd_jax.APD(batch_size=16), "workdir": 5},
            "a path must be a string or a path; got 5",
        ),
        ({"method": "targeted"}, "needs a second stream of data; give elsewhere"),
        ({"config": apd_jax.APD(batch_size=16), "elsewhere": sample_fn}, "elsewhere is read by"),
        (
            {
                "config": apd_jax.APD(batch_size=16, num_components=4, num_component_shards=2),
                "select": {"w": {"components": [0, 1]}, "v": {}},
            },
            "components cannot be split over devices where a site holds only some of them",
        ),
    ],
)
def test_choices_that_do_not_go_together(chosen, sentence):
    apply_fn, params = plain_fn, PLAIN
    with pytest.raises(InputError, match=sentence):
        apd_jax.decompose(apply_fn, params, sample_fn, **chosen)


@pytest.mark.parametrize("name", registry.METHODS)
def test_settings_are_the_same_again_after_a_config(name):
    """Through a locked ConfigDict, and through JSON; of defaults, and where every field differs."""
    default = registry.by_name(name)()
    changes = {
        field: _other(getattr(default, field), hint) for field, hint in default.hints().items()
    }
    for method in (default, default.replace(**changes)):
        config = registry.settings(method)
        assert config.is_locked and set(config) == {"method", *method.fields()}
        for given in (config, json.loads(config.to_json()), method.to_dict()):
            again = registry.of(given)
            assert again == method and type(again) is type(method)
            for field in method.fields():
                assert type(getattr(again, field)) is type(getattr(method, field)), field
    assert registry.settings(name).to_dict() == apd_jax.default_config(name).to_dict()


def _other(value, hint):
    """Another value of the type of a field."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return (*value, 0)
    if value is None:
        return 3 if int in typing.get_args(hint) and float not in typing.get_args(hint) else 0.25
    return value + "s" if isinstance(value, str) else value + 1
