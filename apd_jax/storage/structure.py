"""What of a network and its components is no array, as JSON: and both made again from it."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import PyTree

from apd_jax import components as components_lib
from apd_jax.components import Components, Factors, path_name
from apd_jax.errors import InputError
from apd_jax.methods.base import Method
from apd_jax.network.problem import Problem
from apd_jax.storage import trees
from apd_jax.storage.arrays import taken

# What of a site goes into a file of arrays, and what into the structure.
_FIELDS = dataclasses.fields(Factors)
ARRAYS = [field.name for field in _FIELDS if not field.metadata.get("static")]
_STATIC = [field.name for field in _FIELDS if field.metadata.get("static")]


@dataclasses.dataclass(frozen=True)
class Functions:
    """What of a problem is code or data, which files do not hold; see `apd_jax.decompose`."""

    apply_fn: Callable | None
    sample_fn: Callable | Iterable | None = None
    attribution_fn: Callable | None = None
    num_active_fn: Callable | None = None
    valid_fn: Callable | None = None
    elsewhere: Callable | Iterable | None = None


def of(problem: Problem, components: Components) -> dict[str, Any]:
    """Leaves, containers and selection. The components may be shapes alone."""
    return {
        "num_components": components.num_components,
        "count": components.count,
        "leaves": {
            name: {field: _plain(getattr(f, field)) for field in _STATIC}
            for name, f in components.factors.items()
        },
        "select": problem.select,
        "containers": trees.containers(problem.params),
        "keys": trees.keys(problem.params),
    }


def params(
    about: Mapping[str, Any], arrays: Mapping[str, np.ndarray], like: PyTree, file: epath.Path
) -> PyTree:
    """The network's params; where `like` is None in nested dicts, lists and tuples.

    Raises:
      InputError: they belong to another network, or were held in something else.
    """
    saved = trees.with_keys(arrays, about.get("keys", {}))
    if like is None:
        return trees.refilled(about["containers"], saved, file)
    return trees.like(like, saved, file.parent)


def components(
    about: Mapping[str, Any], factors: Mapping[str, Any], params: PyTree, file: epath.Path
) -> Components:
    """The components with these arrays, {site.U, site.V}."""
    hints = typing.get_type_hints(Factors)

    def slot(leaf_path: tuple[Any, ...], leaf: Any) -> Factors | None:
        name = path_name(leaf_path)
        if name not in about["leaves"]:
            return None
        told = about["leaves"][name]
        static = {field: _typed(hints[field], told[field]) for field in told if field != "ids"}
        static["ids"] = _ids(told.get("ids"))
        arrays = {field: jnp.asarray(taken(factors, f"{name}.{field}", file)) for field in ARRAYS}
        return Factors(**arrays, **static)

    tree = jax.tree_util.tree_map_with_path(slot, params)
    found = Components(tree, about.get("count"))
    components_lib.decomposed_leaves(found, params)  # their shapes agree
    return found


def problem(
    about: Mapping[str, Any], functions: Functions, params: PyTree, components: Components
) -> Problem:
    """The problem that was decomposed."""
    uses = {name: f.uses for name, f in components.factors.items() if f.uses != 1}
    given = vars(functions) | {"apply_fn": functions.apply_fn or _absent}
    return Problem(params=params, select=about["select"], uses=uses, **given)


def _absent(params: PyTree, x: PyTree) -> Any:
    raise InputError(
        "this decomposition was opened without the network's function; give load its apply_fn."
    )


def gate_like(problem: Problem, method: Method, components: Components) -> PyTree:
    """The shapes of the gate's arrays."""

    def make(components: Components) -> PyTree:
        return method.make_gate(jax.random.key(0), problem, components)

    return jax.eval_shape(make if method.num_instances == 1 else jax.vmap(make), components)


def _plain(value: Any) -> Any:
    """A static field as JSON takes it; a range as its ends, a layout as its axes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return {"start": value.start, "stop": value.stop} if isinstance(value, range) else value


def _ids(value: Any) -> Any:
    if isinstance(value, Mapping):
        return range(value["start"], value["stop"])
    return None if value is None else tuple(value)


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
