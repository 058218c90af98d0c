"""Which axis carries the positions, also where its size tells nothing: heads first with H = T.

The oracles have a weight for every position, written out with an index t.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from conftest import close
from draws import draw, drawn_components
from jax import lax

from apd_jax import components
from apd_jax.components import layout
from apd_jax.errors import InputError
from apd_jax.forward import positions, sparse

B, C = 2, 3


def check(fn, by_hand, params, x, T, select=None, tolerance=2e-5):
    """The sparse pass with a mask per position, in value and gradient, against weights [T, ...].

    by_hand: (weights with leading T, x of one example) -> its outputs.
    """
    layouts = layout.infer(fn, params, x)
    cs = drawn_components(
        params,
        num_components=C,
        scale=3.0,
        select=select,
        layouts=layouts,
    )
    mask = jax.random.uniform(jax.random.key(1), (B, T, C)) < 0.5

    def formed(cs, mask_b):
        every = components.materialize(cs)

        def one(p, leaf):
            if p is None:
                return jnp.broadcast_to(leaf, (T, *leaf.shape))
            return jnp.tensordot(mask_b.astype(jnp.float32), p, axes=1)

        return jax.tree.map(one, every, params, is_leaf=lambda p: p is None)

    def loss(run):
        def fn(cs):
            out = run(cs)
            return jnp.mean(out**2), out

        return jax.value_and_grad(fn, has_aux=True)

    def oracle(cs):
        return jax.vmap(lambda m, x_b: by_hand(formed(cs, m), x_b))(mask, x)

    def route(name):
        return lambda cs: sparse.apply(fn, params, cs, mask, x, route=name, slots=2)

    runs = [oracle, route("masked"), route("materialize"), route("dispatch")]
    (expected, gradient), *others = jax.jit(lambda cs: [loss(run)(cs) for run in runs])(cs)
    for (_, out), other in others:
        close(out, expected[1], tolerance)
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(gradient), strict=True):
            close(a, b, 20 * tolerance)


def heads_first(p, x):
    """Weights meet [b, heads, positions, k]; the last one meets merged rows [b·t, h·k]."""
    H, k = p["v"].shape[:2]
    b, t, _ = x.shape
    heads = jnp.swapaxes(x.reshape(b, t, H, k), 1, 2)
    q, key = heads @ p["q"], jnp.einsum("bhtk,kj->bhtj", heads, p["k"])
    v = jnp.einsum("bhtk,hkj->bhtj", heads, p["v"])
    weights = jax.nn.softmax(q @ jnp.swapaxes(key, 2, 3))
    out = jnp.swapaxes(weights @ v, 1, 2).reshape(b * t, H * k) @ p["o"]
    return x + out.reshape(x.shape)


def heads_first_by_hand(w, x):
    H, k = w["v"].shape[1:3]
    t = x.shape[0]
    heads = jnp.swapaxes(x.reshape(t, H, k), 0, 1)
    q, key = (jnp.einsum("htk,tkj->htj", heads, w[name]) for name in "qk")
    v = jnp.einsum("htk,thkj->htj", heads, w["v"])
    mixed = jax.nn.softmax(q @ jnp.swapaxes(key, 1, 2)) @ v
    return x + jnp.einsum("ti,tio->to", jnp.swapaxes(mixed, 0, 1).reshape(t, -1), w["o"])


@pytest.mark.parametrize("size", [3, 5])
def test_heads_first_with_as_many_heads_as_positions(size):
    k = 2
    params = {
        "q": draw(1, k, k),
        "k": draw(2, k, k),
        "v": draw(3, size, k, k),
        "o": draw(4, size * k, size * k),
    }
    check(heads_first, heads_first_by_hand, params, draw(5, B, size, size * k), size)


def test_a_scan_over_layers():
    """Layers as many as positions; each mixes positions and acts on each."""
    T = 3
    params = {"w": draw(1, 3, 4, 4), "v": draw(2, 3, 4, 4)}

    def fn(p, x):
        def layer(h, wv):
            h = h + jnp.cumsum(jnp.swapaxes(h @ wv[0], 1, 2), axis=2).swapaxes(1, 2)
            return jnp.tanh(h), h.reshape(-1, 4) @ wv[1]

        h, ys = lax.scan(layer, x, (p["w"], p["v"]))
        return h + ys.sum(0).reshape(h.shape)

    def by_hand(w, x):
        ys = 0.0
        for i in range(3):
            x = x + jnp.cumsum(jnp.einsum("td,tde->te", x, w["w"][:, i]), axis=0)
            ys = ys + jnp.einsum("td,tde->te", x, w["v"][:, i])
            x = jnp.tanh(x)
        return x + ys

    check(fn, by_hand, params, draw(3, B, T, 4), T)


class Transformer(nn.Module):
    """Embeddings of tokens and of positions, causal attention, an MLP, logits by a tied matrix."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 8, name="embed")
        x = embed(tokens) + nn.Embed(4, 8, name="places")(jnp.arange(tokens.shape[1]))[None]
        mask = nn.make_causal_mask(tokens)
        attention = nn.MultiHeadDotProductAttention(num_heads=4, name="attention")
        x = x + attention(nn.LayerNorm(name="norm")(x), mask=mask)
        x = x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(12, name="up")(x)))
        return embed.attend(x)


def transformer_by_hand(w, tokens):
    w = w["params"]
    T = tokens.shape[0]
    x = jax.vmap(lambda e, t: e[t])(w["embed"]["embedding"], tokens)
    x = x + jax.vmap(lambda e, t: e[t])(w["places"]["embedding"], jnp.arange(T))
    norm = (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)
    norm = norm * w["norm"]["scale"] + w["norm"]["bias"]
    q, k, v = (
        jnp.einsum("td,tdhk->thk", norm, w["attention"][name]["kernel"])
        + w["attention"][name]["bias"]
        for name in ("query", "key", "value")
    )
    scores = jnp.einsum("qhk,shk->hqs", q / jnp.sqrt(2.0), k)
    scores = jnp.where(jnp.tril(jnp.ones((T, T), bool))[None], scores, -1e30)
    mixed = jnp.einsum("hqs,shk->qhk", jax.nn.softmax(scores), v)
    x = x + jnp.einsum("thk,thkd->td", mixed, w["attention"]["out"]["kernel"])
    x = x + w["attention"]["out"]["bias"]
    h = nn.gelu(jnp.einsum("td,tde->te", x, w["up"]["kernel"]) + w["up"]["bias"])
    x = x + jnp.einsum("td,tde->te", h, w["down"]["kernel"]) + w["down"]["bias"]
    return jnp.einsum("td,tvd->tv", x, w["embed"]["embedding"])


def test_a_flax_transformer():
    """4 heads and 4 positions; embeddings are looked up, of tokens and of a plain count."""
    tokens = jax.random.randint(jax.random.key(0), (B, 4), 0, 7)
    params = jax.jit(Transformer().init)(jax.random.key(1), tokens)
    check(Transformer().apply, transformer_by_hand, params, tokens, 4, ["*.kernel", "*.embedding"])


def test_a_plain_count_is_no_position_by_its_size():
    """Looked up by a count of heads, of which there are as many: not one that carries positions."""
    params = {"w": draw(1, 4, 6), "heads": draw(2, 3, 6)}

    def fn(p, x):
        gains = jax.nn.sigmoid(p["heads"][jnp.arange(3)])
        return jnp.einsum("btd,hd->bthd", x @ p["w"], gains)

    some = drawn_components(params, num_components=C)
    with pytest.raises(InputError, match=r"leaf 'heads' meets activations of shape \(3,\)"):
        sparse.apply(fn, params, some, jnp.ones((B, 3, C), jnp.bool_), draw(3, B, 3, 4))


def test_scores_have_two_axes_of_positions():
    """Heads that talk: a weight mixes the heads of scores [b, heads, queries, keys]."""
    params = {"mix": draw(1, 3, 3)}

    def fn(p, x):
        scores = jnp.einsum("bqhk,bshk->bhqs", x, x)
        return jnp.einsum("bhqs,hg->bgqs", scores, p["mix"])

    some = drawn_components(params, num_components=C)
    sentence = (
        r"leaf 'mix' meets activations of shape \(1, 3, 3, 3\), .* \(several do\); leave it out"
    )
    with pytest.raises(InputError, match=sentence):
        sparse.apply(fn, params, some, jnp.ones((B, 3, C), jnp.bool_), draw(3, B, 3, 3, 2))


def test_one_position_needs_no_axis():
    fn = lambda p, x: (x.sum(1) @ p["w"]) * jnp.sum(p["w"] ** 2)  # noqa: E731
    params, x = {"w": draw(1, 4, 6)}, draw(2, B, 1, 4)
    cs = drawn_components(params, num_components=C)
    mask = jnp.ones((B, 1, C), jnp.bool_).at[0, 0, 1].set(False)

    @jax.jit
    def both(mask):
        return [sparse.apply(fn, params, cs, m, x) for m in (mask, mask[:, 0])]

    found, expected = both(mask)
    close(found, expected)


def many_outputs(p, tokens):
    x = jax.nn.one_hot(tokens, 6)
    h = x @ p["w"]
    heads = h.reshape(*h.shape[:2], 3, 2).transpose(0, 2, 1, 3)
    scores = jax.nn.softmax(heads @ heads.swapaxes(2, 3))
    _, states = lax.scan(
        lambda c, x_t: (jnp.tanh(c @ p["cell"] + x_t),) * 2,
        jnp.zeros_like(h[:, 0]),
        h.swapaxes(0, 1),
        reverse=True,
    )
    sparse_h = lax.cond(tokens[0, 0] > 2, lambda h: h + 1, jax.checkpoint(jnp.sin), h)
    looped = lax.fori_loop(0, 4, lambda i, h: jnp.tanh(h) + h, h)
    return heads, {
        "merged": h.reshape(-1, 6),
        "scores": scores,
        "received": scores.sum(2),
        "pooled": h.mean(1),
        "states": [states, states.swapaxes(0, 1)],
        "mixed": jnp.einsum("btd,ts->bsd", h, p["mixer"]),
        "residual": h + jnp.einsum("btd,ts->bsd", h, p["mixer"]),
        "sorted": (jnp.sort(x, axis=1), jnp.sort(x, axis=2)),
        "shifted": jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0))),
        "sums": jnp.cumsum(x, axis=1),
        "branch": sparse_h,
        "looped": looped,
        "stacked": jnp.stack([h, h], axis=1),
        "convolved": lax.conv_general_dilated(
            h, p["w"][None], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        "both": jnp.concatenate([h, x], axis=2),
        "longer": jnp.concatenate([h, x], axis=1),
    }


def test_axes_of_outputs():
    """T = H = 3: sizes tell nothing."""
    T = 3
    params = {"w": draw(1, 6, 6), "mixer": draw(2, T, T), "cell": draw(3, 6, 6)}
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    found = positions.of_outputs(many_outputs, params, tokens, T)
    assert found == (
        2,
        {
            "merged": 0,
            "scores": None,
            "received": 2,
            "pooled": None,
            "states": [0, 1],
            # Column s of the mixer is position s, since what it gives is added there.
            "mixed": 1,
            "residual": 1,
            "sorted": (None, 1),
            "shifted": None,
            "sums": 1,
            "branch": 1,
            "looped": 1,
            "stacked": 2,
            "convolved": 1,
            "both": 1,
            "longer": None,
        },
    )


def test_masks_per_position_in_branches_loops_and_inner_functions():
    T = 4
    params = {"a": draw(1, 4, 4), "b": draw(2, 4, 4)}

    def fn(p, x):
        x = jnp.swapaxes(x, 1, 2)  # [b, d, t], with d = t

        @jax.jit
        def act(h, w):
            return jax.checkpoint(lambda h: jnp.einsum("bdt,de->bet", h, w))(h)

        h = lax.cond(x.sum() > 1e9, lambda h: act(h, p["b"]), lambda h: act(h, p["a"]), x)
        h = lax.fori_loop(0, 2, lambda i, h: jnp.tanh(act(h, p["b"])), h)
        return jnp.swapaxes(h, 1, 2)

    def by_hand(w, x):
        h = jnp.einsum("td,tde->te", x, w["a"])
        for _ in range(2):
            h = jnp.tanh(jnp.einsum("td,tde->te", h, w["b"]))
        return h

    # No reverse derivative of a loop of unknown length: fori_loop with fixed bounds is a scan.
    check(fn, by_hand, params, draw(3, B, T, 4), T)


def test_tracking_costs_no_arrays():
    """Abstract inputs are enough."""
    params = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    x = jax.ShapeDtypeStruct((64, 1000, 8), jnp.float32)
    assert positions.of_outputs(lambda p, x: x @ p["w"], params, x, 1000) == 1
