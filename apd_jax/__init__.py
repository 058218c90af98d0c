"""Parameter decomposition in JAX: splits a trained network's parameters into components."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from apd_jax import attributions, components, decomposition, losses, masks, sparse
from apd_jax.call import decompose, suggest
from apd_jax.components import Components
from apd_jax.decomposition import Decomposition
from apd_jax.methods.apd import APD
from apd_jax.methods.meanings import default_config, explain
from apd_jax.methods.spd import SPD
from apd_jax.methods.targeted import Targeted
from apd_jax.methods.vpd import VPD
from apd_jax.methods.whole import Whole
from apd_jax.network import data
from apd_jax.network.headed import Headed
from apd_jax.recipe.numbers import default_recipe
from apd_jax.train.progress import log_to_wandb

__version__ = "0.1.0"


def _opened(module: str, name: str) -> Callable[..., Any]:
    """A function of a room that is only opened when it is called: it may take seconds to import."""

    def call(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **options)

    call.__doc__ = f"See `{module}.{name}`."
    return call


save = _opened("apd_jax.storage.folder", "save")
load = _opened("apd_jax.storage.folder", "load")
contrast = _opened("apd_jax.recipe.contrast", "contrast")
from_pretrained = _opened("apd_jax.storage.hub", "from_pretrained")
push_to_hub = _opened("apd_jax.storage.hub", "push_to_hub")
decomposition.register(
    save=save,
    load=load,
    push_to_hub=push_to_hub,
    keep=_opened("apd_jax.storage.workdirs", "keep"),
    report=_opened("apd_jax.report.html", "report"),
    text_report=_opened("apd_jax.report.text", "report"),
    evidence=_opened("apd_jax.evidence", "evidence"),
    html=_opened("apd_jax.report.inline", "html"),
)

__all__ = [
    "APD",
    "SPD",
    "VPD",
    "Components",
    "Decomposition",
    "Headed",
    "Targeted",
    "Whole",
    "attributions",
    "components",
    "contrast",
    "data",
    "decompose",
    "default_config",
    "default_recipe",
    "explain",
    "from_pretrained",
    "load",
    "log_to_wandb",
    "losses",
    "masks",
    "push_to_hub",
    "save",
    "sparse",
    "suggest",
]
