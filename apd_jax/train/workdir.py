"""A run's folder belongs to one config, which stands in it as config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from apd_jax.errors import InputError

Config = Any  # a ConfigDict
# With the machine that a run goes on, like the number of devices.
_MAY_CHANGE = ("num_component_shards",)


def claim(workdir: epath.PathLike, config: Config) -> None:
    """Makes the workdir with its config.json, or checks that it belongs to this very config.

    Raises:
      InputError: it belongs to another config (the differing fields are named), or cannot be
        written.
    """
    folder = epath.Path(workdir)
    wanted = json.loads(json.dumps(config.to_dict()))
    if (folder / "config.json").exists():
        there, here = flat(load_config(folder).to_dict()), flat(wanted)
        absent = "absent"
        names = [name for name in sorted(there | here) if name.rsplit(".")[-1] not in _MAY_CHANGE]
        if changed := [name for name in names if there.get(name, absent) != here.get(name, absent)]:
            differences = "; ".join(
                f"{name} is {there.get(name, absent)!r} there and {here.get(name, absent)!r} here"
                for name in changed
            )
            raise InputError(
                f"workdir {folder} belongs to another config: {differences}. Use another workdir, "
                "or the config that it was started with."
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / ".config.json.unfinished"
        unfinished.write_text(json.dumps(wanted, indent=2))
        unfinished.rename(folder / "config.json")
    except OSError as error:
        raise InputError(
            f"workdir {folder} cannot be written ({error.strerror}); choose another workdir."
        ) from None


def load_config(workdir: epath.PathLike) -> Config:
    """The config that a run was started with; no config file is executed.

    Raises:
      InputError: the folder is not a workdir, or its config.json is damaged.
    """
    path = epath.Path(workdir) / "config.json"
    try:
        return ConfigDict(json.loads(path.read_text())).lock()
    except FileNotFoundError:
        raise InputError(
            f"{workdir} holds no config.json; give the workdir of a run that was started."
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is damaged ({error}); restore it, or start a new workdir."
        ) from None


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted name."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        inner = isinstance(value, Mapping)
        out |= flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return out
