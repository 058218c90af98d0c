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

from apd_jax import components as components_lib
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


def components_of(model, roles, rank=1, layers=(1,), num_components=PIECES):
    names = [model.config.name(role, i) for i in layers for role in roles]
    first = model.config.inputs_first
    layout = Layout((), (0,) if first else (1,), (1,) if first else (0,))
    return drawn_components(
        model.params,
        num_components=num_components,
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


def scores_by_hand(model, cs, layer, distances):
    """S(τ) of every query and key by its definition, R_τ a matrix: {(query, key): [H, T]}."""
    config, (q, k) = model.config, (cs.factors[model.config.name(r, layer)] for r in "qk")
    d, found = config.d_head, {}
    for i, c in enumerate(q.ids or range(q.num_pieces)):
        for j, e in enumerate(k.ids or range(k.num_pieces)):
            u_q, u_k = np.asarray(q.V[i, 0]), np.asarray(k.V[j, 0])
            v = np.linalg.norm(q.U[i]) * np.linalg.norm(k.U[j])
            values = np.zeros((H, distances))
            for h in range(H):
                group = h * config.num_kv_heads // H
                own, other = u_q[h * d : (h + 1) * d], u_k[group * d : (group + 1) * d]
                for t in range(distances):
                    R = np.zeros((d, d))
                    for m in range(d // 2):
                        angle = t * config.rope_base ** (-2 * m / d)
                        a, b = m, m + d // 2
                        R[a, a] = R[b, b] = np.cos(angle)
                        R[b, a], R[a, b] = np.sin(angle), -np.sin(angle)
                    values[h, t] = v * (R @ own) @ other / np.sqrt(d)
            before = found.get((c, e))
            if before is None or np.abs(before).max() < np.abs(values).max():
                found[c, e] = values  # of several pieces those with the highest peak
    return found


@pytest.mark.parametrize("ids", [None, (0, 1, 0, 2, 3, 3, 1)])
def test_partners_are_those_with_the_highest_peaks(ids, tmp_path, monkeypatch):
    monkeypatch.setattr(qk, "_BLOCK", 2)  # several blocks, the last one not full
    model = model_of("llama", tmp_path)
    cs = components_of(model, ["q", "k"], layers=(0, 1), num_components=7)
    if ids is not None:  # components with several pieces in a matrix
        cs = components_lib.relabel(cs, ids)
    most, distances = 2, 4
    on = np.arange(cs.num_components) != 1
    found = qk.partners(cs, model.params, model.config, on, distances=distances, most=most)
    by_hand = [
        (c, e, layer, int(np.abs(values).max(axis=1).argmax()), values)
        for layer in range(2)
        for (c, e), values in scores_by_hand(model, cs, layer, distances).items()
        if on[c] and on[e]
    ]
    for side, got in enumerate(found):
        for c in range(cs.num_components):
            own = [pair for pair in by_hand if pair[side] == c]
            own = sorted(own, key=lambda pair: -np.abs(pair[4]).max())[:most]
            if not on[c]:
                assert not own and (got.component[c] == -1).all()
                continue
            assert got.component[c].tolist() == [pair[1 - side] for pair in own]
            assert got.layer[c].tolist() == [pair[2] for pair in own]
            assert got.head[c].tolist() == [pair[3] for pair in own]
            close(got.values[c], np.stack([pair[4][pair[3]] for pair in own]), 1e-5)


def test_no_partners_where_queries_or_keys_are_missing(tmp_path):
    model = model_of("llama", tmp_path)
    args = (model.params, model.config, np.ones(PIECES, bool))
    assert qk.partners(components_of(model, ["q", "v"]), *args) is None
    cs = components_of(model, ["q", "k"])
    assert qk.partners(cs, *args[:2], np.zeros(PIECES, bool)) is None
    one = qk.partners(cs, *args[:2], np.arange(PIECES) == 2, distances=99)
    assert one is not None and one[0].component.tolist() == [[-1] * 5] * 2 + [[2] + [-1] * 4]
    assert one[0].values.shape[2] == min(99, model.config.context)


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
