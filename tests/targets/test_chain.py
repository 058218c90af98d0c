"""A target's list of layers is its function; folding a fixed embedding away changes nothing."""

import jax
import jax.numpy as jnp
import pytest
from conftest import close, get_config
from ml_collections import ConfigDict

from apd_jax import targets
from apd_jax.network.outputs import outputs
from apd_jax.targets import chain

SMOKE = (
    ("tms", "5-2,smoke"),
    ("tms_coactive", "smoke"),
    ("linear", "smoke"),
    ("gated", "smoke"),
    ("resid_mlp", "2layer,smoke"),
)


def given(config: ConfigDict):
    target = targets.build(config.target, 16)
    params = target.init_fn(jax.random.key(1))
    return target, params, target.sample_fn(jax.random.key(2), jnp.zeros((), jnp.int32))


@pytest.mark.parametrize(("file", "arg"), SMOKE)
def test_a_target_is_its_layers(file, arg):
    target, params, x = given(get_config(file, arg))
    out = outputs(target.apply_fn(params, x))
    assert float(jnp.abs(out).max()) > 0
    close(chain.run(target.layers, params, x), out)


def test_the_golden_networks_are_their_layers(golden):
    target = golden.target
    out = outputs(target.apply_fn(golden.params, golden.x))
    close(chain.run(target.layers, golden.params, golden.x), out)
    layers, leaves, sides = chain.fold(target.layers, golden.params, set(golden.components.factors))
    close(chain.run(layers, leaves, golden.x), out)
    # Only one residual block can be folded: with two, the second reads what the first wrote.
    assert bool(sides) == golden.name.startswith("resid1")
    for name, (left, right) in sides.items():
        W = golden.params[name]
        close(
            leaves[name],
            W if left is None and right is None else left @ W if right is None else W @ right,
        )
        assert leaves[name].size < W.size


def test_networks_that_are_no_chain_have_no_layers():
    for file in ("digits", "induction"):
        assert targets.build(get_config(file, "smoke").target, 4).layers == ()
