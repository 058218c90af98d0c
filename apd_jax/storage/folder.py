"""A decomposition as a folder: what was found, without the data and the checkpoints of the search.

  params.safetensors       all of the target's params, by dotted path (`params.Dense_0.kernel`)
  components.safetensors   the factors of every site (`params.Dense_0.kernel.U` [n, d_in, m], `.V`)
  gate.safetensors         the arrays of a learned gate, by dotted path; absent without one
  README.md                a card for a model hub
  decomposition.json       what the leaves and containers are, the settings, the logged rows;
                           written last

No pickle. The folder may lie on cloud storage (gs://). The network's function is code, which `load`
is given.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import PyTree
from ml_collections import ConfigDict

from apd_jax import decomposition as decomposition_lib
from apd_jax.components import Components
from apd_jax.errors import InputError
from apd_jax.methods import registry
from apd_jax.methods.base import Method
from apd_jax.network.problem import Problem
from apd_jax.paths import user_path
from apd_jax.storage import card, structure, trees, workdirs
from apd_jax.storage.arrays import decode, encode, sentence
from apd_jax.storage.structure import Functions
from apd_jax.train import parallel

FORMAT = 2  # raised with every change after which older versions would misread a folder

_PARAMS, _COMPONENTS, _GATE = "params.safetensors", "components.safetensors", "gate.safetensors"
ABOUT, _CARD = "decomposition.json", "README.md"
_OLD_THRESHOLDS = "log_thresholds"  # of format 1, among the components


def save(
    decomposition: decomposition_lib.Decomposition,
    path: epath.PathLike,
    *,
    metrics: Mapping[str, Any] | None = None,
    evidence: Any = None,
    repo_id: str = "",
) -> None:
    """Writes a decomposition into the folder `path`, over one that is there.

    Of several processes, every one must call it; 0 writes.

    Args:
      metrics, evidence: what evaluation.json and evidence.json hold, for the card only; or what
        `decomposition.evidence()` returned.
      repo_id: the name that it will have on the hub, for the card.
    Raises:
      InputError: params hold something else than numbers, or two leaves of the same dotted path.
    """
    params, components = decomposition.problem.params, decomposition.components
    names = trees.names(params, "params")
    about = {
        "format": FORMAT,
        "apd_jax": _version(),
        **structure.of(decomposition.problem, components),
        "config": decomposition.method.to_dict(),
        "history": list(decomposition.history),
        "recipe": None if decomposition.recipe is None else decomposition.recipe.to_dict(),
    }
    factors = {
        f"{name}.{field}": getattr(f, field)
        for name, f in components.factors.items()
        for field in structure.ARRAYS
    }
    if hasattr(evidence, "to_json"):
        evidence = evidence.to_json()
    name = repo_id.rpartition("/")[2] or user_path(path).name
    text = card.render(decomposition, name, metrics or {}, evidence, _version(), repo_id)
    contents = {
        _PARAMS: encode(dict(zip(names, jax.tree.leaves(params), strict=True))),
        _COMPONENTS: encode(factors),
        _CARD: text.encode(),
    }
    if gate := jax.tree.leaves(decomposition.gate):
        gate_names = trees.names(decomposition.gate, "the gate")
        contents[_GATE] = encode(dict(zip(gate_names, gate, strict=True)))
    parallel.from_primary(lambda: _write(user_path(path), contents, about))


def load(
    path: epath.PathLike,
    apply_fn: Callable | None,
    params: PyTree = None,
    sample_fn: Callable | Iterable | None = None,
    *,
    attribution_fn: Callable | None = None,
    num_active_fn: Callable | None = None,
    valid_fn: Callable | None = None,
    elsewhere: Callable | Iterable | None = None,
    minimality_loss: Callable | None = None,
) -> decomposition_lib.Decomposition:
    """The decomposition that `save` wrote, bit for bit; or that of a workdir of `decompose`.

    Of a workdir it is what the newest readable checkpoint holds.

    Args:
      path: either folder.
      apply_fn: the function that was decomposed. This, sample_fn and the functions of x: see
        `apd_jax.decompose`. None gives a decomposition that has weights alone.
      params: a pytree with the structure and shapes of the network's params (arrays, or the shapes
        that `jax.eval_shape` gives), for an NNX state, a NamedTuple or another class. None: nested
        dicts, lists and tuples, as they were. The values are always those of the file.
      minimality_loss: the function that the method's loss was, of which the folder holds the name
        only; without it the components can be used, but nothing that needs the loss.
      sample_fn, elsewhere: not needed to use the components, only to train more.
    Raises:
      InputError: one sentence naming file and leaf: no such folder, a save that was cut short, a
        damaged file, another network's params, or a folder of a newer version.
    """
    folder = user_path(path)
    if apply_fn is not None and not callable(apply_fn):
        raise InputError(
            f"apply_fn must be the function that was decomposed, or None; got a "
            f"{type(apply_fn).__name__}."
        )
    functions = Functions(apply_fn, sample_fn, attribution_fn, num_active_fn, valid_fn, elsewhere)
    if not (folder / ABOUT).exists() and (folder / "config.json").exists():
        found = workdirs.load(folder, functions, params)[1]
        method = found.method.replace(
            minimality_loss=minimality_loss or found.method.minimality_loss
        )
        return dataclasses.replace(found, method=method)
    about = _read_about(folder)
    params = structure.params(about, decode(folder / _PARAMS), params, folder / _PARAMS)
    factors = decode(folder / _COMPONENTS)
    components = structure.components(about, factors, params, folder / _COMPONENTS)
    problem = structure.problem(about, functions, params, components)
    method = _method(about, folder)
    if minimality_loss is not None:
        method = method.replace(minimality_loss=minimality_loss)
    recipe = None if about["recipe"] is None else ConfigDict(about["recipe"]).lock()
    gate = _gate(problem, method, components, factors, folder)
    return decomposition_lib.Decomposition(
        problem, components, method, about["history"], recipe, gate
    )


def _method(about: Mapping[str, Any], folder: epath.Path) -> Method:
    try:
        return registry.of(about["config"])
    except InputError as error:
        raise InputError(
            f"{folder} was written by apd_jax {about['apd_jax']} with settings that this one does "
            f"not have ({str(error).rstrip('.')}); update it."
        ) from None


def _gate(
    problem: Problem,
    method: Method,
    components: Components,
    factors: Mapping[str, np.ndarray],
    folder: epath.Path,
) -> PyTree:
    """The arrays of the gate, in the structure that the method gives them."""
    if _OLD_THRESHOLDS in factors:
        return {"log_thresholds": jnp.asarray(factors[_OLD_THRESHOLDS])}
    like = structure.gate_like(problem, method, components)
    if not jax.tree.leaves(like):
        return like
    return trees.like(like, decode(folder / _GATE), folder, "the gate's arrays")


def _version() -> str:
    try:
        return metadata.version("apd_jax")
    except metadata.PackageNotFoundError:  # run from a copy of the sources
        return "unknown"


# Files


def _write(folder: epath.Path, contents: Mapping[str, bytes], about: Mapping[str, Any]) -> None:
    """A folder without decomposition.json is one that was not finished."""
    text = json.dumps(about, indent=1, default=_plain)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in (ABOUT, _GATE):
            (folder / stale).unlink(missing_ok=True)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        unfinished = folder / f".{ABOUT}.unfinished"
        unfinished.write_text(text)
        unfinished.replace(folder / ABOUT)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}); choose another folder."
        ) from error


def _read_about(folder: epath.Path) -> dict[str, Any]:
    file = folder / ABOUT
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist; give the folder of a saved decomposition.")
    if not file.exists():
        raise InputError(
            f"{folder} holds no {ABOUT}: it is not a saved decomposition, or its saving was cut "
            "short; save it again."
        )
    try:
        about = json.loads(file.read_text())
        written, version = about["format"], about["apd_jax"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} is damaged ({sentence(error)}); save the decomposition again."
        ) from error
    if written > FORMAT:
        raise InputError(
            f"{folder} was written in format {written} by apd_jax {version}; this one reads up to "
            f"{FORMAT}, so update it."
        )
    return about


def _plain(value: Any) -> Any:
    """What json does not know: dataclasses, other mappings as dicts, other sequences as lists."""
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return dict(value) if isinstance(value, Mapping) else list(value)
