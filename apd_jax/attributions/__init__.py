"""A_c(x): how much a component matters for an input.

`kinds` what is asked, `metric` how far outputs move; gradients by `tangents` (forward),
`jacobian` (reverse) or `through_gates` (probes, per position; activations too), `integrated` along
a path; `ablated` the real change. `groups` and `chunks` bound what is computed at once.
"""

from apd_jax.attributions.integrated import INTEGRATION_STEPS
from apd_jax.attributions.kinds import (
    KINDS,
    MODES,
    ablation,
    activation,
    gradient,
    integrated_gradient,
    squared,
)
from apd_jax.attributions.metric import METRICS, in_metric

__all__ = [
    "INTEGRATION_STEPS",
    "KINDS",
    "METRICS",
    "MODES",
    "ablation",
    "activation",
    "gradient",
    "in_metric",
    "integrated_gradient",
    "squared",
]
