"""Target networks.

A new one is a file here with `build(config, batch_size) -> Target`, a line below and a config file.
"""

from __future__ import annotations

from etils import epath

from apd_jax.errors import one_of
from apd_jax.targets import (
    digits,
    gated,
    induction,
    language,
    linear,
    resid_mlp,
    tms,
    tms_coactive,
)
from apd_jax.targets.base import Config, Target

BUILDERS = {
    "digits": digits.build,
    "gated": gated.build,
    "induction": induction.build,
    "linear": linear.build,
    "resid_mlp": resid_mlp.build,
    "tms": tms.build,
    "tms_untied": tms.build_untied,
    "tms_coactive": tms_coactive.build,
}
# Those whose data are made once and kept in the run's folder: they take that folder too.
KEEPERS = {"language": language.build}


def build(config: Config, batch_size: int, folder: epath.Path | None = None) -> Target:
    """The target network that `config` (an experiment's `config.target`) describes.

    Args:
      batch_size: examples in a batch of `sample_fn`; pretraining has its own in `config.pretrain`.
      folder: of the run, where there is one.
    Raises:
      InputError: an unknown name, or a value that the named target refuses.
    """
    name = one_of("target.name", config.name, BUILDERS | KEEPERS)
    if name in KEEPERS:
        return KEEPERS[name](config, batch_size, folder)
    return BUILDERS[name](config, batch_size)
