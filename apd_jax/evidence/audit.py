"""Do attributions say what ablation does?

Rank correlations by kind and leaf (8), and damage by attribution (9).

Shapes: n examples, C components. The truth is ablation of one component at a time from the sum of
all (kind "ablation").
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from apd_jax import attributions as attributions_lib
from apd_jax import components as components_lib
from apd_jax.attributions import INTEGRATION_STEPS
from apd_jax.components import Components, Factors
from apd_jax.evidence.check import Case, Check, Cost, asks
from apd_jax.evidence.subject import Subject, make
from apd_jax.methods.optimizers import Trained
from apd_jax.targets.base import Panel

WIDE = 1024  # outputs from which on directions of them are drawn, not taken one by one ...
JACOBIAN = 2**26  # ... or entries of an example's Jacobian, outputs times weights
NUM_PROBES = 16
NUM_EXAMPLES = 128
NUM_BINS = 10
_TANGENT = 3.0  # a pass with a tangent, in passes


def wide(subject: Subject) -> bool:
    """Whether there are too many outputs to go backward from each."""
    outputs = subject.target_out[0].size
    return outputs > WIDE or outputs * subject.components.num_params > JACOBIAN


def kinds(subject: Subject) -> dict[str, tuple[str, str]]:
    """The kinds of attribution that are audited, with their modes: exact, unless outputs are wide.

    Then what would go backward once per output is estimated from NUM_PROBES random directions.
    """
    drawn = wide(subject)
    backward = "probe" if drawn else "reverse"
    return {
        "gradient_forward": ("gradient", "forward"),
        f"gradient_{backward}": ("gradient", backward),
        "integrated_gradient": ("integrated_gradient", "probe" if drawn else "auto"),
        "activation": ("activation", "auto"),
    }


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation over all entries; NaN where one of the two is constant."""
    from scipy import stats  # here, because it takes a second

    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])


@functools.partial(jax.jit, static_argnames=("kind", "mode"))
def _attributions(subject: Subject, kind: str, mode: str) -> Float[Array, "n C"]:
    """Of the network with all components on."""
    setting = subject.setting
    problem, summed = setting.problem, components_lib.total(subject.components, subject.params)
    squared = attributions_lib.squared(
        *(kind, problem.apply_fn, summed, subject.components, subject.x),
        mode=mode,
        metric=setting.method.metric,
        valid=problem.valid(subject.x),
        num_probes=NUM_PROBES,
        rng=jax.random.key(setting.method.seed),
    )
    return jnp.sqrt(squared)


def _first_examples(subject: Subject) -> Subject:
    x = jax.tree.map(lambda a: a[:NUM_EXAMPLES], subject.x)
    return make(subject.setting, subject.params, subject.trained, x)


Audited = dict[str, np.ndarray]  # of every kind [n, C], the truth's name is "ablation"


def audited(subject: Subject) -> tuple[Audited, dict[str, str]]:
    """Every kind of attribution beside true ablation, and {kind: why it could not be taken}."""
    found, failed = {"ablation": np.asarray(_attributions(subject, "ablation", "auto"))}, {}
    for name, (kind, mode) in kinds(subject).items():
        try:
            found[name] = np.asarray(_attributions(subject, kind, mode))
        # Functions without a tangent, or without a cotangent.
        except (TypeError, NotImplementedError) as error:
            failed[name] = " ".join(str(error).split())[:100]
    return found, failed


def correlations(found: Audited, numbers: Sequence[int] | None = None) -> dict[str, float]:
    """{kind: Spearman correlation with true ablation}, of these components or of all."""
    columns = slice(None) if numbers is None else np.asarray(numbers)
    truth = found["ablation"][:, columns]
    return {k: spearman(a[:, columns], truth) for k, a in found.items() if k != "ablation"}


def apart(components: Components) -> Components:
    """Every leaf's pieces as components of their own; as they are where no number is at two."""
    sites = components.factors.values()
    if all(f.ids is not None for f in sites):
        at = [c for f in sites for c in f.ids or ()]
        if len(at) == len(set(at)):
            return components
    numbers = itertools.count()

    def one(f: Factors) -> Factors:
        return dataclasses.replace(f, ids=tuple(itertools.islice(numbers, f.num_pieces)))

    tree = components_lib.map_sites(one, components).tree
    return Components(tree, next(numbers))


def by_leaf(subject: Subject, together: Audited) -> dict[str, dict[str, float]]:
    """The correlations of every leaf's own parts, where there are several leaves."""
    if len(subject.components.factors) == 1:
        return {}
    parts, found = apart(subject.components), together
    if parts is not subject.components:
        trained = Trained(parts, subject.trained.gate)
        found = audited(dataclasses.replace(subject, trained=trained))[0]
    return {leaf: correlations(found, f.ids) for leaf, f in parts.factors.items()}


def _audit_cost(case: Case) -> Cost:
    """Ablation and tangents go through the components one by one, the others backward."""
    s = case.subject
    rounds, counted = 1 + len(case.earlier), s.num_components * (1 + len(case.earlier))
    parts = apart(s.components)
    if parts is not s.components and len(parts.factors) > 1:
        rounds, counted = rounds + 1, counted + parts.num_components
    if wide(s):
        tangents, backward = 1, NUM_PROBES * (1 + INTEGRATION_STEPS)
    else:
        tangents, backward = 1 + INTEGRATION_STEPS, s.target_out[0].size
    share = min(1.0, NUM_EXAMPLES / s.mask.shape[0])
    return Cost(
        forward=share * counted * (1 + _TANGENT * tangents),
        gradient=share * rounds * backward,
        programs=10 * rounds,
    )


@asks(8, "attribution_fidelity", "Attribution fidelity", _audit_cost)
def fidelity(case: Case) -> Check:
    """Check 8: Spearman correlation of each kind of attribution with true ablation.

    Over all leaves together, and leaf by leaf.
    """
    subject = _first_examples(case.subject)
    found, failed = audited(subject)
    together, leaves = correlations(found), by_leaf(subject, found)
    values = dict(together) | {
        f"{kind}_{leaf}": r for leaf, found in leaves.items() for kind, r in found.items()
    }
    for step, trained in case.earlier.items():
        then = make(subject.setting, subject.params, trained, subject.x)
        values |= {f"{k}_at_{step}": r for k, r in correlations(audited(then)[0]).items()}
    drawn = ""
    if any(mode == "probe" for _, mode in kinds(subject).values()):
        drawn = f"; backward from {NUM_PROBES} random directions of "
        drawn += f"{subject.target_out[0].size} outputs"
    text = "Rank correlation with true ablation, all leaves together: " + ", ".join(
        f"{kind.replace('_', ' ')} {r:.3f}" for kind, r in together.items()
    )
    rows = {"all leaves": together} | leaves
    return Check(
        values=values,
        text=text + "." + "".join(f" {kind}: not taken ({why})." for kind, why in failed.items()),
        budget=f"{subject.mask.shape[0]} examples × {subject.num_components} components{drawn}",
        panels={
            "audit": Panel(
                title="Attributions against true ablation",
                caption="Spearman rank correlation over all examples and components. Good: near 1; "
                "a leaf near 0 is ranked by chance.",
                xlabel="kind of attribution",
                ylabel="",
                matrix=np.nan_to_num(
                    [[found.get(kind, 0.0) for kind in together] for found in rows.values()]
                ),
                unit="rank correlation",
                rows=list(rows),
                columns=list(together),
            )
        },
    )


def _tempered_cost(case: Case) -> Cost:
    share = min(1.0, NUM_EXAMPLES / case.subject.mask.shape[0])
    return Cost(forward=share * case.subject.num_components, programs=2)


@asks(9, "well_tempered", "Well-tempered attributions", _tempered_cost)
def tempered(case: Case) -> Check:
    """Check 9: does a component with more attribution do more damage when ablated alone?"""
    subject = _first_examples(case.subject)
    damage = np.asarray(_attributions(subject, "ablation", "auto")).ravel()
    score = np.asarray(_trained_kind(subject)).ravel()
    used = score > 0
    if used.sum() < 2 * NUM_BINS:
        return Check(
            why=f"only {used.sum()} pairs of example and component have an attribution above 0",
        )
    order = np.argsort(score[used], kind="stable")
    bins = np.array_split(order, NUM_BINS)
    means = np.array([damage[used][b].mean() for b in bins])
    rising = float(np.mean(np.diff(means) >= 0))
    r = spearman(score[used], damage[used])
    return Check(
        values={
            "spearman_above_zero": r,
            "share_rising": rising,
            "top_bin_damage": means[-1],
            "bottom_bin_damage": means[0],
        },
        text=f"In {NUM_BINS} bins of rising attribution the mean damage of ablating one component "
        f"alone goes from {means[0]:.2g} to {means[-1]:.2g} (units of the output) "
        f"and rises at {rising:.0%} of the steps; "
        f"rank correlation {r:.3f} where attributions are above 0.",
        budget=f"{used.sum()} pairs of example and component",
        arrays={
            "tempered_damage": means,
            "tempered_attribution": np.array([score[used][b].mean() for b in bins]),
        },
        panels={
            "tempered": Panel(
                title="Damage by attribution",
                caption="Mean change of the output when one component is ablated alone, by tenths "
                "of rising attribution. Good: it rises.",
                xlabel="tenth of the pairs, by attribution",
                ylabel="change of the output (its units)",
                x=np.arange(1, NUM_BINS + 1),
                lines={"ablated alone": means},
            )
        },
    )


def _trained_kind(subject: Subject) -> Float[Array, "n C"]:
    """The scores that masks are made of, of every example.

    Of scores per position the root mean square if they are attributions, else the largest.
    """
    a = subject.scores
    if a.ndim == 2:
        return a
    return jnp.sqrt(jnp.mean(a**2, axis=1)) if subject.ranks_by_attributions else jnp.max(a, axis=1)
