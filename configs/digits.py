"""Digits: a small convolutional network on scikit-learn's 8 x 8 digits.

    python -m apd_jax.main --config=configs/digits.py --workdir=runs/digits

Argument: nothing, or
    smoke    every stage in seconds on a CPU; the result means nothing
No truth is known; components are compared with classes. About 20 s of CPU time for the target and
80 s for the decomposition.
"""

from ml_collections import ConfigDict

from apd_jax.commands import configs

VARIANTS = ("smoke",)


def get_config(arg: str = "") -> ConfigDict:
    """The experiment `arg`: "" or "smoke".

    Raises:
      InputError: an unknown variant.
    """
    variants, _ = configs.variants("digits", arg, VARIANTS)

    config = configs.begin("digits", num_batches=20, batch_size=256)
    config.target.split_seed = 0  # which images are test images
    config.target.channels = (8, 16)  # of the convolutions, each followed by pooling

    # In kl, images that the target is sure of hardly count in the mask of a whole batch.
    configs.on_logits(config)
    config.apd.num_components = 20
    # With k = 1 one component comes to hold all that digits share, and nothing else lives.
    config.apd.topk = 2.0
    # Materialised kernels, one per image, make slow convolutions: 40 times the time on a CPU.
    config.apd.sparse_route = "masked"

    if "smoke" in variants:
        configs.smoke(config, 20, 32, pretrain_steps=20, evaluation_size=32)
    return config.lock()
