"""What only further runs can tell: more components (13), other seeds (14), other data (15).

All but the given runs are left to `full`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from apd_jax.components import Components
from apd_jax.decomposition import instances
from apd_jax.evaluation import geometry
from apd_jax.evidence import ablate
from apd_jax.evidence.check import Case, Check, Cost, asks
from apd_jax.evidence.matching import SAME, agreement
from apd_jax.evidence.subject import make
from apd_jax.methods.optimizers import Trained
from apd_jax.targets.base import FeatureTarget

CAPACITIES = (2, 4)
FLAT = 0.1  # what the alive count may change
NUM_SEEDS = 10
RECOVERED = 0.95
SHIFT = 0.8  # factor of floating inputs
_LEFT = "needs further runs; give --full"


def runs(case: Case, count: int) -> Cost:
    """What it takes to train so often again, where that is asked for."""
    return Cost(runs=max(count, 0)) if case.full else Cost()


def again(
    case: Case, *, params: PyTree = None, sample_fn: Callable | None = None, **changes: Any
) -> list[Trained]:
    """Decompositions by the same settings but for `changes`.

    Trained side by side if `num_instances` says so.
    """
    d = case.decomposition
    problem = dataclasses.replace(
        d.problem,
        params=d.problem.params if params is None else params,
        sample_fn=sample_fn or d.problem.sample_fn,
    )
    method = d.method.replace(**changes)
    return instances(d.train_again(problem, **changes), method)


@asks(13, "capacity", "Capacity", lambda case: runs(case, sum(CAPACITIES)))
def capacity(case: Case) -> Check:
    """Check 13: does the number of alive components stay when more are offered?"""
    about = {
        "bar": f"alive count within {FLAT:.0%}* at twice and four times as many",
    }
    if not case.full:
        return Check(**about, why=_LEFT)
    s, C = case.subject, case.subject.num_components
    counts = {1: int(case.alive[1].sum())}
    for times in CAPACITIES:
        (trained,) = again(case, num_components=times * case.decomposition.method.num_components)
        counts[times] = int(case.about(make(s.setting, s.params, trained, s.x)).alive[1].sum())
    return Check(
        **about,
        passed=all(abs(count - counts[1]) <= FLAT * counts[1] for count in counts.values()),
        values={f"alive_at_{times * C}": count for times, count in counts.items()},
        text="Alive components: "
        + ", ".join(f"{count} of {times * C}" for times, count in counts.items())
        + ".",
        budget=f"one run of {case.decomposition.method.num_steps} steps each",
    )


def recovered(case: Case, components: Components) -> bool:
    """Every feature has a component of its own.

    Without known features: at least RECOVERED of this run's components are found again.
    """
    s, target = case.subject, case.target
    if isinstance(target, FeatureTarget):
        parts = geometry.of_components(
            partial(target.feature_weights, s.params), components, s.setting.method.always_on
        )
        scores = geometry.scores(
            np.asarray(parts), np.asarray(target.feature_weights(s.params, s.params))
        )
        return geometry.all_owned(scores)
    return agreement(s.components, components).share >= RECOVERED


@asks(14, "seeds", "Seeds", lambda case: runs(case, NUM_SEEDS - 1 - len(case.seeds)))
def seeds(case: Case) -> Check:
    """Check 14: how many seeds of one frozen target find the same? Failures count.

    Another run (--other) is compared here too.
    """
    bar = f"≥ {RECOVERED:.0%} of at least {NUM_SEEDS} seeds*"
    if isinstance(case.target, FeatureTarget):
        bar += ": every feature has a component of its own"
    else:
        bar += f" find {RECOVERED:.0%} of these components"
    values, text = {}, ""
    if case.other is not None:
        other = agreement(case.subject.components, case.other)
        values = {"other_mean_cosine": other.mean_cosine, "other_share": other.share}
        values["other_carried"] = other.carried(np.asarray(ablate.alone(case.subject)))
        text = f"With the other run, {other.share:.0%} of the components agree (cosine ≥ {SAME}), "
        text += f"mean cosine {other.mean_cosine:.4f}; ablated one by one, these make "
        text += f"{values['other_carried']:.0%} of the change. "
    others = list(case.seeds)
    if case.full and len(others) < NUM_SEEDS - 1:
        others = again(case, num_instances=NUM_SEEDS - 1, seed=case.decomposition.method.seed + 1)
    if not others:
        return Check(bar=bar, values=values, text=text.strip(), why=_LEFT)
    runs = [case.subject.components, *(other.components for other in others)]
    found = [recovered(case, components) for components in runs]
    agreed = [agreement(case.subject.components, other.components) for other in others]
    cosines, change = (
        np.array([a.mean_cosine for a in agreed]),
        np.asarray(ablate.alone(case.subject)),
    )
    carried = np.array([a.carried(change) for a in agreed])
    values |= {
        "num_seeds": len(runs),
        "num_recovered": sum(found),
        "mean_cosine": cosines.mean(),
        "lowest_mean_cosine": cosines.min(),
        "mean_carried": carried.mean(),
    }
    return Check(
        bar=bar,
        passed=bool(np.mean(found) >= RECOVERED) if len(runs) >= NUM_SEEDS else None,
        values=values,
        text=text + f"{sum(found)} of {len(runs)} seeds recover, this run counted; "
        f"the others' mean cosine with it is {cosines.mean():.3f}, "
        f"at the least {cosines.min():.3f}. Ablated one by one, what they find again makes "
        f"{carried.mean():.0%} of the change.",
        why="" if len(runs) >= NUM_SEEDS else f"the bar asks for {NUM_SEEDS} seeds; give --full",
        budget=f"{len(runs)} seeds of one target, {case.decomposition.method.num_steps} steps",
    )


def _shifted(a: Array) -> Array:
    floating = jnp.issubdtype(a.dtype, jnp.floating)
    return a * jnp.asarray(SHIFT, a.dtype) if floating else a


@asks(15, "data", "Data", lambda case: runs(case, 3))
def data(case: Case) -> Check:
    """Check 15: are the same components found from other data?

    permuted: the batches in reverse order. halved: half as many different batches, each used twice.
    shifted: floating inputs times SHIFT. The agreement is the share of this run's components that
    are found again.
    """
    sample, num_steps = case.decomposition.problem.sample_fn, case.decomposition.method.num_steps
    if not case.full:
        return Check(why=_LEFT)
    if not callable(sample):
        return Check(why="the data come from an iterable, which cannot be drawn anew")
    variants: dict[str, Callable] = {
        "permuted": lambda rng, step: sample(rng, num_steps - 1 - step),
        "halved": lambda rng, step: sample(rng, step % -(-num_steps // 2)),
    }
    floating = any(
        jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(case.subject.x)
    )
    if floating:
        variants["shifted"] = lambda rng, step: jax.tree.map(_shifted, sample(rng, step))
    found = {
        name: agreement(case.subject.components, again(case, sample_fn=fn)[0].components)
        for name, fn in variants.items()
    }
    values = {f"{name}_share": a.share for name, a in found.items()} | {
        f"{name}_mean_cosine": a.mean_cosine for name, a in found.items()
    }
    change = np.asarray(ablate.alone(case.subject))
    carried = {name: a.carried(change) for name, a in found.items()}
    values |= {f"{name}_carried": share for name, share in carried.items()}
    return Check(
        values=values,
        text=f"Components found again (cosine ≥ {SAME}), and their share of what ablation of one "
        "changes: "
        + ", ".join(f"{name} {a.share:.0%}, {carried[name]:.0%}" for name, a in found.items())
        + ".",
        why="" if floating else "shifted data were left out: the inputs are not floating point",
        budget=f"one run of {num_steps} steps each; shifted: inputs × {SHIFT}",
    )
