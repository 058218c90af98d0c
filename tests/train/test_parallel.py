"""The same global batch on 1, 2 and 4 devices gives the same losses, masks and components."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_method, make_problem

from apd_jax.errors import InputError
from apd_jax.train import parallel
from apd_jax.train import step as step_lib
from apd_jax.train.state import init_state

PARAMS = {
    "W": jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32),
    "b": jnp.full(6, -0.1),
}


def apply_fn(params, x):
    h = x @ params["W"]
    return jax.nn.relu(h @ params["W"].T + params["b"][None, :]), {"h": h}


def sample_fn(key, step):
    """Mostly zeros, so that whole examples tie at attribution 0."""
    value, on = jax.random.split(jax.random.fold_in(key, step))
    return jax.random.uniform(value, (16, 6)) * jax.random.bernoulli(on, 0.1, (16, 6))


def num_active(x):
    return jnp.sum(x != 0, axis=1)


PROBLEM = make_problem(apply_fn, PARAMS, sample_fn, uses={"W": 2}, num_active_fn=num_active)


def run(num_devices, method, state, num_steps=3):
    devices = jax.local_devices()[:num_devices]
    step = step_lib.make_step(PROBLEM, method, axis_name=parallel.AXIS)
    state, metrics = parallel.pmap_steps(step, num_steps, devices)(
        parallel.replicate(state, devices), PARAMS, jax.random.key(1)
    )
    copies = jax.device_get(state.components)
    for leaf in jax.tree.leaves(copies):  # every device holds the same
        for i in range(1, num_devices):
            np.testing.assert_array_equal(leaf[i], leaf[0])
    return parallel.unreplicate(state).components, jax.device_get(metrics)


@pytest.mark.parametrize(
    ("fields", "counts"),
    [
        ({"topk": 1.1, "hidden_reconstruction_coeff": 0.5}, (1, 2, 4)),
        # More kept than there are pairs with attributions: the cut lies among the ties.
        ({"topk": 4.0, "sparse_route": "dispatch"}, (1, 2, 4)),
        ({"mask": "topk", "topk": 2.0, "unit_norm_U": True}, (1, 4)),
        ({"mask": "exact", "attributions_at": "components"}, (1, 2)),
        ({"mask": "none", "attribution_lp_coeff": 0.1, "minimality_coeff": 0.0}, (1, 4)),
    ],
    ids=str,
)
def test_one_two_and_four_devices_agree(fields, counts):
    sizes = {"num_components": 5, "num_steps": 20, "batch_size": 16, "init_scale": 3.0}
    method = make_method(**sizes, warmup_fraction=0.0, learning_rate=1e-2, **fields)
    state = jax.jit(lambda key: init_state(key, PROBLEM, method))(jax.random.key(0))
    (one, metrics), *others = [run(n, method, state) for n in counts]
    for components, theirs in others:
        assert set(theirs) == set(metrics)
        np.testing.assert_array_equal(theirs["mean_active"], metrics["mean_active"])
        for name in metrics:
            np.testing.assert_allclose(theirs[name], metrics[name], rtol=1e-5, err_msg=name)
        for a, b in zip(jax.tree.leaves(components), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


def test_every_device_takes_its_own_slice():
    def per_device(_):
        return step_lib._local_batch({"x": jnp.arange(8.0).reshape(8, 1)}, "data")["x"]

    np.testing.assert_array_equal(
        jax.pmap(per_device, axis_name="data")(jnp.zeros(4)).reshape(8), np.arange(8)
    )


def test_batch_must_be_divisible():
    parallel.check_batch(8, 4)
    with pytest.raises(
        InputError,
        match="batch_size = 10 is not divisible by the 4 devices; choose a multiple of 4",
    ):
        parallel.check_batch(10, 4)


def test_replicate_and_back():
    tree = {"a": jnp.arange(3.0)}
    copies = parallel.replicate(tree, jax.local_devices())
    assert copies["a"].shape == (4, 3) and len(copies["a"].sharding.device_set) == 4
    np.testing.assert_array_equal(parallel.unreplicate(copies)["a"], tree["a"])
