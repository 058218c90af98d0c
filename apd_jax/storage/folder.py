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
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import PyTree
from ml_collections import ConfigDict

from apd_jax import components as components_lib
from apd_jax import decomposition as decomposition_lib
from apd_jax.components import Components, Factors, path_name
from apd_jax.errors import InputError
from apd_jax.methods import registry
from apd_jax.methods.base import Method
from apd_jax.network.problem import Problem
from apd_jax.paths import user_path
from apd_jax.storage import card, trees
from apd_jax.storage.arrays import decode, encode, sentence, taken
from apd_jax.train import parallel

FORMAT = 2  # raised with every change after which older versions would misread a folder

_PARAMS, _COMPONENTS, _GATE = "params.safetensors", "components.safetensors", "gate.safetensors"
_ABOUT, _CARD = "decomposition.json", "README.md"
_OLD_THRESHOLDS = "log_thresholds"  # of format 1, among the components
# What of a site goes into the file of arrays, and what into decomposition.json.
_FIELDS = dataclasses.fields(Factors)
_ARRAYS = [field.name for field in _FIELDS if not field.metadata.get("static")]
_STATIC = [field.name for field in _FIELDS if field.metadata.get("static")]


def save(
    decomposition: decomposition_lib.Decomposition,
    path: epath.PathLike,
    *,
    metrics: Mapping[str, Any] | None = None,
    evidence: Mapping[str, Any] | None = None,
) -> None:
    """Writes a decomposition into the folder `path`, over one that is there.

    Of several processes, every one must call it; 0 writes.

    Args:
      metrics, evidence: what evaluation.json and evidence.json hold; for the card only.
    Raises:
      InputError: params hold something else than numbers, or two leaves of the same dotted path.
    """
    params, components = decomposition.problem.params, decomposition.components
    names = trees.names(params, "params")
    about = {
        "format": FORMAT,
        "apd_jax": _version(),
        "num_components": components.num_components,
        "count": components.count,
        "leaves": {
            name: {field: _json_ids(getattr(f, field)) for field in _STATIC}
            for name, f in components.factors.items()
        },
        "select": decomposition.problem.select,
        "containers": trees.containers(params),
        "keys": trees.keys(params),
        "config": decomposition.method.to_dict(),
        "history": list(decomposition.history),
        "recipe": None if decomposition.recipe is None else decomposition.recipe.to_dict(),
    }
    factors = {
        f"{name}.{field}": getattr(f, field)
        for name, f in components.factors.items()
        for field in _ARRAYS
    }
    text = card.render(decomposition, user_path(path).name, metrics or {}, evidence, _version())
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
    apply_fn: Callable,
    params: PyTree = None,
    sample_fn: Callable | Iterable | None = None,
    *,
    attribution_fn: Callable | None = None,
    num_active_fn: Callable | None = None,
    valid_fn: Callable | None = None,
    elsewhere: Callable | Iterable | None = None,
) -> decomposition_lib.Decomposition:
    """The decomposition that `save` wrote, bit for bit.

    Args:
      apply_fn: the function that was decomposed. This, sample_fn and the functions of x: see
        `apd_jax.decompose`.
      params: a pytree with the structure and shapes of the network's params (arrays, or the shapes
        that `jax.eval_shape` gives), for an NNX state, a NamedTuple or another class. None: nested
        dicts, lists and tuples, as they were. The values are always those of the file.
      sample_fn, elsewhere: not needed to use the components, only to train more.
    Raises:
      InputError: one sentence naming file and leaf: no such folder, a save that was cut short, a
        damaged file, another network's params, or a folder of a newer version.
    """
    folder = user_path(path)
    about = _read_about(folder)
    saved = trees.with_keys(decode(folder / _PARAMS), about.get("keys", {}))
    factors = decode(folder / _COMPONENTS)
    if params is None:
        params = trees.refilled(about["containers"], saved, folder / _PARAMS)
    else:
        params = trees.like(params, saved, folder)
    components = _components(params, about, factors, folder)
    uses = {name: f.uses for name, f in components.factors.items() if f.uses != 1}
    problem = Problem(
        *(apply_fn, params, sample_fn, attribution_fn, num_active_fn),
        *(about["select"], uses, valid_fn, elsewhere),
    )
    method = _method(about, folder)
    recipe = None if about["recipe"] is None else ConfigDict(about["recipe"]).lock()
    gate = _gate(problem, method, components, factors, folder)
    return decomposition_lib.Decomposition(
        problem, components, method, about["history"], recipe, gate
    )


def _components(
    params: PyTree, about: Mapping[str, Any], factors: Mapping[str, np.ndarray], folder: epath.Path
) -> Components:
    hints = typing.get_type_hints(Factors)

    def slot(leaf_path: tuple[Any, ...], leaf: Any) -> Factors | None:
        name = path_name(leaf_path)
        if name not in about["leaves"]:
            return None
        told = about["leaves"][name]
        static = {field: _typed(hints[field], told[field]) for field in told if field != "ids"}
        static["ids"] = _ids(told.get("ids"))
        arrays = {
            field: jnp.asarray(taken(factors, f"{name}.{field}", folder / _COMPONENTS))
            for field in _ARRAYS
        }
        return Factors(**arrays, **static)

    tree = jax.tree_util.tree_map_with_path(slot, params)
    components = Components(tree, about.get("count"))
    components_lib.decomposed_leaves(components, params)  # their shapes agree
    return components


def _json_ids(value: Any) -> Any:
    """A static field as JSON takes it; a range as its ends."""
    return {"start": value.start, "stop": value.stop} if isinstance(value, range) else value


def _ids(value: Any) -> Any:
    if isinstance(value, Mapping):
        return range(value["start"], value["stop"])
    return None if value is None else tuple(value)


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

    def make(components: Components) -> PyTree:
        return method.make_gate(jax.random.key(0), problem, components)

    like = jax.eval_shape(make if method.num_instances == 1 else jax.vmap(make), components)
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
        for stale in (_ABOUT, _GATE):
            (folder / stale).unlink(missing_ok=True)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        unfinished = folder / f".{_ABOUT}.unfinished"
        unfinished.write_text(text)
        unfinished.rename(folder / _ABOUT)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}); choose another folder."
        ) from error


def _read_about(folder: epath.Path) -> dict[str, Any]:
    file = folder / _ABOUT
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist; give the folder of a saved decomposition.")
    if not file.exists():
        raise InputError(
            f"{folder} holds no {_ABOUT}: it is not a saved decomposition, or its saving was cut "
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


def _typed(hint: Any, value: Any) -> Any:
    """A static field again from its JSON.

    Lists are tuples there, and objects the dataclass that the annotation names.
    """
    if isinstance(value, list):
        return tuple(_typed(None, item) for item in value)
    if isinstance(value, dict):
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        cls: Any = next(option for option in options if dataclasses.is_dataclass(option))
        return cls(**{name: _typed(None, item) for name, item in value.items()})
    return value
