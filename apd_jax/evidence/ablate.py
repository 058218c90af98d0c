"""May inactive components be ablated in any combination?

On average (4), in the worst case (5), and along curves (6).

Every permitted mask keeps the active components at 1 and each inactive one at a factor in [0, 1],
its scale.
Shapes: n examples, C components, S steps.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from apd_jax.evidence import bounds
from apd_jax.evidence.check import ERROR_BAR, Case, Check, Cost, asks
from apd_jax.evidence.subject import Subject, distance, errors, fresh, joined, outputs, scaled
from apd_jax.methods.optimizers import Trained
from apd_jax.targets.base import Panel

NUM_DRAWS = 8  # of random factors
STEP_SIZE = 0.1
# From a single start the ascent is sometimes caught at a corner that is only locally the worst.
NUM_STARTS = 4
LADDER = (20, 40, 80)  # steps of the ascent
PLATEAU = 0.1  # what the last doubling of steps may add, as a part of the error
CURVE_POINTS = 21
BOUNDED_EXAMPLES = 32
TELLING = 10.0  # times the scale: a wider bound is given as a number only

_BAR = f"≤ {ERROR_BAR:.0%} of the {{unit}}*"


@asks(
    4,
    "random_ablation",
    "Random partial ablation",
    lambda case: Cost(forward=NUM_DRAWS + 4, programs=12),
)
def partial(case: Case) -> Check:
    """Check 4: inactive components scaled by independent random factors.

    And what "removed" may mean besides that:
      zero: inactive components are absent.
      mean: each is kept at its average scale, the share of examples (positions) on which it is
        active. It then contributes to every example what it contributes to a typical one.
      init: each is replaced by a fresh draw from the distribution that training started from.
    """
    subject, key = case.subject, jax.random.fold_in(case.key, 4)
    values = {
        "zero": case.relative(jnp.mean(errors(subject, subject.mask))),
        "random": case.relative(_random_error(subject, key)),
        "mean": case.relative(jnp.mean(errors(subject, scaled(subject, _average_scale(subject))))),
        "init": case.relative(_redrawn_error(subject, jax.random.fold_in(key, 1))),
    }
    return Check(
        passed=values["random"] <= ERROR_BAR,
        bar=_BAR.format(unit=case.unit),
        values=values,
        text=f"With inactive components scaled by random factors the error is "
        f"{values['random']:.2%} of the {case.unit}; with them at zero {values['zero']:.2%}, "
        f"at their average scale {values['mean']:.2%}, "
        f"replaced by fresh draws from the initialisation {values['init']:.2%}.",
        budget=f"{NUM_DRAWS} draws per example, {case.examples}",
    )


@jax.jit
def _random_error(subject: Subject, key: PRNGKeyArray) -> Float[Array, ""]:
    def one(key):
        return jnp.mean(
            errors(subject, scaled(subject, jax.random.uniform(key, subject.mask.shape)))
        )

    return jnp.mean(jax.lax.map(one, jax.random.split(key, NUM_DRAWS)))


def _average_scale(subject: Subject) -> Float[Array, "*one C"]:
    return jnp.mean(
        subject.mask, axis=range(subject.mask.ndim - 1), keepdims=True, dtype=jnp.float32
    )


@jax.jit
def _redrawn_error(subject: Subject, key: PRNGKeyArray) -> Float[Array, ""]:
    drawn = fresh(key, subject).components
    both = Trained(joined(subject.components, drawn), subject.trained.gate)
    both = dataclasses.replace(subject, trained=both)
    mask = jnp.concatenate([subject.mask, ~subject.mask], axis=-1).astype(jnp.float32)
    return jnp.mean(distance(both, outputs(both, mask)))


@functools.partial(jax.jit, static_argnames=("shared", "steps", "starts"))
def attack(
    subject: Subject,
    key: PRNGKeyArray,
    *,
    shared: bool,
    steps: int = LADDER[-1],
    starts: int = NUM_STARTS,
) -> Float[Array, "S n"]:
    """The largest error that projected gradient ascent over inactive components' factors finds.

    r ← clip(r + 0.1 · sign ∂/∂r mean_b D_b, 0, 1) from uniform random starts. The worst point seen
    counts, all-off and all-on included.

    Args:
      shared: one factor per component, used wherever it is inactive; else one per example
        (position) and component.
    Returns: every example's error at the worst point seen after 0, 1, …, `steps` steps.
    Cost: starts · steps sparse passes forward and back.
    """
    shape = (
        (*[1] * (subject.mask.ndim - 1), subject.num_components) if shared else subject.mask.shape
    )

    def mean_error(r):
        error = errors(subject, scaled(subject, r))
        return jnp.mean(error), error

    def worse(a, b):
        return jnp.where(jnp.mean(a) >= jnp.mean(b), a, b) if shared else jnp.maximum(a, b)

    def ascend(carry, _):
        r, best = carry
        (_, error), gradient = jax.value_and_grad(mean_error, has_aux=True)(r)
        best = worse(best, error)
        return (jnp.clip(r + STEP_SIZE * jnp.sign(jnp.nan_to_num(gradient)), 0, 1), best), best

    corners = worse(mean_error(jnp.zeros(shape))[1], mean_error(jnp.ones(shape))[1])

    def climb(key):
        return jax.lax.scan(ascend, (jax.random.uniform(key, shape), corners), length=steps + 1)[1]

    climbs = jax.lax.map(climb, jax.random.split(key, starts))  # [starts, S, n]
    return functools.reduce(jax.vmap(worse), list(climbs))


def _attack_cost(case: Case) -> Cost:
    """Two attacks; as programs they are larger than a pass, and so is the bound."""
    return Cost(gradient=2 * NUM_STARTS * (LADDER[-1] + 1), programs=16)


@asks(5, "worst_case_ablation", "Worst-case partial ablation", _attack_cost)
def worst(case: Case) -> Check:
    """Check 5: the factors of inactive components chosen to do the most damage.

    And a bound on that damage, for networks that allow it.
    """
    subject, key = case.subject, jax.random.fold_in(case.key, 5)
    found = attack(subject, key, shared=True)
    found_each = attack(subject, jax.random.fold_in(key, 1), shared=False)
    found_each = jnp.maximum(found_each, found)  # shared factors are permitted here, too
    shared, each = (
        np.array([case.relative(e) for e in jnp.mean(history, axis=1)])
        for history in (found, found_each)
    )
    last, before = shared[LADDER[-1]], shared[LADDER[-2]]
    plateau = last - before <= PLATEAU * max(last, ERROR_BAR)
    values = {f"shared_{steps}": shared[steps] for steps in LADDER} | {
        f"per_example_{steps}": each[steps] for steps in LADDER
    }
    text = (
        f"The worst factors found, shared over the batch, give an error of "
        f"{shared[LADDER[0]]:.2%}, {before:.2%} and {last:.2%} of the {case.unit} "
        f"after {', '.join(map(str, LADDER))} steps; "
        f"chosen anew for every {case.row} {each[LADDER[-1]]:.2%}."
    )
    bounded, said = _bounded(case, found_each[-1])
    values |= bounded
    text += said
    lines = {"shared over the batch": shared, "per example": each}
    return Check(
        passed=bool(last <= ERROR_BAR and plateau),
        bar=_BAR.format(unit=case.unit)
        + f", and the last doubling of steps adds at most {PLATEAU:.0%}*",
        values=values,
        text=text,
        budget=f"{'/'.join(map(str, LADDER))} steps × {STEP_SIZE}, {NUM_STARTS} random starts, "
        f"{case.examples}",
        arrays={"worst_shared": shared, "worst_per_example": each},
        panels={
            "worst": Panel(
                title="Inactive components at their worst",
                caption="Largest error that gradient ascent on the factors (0 to 1) of inactive "
                "components has found. Good: low, and level long before the last step. "
                f"The bar is {ERROR_BAR}.",
                xlabel="steps of the ascent",
                ylabel=f"error / {case.unit}",
                x=np.arange(len(shared)),
                lines=lines,
            )
        },
    )


def _bounded(case: Case, found: Float[Array, " n"]) -> tuple[dict[str, float], str]:
    """The bound on any permitted damage beside what the ascent found; in numbers and words."""
    subject = case.subject
    count = min(BOUNDED_EXAMPLES, subject.mask.shape[0])
    try:
        bound = case.relative(jnp.mean(bounds.error_bound(subject, count)))
    except bounds.UnboundedError as error:
        return {}, f" An interval bound was left out: {error}."
    attacked = case.relative(jnp.mean(found[:count]))
    values = {"bound": bound, "per_example_where_bounded": attacked}
    if bound > TELLING:
        wide = f"{bound:.2g} times the {case.unit}"
        return values, f" The interval bound, {wide}, is too wide to tell anything."
    return values, (
        f" On {count} examples no permitted factors can exceed {bound:.2%} (interval bound; "
        f"the ascent finds {attacked:.2%} there)."
    )


@jax.jit
def alone(subject: Subject) -> Float[Array, " C"]:
    """The mean error with all components on but one, of every one. Cost: C sparse passes."""
    C = subject.num_components

    def without(c):
        on = jnp.broadcast_to(jnp.arange(C) != c, subject.mask.shape)
        return jnp.mean(errors(subject, on))

    return jax.lax.map(without, jnp.arange(C))


@jax.jit
def trajectories(subject: Subject, key: PRNGKeyArray) -> dict[str, Float[Array, " points"]]:
    """Mean error along three curves from all components on (t = 0) to active ones only (t = 1).

    joint: inactive components scaled by 1 - t, together.
    by_attribution, random_order: the first ⌊t·(number inactive)⌉ of them are off, those of least
      attribution first or in random order.
    """
    inactive = ~subject.mask
    number = jnp.sum(inactive, axis=-1, keepdims=True)

    def place(scores):  # of every inactive component in its example's order; active ones come last
        order = jnp.argsort(jnp.where(inactive, scores, jnp.inf), axis=-1)
        return jnp.argsort(order, axis=-1)

    places = {
        "by_attribution": place(subject.attributions),
        "random_order": place(jax.random.uniform(key, subject.mask.shape)),
    }

    def at(t):
        masks = {"joint": scaled(subject, 1 - t)}
        masks |= {name: subject.mask | (p >= jnp.round(t * number)) for name, p in places.items()}
        return {
            name: jnp.mean(errors(subject, mask.astype(jnp.float32)))
            for name, mask in masks.items()
        }

    return jax.lax.map(at, jnp.linspace(0, 1, CURVE_POINTS))


@asks(
    6,
    "monotone_trajectories",
    "Ablation trajectories",
    lambda case: Cost(forward=3 * CURVE_POINTS, programs=7),
)
def monotone(case: Case) -> Check:
    """Check 6: the error stays low from all components on to the active ones only.

    (APD, appendix A.1)
    """
    curves = {
        name: np.array([case.relative(e) for e in curve])
        for name, curve in trajectories(case.subject, jax.random.fold_in(case.key, 6)).items()
    }
    values = {f"{name}_max": curve.max() for name, curve in curves.items()} | {
        "end": curves["joint"][-1]
    }
    labels = {
        "joint": "scaled together",
        "by_attribution": f"one by one, least {case.subject.ranked_by} first",
        "random_order": "one by one, at random",
    }
    return Check(
        passed=all(curve.max() <= ERROR_BAR for curve in curves.values()),
        bar=_BAR.format(unit=case.unit) + " everywhere on all three curves",
        values=values,
        text=f"From all components to the active ones the error is at most "
        f"{values['joint_max']:.2%} of the {case.unit} with the others scaled down together, "
        f"{values['by_attribution_max']:.2%} removed in the order of {case.subject.ranked_by}, and "
        f"{values['random_order_max']:.2%} removed in random order.",
        budget=f"{CURVE_POINTS} points per curve, {case.examples}",
        arrays={f"trajectory_{name}": curve for name, curve in curves.items()},
        panels={
            "trajectories": Panel(
                title="From all components to the active ones",
                caption="Error while inactive components are removed, together or one by one. "
                f"Good: no hill, whatever the order. The bar is {ERROR_BAR}.",
                xlabel="share of the inactive components' removal",
                ylabel=f"error / {case.unit}",
                x=np.linspace(0, 1, CURVE_POINTS),
                lines={labels[name]: curve for name, curve in curves.items()},
            )
        },
    )
