"""Where the truth is known: do the components hold the features, one each, in direction and length?

Shapes: C components, F features, d the length of the vector W_f that serves feature f; P_{c,f} is
component c's part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree
from scipy.optimize import linear_sum_assignment

from apd_jax import components as components_lib
from apd_jax.components import Components

OWNED_COSINE = 0.9  # a feature is owned if its component's vector points its way ...
OWNED_NORM_RATIO = 0.5  # ... and holds at least this part of its length


def all_owned(scores: Mapping[str, Any]) -> bool:
    """Whether every feature has a component of its own: the definition of a run that succeeds."""
    return bool(scores["num_features_owned"] == scores["num_features"])


def of_components(
    feature_weights: Callable[[PyTree], Float[Array, "F d"]],
    components: Components,
    num_always_on: int = 0,
) -> Float[Array, "C F d"]:
    """w(A + P_c) - w(A): what every component adds to the feature weights of the always-on ones, A.

    No component is ever used without A. Where w is linear, as for TMS, this is w(P_c). Where w is a
    product of two leaves and A holds one of them, w(P_c) of a component in the other leaf is 0.
    Always-on components have their own w(P_c).
    """
    P = components_lib.materialize(components)
    alone = jax.vmap(feature_weights)(P)
    if not num_always_on:
        return alone
    always = jax.tree.map(lambda a: jnp.sum(a[:num_always_on], axis=0), P)
    added = jax.vmap(
        lambda one: feature_weights(jax.tree.map(jnp.add, always, one)) - feature_weights(always)
    )(P)
    return jnp.where((jnp.arange(len(alone)) < num_always_on)[:, None, None], alone, added)


def cosines(
    component_weights: Float[np.ndarray, "C F d"], target_weights: Float[np.ndarray, "F d"]
) -> Float[np.ndarray, "C F"]:
    """cos(P_{c,f}, W_f); 0 where either vector is exactly zero."""
    P, W = component_weights.astype(np.float64), target_weights.astype(np.float64)
    lengths = np.linalg.norm(P, axis=-1) * np.linalg.norm(W, axis=-1)
    return _divide(np.einsum("cfd,fd->cf", P, W), lengths)


def norm_ratios(
    component_weights: Float[np.ndarray, "C F d"], target_weights: Float[np.ndarray, "F d"]
) -> Float[np.ndarray, "C F"]:
    """‖P_{c,f}‖ / ‖W_f‖; 0 where the target's vector is exactly zero."""
    P, W = component_weights.astype(np.float64), target_weights.astype(np.float64)
    norms = np.linalg.norm(P, axis=-1)
    return _divide(norms, np.broadcast_to(np.linalg.norm(W, axis=-1), norms.shape))


def one_to_one(
    cosine: Float[np.ndarray, "C F"], norm_ratio: Float[np.ndarray, "C F"]
) -> Int[np.ndarray, " F"]:
    """The component of every feature, no component twice: maximises Σ_f cos · min(norm ratio, 1).

    The argmax of the cosine alone is fooled by a tiny column that happens to point the right way,
    and hides a component that serves two features. Here a vector scores by how much of W_f it
    really holds: its projection on W_f, in units of ‖W_f‖. Greater length than that of W_f earns
    nothing.

    Returns: [F]; -1 for the features left over when C < F.
    """
    component, feature = linear_sum_assignment(cosine * np.minimum(norm_ratio, 1), maximize=True)
    owner = np.full(cosine.shape[1], -1)
    owner[feature] = component
    return owner


def per_feature(
    component_weights: Float[np.ndarray, "C F d"], target_weights: Float[np.ndarray, "F d"]
) -> dict[str, Float[np.ndarray, " F"]]:
    r"""How well the components match each feature f.

    mmcs = max_c cos(P_{c,f}, W_f)
    ml2r = ‖P_{c*,f}‖ / ‖W_f‖, c* that argmax        (APD, section 3.1)

    Returns:
      mmcs, ml2r: as in the paper; both best at 1.
      mmcs_one_to_one, ml2r_one_to_one: the same with c* from `one_to_one`; 0 for a feature that is
        left over.
      owned: 1 where the one-to-one component has f as its main feature (the longest of its F
        vectors), with cosine >= OWNED_COSINE and norm ratio >= OWNED_NORM_RATIO; else 0.
    Cost: C·F·d, and an assignment of order max(C, F)³ on the host.
    """
    cosine = cosines(component_weights, target_weights)
    ratio = norm_ratios(component_weights, target_weights)
    features = np.arange(target_weights.shape[0])
    best, owner = cosine.argmax(axis=0), one_to_one(cosine, ratio)
    assigned = owner >= 0
    own_cosine = np.where(assigned, cosine[owner, features], 0)
    own_ratio = np.where(assigned, ratio[owner, features], 0)
    main_feature = np.linalg.norm(component_weights, axis=-1).argmax(axis=1)
    owned = (
        assigned
        & (main_feature[owner] == features)
        & (own_cosine >= OWNED_COSINE)
        & (own_ratio >= OWNED_NORM_RATIO)
    )
    return {
        "mmcs": cosine[best, features],
        "ml2r": ratio[best, features],
        "mmcs_one_to_one": own_cosine,
        "ml2r_one_to_one": own_ratio,
        "owned": owned.astype(np.float64),
    }


def scores(
    component_weights: Float[np.ndarray, "C F d"], target_weights: Float[np.ndarray, "F d"]
) -> dict[str, float | int]:
    """The means of `per_feature` over features, and num_features, num_features_owned."""
    each = per_feature(component_weights, target_weights)
    owned = each.pop("owned")
    means = {name: float(values.mean()) for name, values in each.items()}
    return {**means, "num_features": len(owned), "num_features_owned": int(owned.sum())}


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
