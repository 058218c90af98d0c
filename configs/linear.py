"""A d-dimensional linear map, or a block-diagonal one: one component each, however many there are?

One 8-dimensional map, 4 blocks of 3 dimensions that are used one at a time, and more components:

    python -m apd_jax.main --config=configs/linear.py --workdir=runs/linear
    python -m apd_jax.main --config=configs/linear.py:4x3 --workdir=runs/blocks
    python -m apd_jax.main --config=configs/linear.py --config.apd.num_components=16

Argument: NxS (N blocks of size S; 1xD is the plain map), then, after a comma
    smoke            every stage in seconds on a CPU; the result means nothing
The settings are the same for every number of components. Results: docs/networks.md.
"""

from ml_collections import ConfigDict

from apd_jax.commands import configs


def get_config(arg: str = "1x8") -> ConfigDict:
    """The experiment `arg`, e.g. "1x8" or "4x3,smoke".

    Raises:
      InputError: an unknown variant, or two sizes.
    """
    variants, sizes = configs.variants(
        "linear", arg, ("1x8", "smoke"), size=r"[1-9]\d*x[1-9]\d*", form="NxS"
    )
    configs.at_most_one("linear", arg, sizes)
    num_blocks, block_size = map(int, (sizes or ["1x8"])[0].split("x"))

    config = configs.begin("linear", num_batches=20, batch_size=256)
    config.target.num_blocks = num_blocks
    config.target.block_size = block_size

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

    if "smoke" in variants:
        configs.smoke(config, 40, 64)
    return config.lock()
