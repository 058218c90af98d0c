"""Tables of queries and keys: their sum over all pairs is the attention score of a layer."""

import dataclasses

import numpy as np
import pytest
from checkpoint_files import (
    GPT2_CONFIG,
    LLAMA_CONFIG,
    NEOX_CONFIG,
    QWEN3_CONFIG,
    D,
    H,
    gpt2_weights,
    llama_weights,
    neox_weights,
    rope_adjacent,
    rope_halves,
    write_folder,
)
from conftest import close
from draws import drawn_components

from apd_jax import language
from apd_jax.components import Layout, leaf_total
from apd_jax.errors import InputError
from apd_jax.interpretation import qk

T, PIECES = 5, 3


def of_gpt2(config, W, x):
    q, k, _ = (a.reshape(1, T, H, D // H) for a in np.split(x @ W["qkv"], 3, axis=-1))
    return q, k


def of_neox(config, W, x):
    d = D // H
    mixed = (x @ W["qkv"]).reshape(1, T, H, 3 * d)
    return [rope_halves(a, d // 2, 10_000.0) for a in (mixed[..., :d], mixed[..., d : 2 * d])]


def of_llama(config, W, x):
    q, k = ((x @ W[r]).reshape(1, T, -1, config.d_head) for r in "qk")
    if config.rope_pairs == "adjacent":
        return [rope_adjacent(a, config.rope_base) for a in (q, k)]
    return [rope_halves(a, config.d_head, config.rope_base) for a in (q, k)]


FAMILIES = {
    "gpt2": (GPT2_CONFIG, gpt2_weights, of_gpt2, ["qkv"]),
    "neox": (NEOX_CONFIG, neox_weights, of_neox, ["qkv"]),
    "llama": (LLAMA_CONFIG, llama_weights, of_llama, ["q", "k"]),
    "adjacent": (LLAMA_CONFIG, llama_weights, of_llama, ["q", "k"]),
}


def model_of(name, folder, file=LLAMA_CONFIG, weights=llama_weights):
    write_folder(folder, file, weights())
    model = language.load(folder)
    pairs = {"rope_pairs": "adjacent"} if name == "adjacent" else {}
    return dataclasses.replace(model, config=dataclasses.replace(model.config, **pairs))


def components_of(model, roles, rank=1):
    names = [model.config.name(role, 1) for role in roles]
    first = model.config.inputs_first
    layout = Layout((), (0,) if first else (1,), (1,) if first else (0,))
    return drawn_components(
        model.params,
        num_components=PIECES,
        rank=rank,
        select=names,
        layouts=dict.fromkeys(names, layout),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_all_pairs_together_are_the_score(family, tmp_path):
    file, weights, heads, roles = FAMILIES[family]
    model = model_of(family, tmp_path, file, weights)
    config, rank = model.config, 2 if family == "llama" else 1
    cs = components_of(model, roles, rank)
    sites = {role: cs.factors[config.name(role, 1)] for role in roles}
    W = {r: np.asarray(leaf_total(f)) for r, f in sites.items()}
    W = {r: w if config.inputs_first else w.T for r, w in W.items()}
    x = np.random.default_rng(0).normal(size=(1, T, D))
    q, k = heads(config, W, x)
    k = np.repeat(k, H // k.shape[2], axis=2)
    scores = np.einsum("bthd,bshd->hts", q, k) / np.sqrt(config.d_head)
    got = qk.table(cs, model.params, config, 1, distances=T)
    assert got.values.shape == (H, PIECES * rank, PIECES * rank, T)
    assert got.queries.tolist() == np.repeat(range(PIECES), rank).tolist() == got.keys.tolist()
    U = [np.moveaxis(np.asarray(sites[r].U), 0, 1).reshape(D, -1) for r in (roles[0], roles[-1])]
    a_q, a_k = (x[0] @ (u / np.linalg.norm(u, axis=0)) for u in U)
    for t in range(T):
        for s in range(t + 1):
            pairs = np.einsum("q,k,hqk->h", a_q[t], a_k[s], got.values[..., t - s])
            close(pairs, scores[:, t, s], 1e-4)
    fewer = qk.table(cs, model.params, config, 1, distances=2, queries=[2], keys=[0, 1])
    of_q, of_k = got.queries == 2, got.keys <= 1
    close(fewer.values, got.values[:, of_q][:, :, of_k][..., :2])


def test_learned_scales_of_queries_and_keys_are_in_the_table(tmp_path):
    model = model_of("qwen3", tmp_path, QWEN3_CONFIG, lambda: llama_weights(QWEN3_CONFIG))
    config, cs = model.config, components_of(model, ["q", "k"])
    got = qk.table(cs, model.params, config, 1, distances=1)
    plain = qk.table(cs, model.params, dataclasses.replace(config, qk_norm=False), 1, distances=1)
    scales = [np.asarray(model.params[config.name(r, 1)]) for r in ("norm_q", "norm_k")]
    # At τ = 0 nothing turns: Σ_d u_q u_k times the product of the scales.
    f = [cs.factors[config.name(r, 1)] for r in "qk"]
    u = [np.linalg.norm(g.U, axis=1) * np.asarray(g.V[:, 0]) for g in f]
    q, k = (w.reshape(PIECES, -1, config.d_head) for w in u)
    k = np.repeat(k, config.num_heads // config.num_kv_heads, axis=1)
    root = np.sqrt(config.d_head)
    close(plain.values[..., 0], np.einsum("qhd,khd->hqk", q, k) / root)
    close(got.values[..., 0], np.einsum("qhd,khd,d->hqk", q, k, scales[0] * scales[1]) / root)


def test_what_has_no_table(tmp_path):
    model = model_of("llama", tmp_path)
    cs = components_of(model, ["q", "k"])
    with pytest.raises(InputError, match="layer 2 does not exist"):
        qk.table(cs, model.params, model.config, 2)
    with pytest.raises(InputError, match="not decomposed"):
        qk.table(cs, model.params, model.config, 0)
    with pytest.raises(InputError, match="at least 1"):
        qk.table(cs, model.params, model.config, 1, distances=0)
    with pytest.raises(InputError, match="component 9"):
        qk.table(cs, model.params, model.config, 1, keys=[9])
