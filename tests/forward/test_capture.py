"""What sites read: against activations written out by hand, and what their products give."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close
from draws import draw, drawn_components
from jax import lax
from networks import NETWORKS
from test_links import Transformer

from apd_jax import components
from apd_jax.components import layout
from apd_jax.components.layout import Layout, unfold
from apd_jax.errors import InputError
from apd_jax.forward import capture, sparse

B = 4


def captured(fn, params, sites, x, **options):
    """The rows of every site, after a look at the result."""
    (result, found), expected = jax.jit(
        lambda x: (capture.inputs(fn, params, sites, x, **options), fn(params, x))
    )(x)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), result, expected)
    assert {reading.side for reading in found.values()} == {"in"}
    return {name: reading.rows for name, reading in found.items()}


def test_mlp():
    params = {"w": draw(1, 5, 6), "b": draw(2, 6), "v": draw(3, 6, 2)}
    fn = lambda p, x: jax.nn.relu(x @ p["w"] + p["b"][None]) @ p["v"]  # noqa: E731
    x = draw(4, B, 5)
    cs = drawn_components(params, num_components=3, select=["w", "v"])
    found = captured(fn, params, cs, x)
    close(found["w"], x)
    close(found["v"], jax.nn.relu(x @ params["w"] + params["b"][None]))


def test_a_tied_weight_by_its_first_use():
    """TMS: x W, then h Wᵀ; decomposed as it is used first, and as it is used transposed."""
    fn = lambda p, x: jax.nn.relu(x @ p["w"] @ p["w"].T)  # noqa: E731
    params, x = {"w": draw(1, 5, 2)}, draw(2, B, 5)
    assert captured(fn, params, ["w"], x)["w"].shape == (B, 5)
    close(captured(fn, params, ["w"], x)["w"], x)

    cs = drawn_components(params, num_components=3)
    turned = {"w": dataclasses.replace(cs.factors["w"], layout=Layout((), (1,), (0,)))}
    turned["w"] = dataclasses.replace(turned["w"], U=draw(3, 3, 2, 4), V=draw(4, 3, 4, 5))
    _, found = capture.inputs(fn, params, components.Components(turned, 3), x)
    assert found["w"].side == "out"
    close(found["w"].rows, x)
    h = capture.inner(turned["w"], found["w"])
    close(h, jnp.einsum("bd,nmd->bnm", x, turned["w"].V))


@pytest.mark.parametrize("name", ["conv_strided_dilated", "conv_channels_first_depthwise"])
def test_convolutions_read_patches_in_the_order_of_u(name):
    fn, params, x = NETWORKS[name]()
    layouts = layout.infer(fn, params, x)
    found = captured(fn, params, ["k1"], x)["k1"]
    first = found @ unfold(params["k1"], layouts["k1"])
    if name == "conv_strided_dilated":
        numbers = ("NHWC", "HWIO", "NHWC")
        expected = lax.conv_general_dilated(
            x, params["k1"], (2, 2), "SAME", dimension_numbers=numbers
        )
    else:
        expected = jnp.moveaxis(lax.conv(x, params["k1"], (1, 1), "SAME"), 1, -1)
    close(first, expected)


def test_transformer_and_embeddings():
    tokens = jax.random.randint(jax.random.key(0), (B, 4), 0, 7)
    model = Transformer()
    params = jax.jit(model.init)(jax.random.key(1), tokens)
    sites = components.selected_paths(params, ["*.kernel", "*.embedding"])
    for per_position in (False, True):
        found = captured(model.apply, params, sites, tokens, per_position=per_position)
        p = params["params"]
        np.testing.assert_array_equal(found["params.embed.embedding"], tokens)
        places = jnp.broadcast_to(jnp.arange(4), (B, 4))
        np.testing.assert_array_equal(found["params.places.embedding"], places)
        x = p["embed"]["embedding"][tokens] + p["places"]["embedding"][None]
        norm = nn.LayerNorm().apply({"params": p["norm"]}, x)
        for name in ("query", "key", "value"):
            close(found[f"params.attention.{name}.kernel"], norm)
        q, k, v = (
            jnp.einsum("btd,dhk->bthk", norm, p["attention"][name]["kernel"])
            + p["attention"][name]["bias"][None, None]
            for name in ("query", "key", "value")
        )
        mixed = nn.dot_product_attention(q, k, v, mask=nn.make_causal_mask(tokens))
        close(found["params.attention.out.kernel"], mixed.reshape(B, 4, 8))
        attention = nn.MultiHeadDotProductAttention(4)
        mask = nn.make_causal_mask(tokens)
        x = x + attention.apply({"params": p["attention"]}, norm, mask=mask)
        close(found["params.up.kernel"], x)
        h = nn.gelu(x @ p["up"]["kernel"] + p["up"]["bias"][None, None])
        close(found["params.down.kernel"], h)


def test_positions_come_first():
    """Heads first [b, heads, positions, k] with as many heads as positions, and merged rows."""
    params, x = {"w": draw(1, 2, 2), "o": draw(2, 6, 6)}, draw(3, B, 3, 6)

    def fn(p, x):
        heads = jnp.swapaxes(x.reshape(*x.shape[:2], 3, 2), 1, 2) @ p["w"]
        return jnp.swapaxes(heads, 1, 2).reshape(-1, 6) @ p["o"] + x.reshape(-1, 6)

    by_position = lambda p, x: fn(p, x).reshape(x.shape)  # noqa: E731
    found = captured(by_position, params, ["w", "o"], x, per_position=True)
    close(found["w"], x.reshape(B, 3, 3, 2))
    close(found["o"], (x.reshape(B, 3, 3, 2) @ params["w"]).reshape(B, 3, 6))
    found = captured(by_position, params, ["w"], x)
    close(found["w"], jnp.swapaxes(x.reshape(B, 3, 3, 2), 1, 2))


def residual(x, w, v):
    return x + jax.nn.gelu(x @ w) @ v


def stack_by_hand(params, x):
    """What every layer's w and v read: [B, T, layers, d]."""
    read = []
    for w, v in zip(params["w"], params["v"], strict=True):
        read.append((x, jax.nn.gelu(x @ w)))
        x = residual(x, w, v)
    return [jnp.stack(rows, axis=2) for rows in zip(*read, strict=True)]


def scanned(p, x):
    return lax.scan(lambda x, wv: (residual(x, *wv), None), x, (p["w"], p["v"]))[0]


def remade(p, x):
    layer = jax.checkpoint(lambda x, wv: (residual(x, *wv), None))
    return lax.scan(layer, x, (p["w"], p["v"]))[0]


def backwards(p, x):  # the last layer lies first
    turned = jax.tree.map(lambda a: a[::-1], p)
    return lax.scan(lambda x, wv: (residual(x, *wv), None), x, (turned["w"], turned["v"]))[0]


def unrolled(p, x):
    for i in range(3):
        x = residual(x, p["w"][i], p["v"][i])
    return x


def unstacked(p, x):
    for w, v in zip(jnp.unstack(p["w"]), p["v"], strict=True):
        x = residual(x, w, v)
    return x


@pytest.mark.parametrize("fn", [scanned, remade, backwards, unrolled, unstacked])
@pytest.mark.parametrize("per_position", [False, True])
def test_stacked_layers(fn, per_position):
    params, x = {"w": draw(1, 3, 4, 5), "v": draw(2, 3, 5, 4)}, draw(3, B, 2, 4)
    sites = drawn_components(
        params,
        num_components=2,
        layouts=dict.fromkeys(params, Layout((0,), (1,), (2,))),
    )
    found = captured(fn, params, sites, x, per_position=per_position)
    order = jax.tree.map(lambda a: a[::-1], params) if fn is backwards else params
    for name, expected in zip("wv", stack_by_hand(order, x), strict=True):
        expected = expected[:, :, ::-1] if fn is backwards else expected
        close(found[name], expected, 1e-5)


def test_scans_in_scans_and_experts():
    params, x = {"w": draw(1, 2, 3, 4, 4), "e": draw(2, 2, 5, 4, 4)}, draw(3, B, 4)

    def fn(p, x):
        def group(x, we):
            x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, we[0])[0]
            return jnp.einsum("bd,edf->bf", x, we[1]) + x, x

        return lax.scan(group, x, (p["w"], p["e"]))[0]

    found = captured(fn, params, ["w"], x)["w"]
    for i in range(2):
        for j in range(3):
            close(found[:, i, j], x, 1e-5)
            x = jnp.tanh(x @ params["w"][i, j])
        x = jnp.einsum("bd,edf->bf", x, params["e"][i]) + x


USED_ONCE = {
    "attention_tied_embedding": ["k", "o", "q", "v"],
    "experts": ["gate", "w1", "w2"],
    "vmapped_weights": ["v", "w"],
    "scanned_rematerialized_layers": ["v", "w"],
    "conv_transposed": ["k", "k2"],
    "several_axes": ["o", "w"],
    "custom_vjp_activation": ["v", "w"],
    "graph": ["message", "update", "out"],
    "fused_and_reshaped": ["qkv", "heads"],
    "nnx_sequences": ["attention.out.kernel.value", "out.kernel.value"],
    "linen_vision": ["params.ConvTranspose_0.kernel", "params.Conv_0.kernel"],
}


@pytest.mark.parametrize("name", USED_ONCE)
def test_inner_activations_are_those_of_the_sparse_pass(name):
    """Σ over rows of ‖h_c V_c‖² is what the activation attribution adds up in the network."""
    fn, params, x = NETWORKS[name]()
    cs = drawn_components(
        params,
        num_components=3,
        select=USED_ONCE[name],
        layouts=layout.infer(fn, params, x),
    )

    def driven(x_b):
        out, pull = jax.vjp(
            lambda s: sparse.substituted(fn, params, cs, s, None, x_b, flavor="activation"),
            jnp.zeros(3),
        )
        return pull(jax.tree.map(jnp.ones_like, out))[0]

    def by_rows(x):
        total = 0.0
        for name, reading in capture.inputs(fn, params, cs, x)[1].items():
            f, b = cs.factors[name], len(cs.factors[name].axes.batch)
            V = jnp.moveaxis(f.V, 0, b)  # [*batch, n, m, d_out]
            parts = capture.inner(f, reading)[..., None, :] @ V
            total += jnp.sum(parts[..., 0, :] ** 2, axis=(*range(1, parts.ndim - 3), -1))
        return total

    found, expected = jax.jit(lambda x: (by_rows(x), jax.vmap(driven)(x)))(x)
    close(found, expected, 1e-5)


def test_inner_of_lookups_and_stacks():
    f = components.Factors(draw(1, 3, 7, 2), draw(2, 3, 2, 4), (7, 4))
    tokens = jnp.asarray([[0, 6], [3, 3]])
    h = capture.inner(f, capture.Reading(tokens))
    assert h.shape == (2, 2, 3, 2)
    np.testing.assert_array_equal(h[0, 1], f.U[:, 6])
    both = Layout((0, 1), (2,), (3,))
    f = components.Factors(
        draw(1, 3, 5, 2, 7, 2), draw(2, 3, 5, 2, 2, 4), (5, 2, 7, 4), layout=both
    )
    ids = np.random.default_rng(0).integers(7, size=(B, 6, 5, 2))
    inner = jax.jit(lambda rows: capture.inner(f, capture.Reading(rows)))
    h = inner(jnp.asarray(ids, jnp.int32))
    close(h, inner(jnp.asarray(np.eye(7)[ids], jnp.float32)))
    assert h.shape == (B, 6, 5, 2, 3, 2)


def test_vmap_and_gradients():
    """Over instances; and the derivative of what is read, by the params."""
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]  # noqa: E731
    params = {"w": draw(1, 2, 5, 6), "v": draw(2, 2, 6, 2)}
    x = draw(3, 2, B, 5)
    read = lambda p, x: capture.inputs(fn, p, ["v"], x)[1]["v"].rows  # noqa: E731
    close(jax.vmap(read)(params, x), jnp.tanh(jnp.einsum("ibd,ide->ibe", x, params["w"])))
    one = jax.tree.map(lambda a: a[0], params)
    found = jax.grad(lambda p: jnp.sum(read(p, x[0]) ** 2))(one)
    expected = jax.grad(lambda p: jnp.sum(jnp.tanh(x[0] @ p["w"]) ** 2))(one)
    jax.tree.map(close, found, expected)


def test_it_costs_one_forward_pass():
    params = {f"w{i}": draw(i, 32, 32) for i in range(6)}

    def fn(p, x):
        for w in p.values():
            x = jax.nn.relu(x @ w)
        return x

    x = draw(9, 64, 32)
    flops = [
        jax.jit(run).lower(params, x).compile().cost_analysis()["flops"]
        for run in (fn, lambda p, x: capture.inputs(fn, p, list(params), x))
    ]
    assert flops[1] <= 1.01 * flops[0]


@pytest.mark.parametrize(
    ("name", "site", "message"),
    [
        ("recurrent", "u", "leaf 'u' is first used in a branch, or in a loop"),
        ("branches_dicts_and_lists", "0.w", "leaf '0.w' is first used in a branch"),
        ("weights_in_a_carry_and_in_branches", "w", "leaf 'w' is first used in a branch"),
        ("normalised_weights", "w", "what params leaf 'w' reads cannot be told"),
        ("layers_by_index", "w", "what params leaf 'w' reads cannot be told"),
        ("recurrent", "z", "params has no leaf 'z'; its leaves: o, u, w"),
    ],
)
def test_refused(name, site, message):
    fn, params, x = NETWORKS[name]()
    with pytest.raises(InputError, match=message):
        capture.inputs(fn, params, [site], x)


def test_positions_that_cannot_be_told_are_refused():
    params = {"w": draw(1, 3, 3)}
    scores = lambda p, x: jnp.einsum("bqk,bsk->bqs", x, x) @ p["w"]  # noqa: E731
    with pytest.raises(InputError, match=r"carries the 3 positions \(none is known to\)"):
        capture.inputs(
            lambda p, x: x.sum(1) @ p["w"], params, ["w"], draw(2, B, 3, 3), per_position=True
        )
    found = captured(scores, params, ["w"], draw(2, B, 3, 3), per_position=True)
    assert found["w"].shape == (B, 3, 3)
    two = {"x": draw(2, B, 3, 3), "y": draw(3, B, 5)}
    fn = lambda p, x: x["x"] @ p["w"]  # noqa: E731
    with pytest.raises(InputError, match=r"has sizes \[3, 5\]; give num_positions"):
        capture.inputs(fn, params, ["w"], two, per_position=True)
    _, read = capture.inputs(fn, params, ["w"], two, per_position=True, num_positions=3)
    close(read["w"].rows, two["x"])


def test_one_position():
    params, x = {"w": draw(1, 4, 2)}, draw(2, B, 1, 4)
    found = captured(lambda p, x: x.sum(1) @ p["w"], params, ["w"], x, per_position=True)
    close(found["w"], x)
    found = captured(lambda p, x: x @ p["w"], params, ["w"], x, per_position=True)
    close(found["w"], x)
