"""Do attributions say what ablation does?

Rank correlations by kind and leaf (8), and damage by attribution (9).

Shapes: n examples, C components. The truth is ablation of one component at a time from the sum of
all (kind "ablation").
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import stats

from apd_jax import attributions as attributions_lib
from apd_jax import components as components_lib
from apd_jax.components import Components
from apd_jax.components.layout import path_name
from apd_jax.evidence.check import Case, Check
from apd_jax.evidence.subject import Subject, make
from apd_jax.targets.base import Panel

KINDS = {
    "gradient_forward": ("gradient", "forward"),
    "gradient_reverse": ("gradient", "reverse"),
    "integrated_gradient": ("integrated_gradient", "auto"),
    "activation": ("activation", "auto"),
}
NUM_EXAMPLES = 128
NUM_BINS = 10


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation over all entries; NaN where one of the two is constant."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])


def only(components: Components, leaf: str) -> Components:
    """The components of one leaf; the others count as not decomposed."""
    tree = jax.tree_util.tree_map_with_path(
        lambda path, f: f if path_name(path) == leaf else None,
        components.tree,
        is_leaf=components_lib.is_slot,
    )
    return Components(tree, components.num_components)


@functools.partial(jax.jit, static_argnames=("kind", "mode", "leaf"))
def _attributions(subject: Subject, kind: str, mode: str, leaf: str) -> Float[Array, "n C"]:
    """Of the network with all components on; of one leaf's parts alone if it is named."""
    setting = subject.setting
    problem, summed = setting.problem, components_lib.total(subject.components, subject.params)
    components = only(subject.components, leaf) if leaf else subject.components
    valid = problem.valid(subject.x)
    options = {"mode": mode, "metric": setting.method.metric, "valid": valid}
    return jnp.sqrt(
        attributions_lib.squared(kind, problem.apply_fn, summed, components, subject.x, **options)
    )


def _audited(subject: Subject) -> Subject:
    x = jax.tree.map(lambda a: a[:NUM_EXAMPLES], subject.x)
    return make(subject.setting, subject.params, subject.trained, x)


def correlations(subject: Subject, leaf: str = "") -> tuple[dict[str, float], dict[str, str]]:
    """{kind: Spearman correlation with true ablation}, and {kind: why it could not be taken}."""
    truth = np.asarray(_attributions(subject, "ablation", "auto", leaf))
    found, failed = {}, {}
    for name, (kind, mode) in KINDS.items():
        try:
            found[name] = spearman(np.asarray(_attributions(subject, kind, mode, leaf)), truth)
        # Functions without a tangent, or without a cotangent.
        except (TypeError, NotImplementedError) as error:
            failed[name] = " ".join(str(error).split())[:100]
    return found, failed


def fidelity(case: Case) -> Check:
    """Check 8: Spearman correlation of each kind of attribution with true ablation.

    Over all leaves together, and leaf by leaf.
    """
    subject = _audited(case.subject)
    together, failed = correlations(subject)
    leaves = list(subject.components.factors)
    by_leaf = {leaf: correlations(subject, leaf)[0] for leaf in leaves} if len(leaves) > 1 else {}
    values = dict(together) | {
        f"{kind}_{leaf}": r for leaf, found in by_leaf.items() for kind, r in found.items()
    }
    for step, trained in case.earlier.items():
        found = correlations(_audited(make(subject.setting, subject.params, trained, subject.x)))[0]
        values |= {f"{kind}_at_{step}": r for kind, r in found.items()}
    text = "Rank correlation with true ablation, all leaves together: " + ", ".join(
        f"{kind.replace('_', ' ')} {r:.3f}" for kind, r in together.items()
    )
    rows = {"all leaves": together} | by_leaf
    return Check(
        8,
        "attribution_fidelity",
        "Attribution fidelity",
        values=values,
        text=text + "." + "".join(f" {kind}: not taken ({why})." for kind, why in failed.items()),
        budget=f"{subject.mask.shape[0]} examples × {subject.num_components} components",
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


def tempered(case: Case) -> Check:
    """Check 9: does a component with more attribution do more damage when ablated alone?"""
    subject = _audited(case.subject)
    damage = np.asarray(_attributions(subject, "ablation", "auto", "")).ravel()
    score = np.asarray(_trained_kind(subject)).ravel()
    used = score > 0
    about = {"number": 9, "name": "well_tempered", "title": "Well-tempered attributions"}
    if used.sum() < 2 * NUM_BINS:
        return Check(
            **about,
            why=f"only {used.sum()} pairs of example and component have an attribution above 0",
        )
    order = np.argsort(score[used], kind="stable")
    bins = np.array_split(order, NUM_BINS)
    means = np.array([damage[used][b].mean() for b in bins])
    rising = float(np.mean(np.diff(means) >= 0))
    r = spearman(score[used], damage[used])
    return Check(
        **about,
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
