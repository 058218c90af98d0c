"""The workdir of a run on a network of one's own, as a decomposition.

  target/params.safetensors   the network's params, written when the run begins
  target/structure.json       what leaves, containers and sites are; the function's name, as a hint

The rest is what every run leaves: config.json, settings.json, checkpoints, metrics.jsonl.
"""

from __future__ import annotations

import json
import logging
import operator
import sys
from typing import Any

import jax
from etils import epath
from jaxtyping import PyTree

from apd_jax.components import Components, path_name
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.methods.optimizers import Trained
from apd_jax.network.problem import Problem
from apd_jax.paths import quoted, user_path
from apd_jax.recipe import budget
from apd_jax.storage import structure, trees
from apd_jax.storage.arrays import decode, encode, sentence
from apd_jax.storage.structure import Functions
from apd_jax.train import checkpoint, loop
from apd_jax.train.progress import read_rows
from apd_jax.train.workdir import kept_settings, load_config, write_json

log = logging.getLogger(__name__)
_PARAMS, _STRUCTURE = "params.safetensors", "structure.json"


def keep(workdir: epath.PathLike, problem: Problem, components: Components) -> None:
    """Writes what `load` needs to know of the network, unless it is there.

    A network that no file can hold is left out, with a warning: the run itself does not need it.

    Args:
      components: those that the run begins with, or their shapes.
    """
    folder = user_path(workdir) / "target"
    if (folder / _STRUCTURE).exists():
        return
    about = structure.of(problem, components) | {"function": function_name(problem.apply_fn)}
    try:
        names = trees.names(problem.params, "params")
        arrays = encode(dict(zip(names, jax.tree.leaves(problem.params), strict=True)))
    except InputError as error:
        log.warning(
            "%s does not keep the network, and cannot be opened without this call: %s",
            workdir,
            error,
        )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _PARAMS).write_bytes(arrays)
        write_json(folder / _STRUCTURE, about)
    except OSError as error:
        raise InputError(
            f"workdir {workdir} cannot be written ({error.strerror}); choose another workdir."
        ) from None


def function_name(fn: Any) -> str:
    """module:name by which a function is found again; "" where it has none."""
    fn = getattr(fn, "fn", fn)  # as a problem wraps it
    module, name = getattr(fn, "__module__", None), getattr(fn, "__qualname__", "")
    try:
        found = operator.attrgetter(name)(sys.modules[module])
    except (KeyError, AttributeError):
        return ""
    return f"{module}:{name}" if found is fn and module != "__main__" else ""


def kept_function(workdir: epath.PathLike) -> str:
    """What the function of the run was called, or ""."""
    path = user_path(workdir) / "target" / _STRUCTURE
    return json.loads(path.read_text()).get("function", "") if path.exists() else ""


def load(
    workdir: epath.PathLike,
    functions: Functions,
    params: PyTree = None,
    *,
    until: int | None = None,
) -> tuple[int, Decomposition]:
    """The step of the newest readable checkpoint, and the decomposition that it holds.

    Args:
      params: as of `folder.load`.
      until: checkpoints of later steps are passed over.
    Raises:
      InputError: a run on a built-in target, no network or no checkpoint there.
    """
    folder = user_path(workdir)
    config = load_config(folder)
    if "target" in config:
        raise InputError(
            f"{folder} is a run of apd_jax.main on a target of its own; read it by python -m "
            f"apd_jax.main --mode=evaluate --workdir={quoted(folder)}."
        )
    about = _read_structure(folder)
    file = folder / "target" / _PARAMS
    params = structure.params(about, decode(file), params, file)
    recipe = budget.kept(config.recipe, folder) if "recipe" in config else None
    method = kept_settings(folder)
    _, step, state = checkpoint.read(folder / "checkpoints", until=until)
    where = folder / "checkpoints" / str(step)
    components = structure.components(about, _named(state["components"]["tree"]), params, where)
    problem = structure.problem(about, functions, params, components)
    gate = structure.gate_like(problem, method, components)
    if jax.tree.leaves(gate):
        gate = trees.like(gate, _named(state.get("gate")), folder, "the gate's arrays")
    trained = loop.finished(Trained(components, gate), method)
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["step"] <= step]
    return step, Decomposition(problem, trained.components, method, rows, recipe, trained.gate)


def _read_structure(folder: epath.Path) -> dict[str, Any]:
    path = folder / "target" / _STRUCTURE
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(
            f"{folder} does not keep its network, as runs of an earlier version did not; give the "
            "call of decompose that made it once more, which adds it."
        ) from None
    except ValueError as error:
        raise InputError(
            f"{path} is damaged ({sentence(error)}); delete it, and give the call of "
            "decompose that made it once more."
        ) from None


def _named(tree: Any) -> dict[str, Any]:
    """{dotted path: array} of a checkpoint read without its network."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): leaf for path, leaf in flat}
