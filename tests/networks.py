"""Networks that nobody wrote for this package: (apply_fn, params, x) by name.

Each has another way of using its weights.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from draws import B, draw
from flax.core import freeze
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from library_networks import equinox_module, linen_vision, nnx_sequences


def conv_strided_dilated():
    params = {"k1": draw(1, 3, 3, 2, 4), "k2": draw(2, 2, 2, 4, 3), "w": draw(3, 3, 5)}

    def fn(p, x):
        h = jax.nn.relu(
            lax.conv_general_dilated(
                x, p["k1"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )
        h = lax.conv_general_dilated(
            h,
            p["k2"],
            (1, 1),
            "VALID",
            rhs_dilation=(2, 1),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jax.nn.relu(h).mean((1, 2)) @ p["w"]

    return fn, params, draw(9, B, 8, 8, 2)


def conv_channels_first_depthwise():
    params = {
        "k1": draw(1, 4, 2, 3, 3),
        "depthwise": draw(2, 4, 1, 3, 3),
        "k3": draw(3, 5, 4, 1, 1),
    }

    def fn(p, x):
        h = jax.nn.relu(lax.conv(x, p["k1"], (1, 1), "SAME"))
        h = jax.nn.relu(
            lax.conv_general_dilated(h, p["depthwise"], (1, 1), "SAME", feature_group_count=4)
        )
        return lax.conv(h, p["k3"], (1, 1), "SAME").mean((2, 3))

    return fn, params, draw(9, B, 2, 6, 6)


def conv_transposed():
    params = {"k": draw(1, 3, 2, 4), "k2": draw(2, 3, 4, 3)}

    def fn(p, x):
        h = jnp.tanh(
            lax.conv_general_dilated(
                x, p["k"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            )
        )
        return lax.conv_transpose(h, p["k2"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    return fn, params, draw(9, B, 5, 2)


def attention_tied_embedding():
    params = {
        "e": draw(5, 11, 8),
        "q": draw(1, 8, 2, 4),
        "k": draw(2, 8, 2, 4),
        "v": draw(3, 2, 8, 4),
        "o": draw(4, 2, 4, 8),
    }

    def fn(p, tokens):
        x = p["e"][tokens]
        q, k = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qk")
        v = jnp.einsum("btd,hdk->bhtk", x, p["v"])
        o = jnp.einsum(
            "bhts,bhsk,hkd->btd", jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k)), v, p["o"]
        )
        return (x + o) @ p["e"].T

    return fn, params, jax.random.randint(jax.random.key(9), (B, 4), 0, 11)


def experts():
    params = {"w1": draw(1, 3, 4, 6), "w2": draw(2, 3, 6, 4), "gate": draw(3, 4, 3)}

    def fn(p, x):
        h = jax.nn.relu(jnp.einsum("bd,edf->bef", x, p["w1"]))
        return jnp.einsum(
            "be,bed->bd", jax.nn.softmax(x @ p["gate"]), jnp.einsum("bef,efd->bed", h, p["w2"])
        )

    return fn, params, draw(9, B, 4)


def vmapped_weights():
    params = {"w": draw(1, 3, 4, 6), "v": draw(2, 3, 6, 2)}

    def fn(p, x):
        return jax.vmap(lambda w, v: jax.nn.relu(x @ w) @ v, out_axes=1)(p["w"], p["v"])

    return fn, params, draw(9, B, 4)


def scanned_layers():
    params = {"w": draw(1, 3, 4, 4), "b": draw(2, 3, 4), "o": draw(3, 4, 2)}

    def fn(p, x):
        return (
            lax.scan(
                lambda h, wb: (jnp.tanh(h @ wb[0] + wb[1][None, :]), None), x, (p["w"], p["b"])
            )[0]
            @ p["o"]
        )

    return fn, params, draw(9, B, 4)


def scanned_rematerialized_layers():
    params = {"w": draw(1, 3, 4, 6), "v": draw(2, 3, 6, 4)}

    def fn(p, x):
        return lax.scan(
            jax.checkpoint(lambda h, wv: (h + jax.nn.gelu(h @ wv[0]) @ wv[1], None)),
            x,
            (p["w"], p["v"]),
        )[0]

    return fn, params, draw(9, B, 4)


def layers_by_index():
    params = {"w": draw(1, 3, 4, 4), "u": draw(2, 2, 4, 4)}

    def fn(p, x):
        x = lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"][i]), x)
        for i in range(2):
            x = jnp.tanh(x @ p["u"][i].T)
        return x

    return fn, params, draw(9, B, 4)


def fused_and_reshaped():
    params = {"qkv": draw(1, 4, 12), "o": draw(2, 4, 6), "heads": draw(3, 6, 6)}

    def fn(p, x):
        q, k, v = jnp.split(p["qkv"], 3, axis=1)
        h = jax.nn.softmax(jnp.einsum("btd,bsd->bts", x @ q, x @ k)) @ (x @ v) @ (0.5 * p["o"])
        return jnp.einsum("btd,dhk->bthk", h, p["heads"].reshape(6, 2, 3))[..., :2]

    return fn, params, draw(9, B, 3, 4)


def recurrent():
    params = {"w": draw(1, 3, 5), "u": draw(2, 5, 5), "o": draw(3, 5, 2)}

    def fn(p, x):
        def cell(h, x_t):
            return jnp.tanh(x_t @ p["w"] + h @ p["u"]), None

        return lax.scan(cell, jnp.zeros((x.shape[0], 5)), jnp.swapaxes(x, 0, 1))[0] @ p["o"]

    return fn, params, draw(9, B, 4, 3)


def normalised_weights():
    params = {"w": draw(1, 4, 5), "g": jnp.ones(5), "v": draw(2, 5, 3)}

    def fn(p, x):
        return (
            jax.nn.silu(
                x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True) * p["g"][None, :])
            )
            @ p["v"]
        )

    return fn, params, draw(9, B, 4)


def custom_vjp_activation():
    @jax.custom_vjp
    def act(x):
        return jnp.maximum(x, 0)

    act.defvjp(lambda x: (act(x), x), lambda x, g: (g * (x > 0),))
    return (
        (lambda p, x: act(x @ p["w"]) @ p["v"]),
        {"w": draw(1, 4, 5), "v": draw(2, 5, 2)},
        draw(9, B, 4),
    )


def branches_dicts_and_lists():
    params = [{"w": draw(1, 4, 4)}, (draw(2, 3, 4), draw(3, 4))]

    @jax.jit
    def fn(p, x):
        h = lax.cond(x["a"].sum() > 1e9, lambda w: x["a"] @ w, lambda w: 2 * x["a"] @ w, p[0]["w"])
        return jnp.sum(jax.nn.relu(h + x["b"][1] @ p[1][0] + p[1][1][None, :]) ** 2, axis=1)

    return fn, params, {"a": draw(9, B, 4), "b": [draw(8, B, 2), draw(7, B, 3)]}


def half_precision():
    params = {"w": draw(1, 4, 6), "v": draw(2, 6, 3)}

    def fn(p, x):
        p = jax.tree.map(lambda a: a.astype(jnp.bfloat16), p)
        return (jax.nn.relu(x.astype(jnp.bfloat16) @ p["w"]) @ p["v"]).astype(jnp.float32)

    return fn, params, draw(9, B, 4)


def several_axes():
    params = {"w": draw(1, 2, 3, 4, 5), "o": draw(2, 4, 5, 2)}

    def fn(p, x):
        return jnp.einsum(
            "bxuv,uvo->bxo", jax.nn.relu(jnp.einsum("bxij,ijuv->bxuv", x, p["w"])), p["o"]
        )

    return fn, params, draw(9, B, 2, 2, 3)


def custom_vjp_on_weights_and_in_a_scan():
    @jax.custom_vjp
    def rounded(w):  # straight through
        return jnp.round(4 * w) / 4

    @jax.custom_vjp
    def product(x, w):
        return x @ w

    rounded.defvjp(lambda w: (rounded(w), None), lambda _, g: (g,))
    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    params = {"w": draw(1, 4, 6), "v": draw(2, 6, 4), "layers": draw(3, 2, 4, 4)}

    def fn(p, x):
        h = jax.nn.relu(x @ rounded(p["w"])) @ p["v"]
        return lax.scan(lambda h, w: (jnp.tanh(product(h, w)), None), h, p["layers"])[0]

    return fn, params, draw(9, B, 4)


def weights_in_a_carry_and_in_branches():
    params = {"w": draw(1, 4, 4), "u": draw(2, 4, 4), "v": draw(3, 4, 4), "stack": draw(4, 3, 4, 4)}

    def fn(p, x):
        (h, w), _ = lax.scan(
            lambda c, _: ((jnp.tanh(c[0] @ c[1]), 0.9 * c[1]), None), (x, p["w"]), None, length=2
        )
        h = h @ w @ lax.cond(x.sum() > 1e9, lambda p: p["u"], lambda p: p["v"], p)
        which = jnp.int32(jnp.abs(x[:, 0]) * 3) % 3
        branches = [lambda h, i=i: jnp.tanh(0.1 * (i + 1) * h @ p["stack"][i]) for i in range(3)]
        return jax.vmap(lambda i, h: lax.switch(i, branches, h))(which, h + x @ p["u"] + x @ p["v"])

    return fn, params, draw(9, B, 4)


def experts_by_top_k():
    params = {"gate": draw(1, 4, 3), "up": draw(2, 3, 4, 6), "down": draw(3, 3, 6, 4)}

    def fn(p, x):
        share, chosen = lax.top_k(jax.nn.softmax(x @ p["gate"]), 2)
        h = jax.nn.relu(jnp.einsum("bd,bkdf->bkf", x, p["up"][chosen]))
        return jnp.einsum("bk,bkd->bd", share, jnp.einsum("bkf,bkfd->bkd", h, p["down"][chosen]))

    return fn, params, draw(9, B, 4)


def graph():
    params = {"message": draw(1, 6, 5), "update": draw(2, 8, 3), "out": draw(3, 3, 2)}

    def fn(p, x):
        def one(nodes, edges):
            sent = jax.nn.relu(
                jnp.concatenate([nodes[edges[0]], nodes[edges[1]]], axis=-1) @ p["message"]
            )
            received = jax.ops.segment_sum(sent, edges[1], num_segments=nodes.shape[0])
            return (
                jnp.sort(jnp.concatenate([nodes, received], axis=-1) @ p["update"], axis=0).max(
                    axis=0
                )
                @ p["out"]
            )

        return jax.vmap(one)(x["nodes"], x["edges"])

    return (
        fn,
        params,
        {
            "nodes": draw(9, B, 4, 3),
            "edges": jax.random.randint(jax.random.key(7), (B, 2, 6), 0, 4),
        },
    )


def state_space_and_fourier():
    params = {
        "decay": draw(1, 4, 3),
        "drive": draw(2, 4, 3),
        "filter": draw(3, 3, 12),
        "out": draw(4, 12, 2),
    }

    def fn(p, x):
        decay = jnp.broadcast_to(jax.nn.sigmoid(p["decay"])[None, None], (*x.shape, 3))
        driven = jnp.einsum("btd,dn->btdn", x, p["drive"])
        h = lax.associative_scan(
            lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1]), (decay, driven), axis=1
        )[1].reshape(*x.shape[:2], -1)
        h = jnp.fft.irfft(
            jnp.fft.rfft(h, axis=1) * p["filter"][None].astype(jnp.complex64), n=x.shape[1], axis=1
        )
        return jnp.tanh(h) @ p["out"]

    return fn, params, draw(9, B, 4, 4)


def fast_weights():
    params = {"w": draw(1, 4, 4), "out": draw(2, 4, 4)}

    def fn(p, x):  # one step of gradient descent on the example itself
        def one(x):
            w = p["w"] - 0.5 * jax.grad(lambda w: jnp.mean((jnp.tanh(x @ w) - x) ** 2))(p["w"])
            return jnp.tanh(x @ w) @ p["out"]

        return jax.vmap(one)(x)

    return fn, params, draw(9, B, 4)


class Named(NamedTuple):
    w: Any
    nothing: Any
    rest: Any


def containers_and_checkpoint_policies():
    params = Named(
        draw(1, 4, 5),
        None,
        ([draw(2, 5, 5), {"scale": jnp.float32(1.3)}], freeze({"a.b": draw(3, 5, 2), "empty": {}})),
    )

    def fn(p, x):
        policy = jax.checkpoint_policies.save_only_these_names("h")
        block = jax.checkpoint(
            lambda h, w, s: h + jnp.sin(checkpoint_name(h @ (w / s), "h")), policy=policy
        )
        h = jnp.tanh(p.rest[0][1]["scale"] * (x @ p.w))
        return (
            block(block(h, p.rest[0][0], 2.0), -p.rest[0][0], p.rest[0][1]["scale"])
            @ p.rest[1]["a.b"]
        )

    return fn, params, draw(9, B, 4)


NETWORKS = {
    fn.__name__: fn
    for fn in (
        conv_strided_dilated,
        conv_channels_first_depthwise,
        conv_transposed,
        attention_tied_embedding,
        experts,
        vmapped_weights,
        scanned_layers,
        scanned_rematerialized_layers,
        layers_by_index,
        fused_and_reshaped,
        recurrent,
        normalised_weights,
        custom_vjp_activation,
        branches_dicts_and_lists,
        half_precision,
        several_axes,
        custom_vjp_on_weights_and_in_a_scan,
        weights_in_a_carry_and_in_branches,
        experts_by_top_k,
        graph,
        state_space_and_fourier,
        fast_weights,
        containers_and_checkpoint_policies,
        linen_vision,
        nnx_sequences,
        equinox_module,
    )
}
