"""The library call, on networks of the reader's own: Flax Linen, Flax NNX, a plain dict."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close, make_config
from flax import nnx

import apd_jax
from apd_jax import components as components_lib
from apd_jax.errors import InputError


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


def plain():
    rng = np.random.default_rng(0)  # numpy arrays do as well
    params = {
        "w": rng.normal(size=(4, 6)).astype(np.float32),
        "v": rng.normal(size=(6, 3)).astype(np.float32),
    }
    return lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], params, ["v", "w"]


def config_of(**fields):
    return make_config(
        num_components=5,
        topk=2.0,
        num_steps=30,
        batch_size=16,
        learning_rate=1e-2,
        init_scale=3.0,
        **fields,
    )


@pytest.mark.parametrize("network", [linen, flax_nnx, plain])
def test_any_network(network):
    apply_fn, params, leaves = network()
    found = apd_jax.decompose(apply_fn, params, sample_fn, config_of())
    names = [name.removesuffix(".value") for name in found.components.factors]
    assert names == leaves
    assert found.history[-1]["step"] == 30
    x = sample_fn(jax.random.key(9), 0)
    scores, mask = found.attributions(x), found.mask(x)
    np.testing.assert_array_equal(mask, apd_jax.masks.batch_topk(scores, 2.0))
    # With everything kept the sparse model is the component sum; P_0 + ... + P_4 is that sum on the decomposed leaves.
    total = components_lib.total(found.components, found.problem.params)
    close(found.sparse_output(x, jnp.ones((16, 5), bool)), apply_fn(total, x))
    summed = jax.tree.map(lambda *parts: sum(parts), *[found.component(i) for i in range(5)])
    for name, leaf in components_lib.decomposed_leaves(found.components, summed).items():
        close(leaf, components_lib.decomposed_leaves(found.components, total)[name])
    # Ablating all but 1 and 3 is keeping these two.
    kept = jnp.zeros((16, 5), bool).at[:, jnp.array([1, 3])].set(True)
    close(found.ablate([0, 2, 4], x), found.sparse_output(x, kept))
    assert found.sparse_output(x).shape == (16, 3)


def test_training_makes_it_faithful():
    apply_fn, params, _ = plain()
    config = config_of(schedule="cosine", simplicity_coeff=0.01)
    config.num_steps = 800
    history = apd_jax.decompose(apply_fn, params, sample_fn, config).history
    assert history[-1]["faithfulness"] < 0.05 * history[0]["faithfulness"]
    assert history[-1]["minimality"] < history[0]["minimality"]


def test_the_same_call_gives_the_same_components():
    apply_fn, params, _ = plain()
    one, two = (apd_jax.decompose(apply_fn, params, sample_fn, config_of()) for _ in range(2))
    other = apd_jax.decompose(apply_fn, params, sample_fn, config_of(seed=1))
    assert all(
        jnp.array_equal(a, b)
        for a, b in zip(
            jax.tree.leaves(one.components), jax.tree.leaves(two.components), strict=True
        )
    )
    assert not jnp.array_equal(one.components.factors["w"].U, other.components.factors["w"].U)


def test_instances():
    apply_fn, params, _ = plain()
    both = apd_jax.decompose(apply_fn, params, sample_fn, config_of(num_instances=2))
    x = sample_fn(jax.random.key(9), 0)
    one = both.instance(1)
    assert one.components.factors["w"].U.shape == (5, 4, 4)  # full rank: min(4, 6)
    assert one.sparse_output(x).shape == (16, 3)
    assert one.instance(0) is one
    with pytest.raises(InputError, match="instance 2 does not exist; there are 2"):
        both.instance(2)


def test_select_and_uses():
    apply_fn, params, _ = plain()
    found = apd_jax.decompose(apply_fn, params, sample_fn, config_of(), select="v", uses={"v": 2})
    assert list(found.components.factors) == ["v"] and found.components.num_params == 2 * 18
    np.testing.assert_array_equal(
        components_lib.total(found.components, found.problem.params)["w"], params["w"]
    )


def test_public_names():
    assert all(hasattr(apd_jax, name) for name in apd_jax.__all__)


def test_a_workdir_of_other_settings_is_refused(tmp_path):
    params = {"w": jnp.ones((3, 2))}

    def run(**fields):
        config = make_config(
            num_components=2, num_steps=2, batch_size=4, steps_per_call=1, **fields
        )
        return apd_jax.decompose(
            lambda p, x: x @ p["w"],
            params,
            lambda key, step: jnp.ones((4, 3)),
            config,
            workdir=tmp_path,
        )

    first = run()
    np.testing.assert_array_equal(
        run().components.factors["w"].U, first.components.factors["w"].U
    )  # resumed at its end
    with pytest.raises(InputError, match=r"schatten_p is 0.9 there and 1.0 here"):
        run(schatten_p=1.0)
