"""SPD: stochastic masks, and a small gate per component (Bushnaq et al. 2025).

    python -m apd_jax.main --config=configs/spd.py:tms,40-10 --workdir=runs/spd_tms
    python -m apd_jax.main --config=configs/spd.py:resid_mlp,2layer --workdir=runs/spd_resid_mlp

Argument: the name of a target's file in configs/, then that file's own arguments, and
    tied     (tms) encoder and decoder as one leaf; else as two, which the paper decomposes apart
    smoke    every stage in seconds on a CPU; the result means nothing
C, importance, its power and the learning rate are the paper's; steps and batch are fewer where a
run would take more than minutes on two cores. Results: docs/results.md.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

from ml_collections import ConfigDict

shared = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("_shared.py"))))


def get_config(arg: str = "tms,40-10") -> ConfigDict:
    """The experiment `arg`, e.g. "tms,5-2" or "resid_mlp,2layer,smoke".

    Raises:
      InputError: an unknown target, or what the target's own file refuses.
    """
    variants = [variant for variant in arg.split(",") if variant != "tied"]
    config, name = shared.of_target(",".join(variants), "spd")
    target, apd = config.target, config.apd
    if name == "tms":
        small = target.num_features <= 5
        if "tied" not in arg.split(","):
            target.name = "tms_untied"
        apd.update(num_steps=30_000 if small else 20_000, batch_size=4096 if small else 2048)
        apd.num_components = 20 if small else 5 * target.num_features
        apd.importance_coeff = 3e-3 if small else 1e-4
        apd.importance_p = 1.0 if small else 2.0
    elif name == "resid_mlp":
        apd.num_components = (1 if target.num_layers == 1 else 2) * target.num_features
        apd.learning_rate = 2e-3
        apd.importance_coeff, apd.importance_p = 1e-5, 2.0
        apd.update(num_steps=6000, batch_size=2048, steps_per_call=10)
    if "smoke" in variants:
        shared.smoke(config, 20, 64)
    return config.lock()
