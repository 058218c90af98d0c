"""Units: entries of what lies between two leaves, found by trying."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apd_jax import components
from apd_jax.methods.apd import APD
from apd_jax.network.problem import Problem
from apd_jax.recipe import beginning, held, modes, scales, stages, units

SIZES = {"in": (5, 12), "gate": (5, 12), "more": (12, 12), "out": (12, 3), "side": (12, 2)}


def sample(key, step):
    return jax.random.normal(jax.random.fold_in(key, step), (64, 5))


def norm(h):
    return h / jnp.sqrt(jnp.mean(h**2, -1, keepdims=True))


NETWORKS = {  # with the leaves that are split by what they write; None: there are no units
    "mlp": (lambda p, x: jax.nn.relu(x @ p["in"]) @ p["out"], {"in"}),
    "gated": (
        lambda p, x: (jax.nn.silu(x @ p["gate"]) * (x @ p["in"])) @ p["out"],
        {"in", "gate"},
    ),
    "deep": (
        lambda p, x: jax.nn.tanh(jax.nn.gelu(x @ p["in"]) @ p["more"]) @ p["out"],
        {"in"},
    ),
    "two heads": (
        lambda p, x: jnp.concatenate(
            [(h := jax.nn.relu(x @ p["in"])) @ p["out"], h @ p["side"]], 1
        ),
        {"in"},
    ),
    "linear": (lambda p, x: (x @ p["in"]) @ p["out"], None),
    "residual": (
        lambda p, x: (h := x @ p["in"]) @ p["out"] + (h + 1) @ p["side"] @ jnp.eye(2, 3),
        None,
    ),
    "normalised": (lambda p, x: norm(jax.nn.relu(x @ p["in"])) @ p["out"], None),
    "mixed": (lambda p, x: jnp.roll(jax.nn.relu(x @ p["in"]), 1, 1) @ p["out"], None),
    "a leaf of another kind": (
        lambda p, x: (
            jax.nn.relu(x @ p["in"]) @ p["out"] + norm(x @ p["gate"]) @ p["side"] @ jnp.ones((2, 3))
        ),
        None,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_units_are_what_a_nonlinearity_keeps_apart(name):
    fn, writers = NETWORKS[name]
    rng = np.random.default_rng(0)
    made = {leaf: jnp.asarray(rng.normal(size=s), jnp.float32) for leaf, s in SIZES.items()}
    used = [leaf for leaf in SIZES if f"'{leaf}'" in str(fn.__code__.co_consts)]
    params = {leaf: made[leaf] for leaf in used}
    problem = Problem(fn, params, sample)
    found = units.find(problem, list(problem.looks(jax.random.key(0), 2)))
    if writers is None:
        assert found is None
        return
    assert found is not None and set(found.writes) == writers
    assert set(found.ins) == set(params) - writers
    n = 24 if name == "deep" else 12
    assert len(found) == n and 0 < found.active <= n
    assert set(found.gains.values()) <= {0.5, 1.0}
    fresh = APD(num_components=n + 1, rank=1).make_components(jax.random.key(1), problem)
    begun = held.components(problem, found, fresh)
    parts = components.materialize(components.aligned(begun))
    for leaf, W in params.items():
        P = np.asarray(parts[leaf])
        np.testing.assert_allclose(P.sum(0), W, atol=1e-5)
        axis = 2 if leaf in writers else 1
        alone = np.sum(np.any(np.abs(P) > 1e-6, axis=3 - axis), axis=1)
        assert set(alone[:n]) <= {0, 1} and not P[n].any()
    # A component is one unit everywhere.
    if name == "mlp":
        written = np.abs(parts["in"]).sum(1).argmax(1)[:n]
        np.testing.assert_array_equal(np.abs(parts["out"]).sum(2).argmax(1)[:n], written)


def test_gates_of_few_inputs_begin_at_units(monkeypatch):
    """relu(a + b - 1) of all six pairs of four inputs ±1: five dimensions, and none ever alone."""
    monkeypatch.setattr(modes, "NUM_EXAMPLES", 1024)
    pairs = list(itertools.combinations(range(4), 2))
    first = np.zeros((5, 6), np.float32)
    for unit, pair in enumerate(pairs):
        first[[*pair, 4], unit] = 1, 1, -1
    params = {"first": jnp.asarray(first), "second": jnp.eye(6)}

    def draw(key, step):
        signs = jax.random.rademacher(jax.random.fold_in(key, step), (256, 4), jnp.float32)
        return jnp.concatenate([signs, jnp.ones((256, 1))], axis=1)

    problem = Problem(lambda p, x: jax.nn.relu(x @ p["first"]) @ p["second"], params, draw)
    method, recipe = APD(num_components=8, topk=0.0, batch_size=256), stages.default_recipe()
    found = beginning.accepted(problem, method, recipe, scales.measure(problem, method))
    assert found is not None and found.num_always_on == 0
    assert found.active == pytest.approx(6 / 4, abs=0.1)  # a pair of inputs is on at a quarter
    parts = np.asarray(components.materialize(components.aligned(found.components))["first"])
    which = np.abs(parts[:6]).sum(1).argmax(1)
    assert sorted(which) == list(range(6))
    np.testing.assert_allclose(parts[:6], first[None] * np.eye(6)[which][:, None], atol=1e-5)
