"""Networks in half precision: their recipe and their files. Losses: tests/losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from small import SETTINGS

import apd_jax
from apd_jax.evidence.audit import spearman
from apd_jax.recipe import modes
from apd_jax.targets import weights

HALF = (jnp.bfloat16, jnp.float16)
W = np.random.default_rng(0).normal(size=(6, 4))


def sparse_rows(rng, step):
    on, size = jax.random.split(jax.random.fold_in(rng, step))
    x = jax.random.bernoulli(on, 0.2, (64, 6)) * jax.random.uniform(size, (64, 6))
    return x.astype(jnp.bfloat16)


@pytest.mark.parametrize("dtype", HALF)
def test_the_recipe(dtype, monkeypatch):
    """Begins at modes, whose matrices are decomposed in single precision."""
    monkeypatch.setattr(modes, "NUM_EXAMPLES", 2048)

    def fn(params, x):
        return jax.nn.relu(x.astype(dtype) @ params["w"] @ params["w"].T)

    recipe = apd_jax.default_recipe()
    for stage in ("polish", "refine"):
        recipe[stage].num_steps = 2
    settings = SETTINGS.replace(num_components=6, batch_size=64, num_steps=10_000)
    settings = settings.replace(schedule="cosine")
    run = apd_jax.decompose(fn, {"w": jnp.asarray(W, dtype)}, sparse_rows, settings, recipe=recipe)
    factors = run.components.factors["w"]
    assert factors.U.dtype == factors.V.dtype == jnp.float32
    assert np.isfinite(run.history[-1]["total"])
    assert run.component(0)["w"].dtype == dtype


@pytest.mark.parametrize("dtype", HALF)
def test_rank_correlations(dtype):
    """Evidence's check of attributions."""
    a, b = jnp.arange(8.0).astype(dtype), (-jnp.arange(8.0)).astype(dtype)
    assert spearman(np.asarray(a), np.asarray(b)) == pytest.approx(-1)


@pytest.mark.parametrize("dtype", HALF)
def test_files_of_weights(tmp_path, dtype):
    given = jnp.asarray(W, dtype)
    file = tmp_path / "half.safetensors"
    file.write_bytes(safetensors.numpy.save({"w": np.asarray(given)}))
    for wanted in (dtype, jnp.float32):
        found = weights.load(file, {"w": jax.ShapeDtypeStruct(W.shape, wanted)})["w"]
        assert found.dtype == wanted
        np.testing.assert_array_equal(found, given.astype(wanted))
