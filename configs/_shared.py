"""What config files share: the beginning of an experiment, its pretraining, its smallest form.

A config file is run by its path, so it loads this one by `_load("_shared")`'s few lines.
"""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from apd_jax.errors import one_of
from apd_jax.methods.registry import default_config

TARGETS = ("tms", "tms_coactive", "resid_mlp", "gated", "induction", "digits", "linear")


def load(name: str) -> ModuleType:
    """The config file of a target."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"apd_jax_config_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def begin(target: str, *, num_batches: int, batch_size: int, method: str = "apd") -> Any:
    """An experiment on a target, with a method's defaults; the sizes are the evaluation's."""
    config: Any = ConfigDict()
    config.seed = 0  # the run's; the three others follow it unless they are set themselves
    config.target = ConfigDict({"name": target})
    config.target.seed = config.get_oneway_ref("seed")
    config.target.weights_path = ""  # .npz or .safetensors to load instead of training
    config.apd = default_config(method)
    config.apd.seed = config.get_oneway_ref("seed")
    config.evaluation = ConfigDict()
    config.evaluation.seed = config.get_oneway_ref("seed")
    config.evaluation.num_batches = num_batches
    config.evaluation.batch_size = batch_size
    return config


def pretraining(
    num_steps: int, batch_size: int, learning_rate: float, **more: object
) -> ConfigDict:
    """How the target network is trained, by AdamW."""
    defaults = {"schedule": "cosine", "warmup_fraction": 0.0, "weight_decay": 0.01}
    sizes = {"num_steps": num_steps, "batch_size": batch_size, "learning_rate": learning_rate}
    return ConfigDict(sizes | defaults | more)


def smoke(config: Any, num_steps: int, batch_size: int, pretrain_steps: int = 0) -> None:
    """Every stage in seconds on a CPU; the result means nothing."""
    if pretrain_steps:
        config.target.pretrain.update(num_steps=pretrain_steps, batch_size=batch_size)
    config.apd.update(num_steps=num_steps, batch_size=batch_size)
    config.apd.update(steps_per_call=10, log_every_steps=10, checkpoint_every_steps=10)
    config.evaluation.num_batches = 2


def of_target(arg: str, method: str) -> tuple[Any, str]:
    """The target and evaluation of `arg` ("tms,40-10"), decomposed by a method with its defaults.

    Positions and distance are those of the target's own config. Unlocked, for a file to go on.

    Returns: the config, and the target's name.
    Raises:
      InputError: an unknown target, or what the target's own file refuses.
    """
    name, *rest = arg.split(",")
    one_of("target", name, TARGETS)
    base = load(name).get_config(*[",".join(rest)] if rest else [])
    config = begin(name, num_batches=2, batch_size=2, method=method)
    config.target = ConfigDict(base.target.to_dict())
    config.target.seed = config.get_oneway_ref("seed")
    config.apd.minimality_loss = base.apd.minimality_loss
    config.apd.mask_per = base.apd.mask_per
    config.evaluation.update({k: v for k, v in base.evaluation.items() if k != "seed"})
    return config, name
