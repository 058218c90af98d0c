"""Digits: a small convolutional network on scikit-learn's 8 x 8 digits. No truth is known; components are compared with classes.

    python -m apd_jax.main --config=configs/digits.py --workdir=runs/digits

Argument: nothing, or
    smoke    every stage in seconds on a CPU; the result means nothing
About 20 s of CPU time for the target and 80 s for the decomposition.
"""

from ml_collections import ConfigDict

from apd_jax.errors import one_of
from apd_jax.methods.registry import default_config

VARIANTS = ("smoke",)


def get_config(arg: str = "") -> ConfigDict:
    """The experiment `arg`: "" or "smoke".

    Raises:
      InputError: an unknown variant.
    """
    variants = {
        one_of("digits variant", variant, VARIANTS) for variant in arg.split(",") if variant
    }

    config = ConfigDict()
    config.seed = 0  # the run's; the three below follow it unless they are set themselves

    config.target = ConfigDict()
    config.target.name = "digits"
    config.target.seed = config.get_oneway_ref("seed")
    config.target.weights_path = ""  # .npz or .safetensors to load instead of training
    config.target.split_seed = 0  # which images are test images
    config.target.channels = (8, 16)  # of the convolutions, each followed by pooling
    config.target.pretrain = ConfigDict()
    config.target.pretrain.num_steps = 2000
    config.target.pretrain.batch_size = 128
    config.target.pretrain.learning_rate = 3e-3
    config.target.pretrain.schedule = "cosine"
    config.target.pretrain.warmup_fraction = 0.05
    config.target.pretrain.weight_decay = 0.01

    config.apd = default_config()
    config.apd.seed = config.get_oneway_ref("seed")
    config.apd.num_components = 20
    config.apd.topk = 2.0  # with 1, one component comes to hold everything that all digits share, and nothing else lives
    config.apd.attribution_metric = (
        "mse"  # in kl, images that the target is sure of hardly count in the mask of a whole batch
    )
    config.apd.minimality_loss = "kl"
    config.apd.sparse_route = "masked"  # materialised kernels, one per image, make slow convolutions: 40 times the time on a CPU
    config.apd.faithfulness_coeff = 100.0  # weights are small beside a distance in nats
    config.apd.simplicity_coeff = 10.0
    config.apd.learning_rate = 3e-3
    config.apd.num_steps = 2500
    config.apd.batch_size = 128

    config.evaluation = ConfigDict()
    config.evaluation.seed = config.get_oneway_ref("seed")
    config.evaluation.num_batches = 20
    config.evaluation.batch_size = 256

    if "smoke" in variants:
        config.target.pretrain.num_steps = 20
        config.target.pretrain.batch_size = 32
        config.apd.num_steps = 20
        config.apd.batch_size = 32
        config.apd.steps_per_call = config.apd.log_every_steps = (
            config.apd.checkpoint_every_steps
        ) = 10
        config.evaluation.num_batches = 2
        config.evaluation.batch_size = 32
    return config.lock()
