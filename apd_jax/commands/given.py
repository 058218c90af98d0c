"""A network of one's own at the command line: its function and data, by name or by file."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import operator
import os
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from absl import flags
from jaxtyping import PyTree

from apd_jax.errors import InputError, first_line
from apd_jax.network import data
from apd_jax.paths import user_path

NAMES = ("apply", "data", "params", "valid")


@dataclasses.dataclass(frozen=True)
class Given:
    """What the flags say, each module:name or FILE.py:name; "" where they say nothing.

    data may also be an .npy or .npz file. See `define_flags`.
    """

    apply: str = ""
    data: str = ""
    params: str = ""
    valid: str = ""

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def named(self, flag: str) -> Any:
        """The object that a flag names; None where it says nothing.

        Raises:
          InputError: no such module or name, or the module cannot be imported.
        """
        text = getattr(self, flag)
        return named(text, f"--{flag}") if text else None

    def function(self, flag: str) -> Callable | None:
        found = self.named(flag)
        if found is not None and not callable(found):
            raise InputError(
                f"--{flag}={getattr(self, flag)} is a {type(found).__name__}; give a function."
            )
        return found

    def like(self) -> PyTree:
        """Params, for their structure: a pytree, or a function without arguments that gives one."""
        found = self.named("params")
        return found() if callable(found) else found

    def source(self, batch_size: int) -> Any:
        """The data, as `apd_jax.decompose` takes it: arrays in batches of at most this size."""
        if not self.data:
            return None
        is_file = Path(self.data).suffix in (".npy", ".npz")
        found = _arrays(self.data) if is_file else self.named("data")
        if data.holds_examples(found):
            size = min(leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(found))
            return data.from_arrays(found, min(batch_size, size))
        return found


def define_flags() -> Callable[[], Given]:
    """The flags of a network of one's own; the result reads them."""
    where = "module:name or FILE.py:name, from the current folder too"
    holders = [
        flags.DEFINE_string(
            "apply", "", f"Of a network of your own: its function apply_fn(params, x); {where}."
        ),
        flags.DEFINE_string(
            "data",
            "",
            "Of a network of your own: its inputs: an .npy file [examples, ...], an .npz file (a "
            "dict of such arrays, or the only one in it), or the name of what decompose takes as "
            f"sample_fn, or of arrays; {where}.",
        ),
        flags.DEFINE_string(
            "params",
            "",
            "Of a network whose params are no nested dicts, lists and tuples: a pytree like them, "
            f"or a function that gives one; {where}.",
        ),
        flags.DEFINE_string(
            "valid", "", f"Of a network of your own with padding: its valid_fn(x); {where}."
        ),
    ]
    return lambda: Given(*(holder.value for holder in holders))


def named(text: str, what: str) -> Any:
    """The object module:name or FILE.py:name.

    Raises:
      InputError: see `Given.named`.
    """
    module, _, name = text.rpartition(":")
    if not module or not name:
        raise InputError(
            f"{what} must be module:name, e.g. {what}=my_networks:forward; got {text!r}."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = _of_file(module, what) if module.endswith(".py") else pkgutil.resolve_name(module)
    except InputError:
        raise
    except Exception as error:  # whatever the module does when it is imported
        missing = isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]
        why = "there is no such module" if missing else f"it fails with {first_line(error)}"
        raise InputError(
            f"{what}: {module} cannot be imported from {os.getcwd()}: {why}."
        ) from error
    try:
        return operator.attrgetter(name)(found)
    except AttributeError:
        near = difflib.get_close_matches(name, vars(found), n=1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"{what}: {module} has no {name!r}.{meant}") from None


def _of_file(name: str, what: str) -> ModuleType:
    file = user_path(name)
    if not file.exists():
        raise InputError(f"{what}: there is no file {name}.")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _arrays(file: str) -> Any:
    """What an .npy or .npz file holds: one array, or a dict of several."""
    try:
        with user_path(file).open("rb") as opened:
            found = np.load(opened, allow_pickle=False)
            arrays = found if isinstance(found, np.ndarray) else dict(found)
    except Exception as error:  # of two formats: zip, header, dtype, system
        raise InputError(f"--data={file} cannot be read: {first_line(error)}.") from error
    if isinstance(arrays, dict) and len(arrays) == 1:
        return next(iter(arrays.values()))
    return arrays
