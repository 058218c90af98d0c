"""The methods by name, and their settings as a config that the command line can change."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from ml_collections import config_dict

from apd_jax.errors import InputError, one_of
from apd_jax.methods.apd import APD
from apd_jax.methods.base import Method, allowed_types
from apd_jax.methods.spd import SPD
from apd_jax.methods.targeted import Targeted
from apd_jax.methods.vpd import VPD
from apd_jax.methods.whole import Whole

METHODS: dict[str, type[Method]] = {m.name: m for m in (APD, SPD, VPD, Whole, Targeted)}


def by_name(name: str) -> type[Method]:
    """The class of a method's settings.

    Raises:
      InputError: there is no such method.
    """
    return METHODS[one_of("method", name, METHODS)]


def settings(
    method: str | Method = "apd", cls: type[config_dict.ConfigDict] = config_dict.ConfigDict
) -> config_dict.ConfigDict:
    """A method's settings as a config: defaults, or those of a settings object.

    Locked, so that a mistyped field is an error; `method` names whose they are.
    """
    chosen = by_name(method)() if isinstance(method, str) else method
    config = cls({"method": chosen.name})
    for field, hint in type(chosen).hints().items():
        value = getattr(chosen, field)
        allowed = allowed_types(hint)
        if type(None) in allowed:  # a placeholder may be None, and knows the type of its value
            kind = int if int in allowed and float not in allowed else float
            config[field] = config_dict.placeholder(kind)
            if value is not None:
                config[field] = kind(value)
        elif float in allowed:
            config[field] = float(value)
        else:
            config[field] = value
    return config.lock()


def of(given: Any) -> Method:
    """A method's settings, from a settings object, a name, or a config as `settings` makes them.

    Raises:
      InputError: an unknown method or field, or a value of the wrong type.
    """
    if isinstance(given, Method):
        own = {field: getattr(given, field) for field in given.fields()}
        values = {field: _typed(field, own[field], hint) for field, hint in given.hints().items()}
        same = all(values[field] is own[field] for field in own)
        return given if same else dataclasses.replace(given, **values)
    if isinstance(given, str):
        return by_name(given)()
    if not isinstance(given, Mapping | config_dict.ConfigDict):
        raise InputError(
            "settings must be a method's name, a settings object or a config; got a "
            f"{type(given).__name__}."
        )
    values = dict(given.to_dict() if isinstance(given, config_dict.ConfigDict) else given)
    cls = by_name(values.pop("method", "apd"))
    hints = cls.hints()
    for field in values:
        one_of(f"setting of method {cls.name!r}", field, hints)
    return cls(**{field: _typed(field, value, hints[field]) for field, value in values.items()})


def _typed(field: str, value: Any, hint: Any) -> Any:
    """The value as the field's type; numpy scalars as plain ones.

    Raises:
      InputError: it is of another type.
    """
    allowed = tuple(typing.get_origin(kind) or kind for kind in allowed_types(hint))
    if not all(isinstance(kind, type) and kind is not Any for kind in allowed):
        return value  # of a method that is none of these: its own affair
    if isinstance(value, np.generic | np.ndarray | jax.Array) and not isinstance(value, Tracer):
        value = value.item() if np.ndim(value) == 0 else value
    if value is None and type(None) in allowed:
        return None
    if isinstance(value, bool) != (bool in allowed):
        pass
    elif tuple in allowed and isinstance(value, list):
        return tuple(value)  # JSON has no tuples
    elif float in allowed and isinstance(value, int | float):
        return float(value)
    elif isinstance(value, jax.Array) and value.ndim:
        pass  # of several numbers
    elif any(isinstance(value, kind) for kind in allowed):
        return value
    unsaid = (types.NoneType, jax.Array)  # what a user seldom means
    kinds = " or ".join(sorted(k.__name__ for k in allowed if k not in unsaid))
    raise InputError(f"{field} must be {kinds}; got {value!r}, a {type(value).__name__}.")
