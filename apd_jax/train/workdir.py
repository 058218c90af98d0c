"""A run's folder belongs to one config and one network: config.json and network.json say which."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from apd_jax.errors import InputError
from apd_jax.methods import registry
from apd_jax.paths import run_folder, user_path
from apd_jax.train import fingerprint

Config = Any  # a ConfigDict
_NETWORK = "network.json"
# With the machine that a run goes on, like the number of devices.
_MAY_CHANGE = ("num_component_shards",)


def claim(
    workdir: epath.PathLike, config: Config, network: Mapping[str, Any] | None = None
) -> None:
    """Makes the workdir with its config.json, or checks that it belongs to this very config.

    Args:
      network: what `fingerprint.of_problem` says of the network, where the config does not say it.
    Raises:
      InputError: it belongs to another config or network (what differs is named), or cannot be
        written.
    """
    folder = run_folder(workdir)
    wanted = json.loads(json.dumps(config.to_dict()))
    if (folder / "config.json").exists():
        there, here = flat(load_config(folder).to_dict()), flat(wanted)
        absent = "absent"
        new = _defaults(config)  # of settings that an older version did not have
        there |= {name: new[name] for name in here if name not in there and name in new}
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
        if network is not None:
            _same_network(folder, network)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if network is not None:
            _write(folder / _NETWORK, network)
        _write(folder / "config.json", wanted)
    except OSError as error:
        raise InputError(
            f"workdir {folder} cannot be written ({error.strerror}); choose another workdir."
        ) from None


def _same_network(folder: epath.Path, network: Mapping[str, Any]) -> None:
    path = folder / _NETWORK
    if not path.exists():  # of a version that did not write it
        return
    if changed := fingerprint.differences(json.loads(path.read_text()), network):
        raise InputError(
            f"workdir {folder} belongs to another network or other data: {', '.join(changed)} "
            f"{'differs' if len(changed) == 1 else 'differ'}. Use another workdir, or what it was "
            "started with."
        )


def _write(path: epath.Path, content: Any) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=2))
    unfinished.rename(path)


def _defaults(config: Config) -> dict[str, Any]:
    """The method's settings by their names in the config."""
    prefix, own = ("apd.", config.apd) if "apd" in config else ("", config)
    default = registry.default_config(own.get("method", "apd"))
    return {prefix + name: value for name, value in default.to_dict().items()}


def load_config(workdir: epath.PathLike) -> Config:
    """The config that a run was started with; no config file is executed.

    Raises:
      InputError: the folder is not a workdir, or its config.json is damaged.
    """
    path = user_path(workdir) / "config.json"
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
