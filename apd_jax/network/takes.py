"""What a network makes of a batch, by shapes alone: nothing is compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from apd_jax.errors import InputError, first_line, listed
from apd_jax.network.outputs import split_result


def check_batch(apply_fn: Callable, params: PyTree, x: PyTree) -> None:
    """Checks that the network takes a batch of inputs x.

    Raises:
      InputError: it has no examples, or apply_fn fails on it or does not keep them as first axis.
    Cost: one trace of the network; inside of a jitted function once for every shape.
    """
    leaves = jax.tree.leaves(x)
    shapes = listed(f"{a.dtype}[{', '.join(map(str, a.shape))}]" for a in leaves) or repr(x)
    if any(a.shape[:1] == (0,) for a in leaves):
        raise InputError(f"x holds no examples: it is {shapes}; give at least one.")
    try:
        result = jax.eval_shape(apply_fn, params, x)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"the network fails on x, {shapes}: {first_line(error)}{meant(x)}."
        ) from error
    shape, sizes = split_result(result)[0].shape, {leaf.shape[:1] for leaf in leaves}
    if sizes != {shape[:1]} or () in sizes:
        raise InputError(
            f"x must be a batch as in training, arrays [examples, ...]; it is {shapes}, of which "
            f"the network makes {shape}."
        )


def taken(apply_fn: Callable, params: PyTree, x: PyTree) -> PyTree:
    """A batch that the network takes, on the device: see `on_device`, `check_batch`."""
    x = on_device(x)
    check_batch(apply_fn, params, x)
    return x


def on_device(x: PyTree) -> PyTree:
    """A batch with arrays of any library as its leaves.

    Raises:
      InputError: they are no numbers.
    """
    try:
        return jax.tree.map(jnp.asarray, x)
    except (TypeError, ValueError) as error:
        raise InputError(f"x must hold arrays of numbers: {first_line(error)}.") from None


def check_result(result: Any, sizes: set[tuple[int, ...]]) -> None:
    """Checks that it is a floating array, or (array, {name: array}), with the batch's leading size.

    Args:
      sizes: those that the inputs lead with.
    Raises:
      InputError: it is not.
    """
    if isinstance(result, tuple) and len(result) != 2:
        raise InputError(
            "apply_fn must return an array, or (array, {name: array}); it returns a tuple of "
            f"{len(result)}."
        )
    out, hidden = split_result(result)
    if not isinstance(hidden, Mapping):
        raise InputError(
            "apply_fn must return an array, or (array, {name: array}); its second value is a "
            f"{type(hidden).__name__}."
        )
    named = {f"activation {name!r}": array for name, array in hidden.items()}
    for what, array in ({"its output": out} | named).items():
        is_array = isinstance(array, jax.ShapeDtypeStruct)
        if not is_array or not jnp.issubdtype(array.dtype, jnp.floating):
            raise InputError(
                "apply_fn must return a floating array, or (array, {name: array}); "
                f"{what} is {array}."
            )
        if sizes != {array.shape[:1]}:
            raise InputError(
                f"apply_fn must keep the batch as first axis: {what} has shape {array.shape}, the "
                f"inputs lead with {sorted(sizes)}."
            )


def meant(x: PyTree) -> str:
    """What may be wrong with a batch on which a network fails, where that can be seen of it."""
    leaves = jax.tree.leaves(x)
    if isinstance(x, tuple | list) and leaves and all(leaf.shape == () for leaf in leaves):
        return "; these are nested lists: give arrays, np.asarray(x)"
    if isinstance(x, tuple | list) and len(x) > 1:
        return (
            f"; apply_fn gets the {type(x).__name__} of {len(x)} whole: of (inputs, labels) give "
            "the inputs alone"
        )
    return ""
