"""How many components are needed (2), and how many bits they take to say (19), over a range of k.

Shapes: n examples, C components, K values of k.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from apd_jax import components as components_lib
from apd_jax.evidence.check import ERROR_BAR, Case, Check
from apd_jax.evidence.subject import Subject, errors
from apd_jax.targets.base import Panel

NUM_KS = 25
TRUE_COUNT_SLACK = 1.05


def bits(subject: Subject, mask: Array, bits_per_rank: float) -> Float[Array, ""]:
    """Description length per datapoint (or position): Σ_active (log₂ C + α Σ_l rank_{c,l}).

    α = bits_per_rank. log₂ C names a component, α·rank pays for its size; effective ranks count.
    Of components that are ranked by attributions only those with one above 0 are named.
    """
    ranks = sum(
        components_lib.effective_ranks(subject.components).values(), jnp.zeros((), jnp.int32)
    )
    each = jnp.log2(float(subject.num_components)) + bits_per_rank * ranks
    active = mask & (subject.scores > 0) if subject.ranks_by_attributions else mask
    return jnp.mean(jnp.sum(active * each.reshape(*[1] * (mask.ndim - 1), -1), axis=-1))


@functools.partial(jax.jit, static_argnames="bits_per_rank")
def over_k(
    subject: Subject, ks: Float[Array, " K"], bits_per_rank: float
) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
    """Mean sparse error and bits per datapoint with the k largest kept, of every k."""

    def at(k):
        mask = subject.setting.largest(subject.scores, subject.x, k)
        error = jnp.mean(errors(subject, mask.astype(jnp.float32)))
        return error, bits(subject, mask, bits_per_rank)

    return jax.lax.map(at, ks)


def grid(k: float, most: int) -> np.ndarray:
    """k from an eighth of the trained one to all components, in equal ratios."""
    return np.geomspace(max(k, 1e-3) / 8, most, NUM_KS)


def choosable(subject: Subject) -> int:
    """How many components are not always on."""
    return subject.num_components - subject.setting.method.always_on


def curves(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """k, sparse error in units of `Case.scale`, and bits per datapoint."""
    ks = grid(case.subject.k, choosable(case.subject))
    error, length = over_k(case.subject, jnp.asarray(ks, jnp.float32), case.bits_per_rank)
    return ks, np.array([case.relative(e) for e in error]), np.asarray(length)


def smallest_k(ks: np.ndarray, error: np.ndarray) -> float | None:
    """The smallest k of the grid from which on the error stays within ERROR_BAR.

    None if it never does.
    """
    above = np.flatnonzero(~(error <= ERROR_BAR))
    first = above[-1] + 1 if len(above) else 0
    return float(ks[first]) if first < len(ks) else None


def minimality(case: Case) -> Check:
    """Check 2: the fewest active components per input that keep the sparse error within its bar.

    Against the true count, where it is known.
    """
    about = {
        **{"number": 2, "name": "minimality", "title": "Minimality"},
        "budget": f"{NUM_KS} values of k, {case.examples}",
    }
    ks, error, _ = curves(case)
    needed, count_fn = smallest_k(ks, error), case.decomposition.problem.num_active_fn
    if needed is None:
        values, within = {}, f"within {ERROR_BAR:.0%} of the {case.unit}"
        text = f"At no k is the sparse error {within} up to all components."
    else:
        values = {"smallest_k": needed}
        text = f"{needed:.3g} active components per input keep the sparse error within "
        text += f"{ERROR_BAR:.0%} of the {case.unit}"
    if count_fn is None:
        return Check(
            **about,
            passed=False if needed is None else None,
            bar="the number of truly active features, where it is known",
            values=values,
            text=text if needed is None else f"{text}.",
            why="the true count is not known for this target",
        )
    true = float(jnp.mean(count_fn(case.subject.x)))
    between = " " if needed is None else "; "
    return Check(
        **about,
        passed=needed is not None and needed <= TRUE_COUNT_SLACK * true,
        bar=f"≤ {TRUE_COUNT_SLACK:g} × the true count, {true:.3g}*",
        values=values | {"true_count": true},
        text=f"{text}{between}{true:.3g} features are active.",
    )


def description_length(case: Case) -> Check:
    """Check 19: bits per datapoint as trained and over k, with the sparse error beside it.

    Suggested k: the smallest from which on the sparse error stays within ERROR_BAR, the rule of
    check 2.
    """
    ks, error, length = curves(case)
    s, alpha, needed = case.subject, case.bits_per_rank, smallest_k(ks, error)
    trained = float(bits(s, s.mask, alpha))
    values = {"bits": trained, "bits_per_rank": alpha, "topk": case.subject.k}
    text = f"As trained ({s.kept}) a held-out datapoint takes {trained:.3g} bits "
    text += f"(log₂ C per active component and {alpha:g} per rank)"
    if needed is not None:
        at_needed = float(np.interp(needed, ks, length))
        values |= {"suggested_k": needed, "bits_at_suggested_k": at_needed}
        text += f"; the error bar suggests k = {needed:.3g}, at {at_needed:.3g} bits."
    else:
        text += "; no k keeps the error within its bar."
    drawn = "as given: whether training saw them is not known"
    if callable(case.decomposition.problem.sample_fn):
        drawn = "held out: drawn with a key that training never used"
    return Check(
        19,
        "description_length",
        "Description length",
        values=values,
        text=text,
        budget=f"{NUM_KS} values of k, {case.examples}, {drawn}",
        arrays={"length_k": ks, "length_bits": length, "length_error": error},
        panels=_panels(case, ks, error, length),
    )


def _panels(case: Case, ks: np.ndarray, error: np.ndarray, length: np.ndarray) -> dict[str, Panel]:
    """Error and bits over k."""
    shared = {"xlabel": "k, active components per datapoint", "x": ks}
    return {
        "length_error": Panel(
            title="Error over k",
            caption="Sparse error against the number of components kept. Good: a steep fall below "
            f"the bar, {ERROR_BAR}.",
            ylabel=f"error / {case.unit}",
            lines={"sparse error": error},
            **shared,
        ),
        "length_bits": Panel(
            title="Description length over k",
            caption="Bits that name the active components and their ranks. Good: few at the k that "
            "the error asks for; where it levels off, further components have no attribution.",
            ylabel="bits per datapoint",
            lines={"bits": length},
            **shared,
        ),
    }
