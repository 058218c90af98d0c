"""No program has the network's weights as constants: XLA refuses 2 GiB, and would compile anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import get_config, make_method

from apd_jax import evaluation, targets
from apd_jax.decomposition import Decomposition
from apd_jax.forward.primitives import all_inner
from apd_jax.methods.spd import SPD
from apd_jax.recipe import modes, scales, stages
from apd_jax.targets.base import Target
from apd_jax.train.state import init_state
from apd_jax.train.step import make_step

D = 48  # a weight has D² = 2,304 entries; nothing else here is as large


def apply_fn(params, x):
    return jax.nn.relu(x @ params["first"]) @ params["second"]


def sample_fn(key, step):
    keys = jax.random.split(jax.random.fold_in(key, step))
    size = jax.random.uniform(keys[0], (32, 1), minval=0.5)
    return jax.nn.one_hot(jax.random.randint(keys[1], 32, 0, D), D) * size


PARAMS = {
    name: jnp.asarray(np.random.default_rng(i).normal(size=(D, D)) / D**0.5, jnp.float32)
    for i, name in enumerate(("first", "second"))
}
TARGET = Target("made up", lambda key: PARAMS, apply_fn, sample_fn, select=("*",))
PROBLEM = TARGET.problem(PARAMS)
METHODS = [
    make_method(num_components=D, rank=1, batch_size=32),
    SPD(num_components=4, batch_size=32, gate_width=2),
]


@pytest.fixture
def largest_constant(monkeypatch):
    """Entries of the largest constant of every function that `jax.jit` makes from here on.

    At every call.
    """
    found, jit = [], jax.jit

    def recording(fn, **options):
        jitted = jit(fn, **options)

        def call(*args, **kwargs):
            found.append(max(_constants(jitted.trace(*args, **kwargs).jaxpr), default=0))
            return jitted(*args, **kwargs)

        return call

    monkeypatch.setattr(jax, "jit", recording)
    return found


def _constants(closed):
    yield from (np.size(a) for a in closed.consts)
    yield from _inner(closed.jaxpr)


def _inner(jaxpr):
    """Those that inner functions hold themselves, and literals."""
    for eqn in jaxpr.eqns:
        yield from (np.size(v.val) for v in eqn.invars if hasattr(v, "val"))
        values = list(eqn.params.values())
        for value in jax.tree.leaves(values, is_leaf=lambda p: hasattr(p, "consts")):
            yield from (np.size(a) for a in getattr(value, "consts", ()))
        for inner in all_inner(eqn):
            yield from _inner(inner)


def made(method):
    components = method.make_components(jax.random.key(0), PROBLEM)
    gate = method.make_gate(jax.random.key(1), PROBLEM, components)
    return Decomposition(PROBLEM, components, method, gate=gate)


def test_a_constant_is_found(largest_constant):
    """Or the tests below would pass whatever happens."""
    jax.jit(lambda x: x @ PARAMS["first"])(jnp.ones((2, D)))
    inner = jax.checkpoint(lambda r: PARAMS["first"] @ r)
    jax.jit(lambda x: jax.lax.map(inner, x))(jnp.ones((2, D)))
    jax.jit(lambda p, x: x @ p)(PARAMS["first"], jnp.ones((2, D)))
    assert largest_constant == [D * D, D * D, 0]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_of_a_decomposition(method, largest_constant):
    decomposition, x = made(method), sample_fn(jax.random.key(1), 0)
    decomposition.activity(x)
    if method.name == "apd":
        decomposition.attributions(x)
    assert len(largest_constant) >= 1 and max(largest_constant) < D * D


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_of_an_evaluation(method, largest_constant):
    evaluation.evaluate(TARGET, made(method), num_batches=1, seed=0)
    assert len(largest_constant) >= 1 and max(largest_constant) < D * D


def test_of_an_evaluation_by_features(largest_constant):
    """W of 12 features in 192 dimensions: 12² and the batch are far smaller than 12·192 = D²."""
    config = get_config("tms", "12-192")
    target = targets.build(config.target, 32)
    problem = target.problem(target.init_fn(jax.random.key(0)))
    method = METHODS[0].replace(num_components=12)
    components = method.make_components(jax.random.key(0), problem)
    decomposition = Decomposition(problem, components, method)
    largest_constant.clear()
    evaluation.evaluate(target, decomposition, num_batches=1, seed=0)
    assert len(largest_constant) >= 3 and max(largest_constant) < D * D


def test_of_the_recipe(largest_constant, monkeypatch):
    """Reference points, modes, the loss at these, and what is measured between stages."""
    monkeypatch.setattr(modes, "NUM_EXAMPLES", 512)
    scales.measure(PROBLEM, METHODS[0])
    modes.find(PROBLEM, 32, jax.random.key(0))
    decomposition = made(METHODS[0])
    few = METHODS[0].replace(threshold=0.1)
    stages._between(PROBLEM, few, decomposition.components, 1, revive=True)
    stages._loss(PROBLEM, few, decomposition.trained)
    assert len(largest_constant) >= 4 and max(largest_constant) < D * D


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_of_a_train_step(method):
    key = jax.random.key(0)
    state = init_state(key, PROBLEM, method)
    closed = jax.make_jaxpr(make_step(PROBLEM, method))(state, PARAMS, key)
    assert max(_constants(closed), default=0) < D * D
