"""How many components are needed (2), and how many bits they take to say (19), over a range of k.

Shapes: n examples, C components, K values of k.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from apd_jax import components as components_lib
from apd_jax.evidence.check import ERROR_BAR, FIRING_BATCHES, Case, Check, Cost, asks
from apd_jax.evidence.subject import Subject, errors
from apd_jax.targets.base import Panel

NUM_KS = 25
TRUE_COUNT_SLACK = 1.05
SPARSE = 0.5  # of the alive components
RANK_TOLERANCE = 1e-2
NUMBER_BITS = 24  # what single precision holds


def ranks(subject: Subject) -> tuple[Int[Array, " C"], Int[Array, ""]]:
    """Σ_l rank_{c,l} of every component, and Σ_l rank_l of the target's weights.

    Singular values above RANK_TOLERANCE of the largest of the target's leaf count.
    """
    factors = subject.components.factors
    whole = components_lib.singular_values(
        components_lib.from_materialized(
            {
                name: leaf[None]
                for name, leaf in components_lib.decomposed_leaves(
                    subject.components, subject.params
                ).items()
            },
            layouts={name: f.layout for name, f in factors.items() if f.layout is not None},
        )
    )
    each = jnp.zeros(subject.num_components, jnp.int32)
    total = jnp.zeros((), jnp.int32)
    for name, s in components_lib.singular_values(subject.components).items():
        least = RANK_TOLERANCE * jnp.max(whole[name])
        each += jnp.sum(s > least, axis=-1, dtype=jnp.int32)
        total += jnp.sum(whole[name] > least, dtype=jnp.int32)
    return each, total


@jax.jit
def parts(subject: Subject, mask: Array) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Σ_active log₂ C and Σ_active Σ_l rank_{c,l}, per datapoint (or position).

    Of components that are ranked by attributions only those with one above 0 are active. C counts
    those to choose from: what is always on needs no name.
    """
    active = mask & (subject.scores > 0) if subject.ranks_by_attributions else mask
    named = subject.mean(jnp.sum(active[..., subject.choosable], axis=-1))
    held = subject.mean(active.astype(jnp.float32) @ ranks(subject)[0].astype(jnp.float32))
    return named * np.log2(max(subject.num_choosable, 1)), held


def bits(subject: Subject, mask: Array, bits_per_rank: float) -> Float[Array, ""]:
    """Description length per datapoint (or position): Σ_active (log₂ C + α Σ_l rank_{c,l}).

    α = bits_per_rank. log₂ C names a component, α·rank pays for its size.
    """
    named, held = parts(subject, mask)
    return named + bits_per_rank * held


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


def curves(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """k, sparse error in units of `Case.scale`, and bits per datapoint."""
    ks = grid(case.subject.k, case.subject.num_choosable)
    error, length = over_k(case.subject, jnp.asarray(ks, jnp.float32), case.bits_per_rank)
    return ks, np.array([case.relative(e) for e in error]), np.asarray(length)


def smallest_k(ks: np.ndarray, error: np.ndarray) -> float | None:
    """The smallest k of the grid from which on the error stays within ERROR_BAR.

    None if it never does.
    """
    above = np.flatnonzero(~(error <= ERROR_BAR))
    first = above[-1] + 1 if len(above) else 0
    return float(ks[first]) if first < len(ks) else None


@asks(
    2,
    "minimality",
    "Minimality",
    lambda case: Cost(forward=NUM_KS, gate=FIRING_BATCHES, programs=8),
)
def minimality(case: Case) -> Check:
    """Check 2: few components are active, and no more than are needed.

    As trained, at most half of those that live. The fewest that keep the sparse error within its
    bar are held against the true count, where it is known.
    """
    ks, error, _ = curves(case)
    needed, count_fn = smallest_k(ks, error), case.decomposition.problem.num_active_fn
    rates, living = case.alive
    living = living & case.subject.choosable
    count, active = int(living.sum()), float(rates[living].sum())
    values = {"alive": count, "active": active}
    bar = f"at most {SPARSE:.0%} of the alive components active on average*"
    text = f"{active:.3g} of {count} alive components are active per {case.row}"
    within = f"within {ERROR_BAR:.0%} of the {case.unit}"
    if needed is None:
        text += f"; at no k is the sparse error {within} up to all components"
    else:
        values["smallest_k"] = needed
        text += f"; {needed:.3g} keep the sparse error {within}"
    passed = needed is not None and 0 < active <= SPARSE * count
    why = "the true count is not known for this target"
    if count_fn is not None:
        true = values["true_count"] = float(jnp.mean(count_fn(case.subject.x)))
        passed = passed and needed is not None and needed <= TRUE_COUNT_SLACK * true
        bar += f"; ≤ {TRUE_COUNT_SLACK:g} × the true count, {true:.3g}, needed*"
        text, why = f"{text}; {true:.3g} features are active", ""
    return Check(
        passed=passed,
        bar=bar,
        values=values,
        text=f"{text}.",
        why=why,
        budget=f"{NUM_KS} values of k, {case.examples}",
    )


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The active components' names and ranks, beside the two descriptions that need no gate.

    With n bits of names, r ranks and α bits per rank the length is n + α·r.
    whole: ranks R of the network as one component that is always on, which needs no name: α·R bits.
    empty: no component; the outputs are then corrected one by one to the error D_sparse that the
      components reach, E = O/2 · log₂(D_none / D_sparse) bits for O outputs (of a Gaussian; at most
      NUMBER_BITS each).
    Shorter than both for α in (n/(R - r), (E - n)/r), if that is not empty: n/E + r/R < 1.
    """

    names: float
    ranks: float
    whole: float
    empty: float

    @property
    def shorter(self) -> bool:
        if not (self.ranks < self.whole and self.names < self.empty):
            return False
        return self.names / self.empty + self.ranks / self.whole < 1

    @property
    def prices(self) -> tuple[float, float]:
        """The least and the largest α at which it is shorter than both."""
        least = self.names / (self.whole - self.ranks)
        return least, (self.empty - self.names) / max(self.ranks, 1e-30)


def lengths(case: Case) -> Lengths:
    s = case.subject
    named, held = parts(s, s.mask)
    sparse, none = (float(jnp.mean(errors(s, m))) for m in (s.mask, jnp.zeros(s.mask.shape)))
    outputs = s.target_out.size / (s.mask.size / s.num_components)
    bits_each = 0.5 * np.log2(max(none, 1e-30) / max(sparse, 1e-30))
    empty = outputs * min(max(bits_each, 0.0), NUMBER_BITS)
    return Lengths(float(named), float(held), float(jax.jit(ranks)(s)[1]), float(empty))


@asks(
    *(19, "description_length", "Description length"),
    lambda case: Cost(forward=NUM_KS + 2, programs=4),
)
def description_length(case: Case) -> Check:
    """Check 19: is what is active shorter to say than the whole network, and than nothing?

    See `Lengths`. Also bits per datapoint as trained and over k, with the sparse error beside it.
    Suggested k: the smallest from which on the sparse error stays within ERROR_BAR, the rule of
    check 2.
    """
    ks, error, length = curves(case)
    s, alpha, needed, of = case.subject, case.bits_per_rank, smallest_k(ks, error), lengths(case)
    trained = of.names + alpha * of.ranks
    values = {"bits": trained, "bits_per_rank": alpha, "topk": case.subject.k}
    values |= {"names": of.names, "ranks": of.ranks}
    values |= {"whole_ranks": of.whole, "empty_bits": of.empty}
    text = f"As trained ({s.kept}) naming what is active takes {of.names:.3g} bits per {case.row}, "
    text += f"and it has {of.ranks:.3g} ranks, the whole network {of.whole:.3g}; without any "
    text += f"component the outputs take {of.empty:.3g} bits to the same error. "
    if of.shorter:
        values |= dict(zip(("least_price", "largest_price"), of.prices, strict=True))
        text += "This is shorter than both where a rank costs {:.3g} to {:.3g} bits".format(
            *of.prices
        )
    else:
        text += "Whatever a rank costs, this is not shorter than both"
    text += f"; at {alpha:g} it takes {trained:.3g} bits"
    if needed is not None:
        at_needed = float(np.interp(needed, ks, length))
        values |= {"suggested_k": needed, "bits_at_suggested_k": at_needed}
        text += f", and {at_needed:.3g} at k = {needed:.3g}, which the error bar suggests."
    else:
        text += "; no k keeps the error within its bar."
    drawn = "as given: whether training saw them is not known"
    if callable(case.decomposition.problem.sample_fn):
        drawn = "held out: drawn with a key that training never used"
    return Check(
        passed=of.shorter,
        bar="at some price of a rank shorter than the whole network as one component, and than no "
        "component*",
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
