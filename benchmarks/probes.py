"""How many random output directions do attributions of a wide output need?

    python benchmarks/probes.py --json runs/probes.json

A transformer with a vocabulary of 20,000 as output, in the KL metric. The components' sizes differ
(log-normally, by a factor e).

Compared are exact attributions by forward mode and those by `mode="probe"`: root mean square of the
relative error of A², share of a batch top-k mask that is the same, and ms. Per example and per
position.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from rich.console import Console
from rich.table import Table

from apd_jax import attributions, components
from apd_jax.components import layout
from apd_jax.gates import selection as masks

B, T, VOCAB, D, C, K = 8, 8, 20_000, 64, 40, 4.0
PROBES = (1, 4, 16, 64)
DRAWS = 3


def network() -> tuple[dict[str, Array], Array]:
    """Weights and a batch of tokens: one attention layer and one MLP on an embedding.

    The weights are random, of the size that trained ones have.
    """
    shapes = {
        "embed": (VOCAB, D),
        "q": (D, D),
        "k": (D, D),
        "v": (D, D),
        "o": (D, D),
        "up": (D, 4 * D),
        "down": (4 * D, D),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {
        n: jax.random.normal(key, s) * (1.0 if n == "embed" else D**-0.5)
        for key, (n, s) in zip(keys, shapes.items(), strict=True)
    }
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, VOCAB)
    return params | {"unembed": params["embed"].T * D**-0.5}, tokens


def apply_fn(p: dict[str, Array], tokens: Array) -> Array:
    x = p["embed"][tokens]
    weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", x @ p["q"], x @ p["k"]) / D**0.5)
    x = x + weights @ (x @ p["v"]) @ p["o"]
    return (x + jax.nn.gelu(x @ p["up"]) @ p["down"]) @ p["unembed"]


def components_of(params: dict[str, Array], x: Array) -> components.Components:
    """Random components whose sizes differ log-normally, by a factor e."""
    cs = components.init(
        jax.random.key(2),
        params,
        num_components=C,
        init_scale=2.0,
        select=[*"qkvo", "up", "down"],
        layouts=layout.infer(apply_fn, params, x),
    )
    sizes = jnp.exp(jax.random.normal(jax.random.key(3), (C,)))
    return jax.tree.map(lambda a: a * jnp.sqrt(sizes)[:, None, None], cs)


def measure() -> list[dict[str, Any]]:
    """A row per kind of attribution: rms error of A², share of the mask that is the same, ms."""
    params, x = network()
    cs = components_of(params, x)

    def scores(**more):
        """A² with DRAWS keys, stacked, and the median ms."""
        run = jax.jit(
            lambda key, params, cs, x: attributions.squared(
                "gradient", apply_fn, params, cs, x, metric="kl", rng=key, **more
            )
        )
        jax.block_until_ready(run(jax.random.key(0), params, cs, x))
        times, found = [], []
        for i in range(DRAWS):
            start = time.monotonic()
            found.append(np.asarray(run(jax.random.key(i), params, cs, x)))
            times.append(1e3 * (time.monotonic() - start))
        return np.stack(found), statistics.median(times)

    def kept(found):
        return np.asarray(masks.batch_topk(jnp.asarray(found.reshape(-1, C)), K))

    exact, exact_ms = scores(mode="forward")
    # The exact value per position would take B·T·VOCAB backward passes. 256 probes stand in for it;
    # their own error is 9 %.
    fine, _ = scores(mode="probe", num_probes=256, per_position=True)
    rows = [
        {"per": "example", "probes": "exact (forward)", "error": 0.0, "mask": 1.0, "ms": exact_ms}
    ]
    for per_position, truth in ((False, exact[0]), (True, fine[0])):
        per, mask = "position" if per_position else "example", kept(truth)
        for n in PROBES:
            found, ms = scores(mode="probe", num_probes=n, per_position=per_position)
            same = float(np.mean([(kept(one) & mask).sum() / mask.sum() for one in found]))
            error = float(np.sqrt(np.mean((found / truth - 1) ** 2)))
            rows.append({"per": per, "probes": n, "error": error, "mask": same, "ms": ms})
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    device = jax.devices()[0].device_kind
    title = f"{device}, batch {B} x {T} positions, {VOCAB} outputs, C = {C}, k = {K}"
    shown = Table(title=title)
    headings = ("attributions per", "probes", "rms error of A²", "sqrt(2/n)", "mask the same", "ms")
    for heading in headings:
        shown.add_column(heading, justify="right")
    for row in rows:
        expected = f"{(2 / row['probes']) ** 0.5:.2f}" if isinstance(row["probes"], int) else ""
        shown.add_row(
            row["per"],
            str(row["probes"]),
            f"{row['error']:.3f}",
            expected,
            f"{100 * row['mask']:.0f} %",
            f"{row['ms']:.0f}",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    rows = measure()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(
        json.dumps({"device": jax.devices()[0].device_kind, "rows": rows}, indent=2)
    )
    Console().print(table(rows))


if __name__ == "__main__":
    main()
