"""The sparse pass on five architectures: do its routes agree, and what do they cost?

Each architecture is written as Flax Linen, as Flax NNX and as a plain function.

    python benchmarks/architectures.py --json runs/architectures.json [--only transformer]

Prints the table of docs/networks.md in Markdown. For every network and route:
  time         ms of one loss with its gradient, median of 5 windows, without compilation
  memory       what XLA needs for temporaries
For every network, the largest difference of any route to the materialised one:
  in the loss, relative to the loss; in its gradient, relative to the largest entry
About 3 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from apd_jax import components
from apd_jax.components import layout
from apd_jax.forward import dispatch, sparse
from apd_jax.gates import selection as masks

B, C, K = 32, 20, 2.0  # examples, components, kept per example
WINDOWS, WINDOW_SECONDS = 5, 0.15
ROUTES = ("materialize", "masked", "dispatch", "auto")
D, T, VOCAB, LAYERS = 128, 16, 64, 4


def _matrix(i: int, *shape: int) -> Array:
    return jax.random.normal(jax.random.key(i), shape) * (2 / sum(shape[-2:])) ** 0.5


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(D)(nn.relu(nn.Dense(4 * D)(x)))


class LinenConv(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.mean((1, 2)))


class LinenTransformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB, D)
        x = embed(tokens)
        for _ in range(2):
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(4, qkv_features=D)(h, h)
            x = x + nn.Dense(D)(nn.gelu(nn.Dense(2 * D)(nn.LayerNorm()(x))))
        return embed.attend(x)


class LinenRecurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(jnp.asarray(nn.RNN(nn.GRUCell(D))(x))[:, -1])


class LinenScanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        def layer(module, carry, _):
            return carry + nn.relu(nn.Dense(D, name="layer")(carry)), None

        return nn.scan(
            layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )(self, x, None)[0]


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(D, 4 * D, rngs=rngs), nnx.Linear(4 * D, D, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


class NnxConv(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(3, 32, (3, 3), rngs=rngs)
        self.second = nnx.Conv(32, 64, (3, 3), strides=2, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.second(nnx.relu(self.first(x)))).mean((1, 2)))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(D, rngs=rngs), nnx.LayerNorm(D, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, D, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(D, 2 * D, rngs=rngs), nnx.Linear(2 * D, D, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class NnxTransformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, D, rngs=rngs)
        self.first, self.second = NnxBlock(rngs), NnxBlock(rngs)

    def __call__(self, tokens):
        return self.embed.attend(self.second(self.first(self.embed(tokens))))


class NnxRecurrent(nnx.Module):
    def __init__(self, rngs):
        self.rnn, self.out = nnx.RNN(nnx.GRUCell(16, D, rngs=rngs)), nnx.Linear(D, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.asarray(self.rnn(x))[:, -1])


class NnxScanned(nnx.Module):
    def __init__(self, rngs):
        make = nnx.split_rngs(splits=LAYERS)(nnx.vmap(lambda rngs: nnx.Linear(D, D, rngs=rngs)))
        self.layers = make(rngs)

    def __call__(self, x):
        scan = nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return scan(lambda layer, x: x + nnx.relu(layer(x)))(self.layers, x)


def plain_mlp():
    params = {"w": _matrix(1, D, 4 * D), "v": _matrix(2, 4 * D, D)}
    return params, lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]


def plain_conv():
    def fn(p, x):
        for name, stride in (("k1", 1), ("k2", 2)):
            x = jax.lax.conv_general_dilated(
                x, p[name], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x)
        return x.mean((1, 2)) @ p["out"]

    k1, k2 = _matrix(1, 3, 3, 3, 32), _matrix(2, 3, 3, 32, 64) / 3
    return {"k1": k1, "k2": k2, "out": _matrix(3, 64, 10)}, fn


def plain_transformer():
    shapes = {
        "q": (D, 4, D // 4),
        "k": (D, 4, D // 4),
        "v": (D, 4, D // 4),
        "o": (4, D // 4, D),
        "up": (D, 2 * D),
        "down": (2 * D, D),
    }
    blocks = [
        {name: _matrix(10 * i + j, *shape) / 2 for j, (name, shape) in enumerate(shapes.items())}
        for i in range(2)
    ]

    def fn(p, tokens):
        x = p["embed"][tokens]
        for block in p["blocks"]:
            h = jax.nn.standardize(x)
            q, k, v = (jnp.einsum("btd,dhk->bthk", h, block[name]) for name in "qkv")
            weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / (D // 4) ** 0.5)
            x = x + jnp.einsum("bhts,bshk,hkd->btd", weights, v, block["o"])
            x = x + jax.nn.gelu(jax.nn.standardize(x) @ block["up"]) @ block["down"]
        return x @ p["embed"].T

    return {"embed": _matrix(99, VOCAB, D), "blocks": blocks}, fn


def plain_recurrent():
    def fn(p, x):
        def cell(h, x_t):
            z, r = (jax.nn.sigmoid(x_t @ p["w" + g] + h @ p["u" + g]) for g in "zr")
            return (1 - z) * jnp.tanh(x_t @ p["wn"] + r * (h @ p["un"])) + z * h, None

        return jax.lax.scan(cell, jnp.zeros((x.shape[0], D)), jnp.swapaxes(x, 0, 1))[0] @ p["out"]

    inputs = {f"w{g}": _matrix(i, 16, D) for i, g in enumerate("zrn")}
    recurrent = {f"u{g}": _matrix(9 + i, D, D) for i, g in enumerate("zrn")}
    return inputs | recurrent | {"out": _matrix(3, D, 10)}, fn


def plain_scanned():
    def fn(p, x):
        return jax.lax.scan(lambda h, w: (h + jax.nn.relu(h @ w), None), x, p["w"])[0]

    return {"w": _matrix(1, LAYERS, D, D)}, fn


def _linen(model: nn.Module, x: Array) -> tuple[Any, Callable]:
    return model.init(jax.random.key(0), x), model.apply


def _nnx(model: nnx.Module) -> tuple[Any, Callable]:
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return params, lambda params, x: nnx.merge(graph, params, rest, copy=True)(x)


def networks() -> dict[str, tuple[Array, dict[str, Callable[[], tuple[Any, Callable]]]]]:
    """{architecture: (inputs, {kind: () -> (params, apply_fn)})}"""
    key = jax.random.key(7)
    inputs = {
        "MLP": jax.random.normal(key, (B, D)),
        "convolution": jax.random.normal(key, (B, 16, 16, 3)),
        "transformer": jax.random.randint(key, (B, T), 0, VOCAB),
        "recurrent (GRU)": jax.random.normal(key, (B, 8, 16)),
        "scanned layers": jax.random.normal(key, (B, D)),
    }
    linen = (LinenMLP, LinenConv, LinenTransformer, LinenRecurrent, LinenScanned)
    of_nnx = (NnxMLP, NnxConv, NnxTransformer, NnxRecurrent, NnxScanned)
    plain = (plain_mlp, plain_conv, plain_transformer, plain_recurrent, plain_scanned)
    return {
        name: (
            x,
            {
                "Linen": lambda m=m, x=x: _linen(m(), x),
                "NNX": lambda n=n: _nnx(n(nnx.Rngs(0))),
                "plain": p,
            },
        )
        for (name, x), m, n, p in zip(inputs.items(), linen, of_nnx, plain, strict=True)
    }


def measure(params: Any, apply_fn: Callable, x: Array) -> list[dict[str, Any]]:
    """One row per route."""
    cs = components.init(
        jax.random.key(0),
        params,
        num_components=C,
        init_scale=3.0,
        layouts=layout.infer(apply_fn, params, x),
    )
    mask = masks.batch_topk(jax.random.uniform(jax.random.key(1), (B, C)), K)
    rows: list[dict[str, Any]] = []
    oracle = None
    for route in ROUTES:

        def loss(cs, route=route):
            out = sparse.apply(
                apply_fn, params, cs, mask, x, route=route, slots=dispatch.slots_for(K, B, C)
            )
            return jnp.mean(out**2)

        program = jax.jit(jax.value_and_grad(loss)).lower(cs).compile()
        value, gradient = program(cs)
        oracle = oracle or (value, gradient)
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(oracle[1]))
        errors = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), gradient, oracle[1])
        rows.append(
            {
                "route": route,
                "value_error": float(abs(value - oracle[0]) / abs(oracle[0])),
                "gradient_error": max(jax.tree.leaves(errors)) / largest,
                "ms": 1e3 * statistics.median(_window(program, cs) for _ in range(WINDOWS)),
                "temp_mib": getattr(program.memory_analysis(), "temp_size_in_bytes", 0) / 2**20,
                "num_params": sum(leaf.size for leaf in jax.tree.leaves(params)),
            }
        )
    return rows


def _window(program: Callable, cs: components.Components) -> float:
    count, start = 0, time.monotonic()
    while time.monotonic() - start < WINDOW_SECONDS:
        jax.block_until_ready(program(cs))
        count += 1
    return (time.monotonic() - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", default="", help="architectures whose name contains this")
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, batch {B}, C = {C}, k = {K}\n")
    print("| network | as | loss differs by | gradient differs by ", end="")
    print(f"| ms: {' / '.join(ROUTES)} | temporaries MiB: the same |")
    print("|---|---|---|---|---|---|")
    results = []
    for name, (x, kinds) in networks().items():
        for kind, build in kinds.items() if options.only in name else ():
            params, apply_fn = build()
            rows = measure(params, apply_fn, x)
            results += [{"architecture": name, "kind": kind, **row} for row in rows]
            errors = [
                f"{max(row[e] for row in rows):.0e}" for e in ("value_error", "gradient_error")
            ]
            costs = [
                " / ".join(f"{row[cost]:.{digits}f}" for row in rows)
                for cost, digits in (("ms", 1), ("temp_mib", 0))
            ]
            print(f"| {' | '.join([name, kind, *errors, *costs])} |", flush=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(
        json.dumps({"device": jax.devices()[0].device_kind, "rows": results}, indent=2)
    )


if __name__ == "__main__":
    main()
