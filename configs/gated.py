"""Hand-coded gated functions (APD, appendix B): one component per function, across two layers.

The paper's network and setting, and ten seeds side by side in minutes on a CPU:

    python -m apd_jax.main --config=configs/gated.py --workdir=runs/gated
    python -m apd_jax.main --config=configs/gated.py:short --workdir=runs/gated_short

Argument: paper (the default) | short, then, after commas and in any order
    bias | weights   how a neuron is shut while its bit is off (apd_jax/targets/gated.py); paper
                     has bias, short has weights
    smoke            every stage in seconds on a CPU; the result means nothing
The paper shows one run, picked out of many, and only approximately right. Here `success` in
evaluation.json is the share of the instances that find all functions, a rate over seeds;
`instances` lists them one by one.
"""

from ml_collections import ConfigDict

from apd_jax.commands import configs

SETTINGS = ("paper", "short")
GATES = ("bias", "weights")


def get_config(arg: str = "paper") -> ConfigDict:
    """The experiment `arg`, e.g. "short" or "paper,weights,smoke".

    Raises:
      InputError: an unknown variant, two settings, or two gates.
    """
    variants, _ = configs.variants("gated", arg, (*SETTINGS, *GATES, "smoke"))
    gates = variants & set(GATES)
    configs.at_most_one("gated", arg, variants & set(SETTINGS), gates)
    short = "short" in variants

    config = configs.begin("gated", num_batches=20, batch_size=1000)
    config.target.num_functions = 4
    config.target.neurons_per_function = 10
    config.target.num_layers = 2
    config.target.gate = gates.pop() if gates else "weights" if short else "bias"
    config.target.bit_probability = 0.05

    config.apd.num_components = 4
    config.apd.topk = 0.2217
    config.apd.schatten_p = 1.0
    config.apd.minimality_coeff = 5.0
    config.apd.simplicity_coeff = 5.0
    config.apd.attribution_mode = "forward"  # faster here, with one output; the result is the same
    config.apd.sparse_route = "dispatch"
    if short:
        # Picked by the lowest total loss, not by the truth.
        config.apd.faithfulness_coeff = 1.0
        config.apd.attributions_at = "components"
        config.apd.num_instances = 10
        config.apd.num_steps = 6000
        config.apd.batch_size = 256
        config.apd.learning_rate = 0.03
        config.apd.warmup_fraction = 0.004
    else:
        config.apd.faithfulness_coeff = 0.1
        config.apd.num_steps = 200_000
        config.apd.batch_size = 10_000
        config.apd.learning_rate = 3e-3
        config.apd.warmup_fraction = 0.004
        config.apd.checkpoint_every_steps = 10_000

    if "smoke" in variants:
        configs.smoke(config, 40, 64, evaluation_size=64)
        config.apd.num_instances = 1
    return config.lock()
