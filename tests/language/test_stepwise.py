"""A token at a time with keys and values kept: the tokens and logits of whole passes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import V
from test_last_token import FAMILIES, models  # noqa: F401

from apd_jax import language
from apd_jax.language.interventions import Intervention
from apd_jax.language.tokens import PAD

rng = np.random.default_rng(5)
PROMPTS = np.where(np.arange(5) < [[5], [2], [1]], rng.integers(0, V - 2, (3, 5)), PAD)
MORE = 5  # up to 10 of 12 positions


@pytest.mark.parametrize("name", FAMILIES)
def test_generated_as_by_whole_passes(models, name):  # noqa: F811
    model = models[name]
    for temperature in (0.0, 1.5):
        options = {"num_tokens": MORE, "temperature": temperature, "seed": 3, "length": 11}
        whole, by_steps = (
            language.generate(run, model.params, PROMPTS, **options)
            for run in (model.apply_fn, model.steps)
        )
        np.testing.assert_array_equal(by_steps, whole)
        assert ((whole >= 0).sum(1) == [10, 7, 6]).all()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype, near", [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_logits_are_those_of_whole_passes(models, name, dtype, near):  # noqa: F811
    """Rows at positions of their own; what stands behind them is not read."""
    model = dataclasses.replace(models[name], dtype=dtype)
    tokens = rng.integers(0, V, (3, 8)).astype(np.int32)
    ends = np.array([3, 1, 5])
    seen = jnp.asarray(np.where(np.arange(8) < ends[:, None], tokens, 1))
    kept = jax.jit(model.steps.begin)(model.params, seen)
    step, rows = jax.jit(model.steps.step), np.arange(3)
    expected = np.asarray(model.apply_fn(model.params, tokens))
    for i in range(3):
        at = jnp.asarray(ends + i)
        logits, kept = step(model.params, kept, jnp.asarray(tokens[rows, at]), at)
        size = np.abs(expected).max()
        np.testing.assert_allclose(logits, expected[rows, at], atol=near * size, rtol=near)


def test_a_change_that_holds_everywhere_is_stepwise_too(models):  # noqa: F811
    model = models["llama"]
    changed = {name: 1.5 * a for name, a in model.params.items()}

    def refused(params, tokens):
        raise AssertionError("a whole pass")

    everywhere = Intervention(refused, changed, changed)
    found = model.generate("w1 w2", everywhere, num_tokens=4)
    assert found == model.generate("w1 w2", changed, num_tokens=4)
    with pytest.raises(AssertionError, match="a whole pass"):
        model.generate("w1 w2", Intervention(refused, (changed,), changed), num_tokens=4)
