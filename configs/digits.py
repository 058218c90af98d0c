"""Digits: a small convolutional network on scikit-learn's 8 x 8 digits.

    python -m apd_jax.main --config=configs/digits.py --workdir=runs/digits

Argument: nothing, or
    smoke    every stage in seconds on a CPU; the result means nothing
No truth is known; components are compared with classes. About 20 s of CPU time for the target and
80 s for the decomposition.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

from ml_collections import ConfigDict

from apd_jax.errors import one_of

shared = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("_shared.py"))))

VARIANTS = ("smoke",)


def get_config(arg: str = "") -> ConfigDict:
    """The experiment `arg`: "" or "smoke".

    Raises:
      InputError: an unknown variant.
    """
    variants = {
        one_of("digits variant", variant, VARIANTS) for variant in arg.split(",") if variant
    }

    config = shared.begin("digits", num_batches=20, batch_size=256)
    config.target.split_seed = 0  # which images are test images
    config.target.channels = (8, 16)  # of the convolutions, each followed by pooling
    config.target.pretrain = shared.pretraining(2000, 128, 3e-3, warmup_fraction=0.05)

    config.apd.num_components = 20
    # With k = 1 one component comes to hold all that digits share, and nothing else lives.
    config.apd.topk = 2.0
    config.apd.attribution_metric = (
        "mse"  # in kl, images that the target is sure of hardly count in the mask of a whole batch
    )
    config.apd.minimality_loss = "kl"
    # Materialised kernels, one per image, make slow convolutions: 40 times the time on a CPU.
    config.apd.sparse_route = "masked"
    config.apd.faithfulness_coeff = 100.0  # weights are small beside a distance in nats
    config.apd.simplicity_coeff = 10.0
    config.apd.learning_rate = 3e-3
    config.apd.num_steps = 2500
    config.apd.batch_size = 128

    if "smoke" in variants:
        shared.smoke(config, 20, 32, pretrain_steps=20)
        config.evaluation.batch_size = 32
    return config.lock()
