"""Small networks trained here on tasks whose parts are known, decomposed by the recipe.

    python benchmarks/trained.py --network memorisation reversing --seeds 0:3 --json FILE

memorisation  100 keys of 64 dimensions, each with a label of ten, by an MLP with 128 ReLU units.
              Parts: the facts. A fact is owned if the component with the largest attribution on it
              is no other fact's, and edited if without that component its label is no longer the
              answer (more than half of the probability), and all other facts' still are.
reversing     four tokens of ten in reverse, by a transformer with one layer, components per
              position. Judged by the accuracy with the components that the mask keeps.
modular       a + b mod 13, both one-hot, by 64 ReLU units. Judged as reversing.

Each is decomposed by the recipe with its own numbers. k is found, or where it must be told,
`--topk`. worth: loss + simplicity by the mask that components find (`recipe.judge`), 1 for nothing
and 1 for the whole; seconds: of the CPU, with training.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import write_json

import apd_jax
from apd_jax.errors import InputError, NonFiniteError
from apd_jax.recipe import scales, stages
from apd_jax.recipe.judge import Judge

FACTS, DIMENSIONS, HIDDEN, LABELS = 100, 64, 128, 10
TOKENS, LENGTH, WIDTH = 10, 4, 32
MODULUS, UNITS = 13, 64


@dataclasses.dataclass(frozen=True)
class Case:
    """A trained network, its data and the settings that it is decomposed with.

    every: all inputs, or many. right: the answers to them.
    """

    apply_fn: Callable
    params: Any
    sample: Callable
    settings: apd_jax.APD
    every: jax.Array
    right: jax.Array


def trained(apply_fn: Callable, params: Any, batch: Callable, steps: int, decay: float) -> Any:
    """Trained by cross-entropy on batch(key) -> x, labels."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=decay)

    def loss(params: Any, x: Any, labels: Any) -> Any:
        found = optax.softmax_cross_entropy_with_integer_labels(apply_fn(params, x), labels)
        return jnp.mean(found)

    def step(carry: Any, key: Any) -> Any:
        params, state = carry
        gradient = jax.grad(loss)(params, *batch(key))
        update, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, update), state), None

    @jax.jit
    def run(params: Any) -> Any:
        keys = jax.random.split(jax.random.key(7), steps)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    return jax.device_get(run(params))


def matrices(seed: int, **shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def mlp(params: Any, x: Any) -> Any:
    return jax.nn.relu(x @ params["first"] + params["bias"]) @ params["second"]


def of_all(every: jax.Array, labels: jax.Array, size: int) -> Callable:
    """key -> as many of these inputs, drawn with replacement, and their labels."""

    def batch(key: Any) -> Any:
        which = jax.random.randint(key, (size,), 0, len(every))
        return every[which], labels[which]

    return batch


def memorisation(seed: int) -> Case:
    drawn = np.random.default_rng(seed)
    keys = drawn.normal(size=(FACTS, DIMENSIONS)).astype(np.float32)
    every = jnp.asarray(keys / np.linalg.norm(keys, axis=1, keepdims=True))
    labels = jnp.asarray(drawn.integers(0, LABELS, FACTS))
    params = matrices(seed, first=(DIMENSIONS, HIDDEN), second=(HIDDEN, LABELS))
    batch = of_all(every, labels, 500)
    params = trained(mlp, params | {"bias": jnp.zeros(HIDDEN)}, batch, 2000, 1e-2)
    settings = apd_jax.APD(num_components=2 * FACTS, rank=4, topk=0.0, batch_size=500, seed=seed)
    return Case(mlp, params, drawn_by(batch), settings, every, labels)


def modular(seed: int) -> Case:
    a, b = jnp.divmod(jnp.arange(MODULUS**2), MODULUS)
    every = jnp.concatenate([jax.nn.one_hot(a, MODULUS), jax.nn.one_hot(b, MODULUS)], axis=1)
    labels = (a + b) % MODULUS
    params = matrices(seed, first=(2 * MODULUS, UNITS), second=(UNITS, MODULUS))
    batch = of_all(every, labels, 512)
    params = trained(mlp, params | {"bias": jnp.zeros(UNITS)}, batch, 6000, 0.3)
    settings = apd_jax.APD(num_components=2 * UNITS, rank=8, topk=0.0, batch_size=512, seed=seed)
    return Case(mlp, params, drawn_by(batch), settings, every, labels)


def transformer(params: Any, tokens: Any) -> Any:
    """One head's attention over all positions, then an MLP."""
    x = params["embed"][tokens] + params["positions"]
    q, k, v = (x @ params[name] for name in ("query", "key", "value"))
    pattern = jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2) / WIDTH**0.5)
    x = x + pattern @ v @ params["output"]
    x = x + jax.nn.relu(x @ params["up"]) @ params["down"]
    return x @ params["unembed"]


def reversing(seed: int) -> Case:
    square = dict.fromkeys(("query", "key", "value", "output"), (WIDTH, WIDTH))
    shapes = {"embed": (TOKENS, WIDTH), "positions": (LENGTH, WIDTH)} | square
    shapes |= {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH), "unembed": (WIDTH, TOKENS)}

    def batch(key: Any) -> Any:
        tokens = jax.random.randint(key, (256, LENGTH), 0, TOKENS)
        return tokens, tokens[:, ::-1]

    params = trained(transformer, matrices(seed, **shapes), batch, 2000, 1e-2)
    settings = apd_jax.APD(num_components=60, rank=8, topk=0.0, batch_size=256, seed=seed)
    settings = settings.replace(mask_per="position", minimality_loss="kl")
    return Case(transformer, params, drawn_by(batch), settings, *batch(jax.random.key(1)))


def drawn_by(batch: Callable) -> Callable:
    return lambda key, step: batch(jax.random.fold_in(key, step))[0]


NETWORKS: dict[str, Callable[[int], Case]] = {
    "memorisation": memorisation,
    "reversing": reversing,
    "modular": modular,
}


def run(name: str, seed: int, topk: float) -> dict[str, Any]:
    """One row."""
    began = time.process_time()
    case, recipe = NETWORKS[name](seed), stages.default_recipe()
    row: dict[str, Any] = {"network": name, "seed": seed, "date": time.strftime("%F")}
    row["accuracy"] = accuracy(case.apply_fn(case.params, case.every), case)
    settings = case.settings.replace(topk=topk)
    try:
        found = apd_jax.decompose(case.apply_fn, case.params, case.sample, settings, recipe=recipe)
    except (InputError, NonFiniteError) as error:
        return row | {"error": str(error), "seconds": time.process_time() - began}
    last, mask = stages.as_apd(found.method), found.mask(case.every)
    on = np.asarray(mask)[..., last.always_on :]
    row |= {"k": float(last.topk), "always_on": last.always_on, "active": float(on.sum(-1).mean())}
    row["alive"] = int(on.reshape(-1, on.shape[-1]).any(0).sum())
    row["sparse_accuracy"] = accuracy(found.sparse_output(case.every, mask), case)
    judge = Judge(found.problem, settings, recipe, scales.measure(found.problem, settings))
    worth = judge.by_threshold(found.components, last.always_on, last.topk)
    row["worth"] = dataclasses.asdict(worth)
    if name == "memorisation":
        row |= facts(found, case)
    return row | {"seconds": time.process_time() - began}


def accuracy(logits: Any, case: Case) -> float:
    return float(np.mean(np.argmax(logits, -1) == case.right))


def facts(found: apd_jax.Decomposition, case: Case) -> dict[str, int]:
    """How many facts have a component of their own, and are gone without it, and only they."""
    on = found.method.always_on
    scores = np.asarray(found.attributions(case.every))[:, on:]
    best = scores.argmax(1)
    owned = np.bincount(best, minlength=scores.shape[1])[best] == 1
    edited = np.zeros(FACTS, bool)
    for i in np.flatnonzero(owned):
        logits = found.ablate([on + int(best[i])], case.every)
        sure = jax.nn.softmax(logits)[np.arange(FACTS), case.right] > 0.5
        edited[i] = bool(np.array_equal(sure, np.arange(FACTS) != i))
    return {"owned": int(owned.sum()), "edited": int(edited.sum())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--network", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--seeds", default="0:1", help="first:end")
    parser.add_argument("--topk", type=float, default=0.0, help="k; 0: found")
    parser.add_argument("--json", default=None, help="file for the rows")
    options = parser.parse_args()
    rows = []
    for name in options.network:
        for seed in range(*map(int, options.seeds.split(":"))):
            rows.append(run(name, seed, options.topk))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            write_json(options.json, rows)


if __name__ == "__main__":
    main()
