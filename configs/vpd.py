"""VPD: a transformer as gate, Δ as a component, an adversary (Bushnaq et al. 2026); on toys.

    python -m apd_jax.main --config=configs/vpd.py:tms,40-10 --workdir=runs/vpd_tms
    python -m apd_jax.main --config=configs/vpd.py:resid_mlp,2layer,whole --workdir=runs/whole

Argument: the name of a target's file in configs/, then that file's own arguments, and
    whole    one number and one gate for pieces at every site (`apd_jax.methods.whole`)
    nested   the same with nested ranks and a price on them
    tied     (tms) encoder and decoder as one leaf; else as two
    smoke    every stage in seconds on a CPU; the result means nothing
Distances are in units of the outputs' variance. The adversary is fresh and shared over the batch,
since the examples of a toy do not come again. On TMS components are not warmed up on faithfulness
first: then many of them share every feature from the start, and p = 1 does not part them. The
settings of 5-2 find all features on three of four seeds; those of 40-10, with 200 components a
matrix, 36 of 40 on one, and all where they begin at what the recipe finds
(--config.apd.initial=found). ResidMLP was run with `nested` alone from random beginnings, far from
what is published: docs/results.md.
"""

from ml_collections import ConfigDict

from apd_jax.commands import configs

OWN = ("whole", "nested")


def get_config(arg: str = "tms,40-10") -> ConfigDict:
    """The experiment `arg`, e.g. "tms,5-2" or "resid_mlp,2layer,whole".

    Raises:
      InputError: an unknown target, or what the target's own file refuses.
    """
    variants = arg.split(",")
    whole = "whole" in variants or "nested" in variants
    own = (*OWN, "tied") if variants[0] == "tms" else OWN
    config, name = configs.of_target(arg, "whole" if whole else "vpd", own)
    target, apd = config.target, config.apd
    variance = 1.0
    if name == "tms":
        if "tied" not in variants:
            target.name = "tms_untied"
        F, p = target.num_features, target.feature_probability
        apd.num_components, variance = 40 if F <= 5 else 10 * F, p / 3 - p**2 / 4
    elif name == "resid_mlp":
        F, p = target.num_features, target.feature_probability
        apd.num_components, variance = round(1.3 * F), p * (5 / 6 if target.signed else 4 / 3)
    apd.update(learning_rate=3e-3, num_steps=5000, batch_size=1024, optimizer="adam")
    apd.update(faithfulness_coeff=1e4, faithfulness_warmup_steps=400, gradient_clip=None)
    apd.update(stochastic_coeff=0.5 / variance, adversarial_coeff=0.5 / variance)
    apd.update(importance_coeff=3e-2, importance_p=2.0, importance_p_final=0.7)
    apd.update(frequency_coeff=0.0, gate_kind="pieces")
    if name == "tms":
        apd.update(num_steps=20_000, batch_size=256, importance_p=1.0, importance_p_final=None)
        apd.importance_coeff = 0.5 / target.num_features
        apd.update(faithfulness_coeff=1 / variance, faithfulness_warmup_steps=0)
    apd.update(adversary="fresh", adversary_ascents=4, adversary_rate=0.05)
    apd.adversary_shared = "batch"
    if "nested" in variants:
        apd.update(rank=4, nested=True, trim_coeff=1e-3)
    if "smoke" in variants:
        configs.smoke(config, 20, 64)
        apd.faithfulness_warmup_steps = min(10, apd.faithfulness_warmup_steps)
    return config.lock()
