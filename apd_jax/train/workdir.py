"""A run's folder belongs to one config and one network: config.json and network.json say which."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from apd_jax.errors import InputError, listed
from apd_jax.losses import written
from apd_jax.methods import registry
from apd_jax.methods.base import Method
from apd_jax.paths import run_folder, user_path
from apd_jax.train import checkpoint, fingerprint, parallel

Config = Any  # a ConfigDict
_NETWORK, _STOPPED = "network.json", "stopped.json"
_SETTINGS = "settings.json"  # as training reads them: nothing left to the network
# With the machine that a run goes on, like the number of devices.
_MAY_CHANGE = ("num_component_shards",)
# How long a run is: with more steps it goes on from its last checkpoint.
_LENGTHS = ("num_steps", "apd.num_steps", "recipe.refine.num_steps")


def claim(
    workdir: epath.PathLike,
    config: Config,
    network: Mapping[str, Any] | None = None,
    older: Callable[[Config], Mapping[str, Any]] | None = None,
) -> None:
    """Makes the workdir with its config.json, or checks that it belongs to this very config.

    Only how long the run is may differ, as long as that lies not behind it: config.json then says
    the new number of steps.

    Args:
      network: what `fingerprint.of_problem` says of the network, where the config does not say it.
      older: the config of an older version -> {dotted name: value} of what it did not say, beside
        the method's settings.
    Raises:
      InputError: it belongs to another config or network (what differs is named), or cannot be
        written.
    """
    folder = run_folder(workdir)
    wanted = json.loads(json.dumps(config.to_dict(), default=written))
    if (folder / "config.json").exists():
        saved, absent = load_config(folder), "absent"
        there, here = flat(saved.to_dict()), flat(wanted)
        new = _defaults(config) | dict(older(saved) if older else {})  # that it did not have
        there |= {name: new[name] for name in here if name not in there and name in new}
        names = [name for name in sorted(there | here) if name.rsplit(".")[-1] not in _MAY_CHANGE]
        changed = [name for name in names if there.get(name, absent) != here.get(name, absent)]
        lengths = [n for n in changed if n in _LENGTHS and n in there and "sweep" not in wanted]
        if changed != lengths:
            whose = [name for name in changed if name in ("method", "apd.method", "target.name")]
            differences = listed(  # of another method (or target) nearly all settings differ
                (
                    f"{name} is {there.get(name, absent)!r} there and "
                    f"{here.get(name, absent)!r} here"
                    for name in whose or changed
                ),
                joint="; ",
            )
            raise InputError(
                f"workdir {folder} belongs to another config: {differences}. Use another workdir, "
                "or the config that it was started with."
            )
        if network is not None:
            _same_network(folder, network)
        for name in lengths:
            _not_behind(folder, name, here[name])
            write_json(folder / "config.json", wanted)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if network is not None:
            write_json(folder / _NETWORK, network)
        write_json(folder / "config.json", wanted)
    except OSError as error:
        raise InputError(
            f"workdir {folder} cannot be written ({error.strerror}); choose another workdir."
        ) from None


def _not_behind(folder: epath.Path, name: str, num_steps: int) -> None:
    reached = max(checkpoint.steps(folder / "checkpoints"), default=0)
    if num_steps < reached:
        raise InputError(
            f"workdir {folder} has come to step {reached} already, behind {name} = {num_steps}; "
            f"give at least {reached}, or another workdir."
        )


def keep_settings(workdir: epath.PathLike, method: Method) -> None:
    """Writes the settings that components are evaluated with; with a recipe of its last stage."""
    folder = user_path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _SETTINGS, method.to_dict())


def kept_settings(workdir: epath.PathLike) -> Method:
    """What `keep_settings` wrote.

    Raises:
      InputError: there is nothing.
    """
    path = user_path(workdir) / _SETTINGS
    if not path.exists():
        raise InputError(
            f"{path} is missing, which a run writes when it begins to train; give the call of "
            "decompose that made this workdir once more."
        )
    return registry.of(json.loads(path.read_text()))


def stopped(workdir: epath.PathLike, step: int, num_steps: int) -> None:
    """Says that the run of so many steps was ended at this one."""
    write_json(user_path(workdir) / _STOPPED, {"step": step, "num_steps": num_steps})


def stopped_at(workdir: epath.PathLike | None, num_steps: int) -> int:
    """The step at which the run of so many steps was ended before; -1 if it was not."""

    def read() -> int:
        if workdir is None or not (path := user_path(workdir) / _STOPPED).exists():
            return -1
        there = json.loads(path.read_text())
        return there["step"] if there["num_steps"] == num_steps else -1

    return int(parallel.from_primary(read, like=-1))


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


def write_json(path: epath.Path, content: Any) -> None:
    """A file that is there whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=2))
    unfinished.replace(path)


def _defaults(config: Config) -> dict[str, Any]:
    """The method's settings by their names in the config."""
    prefix, own = ("apd.", config.apd) if "apd" in config else ("", config)
    default = registry.settings(own.get("method", "apd"))
    found = {prefix + name: value for name, value in default.to_dict().items()}
    return found | {prefix + "loss_units": "absolute"}  # all that there was


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
            f"{workdir} holds no config.json; give the workdir of a run that was started, or a "
            "folder that decomposition.save wrote."
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
