"""Pytrees of arrays: names of leaves, containers as JSON, and how they are filled again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import PyTree

from apd_jax.components import path_name
from apd_jax.errors import InputError
from apd_jax.storage import arrays as arrays_lib


def names(tree: PyTree, what: str) -> list[str]:
    """Dotted paths of the leaves.

    Raises:
      InputError: two are the same.
    """
    found = [path_name(p) for p, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    if twice := {name for name in found if found.count(name) > 1}:
        raise InputError(
            f"{what} have two leaves of the dotted path {min(twice)!r}; rename a key that holds a "
            "dot."
        )
    return found


def keys(tree: PyTree) -> dict[str, str]:
    """{dotted path: its generator} of the leaves that are random keys; files hold their numbers."""
    found = {path_name(p): leaf for p, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    return {
        name: str(jax.random.key_impl(leaf))
        for name, leaf in found.items()
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    }


def with_keys(arrays: Mapping[str, np.ndarray], impls: Mapping[str, str]) -> dict[str, Any]:
    """The arrays of a file, those of `keys` as random keys again."""
    return {
        name: jax.random.wrap_key_data(jnp.asarray(a), impl=impls[name]) if name in impls else a
        for name, a in arrays.items()
    }


def containers(tree: PyTree) -> Any:
    """Nested dicts, lists and tuples as JSON: [kind, children], a leaf its dotted path.

    Another container is [the name of its class, None].
    """
    return _containers(jax.tree_util.tree_map_with_path(lambda p, _: path_name(p), tree))


def _containers(named: PyTree) -> Any:
    if named is None or isinstance(named, str):
        return named
    if isinstance(named, Mapping) and all(isinstance(key, str) for key in named):
        return ["dict", {key: _containers(child) for key, child in named.items()}]
    if type(named) is dict and all(type(key) in (str, int) for key in named):
        return ["items", [[key, _containers(child)] for key, child in named.items()]]
    kind = type(named).__name__
    return [kind, [_containers(child) for child in named] if type(named) in (list, tuple) else None]


def refilled(described: Any, arrays: Mapping[str, Any], file: epath.Path) -> PyTree:
    """The pytree that `containers` described, with the arrays of this file for leaves.

    Raises:
      InputError: it has a container of another kind.
    """
    if described is None:
        return None
    if isinstance(described, str):
        return jnp.asarray(arrays_lib.taken(arrays, described, file))
    kind, children = described
    if children is None:
        raise InputError(
            f"{file.parent}: the params were held in a {kind}, which the file cannot make; give "
            "params, a pytree like them."
        )
    if kind == "dict":
        return {key: refilled(child, arrays, file) for key, child in children.items()}
    if kind == "items":
        return {key: refilled(child, arrays, file) for key, child in children}
    return {"list": list, "tuple": tuple}[kind](refilled(child, arrays, file) for child in children)


def like(
    tree: PyTree, arrays: Mapping[str, Any], folder: epath.Path, what: str = "params"
) -> PyTree:
    """The arrays in the structure of `tree`.

    Raises:
      InputError: another leaf, or another shape of one.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    given = {path_name(p): tuple(leaf.shape) for p, leaf in flat}
    if other := sorted(set(given) ^ set(arrays)):
        where = what if other[0] in given else folder
        raise InputError(
            f"{what} do not belong to {folder}: only {where} has a leaf {other[0]!r}; give that "
            f"network's {what}."
        )
    if bad := [name for name, shape in given.items() if shape != arrays[name].shape]:
        name = bad[0]
        raise InputError(
            f"{what} do not belong to {folder}: {name!r} has shape {given[name]} here and "
            f"{arrays[name].shape} there."
        )
    return jax.tree.unflatten(structure, [jnp.asarray(arrays[name]) for name in given])
