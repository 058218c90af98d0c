"""Weights of a target in one file: `.npz` or `.safetensors`, a flat dict of arrays by dotted path (`Dense_0.kernel`)."""

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
from etils import epath
from jaxtyping import PyTree

from apd_jax.components import path_name
from apd_jax.errors import InputError


def _to_npz(arrays: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _from_npz(content: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return dict(file)


# By way of bytes, since the libraries only open local paths.
_FORMATS = {
    ".npz": (_from_npz, _to_npz),
    ".safetensors": (safetensors.numpy.load, safetensors.numpy.save),
}


def save(path: str | os.PathLike[str], params: PyTree) -> None:
    """Writes params; an interrupted write leaves the file as it was.

    Raises:
      InputError: the extension is neither .npz nor .safetensors.
    """
    path, (_, encode) = epath.Path(path), _format(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_bytes(
        encode(
            {
                path_name(p): np.asarray(leaf, order="C")
                for p, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
            }
        )
    )
    unfinished.replace(path)


def load(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """Params from a file, in the structure and dtypes of `like` (arrays, or the shapes that `jax.eval_shape` gives).

    Raises:
      InputError: one sentence naming file and leaf: another extension, an unreadable file, a name too few or too many, another shape,
        a value that is not a finite number.
    """
    path, (decode, _) = epath.Path(path), _format(path)
    try:
        arrays = decode(path.read_bytes())
    except (
        Exception
    ) as error:  # zip, header, dtype and system errors of two formats: for the user all are one
        raise InputError(
            f"weights file {path} cannot be read: {' '.join(str(error).split()).rstrip('.')}."
        ) from error
    wanted = {path_name(p): leaf for p, leaf in jax.tree_util.tree_flatten_with_path(like)[0]}
    if missing := [name for name in wanted if name not in arrays]:
        shapes = {name: array.shape for name, array in arrays.items()}
        raise InputError(
            f"weights file {path} lacks {missing[0]!r} of shape {wanted[missing[0]].shape}; it holds {shapes}."
        )
    if extra := [name for name in arrays if name not in wanted]:
        shapes = {name: leaf.shape for name, leaf in wanted.items()}
        raise InputError(
            f"weights file {path} holds {extra[0]!r} of shape {arrays[extra[0]].shape}, but the target has {shapes}."
        )

    def convert(path_in_tree, leaf):
        name = path_name(path_in_tree)
        array = arrays[name]
        if array.shape != leaf.shape:
            raise InputError(
                f"weights file {path} holds {name!r} with shape {array.shape}, but the target's has shape {leaf.shape}."
            )
        if not (
            jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
        ):
            raise InputError(
                f"weights file {path} holds {name!r} with dtype {array.dtype}, which is not a real number."
            )
        with np.errstate(over="ignore"):  # an overflow in the cast is reported as not finite
            array = array.astype(leaf.dtype)
        if not np.isfinite(array).all():
            raise InputError(
                f"weights file {path} holds values in {name!r} that are not finite in {array.dtype}."
            )
        return jnp.asarray(array)

    return jax.tree_util.tree_map_with_path(convert, like)


def _format(path: str | os.PathLike[str]):
    try:
        return _FORMATS[PurePath(path).suffix]
    except KeyError:
        raise InputError(f"weights file {path} must end in .npz or .safetensors.") from None
