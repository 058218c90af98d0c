"""What the configs of methods share: an experiment with the target network of another config file."""

import importlib.util
from pathlib import Path
from types import ModuleType

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


def experiment(arg: str, method: str) -> tuple[ConfigDict, str]:
    """The target and evaluation of `arg` ("tms,40-10"), decomposed by a method with its defaults.

    Positions and distance are those of the target's own config. Unlocked, for a file to go on.

    Returns: the config, and the target's name.
    Raises:
      InputError: an unknown target, or what the target's own file refuses.
    """
    name, *rest = arg.split(",")
    one_of("target", name, TARGETS)
    base = load(name).get_config(*[",".join(rest)] if rest else [])
    config = ConfigDict()
    config.seed = 0  # the run's; the others follow it unless they are set themselves
    config.target = ConfigDict(base.target.to_dict())
    config.target.seed = config.get_oneway_ref("seed")
    config.apd = default_config(method)
    config.apd.seed = config.get_oneway_ref("seed")
    config.apd.minimality_loss = base.apd.minimality_loss
    config.apd.mask_per = base.apd.mask_per
    config.evaluation = ConfigDict(base.evaluation.to_dict())
    config.evaluation.seed = config.get_oneway_ref("seed")
    return config, name


def smoke(config: ConfigDict) -> None:
    """Every stage in seconds on a CPU; the result means nothing."""
    config.apd.update(num_steps=20, batch_size=64)
    config.apd.update(steps_per_call=10, log_every_steps=10, checkpoint_every_steps=10)
