"""Every gate of APD on the TMS pentagon, and the mask that it should give, worked by numpy."""

import jax.numpy as jnp
import numpy as np
from conftest import make_method
from ml_collections import ConfigDict

from apd_jax import attributions, targets
from apd_jax.decomposition import Decomposition

TARGET = {
    **{"name": "tms", "num_features": 5, "d_hidden": 2, "hidden": "none"},
    **{"feature_probability": 0.3, "pretrain": {"batch_size": 1}},
}
THRESHOLDS = np.array([0.1, 0.2, 0.4, 0.6, 5.0])  # of mask = "learned"; the last is never reached

GATES = {
    "batch_topk": {"topk": 0.7},
    "topk": {"mask": "topk", "topk": 2.0},
    "threshold": {"mask": "threshold", "threshold": 0.3},
    "threshold_0": {"mask": "threshold", "threshold": 0.0},
    "learned": {"mask": "learned", "threshold": 0.3},
    "exact": {"mask": "exact"},
    "none": {"mask": "none"},
    "batch_topk_always_on": {"topk": 0.7, "num_always_on": 1},
    "learned_always_on": {"mask": "learned", "threshold": 0.3, "num_always_on": 2},
}


def decomposed(pentagon, name, batch_size=32):
    """(target, the true components with this gate)."""
    target = targets.build(ConfigDict(TARGET), batch_size)
    method = make_method(num_components=5, batch_size=batch_size, **GATES[name])
    gate = ()
    if method.mask == "learned":
        gate = {"log_thresholds": jnp.log(jnp.asarray(THRESHOLDS, jnp.float32))}
    problem = target.problem(pentagon.params)
    return target, Decomposition(problem, pentagon.components, method, gate=gate)


def attributions_of(pentagon, x):
    A = attributions.gradient(pentagon.apply_fn, pentagon.params, pentagon.components, x)
    return np.asarray(A)


def mask(name, A, x):
    """Which of the attributions [B, C] the gate keeps on the batch x."""
    fields = {"mask": "batch_topk", "num_always_on": 0, **GATES[name]}
    first = fields["num_always_on"]
    chosen, others = np.ones(A.shape, bool), A[:, first:]
    chosen[:, first:] = _chosen(fields, others, np.asarray(x), THRESHOLDS[first:])
    return chosen


def _chosen(fields, A, x, thresholds):
    kind = fields["mask"]
    if kind == "none":
        return np.ones(A.shape, bool)
    if kind == "threshold":
        return fields["threshold"] < A
    if kind == "learned":
        return thresholds < A
    if kind == "topk":
        return _largest(A, int(fields["topk"]))
    number = np.count_nonzero(x) if kind == "exact" else int(fields["topk"] * len(A))
    return _largest(A.reshape(1, -1), number).reshape(A.shape)


def _largest(rows, number):
    """The so many largest of every row; of equal ones the first."""
    places = np.argsort(np.argsort(-rows, axis=1, kind="stable"), axis=1)
    return places < number
