"""Named arrays as the bytes of a safetensors file, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from apd_jax.errors import InputError

_DTYPES = {
    "BOOL": "bool",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
_DTYPES |= {
    f"{letter}{bits}": f"{name}{bits}"
    for letter, name in (("I", "int"), ("U", "uint"))
    for bits in (8, 16, 32, 64)
}


def encode(arrays: Mapping[str, Any]) -> bytes:
    """Raises InputError where one is not made of numbers that the file knows."""
    converted = {}
    for name, leaf in arrays.items():
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        dtype = str(leaf.dtype)
        if dtype not in _DTYPES.values():
            raise InputError(
                f"params leaf {name!r} has dtype {dtype}, which a file cannot hold; leave it out "
                "of params."
            )
        # safetensors writes memory as it lies, whatever the strides.
        converted[name] = np.asarray(leaf, order="C")
    return safetensors.numpy.save(converted)


def decode(file: epath.Path) -> dict[str, np.ndarray]:
    """The arrays of a file. safetensors' own function for it does not know bfloat16.

    Raises:
      InputError: it is missing or damaged.
    """
    try:
        return decode_bytes(file.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{file} is missing; save the decomposition again.") from None
    except Exception as error:  # whatever is wrong in header, offsets or dtypes
        raise InputError(
            f"{file} cannot be read ({sentence(error)}); save the decomposition again."
        ) from error


def decode_bytes(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of a file's bytes; raises whatever is wrong with them."""
    return {
        name: np.frombuffer(t["data"], np.dtype(_DTYPES[t["dtype"]])).reshape(t["shape"])
        for name, t in safetensors.deserialize(content)
    }


def taken(arrays: Mapping[str, Any], name: str, file: epath.Path) -> Any:
    """Raises InputError where the file lacks it."""
    if name not in arrays:
        raise InputError(f"{file} lacks {name!r}; it holds {', '.join(sorted(arrays))}.")
    return arrays[name]


def sentence(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
