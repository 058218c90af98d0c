"""What a workdir's network, selection and data were, so that no other run goes on from there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from apd_jax.components import named_leaves, path_name
from apd_jax.network import data
from apd_jax.network.outputs import outputs
from apd_jax.network.problem import Problem

CLOSE = 1e-3  # by which measured numbers may differ from device to device


def of_problem(problem: Problem) -> dict[str, Any]:
    """{name: value}, as JSON has it: checksums of params, and what function and data give.

    Of a sampler, size and mean of its first batch and of the outputs there; of an iterable the
    shapes alone, as it may shuffle.

    Cost: apply_fn on one batch.
    """
    leaves = {name: a for name, a in named_leaves(problem.params).items() if a is not None}
    found: dict[str, Any] = {f"params {name}": sums for name, sums in _of_arrays(leaves).items()}
    found["select"] = _plain(problem.select)
    found["uses"] = _plain(problem.uses)
    shapes = data.shapes(problem.sample_fn)
    found["batch"] = [[str(s.dtype), list(s.shape)] for s in jax.tree.leaves(shapes)]
    if not problem.fed:
        x = problem.example_batch()
        out = jax.jit(lambda params, x: outputs(problem.apply_fn(params, x)))(problem.params, x)
        found["data"] = [_measured(a) for a in jax.tree.leaves(x)]
        found["outputs"] = _measured(out)
    return found


def of_tree(tree: PyTree) -> dict[str, Any]:
    """{dotted path: [dtype, shape, checksum]} of all arrays."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return _of_arrays({path_name(path): jnp.asarray(leaf) for path, leaf in flat})


def _of_arrays(leaves: Mapping[str, Any]) -> dict[str, Any]:
    summed = jax.jit(lambda leaves: {name: _checksum(a) for name, a in leaves.items()})
    sums = jax.device_get(summed(dict(leaves)))
    return {name: [str(a.dtype), list(a.shape), int(sums[name])] for name, a in leaves.items()}


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """The names of what differs; numbers that were measured may do so by a little."""
    names = [name for name in here if not _alike(there.get(name), here[name])]
    return names + [name for name in there if name not in here]


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_alike(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return bool(np.isclose(a, b, rtol=CLOSE, atol=CLOSE, equal_nan=True))
    return a == b


def _checksum(a: Array) -> Array:
    """A sum of the bits of all entries, each times a number of its place, modulo 2**32."""
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a = jax.random.key_data(a)
    if jnp.issubdtype(a.dtype, jnp.complexfloating):
        a = jnp.stack([a.real, a.imag])
    size = a.dtype.itemsize
    if a.dtype == bool:
        bits = a
    else:
        kinds = {1: jnp.uint8, 2: jnp.uint16}
        bits = lax.bitcast_convert_type(a, kinds.get(size, jnp.uint32))
    bits = bits.astype(jnp.uint32).reshape(-1)
    place = lax.iota(jnp.uint32, bits.size) * jnp.uint32(2654435761)
    place = (place ^ (place >> 15)) * jnp.uint32(2246822519)
    return jnp.sum(bits * (place ^ (place >> 13) | jnp.uint32(1)), dtype=jnp.uint32)


def _measured(a: Array) -> list[float]:
    """Mean and root mean square of what is finite."""
    values = np.asarray(a, np.float32)
    values = values[np.isfinite(values)]
    size = float(np.sqrt(np.mean(values**2))) if values.size else 0.0
    return [float(values.mean()) if values.size else 0.0, size]


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return list(value) if isinstance(value, list | tuple | range) else value
