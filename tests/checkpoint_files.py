"""Tiny random checkpoints as the families write them, and plain numpy forward passes of each.

The forward passes are written from the families' own descriptions, one by one, and share nothing
with `apd_jax.language`.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer, models, pre_tokenizers

V, D, L, H, T = 24, 16, 2, 4, 9
WORDS = {f"w{i}": i for i in range(V - 2)}  # fewer tokens than embeddings, as files often have


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer_norm(x, w, b, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * w + b


def rms_norm(x, w, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w


def gelu_new(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu(x):
    from scipy.special import erf

    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def silu(x):
    return x / (1 + np.exp(-x))


def attention(q, k, v):
    """q, k, v [B, T, heads, d] with as many heads each."""
    out = np.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            scores = q[b, :, h] @ k[b, :, h].T / np.sqrt(q.shape[-1])
            scores[np.triu_indices(len(scores), 1)] = -np.inf
            out[b, :, h] = softmax(scores) @ v[b, :, h]
    return out.reshape(*q.shape[:2], -1)


def rope_halves(x, count, base):
    """As in Hugging Face's rotate_half, on the first `count` entries."""
    out = x.copy()
    for t in range(x.shape[1]):
        for j in range(count // 2):
            angle = t * base ** (-2 * j / count)
            a, b = x[:, t, :, j], x[:, t, :, j + count // 2]
            out[:, t, :, j] = a * np.cos(angle) - b * np.sin(angle)
            out[:, t, :, j + count // 2] = b * np.cos(angle) + a * np.sin(angle)
    return out


def rope_adjacent(x, base):
    out = x.copy()
    for t in range(x.shape[1]):
        for j in range(x.shape[-1] // 2):
            turn = np.exp(1j * t * base ** (-2 * j / x.shape[-1]))
            z = (x[:, t, :, 2 * j] + 1j * x[:, t, :, 2 * j + 1]) * turn
            out[:, t, :, 2 * j], out[:, t, :, 2 * j + 1] = z.real, z.imag
    return out


def gpt2(w, tokens):
    x = w["wte.weight"][tokens] + w["wpe.weight"][: tokens.shape[1]]
    for i in range(L):
        p = f"h.{i}."
        n = layer_norm(x, w[p + "ln_1.weight"], w[p + "ln_1.bias"], 1e-5)
        qkv = n @ w[p + "attn.c_attn.weight"] + w[p + "attn.c_attn.bias"]
        q, k, v = (a.reshape(*tokens.shape, H, D // H) for a in np.split(qkv, 3, axis=-1))
        x = x + attention(q, k, v) @ w[p + "attn.c_proj.weight"] + w[p + "attn.c_proj.bias"]
        n = layer_norm(x, w[p + "ln_2.weight"], w[p + "ln_2.bias"], 1e-5)
        hidden = gelu_new(n @ w[p + "mlp.c_fc.weight"] + w[p + "mlp.c_fc.bias"])
        x = x + hidden @ w[p + "mlp.c_proj.weight"] + w[p + "mlp.c_proj.bias"]
    return layer_norm(x, w["ln_f.weight"], w["ln_f.bias"], 1e-5) @ w["wte.weight"].T


def neox(w, tokens):
    d = D // H
    x = w["gpt_neox.embed_in.weight"][tokens]
    for i in range(L):
        p = f"gpt_neox.layers.{i}."

        def linear(x, name, p=p):
            return x @ w[p + name + ".weight"].T + w[p + name + ".bias"]

        def norm(x, name, p=p):
            return layer_norm(x, w[p + name + ".weight"], w[p + name + ".bias"], 1e-5)

        mixed = linear(norm(x, "input_layernorm"), "attention.query_key_value")
        mixed = mixed.reshape(*tokens.shape, H, 3 * d)
        q, k, v = mixed[..., :d], mixed[..., d : 2 * d], mixed[..., 2 * d :]
        q, k = rope_halves(q, d // 2, 10_000.0), rope_halves(k, d // 2, 10_000.0)
        attended = linear(attention(q, k, v), "attention.dense")
        hidden = gelu(linear(norm(x, "post_attention_layernorm"), "mlp.dense_h_to_4h"))
        x = x + attended + linear(hidden, "mlp.dense_4h_to_h")
    last = "gpt_neox.final_layer_norm."
    return layer_norm(x, w[last + "weight"], w[last + "bias"], 1e-5) @ w["embed_out.weight"].T


def llama(w, tokens, d_head=D // H):
    """Also Qwen2 (biases of q, k, v) and Qwen3 (norms of q and k), by what the file holds."""
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(L):
        p = f"model.layers.{i}."

        def heads(x, name, p=p):
            y = x @ w[p + f"self_attn.{name}_proj.weight"].T
            y = y + w.get(p + f"self_attn.{name}_proj.bias", 0)
            y = y.reshape(*tokens.shape, -1, d_head)
            norm = w.get(p + f"self_attn.{name}_norm.weight")
            return y if norm is None else rms_norm(y, norm, 1e-6)

        n = rms_norm(x, w[p + "input_layernorm.weight"], 1e-6)
        q, k, v = heads(n, "q"), heads(n, "k"), heads(n, "v")
        q, k = rope_halves(q, d_head, 500.0), rope_halves(k, d_head, 500.0)
        k, v = np.repeat(k, H // 2, axis=2), np.repeat(v, H // 2, axis=2)
        x = x + attention(q, k, v) @ w[p + "self_attn.o_proj.weight"].T
        n = rms_norm(x, w[p + "post_attention_layernorm.weight"], 1e-6)
        gate, up = (n @ w[p + f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (silu(gate) * up) @ w[p + "mlp.down_proj.weight"].T
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return rms_norm(x, w["model.norm.weight"], 1e-6) @ head.T


def glass(w, tokens):
    x = w["E"][tokens]
    for i in range(L):
        p = f"blocks.{i}."
        n = rms_norm(x, w[p + "norm1.gamma"], 1e-6)
        q, k, v = (
            (n @ w[p + f"attn.W_{m}"]).reshape(*tokens.shape, -1, D // H) for m in ("Q", "K", "V")
        )
        q, k = rope_adjacent(q, 500.0), rope_adjacent(k, 500.0)
        k, v = np.repeat(k, H // 2, axis=2), np.repeat(v, H // 2, axis=2)
        x = x + attention(q, k, v) @ w[p + "attn.W_O"]
        n = rms_norm(x, w[p + "norm2.gamma"], 1e-6)
        x = x + (silu(n @ w[p + "ffn.W1"]) * (n @ w[p + "ffn.W3"])) @ w[p + "ffn.W2"]
    return rms_norm(x, w["norm_f.gamma"], 1e-6) @ w["E"].T


def random(shapes, seed=0):
    """Large enough that every part matters: norms about 1, the rest of spread 0.3."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes.items():
        centre = 1.0 if len(shape) == 1 and "bias" not in name else 0.0
        found[name] = (centre + 0.3 * rng.normal(size=shape)).astype(np.float32)
    return found


GPT2_CONFIG = {
    **{"model_type": "gpt2", "vocab_size": V, "n_embd": D, "n_layer": L, "n_head": H},
    **{"n_positions": 12, "activation_function": "gelu_new", "n_inner": None},
}


def gpt2_weights():
    shapes = {"wte.weight": (V, D), "wpe.weight": (12, D)}
    for i in range(L):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{norm}.weight": (D,), f"h.{i}.{norm}.bias": (D,)}
        for name, a, b in (
            *(("attn.c_attn", D, 3 * D), ("attn.c_proj", D, D)),
            *(("mlp.c_fc", D, 4 * D), ("mlp.c_proj", 4 * D, D)),
        ):
            shapes |= {f"h.{i}.{name}.weight": (a, b), f"h.{i}.{name}.bias": (b,)}
    return random(shapes | {"ln_f.weight": (D,), "ln_f.bias": (D,)})


NEOX_CONFIG = {
    **{"model_type": "gpt_neox", "vocab_size": V, "hidden_size": D, "num_hidden_layers": L},
    **{"num_attention_heads": H, "intermediate_size": 4 * D, "max_position_embeddings": 12},
    **{"rotary_pct": 0.5, "rotary_emb_base": 10_000, "use_parallel_residual": True},
    **{"hidden_act": "gelu", "layer_norm_eps": 1e-5, "tie_word_embeddings": False},
}


def neox_weights():
    shapes = {"gpt_neox.embed_in.weight": (V, D), "embed_out.weight": (V, D)}
    for i in range(L):
        p = f"gpt_neox.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{p}{norm}.weight": (D,), f"{p}{norm}.bias": (D,)}
        for name, a, b in (
            *(("attention.query_key_value", D, 3 * D), ("attention.dense", D, D)),
            *(("mlp.dense_h_to_4h", D, 4 * D), ("mlp.dense_4h_to_h", 4 * D, D)),
        ):
            shapes |= {f"{p}{name}.weight": (b, a), f"{p}{name}.bias": (b,)}
    last = "gpt_neox.final_layer_norm."
    return random(shapes | {last + "weight": (D,), last + "bias": (D,)})


LLAMA_CONFIG = {
    **{"model_type": "llama", "vocab_size": V, "hidden_size": D, "num_hidden_layers": L},
    **{"num_attention_heads": H, "num_key_value_heads": 2, "intermediate_size": 20},
    **{"max_position_embeddings": 12, "rope_theta": 500.0, "rms_norm_eps": 1e-6},
    **{"hidden_act": "silu", "tie_word_embeddings": False},
}
QWEN2_CONFIG = LLAMA_CONFIG | {"model_type": "qwen2", "tie_word_embeddings": True}
QWEN3_CONFIG = QWEN2_CONFIG | {"model_type": "qwen3", "head_dim": 6}


def llama_weights(config=LLAMA_CONFIG):
    d, kind = config.get("head_dim", D // H), config["model_type"]
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for i in range(L):
        p = f"model.layers.{i}."
        for name, n in (("q", H), ("k", 2), ("v", 2)):
            shapes[f"{p}self_attn.{name}_proj.weight"] = (n * d, D)
            if kind == "qwen2":
                shapes[f"{p}self_attn.{name}_proj.bias"] = (n * d,)
            if kind == "qwen3" and name != "v":
                shapes[f"{p}self_attn.{name}_norm.weight"] = (d,)
        shapes |= {p + "self_attn.o_proj.weight": (D, H * d), p + "mlp.down_proj.weight": (D, 20)}
        shapes |= {p + f"mlp.{name}_proj.weight": (20, D) for name in ("gate", "up")}
        shapes |= {p + "input_layernorm.weight": (D,), p + "post_attention_layernorm.weight": (D,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    return random(shapes)


GLASS_CONFIG = {
    **{"vocab_size": V, "d_model": D, "n_layers": L, "n_heads": H, "n_kv_heads": 2},
    **{"max_len": 12, "rope_base": 500.0, "eps": 1e-6, "init_std": 0.02},
}


def glass_weights():
    shapes = {"E": (V, D), "norm_f.gamma": (D,)}
    for i in range(L):
        p = f"blocks.{i}."
        shapes |= {p + "norm1.gamma": (D,), p + "norm2.gamma": (D,)}
        shapes |= {p + "attn.W_Q": (D, D), p + "attn.W_K": (D, D // 2), p + "attn.W_V": (D, D // 2)}
        shapes |= {p + "attn.W_O": (D, D), p + "ffn.W1": (D, 20), p + "ffn.W3": (D, 20)}
        shapes |= {p + "ffn.W2": (20, D)}
    return random(shapes)


def write_folder(folder, config, weights, *, dtype="float32", shards=1, tokenizer=True):
    """A Hugging Face folder; weights in float32, float16 or bfloat16."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    stored = {name: a.astype(kind) for name, a in weights.items()}
    if shards == 1:
        safetensors.numpy.save_file(stored, folder / "model.safetensors")
    else:
        places = {}
        for j in range(shards):
            file = f"model-{j + 1:05}-of-{shards:05}.safetensors"
            names = list(stored)[j::shards]
            safetensors.numpy.save_file({n: stored[n] for n in names}, folder / file)
            places |= dict.fromkeys(names, file)
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if tokenizer:
        write_tokenizer(folder / "tokenizer.json")
    return folder, {name: np.asarray(a, np.float32) for name, a in stored.items()}


def write_tokenizer(path, words=WORDS):
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
