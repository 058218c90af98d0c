"""How many random output directions do attributions of a wide output need?

    python benchmarks/probes.py --json runs/probes.json

A transformer with a vocabulary of 20,000 as output, in the KL metric, and components whose sizes differ (log-normally, by a factor e).
Exact attributions by forward mode against `mode="probe"`: root mean square of the relative error of A², share of a batch top-k mask
that is the same, and ms. Per example and per position.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

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
    """One attention layer and one MLP on an embedding; random weights of trained size."""
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
    return params | {"unembed": params["embed"].T * D**-0.5}, jax.random.randint(
        jax.random.key(1), (B, T), 0, VOCAB
    )


def apply_fn(p: dict[str, Array], tokens: Array) -> Array:
    x = p["embed"][tokens]
    weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", x @ p["q"], x @ p["k"]) / D**0.5)
    x = x + weights @ (x @ p["v"]) @ p["o"]
    return (x + jax.nn.gelu(x @ p["up"]) @ p["down"]) @ p["unembed"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    params, x = network()
    cs = components.init(
        jax.random.key(2),
        params,
        num_components=C,
        init_scale=2.0,
        select=[*"qkvo", "up", "down"],
        layouts=layout.infer(apply_fn, params, x),
    )

    sizes = jnp.exp(jax.random.normal(jax.random.key(3), (C,)))
    cs = jax.tree.map(lambda a: a * jnp.sqrt(sizes)[:, None, None], cs)

    def scores(**more):
        run = jax.jit(
            lambda key, params, cs, x: attributions.squared(
                "gradient", apply_fn, params, cs, x, metric="kl", rng=key, **more
            )
        )
        program = lambda key: run(key, params, cs, x)  # noqa: E731
        jax.block_until_ready(program(jax.random.key(0)))
        times, found = [], []
        for i in range(DRAWS):
            start = time.monotonic()
            found.append(np.asarray(program(jax.random.key(i))))
            times.append(1e3 * (time.monotonic() - start))
        return np.stack(found), statistics.median(times)

    def kept(found):
        return np.asarray(masks.batch_topk(jnp.asarray(found.reshape(-1, C)), K))

    exact, exact_ms = scores(mode="forward")
    # Per position the exact value would take B·T·VOCAB backward passes; many probes stand in for it, with 9 % error of their own.
    fine, _ = scores(mode="probe", num_probes=256, per_position=True)
    rows = [
        {"per": "example", "probes": "exact (forward)", "error": 0.0, "mask": 1.0, "ms": exact_ms}
    ]
    for per_position, truth in ((False, exact[0]), (True, fine[0])):
        for n in PROBES:
            found, ms = scores(mode="probe", num_probes=n, per_position=per_position)
            same = np.mean([(kept(one) & kept(truth)).sum() / kept(truth).sum() for one in found])
            error = float(np.sqrt(np.mean((found / truth - 1) ** 2)))
            rows.append(
                {
                    "per": "position" if per_position else "example",
                    "probes": n,
                    "error": error,
                    "mask": float(same),
                    "ms": ms,
                }
            )
    table = Table(
        title=f"{jax.devices()[0].device_kind}, batch {B} x {T} positions, {VOCAB} outputs, C = {C}, k = {K}"
    )
    for column in (
        "attributions per",
        "probes",
        "rms error of A²",
        "sqrt(2/n)",
        "mask the same",
        "ms",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        bound = f"{(2 / row['probes']) ** 0.5:.2f}" if isinstance(row["probes"], int) else ""
        table.add_row(
            row["per"],
            str(row["probes"]),
            f"{row['error']:.3f}",
            bound,
            f"{100 * row['mask']:.0f} %",
            f"{row['ms']:.0f}",
        )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(
        json.dumps({"device": jax.devices()[0].device_kind, "rows": rows}, indent=2)
    )
    Console().print(table)


if __name__ == "__main__":
    main()
