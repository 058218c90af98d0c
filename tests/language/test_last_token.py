"""The last position alone: the logits of the whole model, and edits that it does not see."""

import jax
import numpy as np
import pytest
from checkpoint_files import (
    GPT2_CONFIG,
    LLAMA_CONFIG,
    NEOX_CONFIG,
    QWEN3_CONFIG,
    L,
    T,
    V,
    gpt2_weights,
    llama_weights,
    neox_weights,
    write_folder,
)

import apd_jax
from apd_jax import language
from apd_jax.errors import InputError

TOKENS = np.random.default_rng(1).integers(0, V, (4, T)).astype(np.int32)
FAMILIES = {
    "gpt2": (GPT2_CONFIG, gpt2_weights),
    "neox": (NEOX_CONFIG, neox_weights),
    "llama": (LLAMA_CONFIG, llama_weights),
    "qwen3": (QWEN3_CONFIG, lambda: llama_weights(QWEN3_CONFIG)),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return {
        name: language.load(write_folder(base / name, config, weights())[0])
        for name, (config, weights) in FAMILIES.items()
    }


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layer", range(L))
def test_the_logits_are_those_of_the_whole(models, name, layer):
    model = models[name]
    last = model.last_token(layer)
    found = last.apply_fn(last.params, last.inputs(TOKENS))
    np.testing.assert_allclose(
        found, model.apply_fn(model.params, TOKENS)[:, -1], rtol=1e-4, atol=1e-5
    )
    skipped = model.config.matrices(layers=range(layer))
    assert set(last.params).isdisjoint(skipped) and set(last.params) <= set(model.params)


def test_it_can_be_decomposed_and_edited(models):
    """An edit of the last layer's MLP, which writes no keys, does the same in the whole model."""
    model = models["llama"]
    last, sites = model.last_token(L - 1), model.matrices("mlp", layers=[L - 1])
    inputs = jax.tree.map(np.asarray, last.inputs(TOKENS))
    settings = apd_jax.Targeted(
        num_components=3, batch_size=4, num_steps=2, minimality_loss="kl", adversarial_coeff=0.0
    )
    found = apd_jax.decompose(
        last.apply_fn, last.params, [inputs], settings, select=sites, elsewhere=[inputs]
    )
    assert found.activity(inputs).values.shape == (4, 9)
    edited = found.edit({0: 0.0, 4: 3.0})
    alone = last.apply_fn(edited, inputs)
    whole = model.apply_fn(model.params | edited, TOKENS)[:, -1]
    np.testing.assert_allclose(alone, whole, rtol=1e-4, atol=1e-5)
    assert np.abs(alone - last.apply_fn(last.params, inputs)).max() > 1e-3


def test_layers_that_are_not_there_are_refused(models):
    for layer in (-1, L):
        with pytest.raises(InputError, match=f"no layer {layer}"):
            models["gpt2"].last_token(layer)


def test_padding_is_refused(models):
    with pytest.raises(InputError, match="below 0 stand for padding"):
        models["gpt2"].last_token(0).inputs(TOKENS - V)
