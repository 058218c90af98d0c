"""Networks whose parts are written by hand, none of which need be alone in an example.

    python benchmarks/by_hand.py --network boolean circles --seeds 0:1 --json FILE

boolean  12 inputs of ±1 and a constant, 10 AND and 5 XOR gates on one hidden layer:
         a AND b = relu(a + b - 1); a XOR b = relu(a - b - 1) + its mirror.
         Parts: the gates; also the 20 units (the two of a XOR are never on together).
circles  six circles of seven points in five dimensions, tied: relu(x E Eᵀ), x [12] two coordinates
         for each circle, which is on with probability 0.1. Parts: the planes, of rank 2.
random   TMS 20-5 that is not trained: relu(x W Wᵀ), rows of W drawn from a normal distribution, of
         length 1 on average. Parts: the features, each on with probability 0.05.

Each is decomposed by the recipe with its own numbers, k found, two components per part.
own, exact: parts matched one to one whose cosine, over all leaves, is at least 0.9 or 0.99, exact
with a length within 5 %. worth: loss + simplicity by the mask that components find
(`recipe.judge`), 1 for nothing and 1 for the whole: where the truth's is above what is found, the
objective is at fault, where it is below, the search.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import write_json

from apd_jax import components as components_lib
from apd_jax.errors import InputError, NonFiniteError
from apd_jax.evaluation import geometry
from apd_jax.methods.apd import APD
from apd_jax.network.problem import Problem
from apd_jax.recipe import scales, stages
from apd_jax.recipe.judge import Judge, Worth
from apd_jax.targets.base import feature_sampler

BATCH = 512
Parts = dict[str, np.ndarray]  # {leaf: [parts, *shape]}


def boolean(seed: int) -> tuple[Problem, dict[str, Parts]]:
    """The network, and what may count as its parts."""
    inputs, ands, xors = 12, 10, 5
    drawn = np.random.default_rng(seed)
    every = list(itertools.combinations(range(inputs), 2))
    pairs = [every[i] for i in drawn.choice(len(every), ands + xors, replace=False)]
    units = [(g, a, b, 1, 1) for g, (a, b) in enumerate(pairs[:ands])]
    for g, (a, b) in enumerate(pairs[ands:], ands):
        units += [(g, a, b, 1, -1), (g, a, b, -1, 1)]
    n, gates = len(units), ands + xors
    first, second = np.zeros((n, inputs + 1, n)), np.zeros((n, n, gates))
    for u, (g, a, b, by_a, by_b) in enumerate(units):
        first[u, [a, b, inputs], u] = by_a, by_b, -1
        second[u, u, g] = 1
    belongs = np.equal.outer(np.arange(gates), [g for g, *_ in units]).astype(float)
    each = {"first": first, "second": second}
    whole = {name: np.einsum("gu,u...->g...", belongs, P) for name, P in each.items()}

    def sample(key: Any, step: Any) -> Any:
        x = jax.random.rademacher(jax.random.fold_in(key, step), (BATCH, inputs), jnp.float32)
        return jnp.concatenate([x, jnp.ones((BATCH, 1))], axis=1)

    params = {name: jnp.asarray(P.sum(0), jnp.float32) for name, P in each.items()}
    problem = Problem(lambda p, x: jax.nn.relu(x @ p["first"]) @ p["second"], params, sample)
    return problem, {"units": each, "gates": whole}


def circles(seed: int) -> tuple[Problem, dict[str, Parts]]:
    count, points, d, p = 6, 7, 5, 0.1
    drawn = np.random.default_rng(seed)
    planes = [np.linalg.qr(drawn.normal(size=(d, 2)))[0].T for _ in range(count)]
    parts = np.zeros((count, 2 * count, d))
    for c, plane in enumerate(planes):
        parts[c, 2 * c : 2 * c + 2] = plane

    def sample(key: Any, step: Any) -> Any:
        on, where = jax.random.split(jax.random.fold_in(key, step))
        angle = jax.random.randint(where, (BATCH, count), 0, points) * (2 * jnp.pi / points)
        x = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=2)
        return (x * jax.random.bernoulli(on, p, (BATCH, count, 1))).reshape(BATCH, -1)

    params = {"E": jnp.asarray(parts.sum(0), jnp.float32)}
    problem = Problem(lambda p, x: jax.nn.relu(x @ p["E"] @ p["E"].T), params, sample)
    return problem, {"planes": {"E": parts}}


def random(seed: int) -> tuple[Problem, dict[str, Parts]]:
    features, d = 20, 5
    W = np.random.default_rng(seed).normal(size=(features, d)) / d**0.5
    params = {"W": jnp.asarray(W, jnp.float32)}
    sample = feature_sampler(BATCH, features, 0.05, signed=False)
    problem = Problem(lambda p, x: jax.nn.relu(x @ p["W"] @ p["W"].T), params, sample)
    return problem, {"features": {"W": np.eye(features)[:, :, None] * W}}


NETWORKS: dict[str, Callable[[int], tuple[Problem, dict[str, Parts]]]] = {
    "boolean": boolean,
    "circles": circles,
    "random": random,
}


def run(name: str, seed: int) -> dict[str, Any]:
    """One row."""
    problem, truths = NETWORKS[name](seed)
    most = max(len(next(iter(parts.values()))) for parts in truths.values())
    method = APD(num_components=2 * most, topk=0.0, batch_size=BATCH, seed=seed)
    recipe, began = stages.default_recipe(), time.process_time()
    last: Any = None
    row: dict[str, Any] = {"network": name, "seed": seed, "date": time.strftime("%F")}
    try:
        trained, logged, last = stages.fit(problem, method, recipe)
    except (InputError, NonFiniteError) as error:
        return row | {"error": str(error), "seconds": time.process_time() - began}
    row |= {"seconds": time.process_time() - began, "active": logged[-1]["mean_active"]}
    row |= {"k": last.topk, "always_on": last.num_always_on}
    judge = Judge(problem, method, recipe, scales.measure(problem, method))
    found = jax.tree.map(jnp.asarray, trained.components)
    row["worth"] = told(judge.by_threshold(found, last.num_always_on, last.topk))
    for kind, parts in truths.items():
        row[kind] = matched(found, parts)
        true = components_lib.from_materialized(
            {leaf: jnp.asarray(P, jnp.float32) for leaf, P in parts.items()}
        )
        row[kind]["worth"] = told(judge.by_threshold(true, 0, last.topk))
    return row


def matched(found: Any, parts: Parts) -> dict[str, Any]:
    """How many parts have a component of their own."""
    every = components_lib.materialize(components_lib.aligned(found))
    P, W = (
        np.concatenate([np.asarray(of[leaf]).reshape(len(of[leaf]), -1) for leaf in parts], 1)
        for of in (every, parts)
    )
    among = np.broadcast_to(P[:, None], (len(P), len(W), P.shape[1]))
    cosine, ratio = geometry.cosines(among, W), geometry.norm_ratios(among, W)
    owner = geometry.one_to_one(cosine, ratio)
    cosine, ratio = (a[owner, np.arange(len(W))] * (owner >= 0) for a in (cosine, ratio))
    return {
        "of": len(W),
        "own": int(np.sum(cosine >= 0.9)),
        "exact": int(np.sum((cosine >= 0.99) & (abs(ratio - 1) <= 0.05))),
        "cosine": float(cosine.mean()),
        "length": float(ratio.mean()),
    }


def told(worth: Worth) -> dict[str, float]:
    return {
        "loss": worth.loss,
        "simplicity": worth.simplicity,
        "total": worth.total,
        "active": worth.active,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--network", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--seeds", default="0:1", help="first:end")
    parser.add_argument("--json", default=None, help="file for the rows")
    options = parser.parse_args()
    rows = []
    for name in options.network:
        for seed in range(*map(int, options.seeds.split(":"))):
            rows.append(run(name, seed))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            write_json(options.json, rows)


if __name__ == "__main__":
    main()
