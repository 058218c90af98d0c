"""Weights of a target in one file, `.npz` or `.safetensors`.

The file holds a flat dict of arrays by dotted path (`Dense_0.kernel`).
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import PyTree

from apd_jax.components import path_name
from apd_jax.errors import InputError
from apd_jax.paths import user_path
from apd_jax.storage.arrays import decode_bytes


def _to_npz(arrays: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _from_npz(content: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return dict(file)


# (decode, encode), to and from bytes: the libraries themselves only open local paths.
_FORMATS = {
    ".npz": (_from_npz, _to_npz),
    ".safetensors": (decode_bytes, safetensors.numpy.save),
}


def save(path: str | os.PathLike[str], params: PyTree) -> None:
    """Writes params. An interrupted write leaves the file as it was.

    Raises:
      InputError: the extension is neither .npz nor .safetensors.
    """
    path, (_, encode) = user_path(path), _format(path)
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in _by_name(params).items()}
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_bytes(encode(arrays))
    unfinished.replace(path)


def load(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """Params from a file, in the structure and dtypes of `like`.

    Args:
      like: a pytree of arrays, or of the shapes that `jax.eval_shape` gives.
    Raises:
      InputError: another extension, an unreadable file, a missing or an unknown leaf, a leaf of
        another shape, or a value that is not a finite number. One sentence names file and leaf.
    """
    path, (decode, _) = user_path(path), _format(path)
    try:
        arrays = decode(path.read_bytes())
    # Everything: two formats have many kinds of error (zip, header, dtype, system).
    except Exception as error:
        why = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"weights file {path} cannot be read: {why}.") from error
    wanted = _by_name(like)
    if missing := [name for name in wanted if name not in arrays]:
        shapes = {name: array.shape for name, array in arrays.items()}
        raise InputError(
            f"weights file {path} lacks {missing[0]!r} of shape {wanted[missing[0]].shape}; "
            f"it holds {shapes}."
        )
    if extra := [name for name in arrays if name not in wanted]:
        shapes = {name: leaf.shape for name, leaf in wanted.items()}
        raise InputError(
            f"weights file {path} holds {extra[0]!r} of shape {arrays[extra[0]].shape}, "
            f"but the target has {shapes}."
        )

    def convert(path_in_tree, leaf):
        name = path_name(path_in_tree)
        array, real = arrays[name], (jnp.floating, jnp.integer)
        if array.shape != leaf.shape:
            raise InputError(
                f"weights file {path} holds {name!r} with shape {array.shape}, "
                f"but the target's has shape {leaf.shape}."
            )
        if not any(jnp.issubdtype(array.dtype, kind) for kind in real):
            raise InputError(
                f"weights file {path} holds {name!r} with dtype {array.dtype}, "
                "which is not a real number."
            )
        with np.errstate(over="ignore"):  # an overflow in the cast is reported as not finite
            array = array.astype(leaf.dtype)
        if not np.isfinite(array).all():
            raise InputError(
                f"weights file {path} holds values in {name!r} "
                f"that are not finite in {array.dtype}."
            )
        return jnp.asarray(array)

    return jax.tree_util.tree_map_with_path(convert, like)


def _by_name(params: PyTree) -> dict[str, Any]:
    """{dotted path: leaf}."""
    return {path_name(p): leaf for p, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}


def _format(path: str | os.PathLike[str]):
    try:
        return _FORMATS[PurePath(path).suffix]
    except KeyError:
        raise InputError(f"weights file {path} must end in .npz or .safetensors.") from None
