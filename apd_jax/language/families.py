"""The families: the names of their weights, and their config files as a `DecoderConfig`.

Roles of a layer: norm_attention, q, k, v (or qkv), norm_q, norm_k, o, norm_mlp, gate, up, down;
of the whole: embed, positions, norm_out, unembed. {i} stands for the layer's number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from apd_jax.errors import InputError, one_of
from apd_jax.language.decoder import ACTIVATIONS, DecoderConfig

_GPT2 = {
    "embed": "transformer.wte.weight",
    "positions": "transformer.wpe.weight",
    "norm_attention": "transformer.h.{i}.ln_1.weight",
    "qkv": "transformer.h.{i}.attn.c_attn.weight",
    "o": "transformer.h.{i}.attn.c_proj.weight",
    "norm_mlp": "transformer.h.{i}.ln_2.weight",
    "up": "transformer.h.{i}.mlp.c_fc.weight",
    "down": "transformer.h.{i}.mlp.c_proj.weight",
    "norm_out": "transformer.ln_f.weight",
    "unembed": "lm_head.weight",
}
_NEOX = {
    "embed": "gpt_neox.embed_in.weight",
    "norm_attention": "gpt_neox.layers.{i}.input_layernorm.weight",
    "qkv": "gpt_neox.layers.{i}.attention.query_key_value.weight",
    "o": "gpt_neox.layers.{i}.attention.dense.weight",
    "norm_mlp": "gpt_neox.layers.{i}.post_attention_layernorm.weight",
    "up": "gpt_neox.layers.{i}.mlp.dense_h_to_4h.weight",
    "down": "gpt_neox.layers.{i}.mlp.dense_4h_to_h.weight",
    "norm_out": "gpt_neox.final_layer_norm.weight",
    "unembed": "embed_out.weight",
}
LLAMA = {
    "embed": "model.embed_tokens.weight",
    "norm_attention": "model.layers.{i}.input_layernorm.weight",
    "q": "model.layers.{i}.self_attn.q_proj.weight",
    "k": "model.layers.{i}.self_attn.k_proj.weight",
    "v": "model.layers.{i}.self_attn.v_proj.weight",
    "o": "model.layers.{i}.self_attn.o_proj.weight",
    "norm_mlp": "model.layers.{i}.post_attention_layernorm.weight",
    "gate": "model.layers.{i}.mlp.gate_proj.weight",
    "up": "model.layers.{i}.mlp.up_proj.weight",
    "down": "model.layers.{i}.mlp.down_proj.weight",
    "norm_out": "model.norm.weight",
    "unembed": "lm_head.weight",
}
_QWEN3 = LLAMA | {
    "norm_q": "model.layers.{i}.self_attn.q_norm.weight",
    "norm_k": "model.layers.{i}.self_attn.k_norm.weight",
}
_GGUF = {
    "embed": "token_embd.weight",
    "norm_attention": "blk.{i}.attn_norm.weight",
    "q": "blk.{i}.attn_q.weight",
    "k": "blk.{i}.attn_k.weight",
    "v": "blk.{i}.attn_v.weight",
    "o": "blk.{i}.attn_output.weight",
    "norm_q": "blk.{i}.attn_q_norm.weight",
    "norm_k": "blk.{i}.attn_k_norm.weight",
    "norm_mlp": "blk.{i}.ffn_norm.weight",
    "gate": "blk.{i}.ffn_gate.weight",
    "up": "blk.{i}.ffn_up.weight",
    "down": "blk.{i}.ffn_down.weight",
    "norm_out": "output_norm.weight",
    "unembed": "output.weight",
}
_GLASS = {
    "embed": "E",
    "norm_attention": "blocks.{i}.norm1.gamma",
    "q": "blocks.{i}.attn.W_Q",
    "k": "blocks.{i}.attn.W_K",
    "v": "blocks.{i}.attn.W_V",
    "o": "blocks.{i}.attn.W_O",
    "norm_mlp": "blocks.{i}.norm2.gamma",
    "gate": "blocks.{i}.ffn.W1",
    "up": "blocks.{i}.ffn.W3",
    "down": "blocks.{i}.ffn.W2",
    "norm_out": "norm_f.gamma",
}
# Hugging Face's names of activations; config files of GPT-2 say "gelu_new".
_ACTIVATIONS = {name: name for name in ("silu", "relu", "gelu")} | {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "swish": "silu",
}
# What no forward pass needs: causal masks and rotary frequencies, which older files hold.
_BUFFERS = re.compile(r"(\.attn|\.attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$")

Shapes = Mapping[str, tuple[int, ...]]  # of the arrays in a file


class _Fields:
    """The fields of a config file, by their names there.

    Raises InputError for one that is missing, and that is not what this decoder does.
    """

    def __init__(self, given: Mapping[str, Any], where: str):
        self.given, self.where = given, where

    def __getitem__(self, name: str) -> Any:
        if self.given.get(name) is None:
            raise InputError(f"{self.where} lacks {name!r}; it holds {', '.join(self.given)}.")
        return self.given[name]

    def get(self, name: str, default: Any) -> Any:
        value = self.given.get(name)
        return default if value is None else value

    def must_be(self, **wanted: Any) -> None:
        for name, value in wanted.items():
            if self.get(name, value) != value:
                raise InputError(
                    f"{self.where} sets {name} = {self.given[name]!r}, which this decoder does not "
                    f"do; only {value!r} can be loaded."
                )

    def activation(self, name: str, default: str) -> str:
        return _ACTIVATIONS[
            one_of(f"{name} in {self.where}", self.get(name, default), _ACTIVATIONS)
        ]

    def rope_base(self, name: str) -> float:
        """Of old config files, and of those that put all of it into rope_parameters."""
        found = 10_000.0
        for group in ("rope_scaling", "rope_parameters"):
            rope = self.get(group, {})
            kind = rope.get("rope_type", rope.get("type", "default"))
            if kind != "default":
                raise InputError(
                    f"{self.where} scales rotary embeddings by {kind!r}, which this decoder does "
                    "not do; only models without such scaling can be loaded."
                )
            found = rope.get("rope_theta", found)
        return float(self.get(name, found))


def _gpt2(f: _Fields) -> dict[str, Any]:
    f.must_be(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    f.must_be(add_cross_attention=False)
    D = f["n_embd"]
    heads = {"num_heads": f["n_head"], "num_kv_heads": f["n_head"], "d_head": D // f["n_head"]}
    return heads | {
        "names": _GPT2,
        "d_model": D,
        "num_layers": f["n_layer"],
        "d_mlp": f.get("n_inner", 4 * D),
        "context": f.get("n_positions", f.get("n_ctx", 1024)),
        "inputs_first": True,
        "norm": "layer",
        "norm_eps": f.get("layer_norm_epsilon", 1e-5),
        "activation": f.activation("activation_function", "gelu_new"),
        "qkv": "packed",
        "tied": f.get("tie_word_embeddings", True),
    }


def _neox(f: _Fields) -> dict[str, Any]:
    D, H = f["hidden_size"], f["num_attention_heads"]
    share = f.get("rotary_pct", f.get("rope_parameters", {}).get("partial_rotary_factor", 0.25))
    return {
        "names": _NEOX,
        "d_model": D,
        "num_layers": f["num_hidden_layers"],
        **{"num_heads": H, "num_kv_heads": H, "d_head": D // H},
        "d_mlp": f["intermediate_size"],
        "context": f["max_position_embeddings"],
        "norm": "layer",
        "norm_eps": f.get("layer_norm_eps", 1e-5),
        "activation": f.activation("hidden_act", "gelu"),
        "qkv": "per_head",
        "parallel": f.get("use_parallel_residual", True),
        "rotary": int(D // H * share),
        "rope_base": f.rope_base("rotary_emb_base"),
        "tied": f.get("tie_word_embeddings", False),
    }


def _llama(f: _Fields) -> dict[str, Any]:
    f.must_be(use_sliding_window=False)
    D, H = f["hidden_size"], f["num_attention_heads"]
    d_head = f.get("head_dim", D // H)
    qk_norm = f["model_type"] == "qwen3"
    return {
        "names": _QWEN3 if qk_norm else LLAMA,
        "d_model": D,
        "num_layers": f["num_hidden_layers"],
        **{"num_heads": H, "num_kv_heads": f.get("num_key_value_heads", H), "d_head": d_head},
        "d_mlp": f["intermediate_size"],
        "context": f["max_position_embeddings"],
        "norm_eps": f.get("rms_norm_eps", 1e-6),
        "activation": f.activation("hidden_act", "silu"),
        "qk_norm": qk_norm,
        "rotary": d_head,
        "rope_base": f.rope_base("rope_theta"),
        "tied": f.get("tie_word_embeddings", False),
    }


_HUGGING_FACE = {
    "gpt2": _gpt2,
    "gpt_neox": _neox,
    "llama": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
}


def of_hugging_face(given: Mapping[str, Any], shapes: Shapes, where: str) -> DecoderConfig:
    """From a config.json and what the weights' files hold."""
    f = _Fields(given, where)
    found = _HUGGING_FACE[one_of(f"model_type in {where}", f["model_type"], _HUGGING_FACE)](f)
    found["names"] = _without_prefix(found["names"], shapes)
    return _finished(found, f["vocab_size"], shapes, where)


def _without_prefix(names: dict[str, str], shapes: Shapes) -> dict[str, str]:
    """Files of the bare model, without its head, lack the first part of every name."""
    prefix, bare = names["embed"].split(".", 1)
    if names["embed"] in shapes or bare not in shapes:
        return names
    return {role: name.removeprefix(prefix + ".") for role, name in names.items()}


# Whose rows of q and k the conversion reorders, so that rotary pairs lie side by side.
_GGUF_PAIRS = {"llama": "adjacent", "qwen2": "halves", "qwen3": "halves"}


def of_gguf(given: Mapping[str, Any], shapes: Shapes, where: str) -> DecoderConfig:
    """From the fields of a GGUF file."""
    kind = str(given.get("general.architecture"))
    arch = one_of(f"architecture in {where}", kind, _GGUF_PAIRS)
    own = {k.removeprefix(f"{arch}."): v for k, v in given.items() if k.startswith(f"{arch}.")}
    f = _Fields(own, where)
    f.must_be(**{"rope.scaling.type": "none"})
    D, H = f["embedding_length"], f["attention.head_count"]
    d_head = f.get("attention.key_length", D // H)
    qk_norm = arch == "qwen3"
    found = {
        "names": {r: n for r, n in _GGUF.items() if qk_norm or r not in ("norm_q", "norm_k")},
        "d_model": D,
        "num_layers": f["block_count"],
        **{"num_heads": H, "num_kv_heads": f.get("attention.head_count_kv", H), "d_head": d_head},
        "d_mlp": f["feed_forward_length"],
        "context": f["context_length"],
        "norm_eps": f["attention.layer_norm_rms_epsilon"],
        "qk_norm": qk_norm,
        "rotary": f.get("rope.dimension_count", d_head),
        "rope_base": float(f.get("rope.freq_base", 10_000.0)),
        "rope_pairs": _GGUF_PAIRS[arch],
        "tied": _GGUF["unembed"] not in shapes,
    }
    vocab_size = shapes.get(_GGUF["embed"], (0,))[0]
    return _finished(found, f.get("vocab_size", vocab_size), shapes, where)


def of_npz(given: Mapping[str, Any], shapes: Shapes, where: str) -> DecoderConfig:
    """From the JSON in a glassllm archive."""
    f = _Fields(given, where)
    D, H = f["d_model"], f["n_heads"]
    widths = shapes.get(_GLASS["gate"].replace("{i}", "0"), (D, 0))
    found = {
        "names": _GLASS,
        "d_model": D,
        "num_layers": f["n_layers"],
        **{"num_heads": H, "num_kv_heads": f["n_kv_heads"], "d_head": D // H, "d_mlp": widths[-1]},
        "context": f["max_len"],
        "inputs_first": True,
        "norm_eps": f["eps"],
        "rotary": D // H,
        "rope_base": f["rope_base"],
        "rope_pairs": "adjacent",
    }
    return _finished(found, f["vocab_size"], shapes, where)


def of_own(given: Mapping[str, Any], where: str) -> DecoderConfig:
    """From what `save` writes of a model that came from no config.json."""
    try:
        return DecoderConfig(**{**given, "biases": tuple(given["biases"])})
    except (TypeError, KeyError) as error:
        raise InputError(f"{where} is not a whole decoder's: {error}; save it again.") from error


def _finished(found: dict[str, Any], vocab_size: int, shapes: Shapes, where: str) -> DecoderConfig:
    """With the roles that have a bias, as the file's names say it."""
    sizes = ("num_layers", "num_heads", "num_kv_heads", "d_head", "d_model", "context")
    if bad := [n for n in sizes if not isinstance(found[n], int) or found[n] < 1]:
        raise InputError(f"{where} gives {bad[0]} = {found[bad[0]]!r}; it must be at least 1.")
    if found["num_heads"] % found["num_kv_heads"]:
        raise InputError(
            f"{where} has {found['num_heads']} heads for {found['num_kv_heads']} heads of keys; "
            "the second must divide the first."
        )
    assert found.get("activation", "silu") in ACTIVATIONS
    plain = DecoderConfig(vocab_size=vocab_size, **found)
    biases = tuple(role for role in found["names"] if plain.bias(role) in shapes)
    return DecoderConfig(vocab_size=vocab_size, **found | {"biases": biases})


def checked(config: DecoderConfig, shapes: Shapes, where: str) -> list[str]:
    """The arrays of a file that this decoder does not use, and need not.

    Raises:
      InputError: one is missing, has another shape, or belongs to something this decoder lacks.
    """
    wanted = config.shapes()
    if missing := [name for name in wanted if name not in shapes]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{where} lacks the weights {missing[0]!r}{more}; give all files of the model."
        )
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise InputError(
                f"{where} holds {name!r} with shape {shapes[name]}, but its config asks for "
                f"{shape}; config and weights must be of one model."
            )
    rest = sorted(name for name in shapes if name not in wanted)
    head = config.names.get("unembed")
    if unknown := [name for name in rest if not _BUFFERS.search(name) and name != head]:
        raise InputError(
            f"{where} holds {unknown[0]!r} ({_count(shapes, unknown)} weights), for which this "
            "family has no place; without it the model would be another."
        )
    return rest


def _count(shapes: Shapes, names: Iterable[str]) -> int:
    return sum(math.prod(shapes[name]) for name in names)
