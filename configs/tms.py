"""TMS, the toy model of superposition (APD, section 3.1): one component per feature.

    python -m apd_jax.main --config=configs/tms.py --workdir=runs/tms                 TMS 40-10, the paper's setting
    python -m apd_jax.main --config=configs/tms.py:5-2 --workdir=runs/tms_5-2         TMS 5-2, the paper's setting

Argument: sizes F-H (features, hidden dimensions), then, after commas and in any order
    id | rotation    a fixed identity, or a fixed random rotation, in the hidden space, decomposed too
    smoke            every stage in seconds on a CPU; the result means nothing
Reproduces: MMCS and ML2R of the APD paper's table. Minutes, devices and seeds: the README's table of results.
"""

import re

from ml_collections import ConfigDict

from apd_jax.errors import InputError, one_of
from apd_jax.methods.registry import default_config

MODIFIERS = {"id": "identity", "rotation": "rotation", "smoke": None}
SIZES = ("40-10", "5-2")  # any other F-H is derived from the first


def get_config(arg: str = "40-10") -> ConfigDict:
    """The experiment `arg`, e.g. "5-2" or "40-10,id,smoke".

    Raises:
      InputError: an unknown variant, two sizes, or two matrices for the hidden space.
    """
    variants = [variant for variant in arg.split(",") if variant]
    sizes = [variant for variant in variants if re.fullmatch(r"[1-9]\d*-[1-9]\d*", variant)]
    modifiers = {
        one_of("TMS variant (sizes F-H or a name)", variant, (*SIZES, *MODIFIERS))
        for variant in variants
        if variant not in sizes
    }
    hidden = sorted(modifiers - {"smoke"})
    if len(sizes) > 1 or len(hidden) > 1:
        raise InputError(
            f"TMS variant {arg!r} names {' and '.join(sizes if len(sizes) > 1 else hidden)}; give one of them."
        )
    F, H = map(int, (sizes or SIZES)[0].split("-"))

    config = ConfigDict()
    config.seed = 0  # the run's; the three below follow it unless they are set themselves

    config.target = ConfigDict()
    config.target.name = "tms"
    config.target.seed = config.get_oneway_ref("seed")
    config.target.weights_path = ""  # .npz or .safetensors to load instead of training
    config.target.num_features = F
    config.target.d_hidden = H
    config.target.hidden = MODIFIERS[hidden[0]] if hidden else "none"
    config.target.feature_probability = 0.05
    config.target.pretrain = ConfigDict()
    config.target.pretrain.num_steps = 5000 if F <= 5 else 2000
    config.target.pretrain.batch_size = 1024 if F <= 5 else 2048
    config.target.pretrain.learning_rate = 5e-3
    config.target.pretrain.schedule = "linear"  # as the released code; the paper says constant
    config.target.pretrain.warmup_fraction = 0.0
    config.target.pretrain.weight_decay = 0.01

    config.apd = default_config()
    config.apd.seed = config.get_oneway_ref("seed")
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
        # The paper's 40-10 (C = 50, k = 1) with components and active ones in proportion to the features.
        config.apd.num_components = max(2, round(1.25 * F))
        config.apd.topk = F / 40
        config.apd.learning_rate = 1e-3
        config.apd.schedule = "cosine"
        config.apd.minimality_coeff = 10.0
        config.apd.simplicity_coeff = 20.0
        config.apd.schatten_p = 0.9
    if hidden:
        # Our addition, no published setting: one component more for the hidden matrix, needed wherever any feature is active.
        config.apd.num_components += 1
        config.apd.topk += 1 - (1 - config.target.feature_probability) ** F

    config.evaluation = ConfigDict()
    config.evaluation.seed = config.get_oneway_ref("seed")
    config.evaluation.num_batches = 100
    config.evaluation.batch_size = 256

    if "smoke" in modifiers:
        config.target.pretrain.num_steps = 50
        config.target.pretrain.batch_size = 128
        config.apd.num_steps = 40
        config.apd.batch_size = 128
        config.apd.steps_per_call = config.apd.log_every_steps = (
            config.apd.checkpoint_every_steps
        ) = 10
        config.evaluation.num_batches = 2
        config.evaluation.batch_size = 64
    return config.lock()
