"""Do the components stand for the network?

Their sum (1), the active ones (3), their size (11), which live (12), training (17), where these
numbers come from (18).

Shapes: n examples, C components.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from apd_jax import components as components_lib
from apd_jax import losses
from apd_jax.evidence import ablate
from apd_jax.evidence import length as length_lib
from apd_jax.evidence.check import ERROR_BAR, FIRING_BATCHES, Case, Check, Cost, asks
from apd_jax.evidence.subject import Subject, distance, errors, make, outputs
from apd_jax.network.outputs import outputs as outputs_of
from apd_jax.targets.base import Panel
from apd_jax.targets.scoring import ALIVE_NORM

PARAMETER_BAR = 1e-3
UNMASKED_BAR = 0.01
SIZE_BAR = 0.01  # norm ratio and gain lie within 1 ± this
THRESHOLD = 0.1  # of the largest attribution in the batch
# The least active alive component fires this many times as often as the most active dead one.
SHARP = 10.0
# The losses that must have levelled off: all but those whose coefficient or power is annealed.
LEVELLED = (
    *("faithfulness", "minimality", "simplicity"),
    *("stochastic", "layerwise", "adversarial", "elsewhere", "unmasked"),
)
WINDOW = 0.1  # of the logged rows
MIN_ROWS = 5  # of a window
LEVEL = 0.1  # what a loss may still change from one window to the next
STANDARD_ERRORS = 3.0
IMMATERIAL = 0.01  # ... or this part of what the bars of checks 1 and 3 allow


@jax.jit
def _unmasked_error(subject: Subject) -> Float[Array, ""]:
    summed = components_lib.total(subject.components, subject.params)
    return jnp.mean(
        distance(subject, outputs_of(subject.setting.problem.apply_fn(summed, subject.x)))
    )


@asks(
    1, "parameter_faithfulness", "Parameter faithfulness", lambda case: Cost(forward=3, programs=4)
)
def faithfulness(case: Case) -> Check:
    """Check 1: do the components sum to the network?"""
    s = case.subject
    parameters = float(components_lib.relative_parameter_error(s.components, s.params))
    unmasked = case.relative(_unmasked_error(s))
    return Check(
        passed=parameters <= PARAMETER_BAR and unmasked <= UNMASKED_BAR,
        bar=f"parameters ≤ {PARAMETER_BAR:g}*, "
        f"all components on ≤ {UNMASKED_BAR:.0%} of the {case.unit}*",
        values={"relative_parameter_error": parameters, "unmasked_error": unmasked},
        text=f"The components' sum misses {parameters:.2g} of the squared norm of the weights; "
        f"with all of them on the output is off by {unmasked:.2g} of the {case.unit}.",
        budget=case.examples,
    )


@asks(3, "sparse_reconstruction", "Sparse reconstruction", lambda case: Cost(forward=8, programs=5))
def sparse(case: Case) -> Check:
    """Check 3: the error with the active components only.

    Kept as in training, and by choices that were not trained on.
    """
    s = case.subject
    setting, k = s.setting, s.k
    masks = {
        "trained": s.mask,
        "top1": setting.largest(s.scores, s.x, 1, each=True),
        "threshold": s.scores >= THRESHOLD * jnp.max(s.scores),
        "k": setting.largest(s.scores, s.x, k),
        "half_k": setting.largest(s.scores, s.x, k / 2),
        "double_k": setting.largest(s.scores, s.x, min(2 * k, s.num_choosable)),
        "all": jnp.ones_like(s.mask),
        "none": setting.largest(s.scores, s.x, 0.0),
    }
    values = {name: case.relative(jnp.mean(errors(s, mask))) for name, mask in masks.items()}
    active = float(s.active)
    at_k = ", ".join(
        f"at k = {of * k:g} {values[name]:.2%}"
        for name, of in {"half_k": 0.5, "k": 1, "double_k": 2}.items()
    )
    return Check(
        passed=values["trained"] <= ERROR_BAR,
        bar=f"≤ {ERROR_BAR:.0%} of the {case.unit}* as trained; the others are reported",
        values=values
        | {
            "trained_active": active,
            "threshold_active": float(s.mean(jnp.sum(masks["threshold"], axis=-1))),
            "topk": k,
        },
        text=f"With the components kept as in training ({s.kept}; {active:.3g} per {case.row}) "
        f"the error is {values['trained']:.2%} of the {case.unit}; {at_k}, "
        f"with the largest of every {case.row} {values['top1']:.2%}, "
        f"with all above {THRESHOLD:.0%} of the largest {s.ranked_by} {values['threshold']:.2%}, "
        f"with none {values['none']:.2%}.",
        budget=case.examples,
    )


@asks(11, "shrinkage", "Shrinkage", lambda case: Cost(forward=2, programs=4))
def shrinkage(case: Case) -> Check:
    """Check 11: are components and outputs as large as they should be?

    gain: the factor of the target's outputs that fits the sparse ones best,
      Σ out·target / Σ target². What the network gives without any component is first taken from
      both, and of logits their mean.
    norm_ratio: ‖Σ_c P_c‖ / ‖θ*‖. Where the features' own weights are known, the mean norm ratio of
      the components that hold them.
    """
    s, kl = case.subject, case.decomposition.method.distance == "kl"
    none = outputs(s, jnp.zeros(s.mask.shape))
    out, target = (
        o - jnp.mean(o, axis=-1, keepdims=True) if kl else o
        for o in (outputs(s, s.mask) - none, s.target_out - none)
    )
    gain = float(jnp.sum(out * target) / jnp.maximum(jnp.sum(target**2), 1e-30))
    metrics = case.evaluation.metrics if case.evaluation else {}
    if "ml2r_one_to_one" in metrics:
        ratio, of = float(metrics["ml2r_one_to_one"]), "the component of a feature has on average"
    else:
        squares = [
            sum(float(jnp.sum(leaf**2)) for leaf in leaves.values())
            for leaves in _summed_and_target(s)
        ]
        ratio, of = (squares[0] / squares[1]) ** 0.5, "the components' sum has"
    return Check(
        passed=abs(gain - 1) <= SIZE_BAR and abs(ratio - 1) <= SIZE_BAR,
        bar=f"1 ± {SIZE_BAR:g}* both",
        values={"norm_ratio": ratio, "gain": gain},
        text=f"{of[0].upper() + of[1:]} {ratio:.3f} of the norm of the target's weights, "
        f"and the sparse outputs are {gain:.3f} times the target's.",
        budget=case.examples,
    )


def _summed_and_target(s: Subject):
    summed = components_lib.total(s.components, s.params)
    return [components_lib.decomposed_leaves(s.components, params) for params in (summed, s.params)]


@asks(
    12, "alive_components", "Alive components", lambda case: Cost(gate=FIRING_BATCHES, programs=1)
)
def alive_components(case: Case) -> Check:
    """Check 12: how many components are used, and is it clear which?"""
    rates, living = case.alive
    batches = min(FIRING_BATCHES, case.num_batches)
    floor = 1 / (2 * batches * case.subject.mask.shape[0])  # less than once
    lowest = rates[living].min() if living.any() else floor
    highest = max(rates[~living].max(), floor) if (~living).any() else float("nan")
    values = {
        "alive": int(living.sum()),
        "components": len(living),
        "lowest_alive_rate": lowest,
        "highest_dead_rate": highest,
    }
    text = f"{living.sum()} of {len(living)} components are alive; "
    text += f"they are active on {lowest:.2%} to {rates.max():.2%} of the examples"
    if (~living).any():
        text += f", the dead on at most {highest:.2%}."
    else:
        text += ", and there is no dead one to tell them from."
    passed = False if not living.any() else None
    if living.any() and (~living).any():
        passed = bool(lowest >= SHARP * highest)
    order = np.argsort(-rates, kind="stable")
    return Check(
        passed=passed,
        bar=f"the least used alive component fires ≥ {SHARP:g} times as often as the most used "
        "dead one*",
        values=values,
        text=text,
        budget=f"{batches} × {case.examples}; "
        f"alive: fires, with more than {ALIVE_NORM:.0%} of the largest norm",
        arrays={"firing_rates": rates, "alive": living},
        panels={
            "firing": Panel(
                title="How often components are active",
                caption="Share of held-out examples on which each component is active. Good: a "
                "sharp edge between used and dead ones.",
                xlabel="component (ordered by firing rate)",
                ylabel="share of examples",
                x=np.arange(len(order)),
                lines={"all": rates[order], "alive": np.where(living, rates, np.nan)[order]},
            )
        },
    )


def _plateau_cost(case: Case) -> Cost:
    """Of every earlier checkpoint, and of this one, checks 2 and half of 5."""
    count = len(case.earlier) + 1 if case.earlier else 0
    passes = {"forward": length_lib.NUM_KS, "gradient": ablate.NUM_STARTS * (ablate.LADDER[-1] + 1)}
    return Cost(**{name: count * number for name, number in passes.items()}, gate=count)


@asks(17, "convergence", "Convergence", _plateau_cost)
def convergence(case: Case) -> Check:
    """Check 17: has training levelled off?

    Means over windows of the log are compared, never last values. Where earlier checkpoints are
    kept, what checks 2, 3 and 5 measure is reported for each of them.
    """
    about = {
        "bar": f"from one tenth of the log to the next the mean moves by ≤ {LEVEL:.0%}, "
        f"within {STANDARD_ERRORS:g} standard errors, "
        f"or by ≤ {IMMATERIAL:.0%} of the bars of checks 1 and 3*",
    }
    rows = case.decomposition.history
    length = max(int(WINDOW * len(rows)), MIN_ROWS)
    if len(rows) < 2 * length:
        why = f"the training log has {len(rows)} rows; two windows of {length} are needed"
        return Check(**about, why=why)
    values, level = _levelled(case, rows, length)
    for step, trained in case.earlier.items():
        s = make(case.subject.setting, case.subject.params, trained, case.subject.x)
        values |= {f"{name}_at_{step}": value for name, value in _plateau(case.about(s)).items()}
    if case.earlier:
        values |= {f"{name}_now": value for name, value in _plateau(case).items()}
    changes = ", ".join(
        f"{name.removesuffix('_change')} {value:+.1%}"
        for name, value in values.items()
        if name.endswith("_change")
    )
    return Check(
        **about,
        passed=level,
        values=values,
        text="From the last but one window of the log to the last, the mean losses moved: "
        f"{changes}.",
        budget=f"windows of {length} of {len(rows)} logged rows",
    )


def _levelled(
    case: Case, rows: Sequence[Mapping[str, Any]], length: int
) -> tuple[dict[str, Any], bool]:
    """The mean of every loss over the last window and its change, and whether all are level."""
    s = case.subject
    nothing = losses.faithfulness(jax.tree.map(jnp.zeros_like, s.components), s.params)
    material = {"faithfulness": PARAMETER_BAR * float(nothing), "simplicity": 0.0}
    values, level = {}, []
    for name in [n for n in LEVELLED if n in rows[-1]]:
        before, last = (
            np.array([row[name] for row in part], float)
            for part in (rows[-2 * length : -length], rows[-length:])
        )
        error = np.sqrt((before.var(ddof=1) + last.var(ddof=1)) / length)
        moved = last.mean() - before.mean()
        values[name] = last.mean()
        values[f"{name}_change"] = moved / max(abs(before.mean()), 1e-30)
        allowed = max(
            LEVEL * abs(before.mean()),
            STANDARD_ERRORS * error,
            IMMATERIAL * material.get(name, ERROR_BAR * case.scale),  # of errors of outputs
        )
        level.append(bool(abs(moved) <= allowed))
    return values, all(level)


def _plateau(case: Case) -> dict[str, float]:
    """The numbers of checks 2, 3 and 5, without their bars."""
    s = case.subject
    ks, error, _ = length_lib.curves(case)
    worst = jnp.mean(ablate.attack(s, case.key, shared=True)[-1])
    needed = length_lib.smallest_k(ks, error)
    return {
        "smallest_k": math.nan if needed is None else needed,
        "sparse": case.relative(jnp.mean(errors(s, s.mask))),
        "worst": case.relative(worst),
    }


@asks(18, "provenance", "Provenance")
def provenance(case: Case) -> Check:
    """Check 18: is it known where these numbers come from?"""
    given = {
        name: case.provenance[name] for name in ("workdir", "command", "step", "seed", "device")
    }
    missing = [name for name, value in given.items() if value in ("", None)]
    values = {name: given[name] for name in ("step", "seed") if name not in missing}
    run = given["workdir"] or "a decomposition in memory"
    where = f"Step {given['step']} of {run}, seed {given['seed']}, on {given['device']}"
    return Check(
        passed=None if missing else True,
        bar="run, command, step, seed and device are known",
        values=values,
        text=f"{where}, by `{given['command']}`.",
        why=f"not known: {', '.join(missing)}" if missing else "",
    )
