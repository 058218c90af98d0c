"""What config files share: how an experiment begins, its pretraining, its smallest form.

A config file is plain Python with a function `get_config(arg)`, run by its path. Those that come
with the package are found as `configs/NAME.py` from any folder.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from apd_jax.errors import InputError, UnknownName, one_of
from apd_jax.methods import registry
from apd_jax.recipe.numbers import default_recipe

TARGETS = ("tms", "tms_coactive", "resid_mlp", "gated", "induction", "digits", "linear")
FILES = {"tms_untied": "tms"}  # targets that another's file describes
# A wheel has them in the package; in a checkout they are the folder beside it.
_PACKAGE = Path(__file__).parents[1]
SHIPPED = next(f for f in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if f.is_dir())


log = logging.getLogger(__name__)


def found(path: str) -> str:
    """`path` ("configs/tms.py:5-2") if it is a file here; else the shipped one of that name."""
    file, colon, arg = path.partition(":")
    ours = SHIPPED / file.removeprefix("configs/")
    if file.startswith("configs/") and not Path(file).exists() and ours.exists():
        return f"{ours}{colon}{arg}"
    return path


def load(name: str) -> ModuleType:
    """The config file of a target."""
    spec = importlib.util.spec_from_file_location(f"apd_jax_config_{name}", SHIPPED / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def variants(
    what: str, arg: str, known: Collection[str], *, size: str = "", form: str = ""
) -> tuple[set[str], list[str]]:
    """The names and the sizes that an argument lists: "5-2,id,smoke" -> {"id", "smoke"}, ["5-2"].

    Args:
      what: of which target, for the sentence.
      size: regular expression of a size; none where it is empty. form: how it is written, "F-H".
    Raises:
      InputError: an unknown name.
    """
    given = [variant for variant in arg.split(",") if variant]
    sizes = [variant for variant in given if size and re.fullmatch(size, variant)]
    kind = f"{what} variant" + (f" (sizes {form} or a name)" if form else "")
    return {one_of(kind, variant, known) for variant in given if variant not in sizes}, sizes


def at_most_one(what: str, arg: str, *choices: Iterable[str]) -> None:
    """Refuses an argument that names two of one choice.

    Raises:
      InputError: it does.
    """
    for names in map(sorted, choices):
        if len(names) > 1:
            raise InputError(
                f"{what} variant {arg!r} names {' and '.join(names)}; give one of them."
            )


def begin(target: str, *, num_batches: int, batch_size: int, method: str = "apd") -> Any:
    """An experiment on a target, with a method's defaults; the sizes are the evaluation's."""
    config: Any = ConfigDict()
    config.seed = 0  # the run's; the three others follow it unless they are set themselves
    config.target = ConfigDict({"name": target})
    config.target.seed = config.get_oneway_ref("seed")
    config.target.weights_path = ""  # .npz or .safetensors to load instead of training
    config.apd = registry.settings(method)
    config.apd.seed = config.get_oneway_ref("seed")
    config.apd.loss_units = "absolute"  # as the papers' coefficients are
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


def feature_data(target: Any) -> ConfigDict:
    """The data that components are found on: what the target is trained on, where not changed.

    The fields are options of `targets.base.feature_sampler`; the probability follows the target's.
    """
    options = {"value": "uniform", "num_on": 0, "frequency_ratio": 1.0}
    return ConfigDict(
        {"feature_probability": target.get_oneway_ref("feature_probability")} | options
    )


def on_logits(config: Any) -> None:
    """APD where outputs are logits: distances in nats, beside which weights are small."""
    config.target.pretrain = pretraining(2000, 128, 3e-3, warmup_fraction=0.05)
    config.apd.update(attribution_metric="mse", minimality_loss="kl")
    config.apd.update(faithfulness_coeff=100.0, simplicity_coeff=10.0, learning_rate=3e-3)
    config.apd.update(num_steps=2500, batch_size=128)


def smoke(
    config: Any,
    num_steps: int,
    batch_size: int,
    *,
    pretrain_steps: int = 0,
    evaluation_size: int = 0,
) -> None:
    """Every stage in seconds on a CPU; the result means nothing. 0: there is none, as it is."""
    if pretrain_steps:
        config.target.pretrain.update(num_steps=pretrain_steps, batch_size=batch_size)
    config.apd.update(num_steps=num_steps, batch_size=batch_size)
    config.apd.update(steps_per_call=10, log_every_steps=10, checkpoint_every_steps=10)
    config.evaluation.num_batches = 2
    if evaluation_size:
        config.evaluation.batch_size = evaluation_size


def target_config(name: str, variants: Iterable[str], also: Collection[str] = ()) -> Any:
    """The experiment of a target's own file.

    Args:
      also: what the asking file takes itself, to be named beside what the target's takes.
    Raises:
      InputError: an unknown variant, or what the target's own file refuses.
    """
    joined = ",".join(variants)
    try:
        return load(name).get_config(*[joined] if joined else [])
    except UnknownName as error:
        raise UnknownName.of(error.what, error.value, (*error.known, *also)) from None


def of_target(arg: str, method: str, also: Collection[str] = ()) -> tuple[Any, str]:
    """The target and evaluation of `arg` ("tms,40-10"), decomposed by a method with its defaults.

    Positions and distance are those of the target's own config. Unlocked, for a file to go on.

    Args:
      also: variants that are the asking file's own.
    Returns: the config, and the target's name.
    Raises:
      InputError: an unknown target, or what the target's own file refuses.
    """
    name, *rest = arg.split(",")
    one_of("target", name, TARGETS)
    base = target_config(name, [variant for variant in rest if variant not in also], also)
    config = begin(name, num_batches=2, batch_size=2, method=method)
    config.target = ConfigDict(base.target)  # with what follows another field
    config.target.seed = config.get_oneway_ref("seed")
    config.apd.minimality_loss = base.apd.minimality_loss
    config.apd.mask_per = base.apd.mask_per
    config.evaluation.update({k: v for k, v in base.evaluation.items() if k != "seed"})
    return config, name


def later(config: Any) -> dict[str, Any]:
    """{dotted name: default} of the fields that a saved experiment lacks, as they came later.

    Of its target and evaluation as the target's own file has them without a variant, of a recipe
    as `default_recipe` has them. The method's settings know their defaults themselves
    (`registry.of`). A section that it lacks whole is left out: not every variant has it. So is one
    that is damaged, for its reader to say.
    """
    if "name" not in _section(config, "target"):
        return {}
    file = FILES.get(config.target.name, config.target.name)
    shipped = (SHIPPED / f"{file}.py").exists()
    now = {"recipe": default_recipe()} | (dict(load(file).get_config()) if shipped else {})
    return {
        f"{section}.{name}": list(value) if isinstance(value, tuple) else value  # as JSON has it
        for section in ("target", "evaluation", "recipe")
        if section in now and _section(config, section)
        for name, value in _absent(now[section], config[section])
    }


def _section(config: Any, name: str) -> Any:
    """A part of a config; nothing where it is none."""
    here = name in config and isinstance(config[name], ConfigDict)
    return config[name] if here else {}


def completed(config: Any) -> Any:
    """A saved experiment's config with what is `later`, which is said."""
    added = later(config)
    if not added:
        return config
    whole: Any = ConfigDict(config.to_dict())
    for name, value in added.items():
        *sections, field = name.split(".")
        inner: Any = whole
        for section in sections:
            inner = inner[section]
        inner[field] = value
    told = ", ".join(f"{name} = {value!r}" for name, value in added.items())
    log.info("config.json lacks what came later; by default: %s.", told)
    return whole.lock()


def _absent(now: Any, there: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of fields of one config that another lacks, sections apart."""
    for name, value in now.items():
        inner = isinstance(value, ConfigDict)
        if name in there and inner and isinstance(there[name], ConfigDict):
            yield from _absent(value, there[name], f"{prefix}{name}.")
        elif name not in there and not inner:
            yield prefix + name, value
