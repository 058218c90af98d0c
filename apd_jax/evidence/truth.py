"""Against what is known of a target made of features: scrubbing (7) and geometry (10).

Shapes: C components, F features, d the length of a feature's weight vector, P_{c,f} component c's
part of it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from apd_jax import components as components_lib
from apd_jax.evaluation import geometry, scrub
from apd_jax.evaluation.masks import always_on as always_on_mask
from apd_jax.evidence.check import ERROR_BAR, EVALUATION_BATCHES, Case, Check, Cost, asks
from apd_jax.evidence.subject import Subject, errors, norms
from apd_jax.network.outputs import outputs as outputs_of
from apd_jax.targets.base import FeatureTarget
from apd_jax.targets.scoring import large_components

SEPARATION = 3.0  # antiscrubbed / scrubbed
COSINE_BAR, NORM_BAR, PURITY_BAR = 0.999, 0.01, 0.98
_NO_FEATURES = "the truth of this target is not one weight vector per input feature"


def _of_features(case: Case) -> Cost:
    """The target's own metrics, on their batches; nothing where there is no target."""
    passes = 5 * EVALUATION_BATCHES
    return Cost(forward=passes, programs=2) if case.target else Cost()


@asks(7, "scrubbing", "Scrubbing", _of_features)
def scrubbing(case: Case) -> Check:
    """Check 7: an input's features need their own components and no others.

    APD's protocol; see `apd_jax.evaluation.scrub`.
    """
    target, s = case.target, case.subject
    if not isinstance(target, FeatureTarget) or case.evaluation is None:
        return Check(why=_NO_FEATURES)
    owner = jnp.asarray(case.evaluation.arrays["component_of_feature"])
    needed = scrub.needed(s.x, owner, s.num_components)
    always_on = always_on_mask(s.setting.method.always_on, s.num_components)
    masks = {"sparse": s.mask} | {
        name: mask | always_on
        for name, mask in scrub.draw_masks(jax.random.fold_in(case.key, 7), needed).items()
    }
    lost = {name: errors(s, mask) for name, mask in masks.items()} | {
        "zero": scrub.per_example_loss(jnp.zeros_like(s.target_out), s.target_out)
    }
    if target.monosemantic_fn is not None:
        lost["monosemantic"] = scrub.per_example_loss(target.monosemantic_fn(s.x), s.target_out)
    values = {name: case.relative(jnp.mean(error)) for name, error in lost.items()}
    return Check(
        passed=values["scrubbed"] <= ERROR_BAR
        and values["antiscrubbed"] >= SEPARATION * values["scrubbed"],
        bar=f"scrubbed ≤ {ERROR_BAR:.0%} of the {case.unit}*, "
        f"antiscrubbed ≥ {SEPARATION:g} × scrubbed*",
        values=values,
        text="With the components of active features forced on and the others switched at random "
        f"the error is {values['scrubbed']:.2%} of the {case.unit}, "
        f"forced off {values['antiscrubbed']:.2%}; as in training {values['sparse']:.2%}, "
        f"all at random {values['random']:.2%}.",
        budget=f"one random mask per example and kind, {case.examples}",
    )


@asks(10, "geometry", "Geometry", _of_features)
def geometry_of(case: Case) -> Check:
    """Check 10: each feature's weights in one component of its own, in direction and length.

    Matched one to one.
    """
    evaluation = case.evaluation
    if evaluation is None:
        return Check(why=_NO_FEATURES)
    m, labels, s = evaluation.metrics, evaluation.labels, case.subject
    if not isinstance(case.target, FeatureTarget):
        known = {name: m[name] for name in labels}
        text = ". ".join(f"{labels[name]}: {value:.4g}" for name, value in known.items())
        return Check(values=known, text=text, why=_NO_FEATURES)
    P, W = (evaluation.arrays[f"feature_weights_{of}"] for of in ("components", "target"))
    pure, each = purity(P, W), geometry.per_feature(P, W)
    owner = geometry.one_to_one(geometry.cosines(P, W), geometry.norm_ratios(P, W))
    lost = np.asarray(ablated_alone(s, jnp.asarray(case.target.probes), jnp.asarray(owner)))
    order = np.argsort(lost, kind="stable")
    columns = {"feature": np.arange(len(owner)), "component": owner}
    columns |= {"cosine": each["mmcs_one_to_one"], "norm ratio": each["ml2r_one_to_one"]}
    columns |= {"purity": pure, "lost when ablated alone": lost}
    names = ("mmcs", "ml2r", "mmcs_one_to_one", "ml2r_one_to_one")
    values = {name: m[name] for name in (*names, "num_features_owned", "num_features")}
    values |= {"purity": float(pure.mean()), "cross_leaf_share": cross_leaf_share(s)}
    values |= {"ablation_mean": float(lost.mean()), "ablation_least": float(lost.min())}
    for leaf, (parts, whole) in leaf_parts(case.target, s).items():
        scores = geometry.scores(parts, whole)
        values |= {
            f"{name}_{leaf}": scores[name] for name in ("mmcs_one_to_one", "ml2r_one_to_one")
        }
    cosine, ratio = values["mmcs_one_to_one"], values["ml2r_one_to_one"]
    return Check(
        passed=cosine >= COSINE_BAR
        and abs(ratio - 1) <= NORM_BAR
        and values["purity"] >= PURITY_BAR,
        bar=f"MMCS ≥ {COSINE_BAR}, ML2R 1 ± {NORM_BAR}, purity ≥ {PURITY_BAR:.0%}, "
        "no component twice*",
        values=values,
        text="No component used twice, the mean cosine with the features' weights is "
        f"{cosine:.4f}, the norm ratio {ratio:.3f}, purity {values['purity']:.1%}; "
        f"{m['num_features_owned']} of {m['num_features']} features have a component of their own. "
        "Ablated alone, it takes on average "
        f"{lost.mean():.1%} of what the components do for its feature, at the least "
        f"{lost.min():.1%}.",
        budget=f"{m['num_features']} features",
        arrays={"purity_of_feature": pure, "ablation_of_feature": lost},
        columns={name: np.asarray(column)[order] for name, column in columns.items()},
    )


@jax.jit
def ablated_alone(
    subject: Subject, probes: Float[Array, "F ..."], owner: Int[Array, " F"]
) -> Float[Array, " F"]:
    """Of what the components do for a feature alone, how much its own component's ablation takes.

    D(without it) / D(without any), each on the input of the feature alone; 0 for one left over.
    """
    out = outputs_of(subject.setting.problem.apply_fn(subject.params, probes))
    on = owner[:, None] != jnp.arange(subject.num_components)[None]
    at = dataclasses.replace(subject, x=probes, target_out=out, mask=on)
    none = errors(at, jnp.zeros_like(on))
    return jnp.where(owner >= 0, errors(at, on) / jnp.maximum(none, 1e-30), 0.0)


def purity(P: Float[np.ndarray, "C F d"], W: Float[np.ndarray, "F d"]) -> Float[np.ndarray, " F"]:
    """‖P_{c,f}‖² / Σ_g ‖P_{c,g}‖² of the feature's one-to-one component.

    0 for a feature that is left over.
    """
    owner = geometry.one_to_one(geometry.cosines(P, W), geometry.norm_ratios(P, W))
    squares = np.sum(P.astype(np.float64) ** 2, axis=-1)
    share = squares / np.maximum(squares.sum(axis=1, keepdims=True), 1e-30)
    return np.where(owner >= 0, share[owner, np.arange(len(owner))], 0.0)


def leaf_parts(target: FeatureTarget, s: Subject) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each leaf's own part in the features' weights.

    A feature's weights are linear in each leaf, so a leaf's part is what they lose when it is 0,
    with the target's values in all others.

    Returns: {leaf: ([C, F, d] of the components, [F, d] of the target)}. Empty for a single leaf;
      leaves without a part are left out.
    """
    factors, found = components_lib.aligned(s.components).factors, {}
    for name, f in factors.items() if len(factors) > 1 else ():

        def part(leaf, name=name):
            at = [
                target.feature_weights(
                    s.params, components_lib.replace_leaves(s.params, {name: value})
                )
                for value in (leaf, 0 * leaf)
            ]
            return at[0] - at[1]

        whole = np.asarray(part(components_lib.decomposed_leaves(s.components, s.params)[name]))
        if np.any(whole):
            found[name] = (np.asarray(jax.lax.map(part, f.weights)), whole)
    return found


def cross_leaf_share(s: Subject) -> float:
    """How much of a component lies outside its main leaf.

    1 - its largest share of ‖P_{c,l}‖² / ‖θ*_l‖², averaged over the components of some size.
    """
    leaves = components_lib.decomposed_leaves(s.components, s.params)
    squares = components_lib.squared_norms(s.components)
    of_leaf = np.stack(
        [np.asarray(squares[name]) / float(jnp.sum(leaf**2)) for name, leaf in leaves.items()]
    )
    norm = np.asarray(norms(s.components))
    held = of_leaf[:, large_components(norm)]
    if not held.size:
        return 0.0
    return float(np.mean(1 - held.max(axis=0) / np.maximum(held.sum(axis=0), 1e-30)))
