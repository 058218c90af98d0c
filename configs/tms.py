"""TMS, the toy model of superposition (APD, section 3.1): one component per feature.

TMS 40-10 and 5-2, the paper's settings:

    python -m apd_jax.main --config=configs/tms.py --workdir=runs/tms
    python -m apd_jax.main --config=configs/tms.py:5-2 --workdir=runs/tms_5-2

Argument: sizes F-H (features, hidden dimensions), then, after commas and in any order
    id | rotation    a fixed identity, or a fixed random rotation, in the hidden space, decomposed
                     too
    untied           encoder and decoder as two leaves, as SPD's paper decomposes them
    smoke            every stage in seconds on a CPU; the result means nothing
Reproduces MMCS and ML2R of the APD paper's table. Minutes, devices and seeds: docs/results.md.
"""

from ml_collections import ConfigDict

from apd_jax.commands import configs

MODIFIERS = {"id": "identity", "rotation": "rotation", "untied": None, "smoke": None}
SIZES = ("40-10", "5-2")  # any other F-H is derived from the first


def get_config(arg: str = "40-10") -> ConfigDict:
    """The experiment `arg`, e.g. "5-2" or "40-10,id,smoke".

    Raises:
      InputError: an unknown variant, two sizes, or two matrices for the hidden space.
    """
    variants, sizes = configs.variants(
        "TMS", arg, (*SIZES, *MODIFIERS), size=r"[1-9]\d*-[1-9]\d*", form="F-H"
    )
    hidden = variants - {"smoke", "untied"}
    configs.at_most_one("TMS", arg, sizes, hidden)
    F, H = map(int, (sizes or SIZES)[0].split("-"))

    config = configs.begin("tms", num_batches=100, batch_size=256)
    if "untied" in variants:
        config.target.name = "tms_untied"
    config.target.num_features = F
    config.target.d_hidden = H
    config.target.hidden = MODIFIERS[min(hidden)] if hidden else "none"
    config.target.feature_probability = 0.05
    config.target.data = configs.feature_data(config.target)
    config.target.pretrain = configs.pretraining(
        5000 if F <= 5 else 2000, 1024 if F <= 5 else 2048, 5e-3, schedule="linear"
    )

    config.apd.rank = min(F, H) + 1
    config.apd.num_steps = 20_000
    config.apd.batch_size = 2048
    config.apd.warmup_fraction = 0.05
    if (F, H) == (5, 2):
        config.apd.num_components = 5
        config.apd.topk = 0.211
        config.apd.learning_rate = 0.03
        config.apd.schedule = "constant"
        config.apd.attributions_at = "components"  # this run of the paper only
        config.apd.minimality_coeff = 1.0
        config.apd.simplicity_coeff = 0.7
        config.apd.schatten_p = 1.0
    else:
        # The paper's 40-10 (C = 50, k = 1), with C and k in proportion to the features.
        config.apd.num_components = max(2, round(1.25 * F))
        config.apd.topk = F / 40
        config.apd.learning_rate = 1e-3
        config.apd.schedule = "cosine"
        config.apd.minimality_coeff = 10.0
        config.apd.simplicity_coeff = 20.0
        config.apd.schatten_p = 0.9
    if hidden:
        # Our addition, no published setting: one component more for the hidden matrix, needed
        # wherever any feature is active.
        config.apd.num_components += 1
        on = config.target.data.get_ref("feature_probability")
        config.apd.topk = config.apd.topk + 1 - (1 - on) ** F

    if "smoke" in variants:
        configs.smoke(config, 40, 128, pretrain_steps=50, evaluation_size=64)
    return config.lock()
