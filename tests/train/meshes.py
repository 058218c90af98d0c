"""A small problem, and steps of it, on a mesh of D devices for data and M for components."""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import close, make_method

from apd_jax.network.problem import Problem
from apd_jax.train import placement
from apd_jax.train import step as step_lib
from apd_jax.train.state import init_state

RNG = np.random.default_rng(0)
PARAMS = {
    name: jnp.asarray(RNG.normal(size=shape), jnp.float32)
    for name, shape in {"W": (6, 5), "V": (5, 4), "b": (5,)}.items()
}
MESHES = [(2, 2), (1, 4)]


def apply_fn(params, x):
    """Two layers: the cotangent of h comes from the components of V on every device."""
    h = jax.nn.relu(x @ params["W"] + params["b"][None, :])
    return h @ params["V"], {"h": h}


def sample_fn(key, step):
    """Mostly zeros, so that whole examples tie at attribution 0."""
    value, on = jax.random.split(jax.random.fold_in(key, step))
    return jax.random.uniform(value, (16, 6)) * jax.random.bernoulli(on, 0.2, (16, 6))


def per_position(params, x):
    out, _ = apply_fn(params, x.reshape(-1, 6))
    return out.reshape(*x.shape[:2], -1)


def sequences(key, step):
    halves = [sample_fn(key, 2 * step), sample_fn(key, 2 * step + 1)]
    return jnp.concatenate(halves, axis=1).reshape(16, 2, 6)


def problem_of(fn=apply_fn, sample=sample_fn, select=("W", "V"), **more):
    return Problem(fn, PARAMS, sample, select=list(select), **more)


def initial(method, problem):
    """Where a run begins, on the host: the same on every mesh."""
    make = jax.jit(lambda key: init_state(key, problem, method))
    return jax.device_get(make(jax.random.key(0)))


def run(D, M, method, problem, begin, num_steps=2):
    method = method.replace(num_component_shards=M)
    placed = placement.arrange(method, jax.devices()[: D * M])
    step = step_lib.make_step(problem, method, **placed.axes)
    state = placed.put(begin)
    if M > 1:
        factors = state.components.factors["W"]
        assert factors.U.shape[0] == 8 and factors.U.addressable_shards[0].data.shape[0] == 8 // M
    params, key = placed.share((PARAMS, jax.random.key(1)))
    state, metrics = placed.steps(step, num_steps)(state, params, key)
    state = placed.get(state)
    return (state.components, state.gate), jax.device_get(metrics)


def check_same(found, expected):
    (arrays, metrics), (expected_arrays, expected_metrics) = found, expected
    assert set(metrics) == set(expected_metrics)
    np.testing.assert_allclose(
        metrics["mean_active"], expected_metrics["mean_active"], rtol=1e-6
    )  # one pair more would be 1e-2
    for name in expected_metrics:
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(arrays), jax.tree.leaves(expected_arrays), strict=True):
        close(a, b, 1e-5)


def sgd(**fields):
    sizes = {"num_components": 8, "num_steps": 20, "batch_size": 16, "init_scale": 4.0}
    descent = {"learning_rate": 0.3, "optimizer": "sgd", "warmup_fraction": 0.0}
    return make_method(**sizes | descent | {"topk": 1.7} | fields)


def check_mesh(D, M, method, problem=None):
    """Two steps on the mesh are those on one device, which are returned."""
    problem = problem_of() if problem is None else problem
    begin = initial(method, problem)
    expected = run(1, 1, method, problem, begin)
    check_same(run(D, M, method, problem, begin), expected)
    return expected
