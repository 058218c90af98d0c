"""Induction: an attention-only transformer of two layers that continues a repeated block of tokens.

    python -m apd_jax.main --config=configs/induction.py --workdir=runs/induction

Argument: nothing, or one or both of
    position   masks per position: every token chooses its own components, so that the steps of one
               head can be told apart
    smoke      every stage in seconds on a CPU; the result means nothing
About 45 s of CPU time for the target and 150 s for the decomposition.
"""

from ml_collections import ConfigDict

from apd_jax.commands import configs

VARIANTS = ("position", "smoke")


def get_config(arg: str = "") -> ConfigDict:
    """The experiment `arg`, e.g. "position" or "position,smoke".

    Raises:
      InputError: an unknown variant.
    """
    variants, _ = configs.variants("induction", arg, VARIANTS)

    config = configs.begin("induction", num_batches=20, batch_size=256)
    config.target.num_symbols = 16
    config.target.min_block = 5
    config.target.max_block = 8
    config.target.repeat_probability = 0.5  # of sequences in which induction has something to do
    config.target.d_model = 48
    config.target.num_heads = 1
    config.target.d_head = 48

    configs.on_logits(config)
    config.target.pretrain.batch_size = 256
    config.apd.num_components = 8
    config.apd.topk = config.target.repeat_probability  # sequences that need anything, on average
    if "position" in variants:
        # The lowest error of five settings (k from 0.5 to 2, simplicity 10 to 100, rank 8 or full),
        # judged without the two heads.
        config.apd.mask_per = "position"
        config.apd.attribution_mode = (
            "probe"  # exact attributions take a backward pass for each of the 272 outputs
        )
        config.apd.num_probes = 4
        config.apd.topk = 1.5  # per position
        config.apd.faithfulness_coeff = 1000.0
        config.apd.simplicity_coeff = 30.0
        config.apd.num_steps = 1500
        config.apd.batch_size = 64

    if "smoke" in variants:
        configs.smoke(config, 20, 32, pretrain_steps=20, evaluation_size=32)
    return config.lock()
