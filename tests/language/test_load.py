"""`language.load`: every family against plain numpy, round trips, and what is refused."""

import json
import logging

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import (
    GLASS_CONFIG,
    GPT2_CONFIG,
    LLAMA_CONFIG,
    NEOX_CONFIG,
    QWEN2_CONFIG,
    QWEN3_CONFIG,
    D,
    H,
    L,
    T,
    V,
    glass,
    glass_weights,
    gpt2,
    gpt2_weights,
    llama,
    llama_weights,
    neox,
    neox_weights,
    write_folder,
    write_tokenizer,
)

from apd_jax import components, language
from apd_jax.components import layout
from apd_jax.errors import InputError
from apd_jax.network.problem import Problem, check_function

TOKENS = np.random.default_rng(1).integers(0, V, (2, T)).astype(np.int32)


def write_gguf(path, weights):
    """The Llama weights as llama.cpp's converter writes them: q and k with rows in pairs."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(12)
    writer.add_embedding_length(D)
    writer.add_block_count(L)
    writer.add_feed_forward_length(20)
    writer.add_head_count(H)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(500.0)
    writer.add_rope_dimension_count(D // H)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b", "ab", "Ġ", "Ġab", "<|endoftext|>"])
    writer.add_token_merges(["a b", "Ġ ab"])
    writer.add_token_types([1, 1, 1, 1, 1, 3])
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {"self_attn.o_proj": "attn_output"}
    names |= {f"self_attn.{n}_proj": f"attn_{n}" for n in "qkv"}
    names |= {f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")}
    for name, a in weights.items():
        for theirs, own in names.items():
            name = name.replace(theirs, own)
        name = name.replace("model.layers", "blk").replace("model.embed_tokens", "token_embd")
        name = name.replace("model.norm", "output_norm").replace("lm_head", "output")
        if "attn_q" in name or "attn_k" in name:
            heads = a.reshape(-1, 2, D // H // 2, D)
            a = heads.swapaxes(1, 2).reshape(a.shape)
        writer.add_tensor(name, np.ascontiguousarray(a))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_npz(path):
    weights = {name: a.astype(np.float16) for name, a in glass_weights().items()}
    np.savez(path, __config__=np.array(json.dumps(GLASS_CONFIG)), **weights)
    return {name: a.astype(np.float32) for name, a in weights.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{family: (model, the logits that numpy gives)}, one checkpoint each, as they come."""
    base, found = tmp_path_factory.mktemp("models"), {}

    def add(name, path, weights, forward, **options):
        found[name] = language.load(path, **options), forward(weights, TOKENS)

    buffers = {f"h.{i}.attn.bias": np.ones((1, 1, 12, 12), np.float32) for i in range(L)}
    path, w = write_folder(base / "gpt2", GPT2_CONFIG, gpt2_weights() | buffers)
    add("gpt2", path, w, gpt2)
    prefixed = {"transformer." + name: a for name, a in gpt2_weights().items()}
    prefixed["lm_head.weight"] = prefixed["transformer.wte.weight"]
    path, _ = write_folder(base / "gpt2_prefixed", GPT2_CONFIG, prefixed)
    add("gpt2_prefixed", path, w, gpt2)
    path, w = write_folder(base / "neox", NEOX_CONFIG, neox_weights(), dtype="float16")
    add("neox", path, w, neox)
    path, w = write_folder(base / "llama", LLAMA_CONFIG, llama_weights(), shards=3)
    add("llama", path, w, llama, remat=True)
    write_gguf(base / "llama.gguf", w)
    add("gguf", base / "llama.gguf", w, llama)
    path, w = write_folder(
        base / "qwen2", QWEN2_CONFIG, llama_weights(QWEN2_CONFIG), dtype="bfloat16"
    )
    add("qwen2", path, w, llama)
    path, w = write_folder(base / "qwen3", QWEN3_CONFIG, llama_weights(QWEN3_CONFIG))
    add("qwen3", path, w, lambda w, tokens: llama(w, tokens, d_head=6))
    w = write_npz(base / "glass.npz")
    add("glass", base / "glass.npz", w, glass)
    return found


NAMES = ("gpt2", "gpt2_prefixed", "neox", "llama", "gguf", "qwen2", "qwen3", "glass")


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_numpy(models, name):
    model, expected = models[name]
    logits = jax.jit(model.apply_fn)(model.params, TOKENS)
    assert logits.dtype == jnp.float32 and np.abs(expected).max() > 1
    assert np.abs(logits - expected).max() < 1e-4


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "qwen3", "glass"])
def test_every_matrix_can_be_decomposed(models, name):
    """By shapes alone: the axes that the network sums over are the inputs, tied embeddings too."""
    model, _ = models[name]
    chosen = model.matrices()
    assert len(chosen) == L * (4 if name in ("gpt2", "neox") else 7)
    layouts = layout.infer(model.apply_fn, model.params, TOKENS)
    for site in chosen:
        assert layouts[site].ins == ((0,) if model.config.inputs_first else (1,)), site
        assert layouts[site].outs == ((1,) if model.config.inputs_first else (0,)), site
    embed = model.config.name("embed")
    assert (layouts[embed].ins, layouts[embed].outs) == ((0,), (1,))  # looked up first
    cs = jax.eval_shape(
        lambda key: components.init(
            key, model.params, num_components=3, rank=1, select=chosen, layouts=layouts
        ),
        jax.random.key(0),
    )
    q = cs.factors[chosen[0]]
    assert q.U.shape == (3, D, 1) and q.V.shape == (3, 1, model.params[chosen[0]].size // D)
    check_function(Problem(model.apply_fn, model.params, lambda rng, step: jnp.asarray(TOKENS)))


def test_what_is_not_used_is_said(models, tmp_path, caplog):
    assert models["gpt2"][0].ignored == ("h.0.attn.bias", "h.1.attn.bias")
    assert models["gpt2_prefixed"][0].ignored == ("lm_head.weight",)
    write_npz(tmp_path / "glass.npz")
    with caplog.at_level(logging.INFO, "apd_jax"):
        assert language.load(tmp_path / "glass.npz").tokenizer is None
    assert "loaded without a tokenizer" in caplog.text
    with pytest.raises(InputError, match="came without a tokenizer; give tokens"):
        models["glass"][0].encode("a")


def test_tokenizers(models):
    model = models["llama"][0]
    assert model.encode("w3").tolist() == [3] and model.decode([3]) == "w3"
    tokenizer = models["gguf"][0].tokenizer
    assert tokenizer.encode("ab ab<|endoftext|>").tolist() == [2, 4, 5]
    assert tokenizer.strings([2, 4]) == ["ab", " ab"] and tokenizer.document == 5


@pytest.mark.parametrize("name", ["gpt2_prefixed", "gguf"])
def test_edited_weights_come_back_under_their_names(models, name, tmp_path):
    model, _ = models[name]
    site = model.matrices("mlp", layers=[1])[0]
    edited = model.params | {site: model.params[site] + 1}
    model.save(tmp_path / "edited", edited)
    again = language.load(tmp_path / "edited")
    assert set(again.params) == set(model.params) and again.config == model.config
    for key, a in edited.items():
        np.testing.assert_array_equal(again.params[key], a)
    assert again.tokenizer.sha256 == model.tokenizer.sha256
    with pytest.raises(InputError, match=r"params do not fit the model: .* should be absent"):
        model.save(tmp_path / "edited", model.params | {"more": jnp.zeros(1)})


def test_half_precision_is_for_products_alone(models, tmp_path):
    _, expected = models["qwen2"]
    path, _ = write_folder(tmp_path, QWEN2_CONFIG, llama_weights(QWEN2_CONFIG), dtype="bfloat16")
    model = language.load(path, dtype="bfloat16")
    assert {a.dtype for a in model.params.values()} == {jnp.dtype("float32")}
    error = np.abs(jax.jit(model.apply_fn)(model.params, TOKENS) - expected).max()
    assert 1e-3 < error < 0.1 * np.abs(expected).max()


def test_too_long_a_context(models):
    model = models["gguf"][0]
    with pytest.raises(InputError, match="13 positions, but this model's context is 12"):
        jax.eval_shape(model.apply_fn, model.params, jnp.zeros((1, 13), jnp.int32))


def damaged(kind, folder):
    """A folder with one fault."""
    config, weights, options = dict(LLAMA_CONFIG), llama_weights(), {}
    if kind == "shard":
        options = {"shards": 3}
    elif kind == "nan":
        weights["model.norm.weight"][3] = np.nan
    elif kind == "missing":
        del weights["model.layers.1.mlp.up_proj.weight"]
    elif kind == "shape":
        config["intermediate_size"] = 21
    elif kind == "more":
        weights["model.layers.0.adapter.weight"] = np.ones((2, 3), np.float32)
    elif kind == "family":
        config["model_type"] = "mamba"
    elif kind == "rope":
        config["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0}
    write_folder(folder, config, weights, **options)
    if kind == "shard":
        (folder / "model-00002-of-00003.safetensors").unlink()
    elif kind == "torn":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[:-10])
    elif kind == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif kind == "vocabulary":
        write_tokenizer(folder / "tokenizer.json", {f"w{i}": i for i in range(V + 1)})
    elif kind == "json":
        (folder / "config.json").write_text("{")


REFUSED = {
    "shard": "lacks 1 of 3 files of weights that its index names: model-00002-of-00003",
    "nan": r"holds NaN or infinities in 'model.norm.weight'",
    "missing": r"lacks the weights 'model.layers.1.mlp.up_proj.weight'; give all files",
    "shape": r"shape \(20, 16\), but its config asks for \(21, 16\)",
    "more": r"holds 'model.layers.0.adapter.weight' \(6 weights\), for which this family has no",
    "family": "unknown model_type in .*'mamba'; known: gpt2, gpt_neox, llama",
    "rope": "scales rotary embeddings by 'yarn', which this decoder does not do",
    "torn": "is no whole safetensors file",
    "pickle": "no model.safetensors .its pytorch_model.bin is a pickle",
    "vocabulary": "tokenizer of .* has 25 tokens, but the model only 24 embeddings",
    "json": "config.json is no JSON",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_faults_are_told_in_a_sentence(kind, tmp_path):
    damaged(kind, tmp_path / "model")
    with pytest.raises(InputError, match=REFUSED[kind]):
        language.load(tmp_path / "model")


def test_files_of_other_kinds(tmp_path):
    np.savez(tmp_path / "objects.npz", __config__=np.array({"a": 1}, dtype=object))
    with pytest.raises(InputError, match=r"objects.npz (is no plain|lacks)"):
        language.load(tmp_path / "objects.npz")
    (tmp_path / "torn.gguf").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(InputError, match=r"torn.gguf is no whole GGUF file"):
        language.load(tmp_path / "torn.gguf")
    with pytest.raises(InputError, match="does not exist; give a folder"):
        language.load(tmp_path / "absent")
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"neither a folder with config.json"):
        language.load(tmp_path / "model.bin")
