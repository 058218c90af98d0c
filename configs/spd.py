"""SPD: stochastic masks, and a small gate per component (Bushnaq et al. 2025).

    python -m apd_jax.main --config=configs/spd.py:tms,40-10 --workdir=runs/spd_tms
    python -m apd_jax.main --config=configs/spd.py:resid_mlp,2layer --workdir=runs/spd_resid_mlp

Argument: the name of a target's file in configs/, then that file's own arguments, and
    tied     (tms) encoder and decoder as one leaf; else as two, which the paper decomposes apart
    smoke    every stage in seconds on a CPU; the result means nothing
Not the paper's numbers: with those (batch 4096, rate 1e-3; 40-10 with p = 2) one of three seeds of
5-2 is recovered here, and 18 of 40 features of 40-10. A smaller batch, a higher rate, more pieces
and p = 1 reach fewer local minima in which two pieces share three features; on 40-10 some seeds
still miss a feature; begun at what the recipe finds (--config.apd.initial=found) none did. All
runs: docs/results.md.
"""

from ml_collections import ConfigDict

from apd_jax.commands import configs


def get_config(arg: str = "tms,40-10") -> ConfigDict:
    """The experiment `arg`, e.g. "tms,5-2" or "resid_mlp,2layer,smoke".

    Raises:
      InputError: an unknown target, or what the target's own file refuses.
    """
    variants = arg.split(",")
    config, name = configs.of_target(arg, "spd", ("tied",) if variants[0] == "tms" else ())
    target, apd = config.target, config.apd
    if name == "tms":
        small = target.num_features <= 5
        if "tied" not in variants:
            target.name = "tms_untied"
        apd.update(num_steps=20_000, batch_size=256, learning_rate=3e-3 if small else 6e-3)
        apd.num_components = 40 if small else 10 * target.num_features
        apd.importance_coeff = 3e-3 if small else 2e-4
        apd.importance_p = 1.0
    elif name == "resid_mlp":
        apd.update(num_steps=20_000, batch_size=256, learning_rate=3e-3, steps_per_call=10)
        apd.num_components = round(1.6 * target.num_layers * target.num_features)
        apd.importance_coeff, apd.importance_p = 1e-5, 1.0
    if "smoke" in variants:
        configs.smoke(config, 20, 64)
    return config.lock()
