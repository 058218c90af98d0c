"""Methods on the toys of their papers: is the truth found, with how many pieces, how worst ablated?

    python benchmarks/methods.py --config spd.py:tms,5-2 --seeds 0:3 [--set num_steps=5000 ...]
    python benchmarks/methods.py --config spd.py:resid_mlp vpd.py:tms,40-10,whole --csv FILE
    python benchmarks/methods.py --config spd.py:tms,5-2 --truth --set num_steps=3000

One row per config and seed, every seed with a target network of its own. What a site holds is
matched with the features one to one, by the share of a feature's weights that a piece holds:

  TMS        row f of W; untied also column f of W_out, side by side with it
  ResidMLP   what neurons read of feature f, W_E[f] W_in of all layers side by side; in every layer
             the matched piece of that layer

--truth begins at the true pieces of a TMS, as many as features: where its loss ends below that of a
run from the method's own beginning, the search is at fault and not the objective.

Of a ResidMLP, and of components of the whole network, also, on inputs with one feature alone (at
1/4, 1/2, 3/4 and 1), with g the causal importance of a component there, averaged over these, and
alive where it is above 0.1 for a feature; those that are on for all of them are kept in both
errors, and counted in nothing else:

  separation   of an alive component, the share of Σ_f g that its main feature has; the mean of them
  coverage     share of features whose most important component (g > 1/2) is no other feature's
  cross_layer  share of alive components with 5 % of their squared norm or more in every layer (of
               a TMS in encoder and decoder)
  keep_only    error with the feature's most important component alone, of that with none

loss: the mean of the last 20 logged totals. worst: the error of 20 signed ascents of 0.1 on one
source per component, shared over the batch, relative to the outputs' variance; pieces active per
input are counted at g > 0.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import load_config
from rich.console import Console
from rich.table import Table

from apd_jax import components as components_lib
from apd_jax import evaluation, targets
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError, NonFiniteError
from apd_jax.evaluation import geometry
from apd_jax.evidence import ablate
from apd_jax.evidence.subject import Setting, baselines, make
from apd_jax.methods import registry
from apd_jax.methods.optimizers import Trained
from apd_jax.recipe import run as run_lib
from apd_jax.recipe import stages
from apd_jax.targets import pretrain

SHOWN = (
    "loss",
    "mmcs",
    "ml2r",
    "owned",
    "of",
    "alive",
    "active",
    "all_on",
    "rounded",
    "stochastic",
    "worst",
    "separation",
    "coverage",
    "cross_layer",
    "keep_only",
)
BATCHES = 20


def run(name: str, seed: int, changes: dict[str, Any], truth: bool = False) -> dict[str, Any]:
    """One row."""
    file, _, variant = name.partition(":")
    config = load_config(file, variant)
    config.update_from_flattened_dict({"seed": seed})
    config.apd.update(changes)
    row = {"config": name, "changes": changes, "seed": seed, "date": time.strftime("%F")}
    row["device"] = jax.devices()[0].device_kind
    if truth and "recipe" in config:
        raise InputError("--truth begins elsewhere than a recipe does; give a config without one.")
    if truth:
        config.apd.num_components = config.target.num_features
        row["begins"] = "truth"
    method = registry.of(config.apd)
    target = targets.build(config.target, method.batch_size)
    params, _ = pretrain.pretrain(target, config.target)
    problem, began = target.problem(params), time.monotonic()
    try:
        if "recipe" in config:
            trained, history, method = stages.fit(problem, method, config.recipe)
        else:
            components = true_pieces(target, problem, method) if truth else None
            begun = None if components is None else Trained(components)
            trained, history, method = run_lib.run(problem, method, given=begun)
    except (InputError, NonFiniteError) as error:
        return row | {"error": str(error)}
    row |= {"steps": method.num_steps, "minutes": (time.monotonic() - began) / 60}
    row["loss"] = float(np.mean([one["total"] for one in history[-20:]]))
    trained = jax.tree.map(jnp.asarray, trained)
    found = Decomposition(problem, trained.components, method, history, gate=trained.gate)
    return row | measured(target, found)


def true_pieces(target: Any, problem: Any, method: Any) -> Any:
    """Components of a TMS with its feature f in piece f of every site, and nothing else.

    Raises:
      InputError: the target is no TMS of one or two leaves.
    """
    begun = method.make_components(jax.random.key(0), problem)
    if set(begun.factors) - {"W", "W_out"}:
        raise InputError(f"--truth knows the pieces of a plain TMS, not those of {target.name}.")
    own = np.eye(len(problem.params["W"]))
    parts = {"W": np.einsum("cf,fh->cfh", own, np.asarray(problem.params["W"]))}
    if "W_out" in begun.factors:
        parts["W_out"] = np.einsum("cf,hf->chf", own, np.asarray(problem.params["W_out"]))

    def site(name: str, f: Any) -> Any:
        u, s, vt = np.linalg.svd(parts[name], full_matrices=False)
        root = np.sqrt(s[:, :1])
        U, V = u[:, :, :1] * root[:, None], vt[:, :1] * root[:, :, None]
        return dataclasses.replace(f, U=jnp.asarray(U, jnp.float32), V=jnp.asarray(V, jnp.float32))

    return components_lib.Components(
        {name: begun.factors.get(name) and site(name, begun.factors[name]) for name in begun.tree},
        begun.count,
    )


def measured(target: Any, found: Decomposition) -> dict[str, Any]:
    """All that is asked of one decomposition."""
    seen = evaluation.evaluate(target, found, num_batches=BATCHES, seed=0)
    m = seen.metrics
    setting = Setting(found.problem, found.method)
    x = jax.jit(target.sample_fn)(jax.random.key(0x7E57), jnp.zeros((), jnp.int32))
    subject = make(setting, found.problem.params, found.trained, x)
    scale = float(baselines(subject)[0])
    worst = ablate.attack(subject, jax.random.key(1), shared=True, steps=20, starts=1)[-1]
    whole = target.name == "resid_mlp" or not found.method.own_numbers
    alone = by_feature(target, found) if whole else {}
    return {
        **by_site(target, found, seen),
        **alone,
        "alive": m["num_alive_components"],
        "active": m["mean_active_components"],
        "faithfulness": m["relative_parameter_error"],
        "all_on": m["minimality_all"] / scale,
        "rounded": m["minimality_topk"] / scale,
        "stochastic": m.get("minimality_stochastic", float("nan")) / scale,
        "worst": float(jnp.mean(worst)) / scale,
    }


def by_site(target: Any, found: Decomposition, seen: Any) -> dict[str, Any]:
    """MMCS, ML2R and features with a piece of their own; see the module."""
    params = found.problem.params
    every = {
        name: np.asarray(f.weights)
        for name, f in components_lib.aligned(found.components).factors.items()
    }
    if target.name == "resid_mlp":
        layers = sorted(name for name in every if name.startswith("mlp_in_"))
        E = np.asarray(params["W_E"])
        parts = [np.einsum("fd,cdn->cfn", E, every[name]) for name in layers]
        wholes = [E @ np.asarray(params[name]) for name in layers]
    else:
        parts, wholes = [every["W"]], [np.asarray(params["W"])]
        if "W_out" in every:
            parts.append(np.swapaxes(every["W_out"], 1, 2))
            wholes.append(np.asarray(params["W_out"]).T)
    own, whole, owned = [], np.concatenate(wholes, axis=1), []
    for P, W in zip(parts, wholes, strict=True):
        cosine, ratio = geometry.cosines(P, W), geometry.norm_ratios(P, W)
        owner = geometry.one_to_one(cosine, ratio)
        features = np.arange(len(W))
        own.append(np.where((owner >= 0)[:, None], P[owner, features], 0.0))
        owned.append(owner)
    own = np.concatenate(own, axis=1)
    lengths = np.linalg.norm(own, axis=1), np.linalg.norm(whole, axis=1)
    cosine = np.sum(own * whole, axis=1) / np.maximum(lengths[0] * lengths[1], 1e-30)
    ratio = lengths[0] / np.maximum(lengths[1], 1e-30)
    alive = seen.arrays["firing_rates"] > 0
    row = {"mmcs": cosine.mean(), "ml2r": ratio.mean(), "least_cosine": cosine.min()}
    row |= {"owned": int(np.sum((cosine > 0.9) & (ratio > 0.5))), "of": len(cosine)}
    for name, P in every.items():
        size = np.linalg.norm(P.reshape(len(P), -1), axis=1)
        row[f"pieces_{name}"] = int(np.sum(alive & (size > 0.01 * size.max())))
    return row


def by_feature(target: Any, found: Decomposition) -> dict[str, float]:
    """What components do where one feature is alone; see the module."""
    F = target.num_features
    x = jnp.concatenate([value * jnp.eye(F) for value in (0.25, 0.5, 0.75, 1.0)])
    g = np.asarray(found.activity(x).values).reshape(4, F, -1).mean(axis=0)
    always = g.min(axis=0) > 0.99
    g = np.where(always, 0.0, g)
    own, alive = g.argmax(axis=1), g.max(axis=0) > 0.1
    separated = g.max(axis=0)[alive] / g.sum(axis=0)[alive]
    counts = np.bincount(own, minlength=g.shape[1])
    covered = (g.max(axis=1) > 0.5) & (counts[own] == 1)

    layers: dict[str, Any] = {}
    for name, f in components_lib.aligned(found.components).factors.items():
        squared = np.sum(np.asarray(f.weights).reshape(g.shape[1], -1) ** 2, axis=1)
        layer = name.rpartition("_")[-1]
        layers[layer] = layers.get(layer, 0.0) + squared
    sizes = np.stack(list(layers.values()))[:, alive]
    spread = np.all(sizes >= 0.05 * sizes.sum(axis=0), axis=0)

    mask = np.eye(g.shape[1], dtype=np.float32)[np.tile(own, 4)]
    kept, none = (found.sparse_output(x, m)[0] for m in (mask + always, 0 * mask + always))
    true = found.problem.apply_fn(found.problem.params, x)[0]
    errors = [float(jnp.sum((y - true) ** 2)) for y in (kept, none)]
    return {
        "separation": float(np.mean(separated)) if alive.any() else float("nan"),
        "coverage": float(np.mean(covered)),
        "cross_layer": float(np.mean(spread)) if alive.any() else float("nan"),
        "keep_only": errors[0] / errors[1],
    }


def number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", nargs="+", required=True)
    parser.add_argument("--seeds", default="0:1", help="first:stop")
    parser.add_argument("--set", nargs="*", default=[], help="field=value of config.apd")
    parser.add_argument("--truth", action="store_true", help="begin at the true pieces (TMS)")
    parser.add_argument("--csv", type=Path, help="rows are added to this file")
    args = parser.parse_args()
    changes = {key: number(value) for key, _, value in (s.partition("=") for s in args.set)}
    first, _, stop = args.seeds.partition(":")
    table = Table("config", "seed", *SHOWN, "minutes")
    for name in args.config:
        for seed in range(int(first), int(stop)):
            row = run(name, seed, changes, args.truth)
            print({k: v for k, v in row.items()}, file=sys.stderr, flush=True)
            cells = [row.get(key, float("nan")) for key in (*SHOWN, "minutes")]
            shown = [f"{v:.4g}" if isinstance(v, float | np.floating) else str(v) for v in cells]
            table.add_row(name, str(seed), *shown)
            if args.csv:
                _append(args.csv, row)
    Console(width=180).print(table)


def _append(path: Path, row: dict[str, Any]) -> None:
    """Adds a row, with new columns at the end of the old."""
    rows = []
    if path.exists():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    rows.append({key: str(value) for key, value in row.items()})
    names = list(dict.fromkeys(name for one in rows for name in one))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
