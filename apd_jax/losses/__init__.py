"""The losses, each a scalar function of arrays; all sums are taken in single precision or better.

`reconstruction` how far components or a sparse pass are from the target, `sparsity` what active
components, their ranks and their gates cost. N = entries of the decomposed matrices, a tied one
counted as often as it is used (`Components.num_params`): the released code of APD normalises so,
and the papers' coefficients assume it.
"""

from apd_jax.losses.reconstruction import (
    DISTANCES,
    Distance,
    best_constant,
    counted,
    faithfulness,
    hidden_reconstruction,
    known,
    minimality,
    next_tokens,
    relative_faithfulness,
    single,
    weighted,
    written,
)
from apd_jax.losses.sparsity import (
    attribution_lp,
    frequency,
    importance,
    of_rows,
    simplicity,
    smooth_l0,
    trim,
)

__all__ = [
    "DISTANCES",
    "Distance",
    "attribution_lp",
    "best_constant",
    "counted",
    "faithfulness",
    "frequency",
    "hidden_reconstruction",
    "importance",
    "known",
    "minimality",
    "next_tokens",
    "of_rows",
    "relative_faithfulness",
    "simplicity",
    "single",
    "smooth_l0",
    "trim",
    "weighted",
    "written",
]
