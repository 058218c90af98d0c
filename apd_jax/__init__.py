"""Parameter decomposition in JAX: splits a trained network's parameters into components."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from apd_jax import attributions, components, decomposition, losses, masks, sparse
from apd_jax.components import Components
from apd_jax.decomposition import Decomposition, decompose
from apd_jax.methods.apd import APD
from apd_jax.methods.registry import default_config
from apd_jax.methods.spd import SPD
from apd_jax.methods.targeted import Targeted
from apd_jax.methods.vpd import VPD
from apd_jax.methods.whole import Whole
from apd_jax.network import data
from apd_jax.recipe.numbers import default_recipe


def _opened(module: str, name: str) -> Callable[..., Any]:
    """A function of a room that is only opened when it is called: it may take seconds to import."""

    def call(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **options)

    call.__doc__ = f"See `{module}.{name}`."
    return call


save = _opened("apd_jax.storage.folder", "save")
load = _opened("apd_jax.storage.folder", "load")
decomposition.register(
    save=save,
    load=load,
    report=_opened("apd_jax.report.html", "report"),
    evidence=_opened("apd_jax.evidence", "evidence"),
)

__all__ = [
    "APD",
    "SPD",
    "VPD",
    "Components",
    "Decomposition",
    "Targeted",
    "Whole",
    "attributions",
    "components",
    "data",
    "decompose",
    "default_config",
    "default_recipe",
    "load",
    "losses",
    "masks",
    "save",
    "sparse",
]
