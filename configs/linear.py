"""A d-dimensional linear map, or a block-diagonal one: one component each, however many are offered?

    python -m apd_jax.main --config=configs/linear.py --workdir=runs/linear                    one 8-dimensional map
    python -m apd_jax.main --config=configs/linear.py:4x3 --workdir=runs/blocks                4 blocks of 3 dimensions, used one at a time
    python -m apd_jax.main --config=configs/linear.py --workdir=runs/c16 --config.apd.num_components=16

Argument: NxS (N blocks of size S; 1xD is the plain map), then, after a comma
    smoke            every stage in seconds on a CPU; the result means nothing
The settings are the same for every number of components. Results: docs/networks.md.
"""

import re

from ml_collections import ConfigDict

from apd_jax.errors import InputError, one_of
from apd_jax.methods.registry import default_config


def get_config(arg: str = "1x8") -> ConfigDict:
    """The experiment `arg`, e.g. "1x8" or "4x3,smoke".

    Raises:
      InputError: an unknown variant, or two sizes.
    """
    variants = [variant for variant in arg.split(",") if variant]
    sizes = [variant for variant in variants if re.fullmatch(r"[1-9]\d*x[1-9]\d*", variant)]
    smoke = {
        one_of("linear variant (sizes NxS or a name)", v, ("1x8", "smoke"))
        for v in variants
        if v not in sizes
    }
    if len(sizes) > 1:
        raise InputError(f"linear variant {arg!r} names {' and '.join(sizes)}; give one of them.")
    num_blocks, block_size = map(int, (sizes or ["1x8"])[0].split("x"))

    config = ConfigDict()
    config.seed = 0  # the run's; the three below follow it unless they are set themselves

    config.target = ConfigDict()
    config.target.name = "linear"
    config.target.seed = config.get_oneway_ref("seed")
    config.target.weights_path = ""  # .npz or .safetensors to load instead of building
    config.target.num_blocks = num_blocks
    config.target.block_size = block_size

    config.apd = default_config()
    config.apd.seed = config.get_oneway_ref("seed")
    config.apd.num_components = 2 * num_blocks * block_size
    config.apd.topk = 1.0  # one map, or one block ...
    config.apd.mask = "topk"  # ... on every single input
    config.apd.init_scale = 0.3
    config.apd.num_steps = 3000
    config.apd.batch_size = 512
    config.apd.learning_rate = 3e-3
    config.apd.minimality_coeff = 1.0
    config.apd.simplicity_coeff = 0.1
    config.apd.schatten_p = 0.9

    config.evaluation = ConfigDict()
    config.evaluation.seed = config.get_oneway_ref("seed")
    config.evaluation.num_batches = 20
    config.evaluation.batch_size = 256

    if smoke:
        config.apd.num_steps = 40
        config.apd.batch_size = 64
        config.apd.steps_per_call = config.apd.log_every_steps = (
            config.apd.checkpoint_every_steps
        ) = 10
        config.evaluation.num_batches = 2
    return config.lock()
