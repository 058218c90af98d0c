"""What the scores of several targets share.

Which components are alive, and how well attributions predict true ablation.

Shapes: B examples, T positions (only with a mask per position), C components.
"""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from apd_jax import attributions
from apd_jax import components as components_lib
from apd_jax.components import Components
from apd_jax.decomposition import Decomposition

ALIVE_NORM = 0.01  # an alive component has more than this part of the largest component's norm
CORRELATION_LABELS = {
    f"attribution_rank_correlation_{kind}": (
        f"rank correlation of {kind.replace('_', ' ')} attributions with true ablation; 1"
    )
    for kind in attributions.KINDS
    if kind != "ablation"
}


def accuracy_labels(what: str) -> dict[str, str]:
    """Labels for the table: accuracy of the target, with all components and with the mask."""
    return {
        "target_accuracy": f"{what} of the target; 1",
        "all_accuracy": f"{what} with all components; the target's",
        "sparse_accuracy": f"{what} with the mask of training; the target's",
    }


def alive_components(
    firing_rates: Float[np.ndarray, " C"], norms: Float[np.ndarray, " C"]
) -> Bool[np.ndarray, " C"]:
    """Components that some example keeps, and whose norm exceeds ALIVE_NORM times the largest.

    `firing_rates` count an example only where the attribution is above 0.
    """
    return (firing_rates > 0) & large_components(norms)


def large_components(norms: Float[np.ndarray, " C"]) -> Bool[np.ndarray, " C"]:
    """Components whose norm exceeds ALIVE_NORM times the largest."""
    return norms > ALIVE_NORM * norms.max()


def rank_correlations(
    decomposition: Decomposition, x: PyTree, alive: Bool[np.ndarray, " C"]
) -> dict[str, float]:
    """Spearman's rank correlation between each kind of attribution and true ablation.

    Taken over all pairs of an example of x and an alive component; 0 if either side is constant.
    Attributions are per example, in the method's metric, whatever its gate reads.

    Returns:
      {"attribution_rank_correlation_{kind}": value} for every kind but "ablation".
    """
    from scipy.stats import rankdata  # here, because it takes a second

    method, problem = decomposition.method, decomposition.problem
    names = {k: f"attribution_rank_correlation_{k}" for k in attributions.KINDS if k != "ablation"}
    if not alive.any():
        return dict.fromkeys(names.values(), 0.0)

    def ranks(kind: str) -> np.ndarray:
        @jax.jit
        def attribute(components: Components, params: PyTree, x: PyTree) -> Float[Array, "B C"]:
            at = params
            if method.gradients_at == "components":
                at = components_lib.total(components, params)
            valid = problem.valid(x)
            return attributions.squared(
                kind, problem.apply_fn, at, components, x, metric=method.metric, valid=valid
            )

        given = attribute(decomposition.components, problem.params, x)
        return rankdata(np.asarray(given)[:, alive])

    truth, found = ranks("ablation"), {}
    for kind, name in names.items():
        given = ranks(kind)
        varied = np.ptp(truth) > 0 and np.ptp(given) > 0
        found[name] = float(np.corrcoef(given, truth)[0, 1]) if varied else 0.0
    return found
