"""Settings that are chosen for the user: by the network, in units of the target."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import apd_jax
from apd_jax.errors import InputError
from apd_jax.methods import registry, suggest
from apd_jax.network.problem import Problem
from apd_jax.recipe import scales

V, T, D = 11, 6, 4
PARAMS = {
    name: jnp.asarray(np.random.default_rng(i).normal(size=shape), jnp.float32)
    for i, (name, shape) in enumerate({"embed": (V, D), "mlp": (D, D), "out": (D, V)}.items())
}
TOKENS = np.random.default_rng(3).integers(0, V, (40, T))
SELECT = ["mlp", "out"]


def network(params, tokens):
    return jnp.tanh(params["embed"][tokens].cumsum(1) @ params["mlp"]) @ params["out"]


def problem(**more):
    sample = apd_jax.data.from_arrays(TOKENS, 8)
    return Problem(network, PARAMS, sample, **{"select": SELECT} | more)


def test_tokens_are_known_by_their_shapes():
    chosen = suggest.suggested(problem())
    assert (chosen.name, chosen.mask_per, chosen.minimality_loss) == ("spd", "position", "kl")
    assert chosen.batch_size == 8
    for name in registry.METHODS:  # a name gets the same kind of outputs
        named = suggest.suggested(problem(), name)
        assert (named.name, named.per_position, named.minimality_loss) == (name, True, "kl")
        named.check()


def test_anything_else_gets_a_methods_defaults():
    x = np.zeros((9, D), np.float32)
    other = Problem(lambda p, x: x @ p["mlp"], PARAMS, [x], select=["mlp"])
    assert suggest.suggested(other) == apd_jax.APD(batch_size=9)
    assert suggest.suggested(other, "spd") == apd_jax.SPD(batch_size=9)


def test_components_by_the_size_of_a_site():
    """mlp [4, 4] has twice its full rank, out [4, 11] as many as its larger side."""
    method = apd_jax.SPD(num_components=0)
    components = method.make_components(jax.random.key(0), problem())
    counts = {name: f.num_pieces for name, f in components.factors.items()}
    assert counts == {"mlp": 8, "out": 11}
    with pytest.raises(InputError, match="num_components must be at least 1"):
        apd_jax.Whole(num_components=0).check()


def test_the_batch_is_cut_for_the_devices():
    """Four of them here: about 512 tokens, in eights where there are as many examples."""
    sizes = {(640, 12): 48, (640, 512): 8, (30, 12): 24, (7, 12): 4, (3, 12): 1}
    for shape, size in sizes.items():
        assert suggest.batch_size(np.zeros(shape, int)) == size
    assert suggest.batch_size(np.zeros((5000, 3))) == 2048


def test_coefficients_in_units_of_the_target():
    method = apd_jax.APD(num_components=3, minimality_loss="kl", mask_per="position", batch_size=8)
    method = method.replace(faithfulness_coeff=2.0, simplicity_coeff=0.0)
    found, s = scales.absolute(problem(), method), scales.measure(problem(), method)
    assert found.loss_units == "absolute"
    assert found.faithfulness_coeff == pytest.approx(2 / s.faithfulness)
    assert found.minimality_coeff == pytest.approx(1 / s.minimality)
    assert found.simplicity_coeff == 0
    assert scales.absolute(problem(), found) is found
    spd = apd_jax.SPD(num_components=0, loss_units="target", importance_coeff=1.0)
    spd = spd.replace(minimality_loss="kl", mask_per="position", batch_size=8)
    assert scales.absolute(problem(), spd).importance_coeff == pytest.approx(1 / 19)


def test_auto_takes_probes_where_exact_attributions_cost_more():
    """Per position by outputs: 66 per example at T = 6, 110 at 10. Else forward, by components."""
    method = apd_jax.APD(mask_per="position", num_probes=1, batch_size=8)
    assert method.fitted(problem()).attribution_mode == "auto"
    wide = np.random.default_rng(4).integers(0, V, (8, 10))
    found = method.fitted(Problem(network, PARAMS, [wide]))
    assert found.attribution_mode == "probe"
    for count, mode in ((100, "auto"), (101, "probe")):
        by_example = method.replace(mask_per="example", num_components=count)
        assert by_example.fitted(problem()).attribution_mode == mode


def test_nothing_chosen_by_the_user(caplog):
    """Arrays of tokens alone. So short a run leaves the sum far off, which is said."""
    method = apd_jax.suggest(network, PARAMS, TOKENS[:8], select=SELECT)
    assert (method.name, method.batch_size) == ("spd", 8)
    with caplog.at_level(logging.WARNING, logger="apd_jax"):
        short = method.replace(num_steps=2, faithfulness_warmup_steps=0, steps_per_call=2)
        found = apd_jax.decompose(network, PARAMS, TOKENS[:8], short, select=SELECT)
    assert "the components' sum is not the network" in caplog.text
    assert found.mask(TOKENS[:2]).shape == (2, T, 19)
    assert found.method.loss_units == "absolute"
    missed = scales.missing(found.problem, found.method, found.components)
    assert missed > scales.FAR
