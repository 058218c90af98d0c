"""Where batches come from: a sampler on the device, arrays in memory, or any iterable of batches.

Shapes: a batch is a pytree of arrays whose first axis is B = `batch_size`, the examples of one step
over *all* devices.

  sampler    a pure function (rng, step) -> batch, run inside the train step.
  arrays     `from_arrays` makes a sampler of them.
  iterable   a list, a generator, a data loader: pulled on the host, several steps at a time, while
             the devices work.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from apd_jax.errors import InputError, first_line, one_of
from apd_jax.network.batches import Batches, Restarted, cut_anew, named, numbers
from apd_jax.network.outputs import reaching_outputs

# Of the batches of one XLA call; those of the next call are pulled beside them.
MAX_STACK_BYTES = 2**28
RAGGED = ("drop", "join", "refuse")
_ELSEWHERE = 0xE15E  # sets the draws of the second stream apart
MAX_ARRAYS_BYTES = 2**30  # XLA refuses programs with constants of 2 GiB


def from_arrays(arrays: PyTree, batch_size: int, shuffle: bool = True) -> Callable[..., PyTree]:
    """A sampler that goes through the examples epoch by epoch, each once per epoch.

    Batch i of epoch e has the rows π_e(iB), ..., π_e(iB + B - 1), with π_e the permutation drawn
    from fold_in(rng, e). The rest of an epoch that fills no batch is left out of it: other examples
    in every epoch if shuffled, else always the last.

    Args:
      arrays: pytree of arrays [N, ...], one row per example, 1 GiB at most: they become constants
        of the compiled program.
      shuffle: False takes the rows in their order.
    Returns: (rng, step) -> batch, pure in both.
    Raises:
      InputError: no arrays, not numbers, different N, fewer examples than a batch, or too large.
    Cost: if shuffled, every step draws its epoch's permutation anew. This is a sort of N numbers:
      about 0.5 ms per 1,000 examples on a CPU core.
    """
    rows = jax.tree_util.tree_map_with_path(
        lambda path, a: numbers(a, f"arrays leaf {named(path)}"), arrays
    )
    leaves = jax.tree.leaves(rows)
    leading = {leaf.shape[:1] for leaf in leaves}
    if len(leading) != 1 or leading == {()}:
        raise InputError(
            "arrays must all lead with the number of examples; their leading sizes are "
            f"{sorted(leading)}."
        )
    (size,), num_bytes = leading.pop(), sum(leaf.nbytes for leaf in leaves)
    if not 1 <= batch_size <= size:
        raise InputError(
            f"batch_size must lie between 1 and the number of examples, {size}; got {batch_size}."
        )
    if num_bytes > MAX_ARRAYS_BYTES:
        raise InputError(
            f"arrays hold {num_bytes / 2**30:.1f} GiB, but at most 1 GiB fits into a program; give "
            "an iterable of batches."
        )
    rows, per_epoch = jax.tree.map(jnp.asarray, rows), size // batch_size

    def sample_fn(rng: Array, step: Any) -> PyTree:
        first = step % per_epoch * batch_size
        if shuffle:
            order = jax.random.permutation(jax.random.fold_in(rng, step // per_epoch), size)
            chosen = jax.lax.dynamic_slice_in_dim(order, first, batch_size)
        else:
            chosen = first + jnp.arange(batch_size)
        return jax.tree.map(lambda a: a[chosen], rows)

    return sample_fn


def holds_examples(given: Any) -> bool:
    """Whether data is an array of examples, or a mapping of such, and not batches of them."""
    leaves = list(given.values()) if isinstance(given, Mapping) else [given]
    return bool(leaves) and all(isinstance(a, np.ndarray | jax.Array) for a in leaves)


def _beside_each_other(arrays: tuple[Any, ...]) -> bool:
    """Whether these are arrays of the same examples, and no batches alike."""
    shapes = {tuple(getattr(a, "shape", ())) for a in arrays}
    return len(shapes) > 1 and () not in shapes and len({shape[:1] for shape in shapes}) == 1


def source(sample_fn: Any, ragged: str = "drop", batch_size: int | None = None) -> Any:
    """A sampler (or None) as it is, an iterable as `Batches`.

    Args:
      ragged: "drop", "join" or "refuse", see `apd_jax.decompose`; of iterables.
      batch_size: of "join".
    Raises:
      InputError: it is neither.
    """
    one_of("ragged", ragged, RAGGED)
    if inspect.isgeneratorfunction(sample_fn):
        sample_fn = Restarted(sample_fn)
    elif sample_fn is None or callable(sample_fn) or isinstance(sample_fn, Batches):
        return sample_fn
    if not hasattr(sample_fn, "__iter__"):
        raise InputError(
            "sample_fn must be a function (rng, step) -> batch, or an iterable of batches; got a "
            f"{type(sample_fn).__name__}."
        )
    if isinstance(sample_fn, tuple) and _beside_each_other(sample_fn):
        raise InputError(
            "sample_fn is a tuple of arrays of different shapes with a row per example, which "
            "would be read as batches; of (inputs, labels) give the inputs alone, several inputs "
            "as a dict."
        )
    if ragged == "join" and batch_size is None:
        raise InputError("ragged = 'join' cuts batches of batch_size; give settings that say it.")
    if ragged != "join":
        return Batches(sample_fn, drop=ragged == "drop")
    once = isinstance(sample_fn, Iterator)
    return Batches(
        cut_anew(sample_fn, batch_size)
        if once
        else Restarted(lambda: cut_anew(sample_fn, batch_size))
    )


def paired(here: Any, elsewhere: Any) -> Any:
    """Both streams of data as one: batches {"here": ..., "elsewhere": ...}.

    Raises:
      InputError: one is a function and the other an iterable.
    """
    if isinstance(here, Batches) != isinstance(elsewhere, Batches):
        raise InputError(
            "sample_fn and elsewhere must both be functions (rng, step) -> batch, or both be "
            "iterables."
        )
    if isinstance(here, Batches):
        return Batches(_Zipped(here, elsewhere))
    return lambda rng, step: {
        "here": here(rng, step),
        "elsewhere": elsewhere(jax.random.fold_in(rng, _ELSEWHERE), step),
    }


class _Zipped:
    """Two streams of batches side by side, from their beginning at every iteration."""

    def __init__(self, here: Batches, elsewhere: Batches):
        self._streams = (here, elsewhere)

    def __iter__(self) -> Iterator[PyTree]:
        for here, elsewhere in zip(*(s.since(0) for s in self._streams), strict=False):
            yield {"here": here, "elsewhere": elsewhere}


def as_sampler(source: Callable | Batches, num_batches: int) -> Callable[..., PyTree]:
    """A sampler as it is; of an iterable one that goes through its first batches.

    Of these, no more than fit into MAX_STACK_BYTES.
    """
    if not isinstance(source, Batches):
        return source
    count, (batches,) = next(calls(source, 0, num_batches, num_batches))
    rows = jax.tree.map(jnp.asarray, batches)
    return lambda rng, step: jax.tree.map(lambda a: a[step % count], rows)


def shapes(sample_fn: Callable | Batches | None) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch.

    A sampler is not run for it; of an iterable the first batch is pulled, and kept for step 0.

    Raises:
      InputError: there is no data, or its function does not take (rng, step).
    """
    if sample_fn is None:
        raise InputError(
            "there is no data to train on; give sample_fn, a function (rng, step) -> batch or an "
            "iterable of batches."
        )
    if isinstance(sample_fn, Batches):
        return sample_fn.shapes
    try:
        inspect.signature(sample_fn).bind("rng", "step")
    except ValueError:
        pass  # a callable without a signature
    except TypeError as error:
        raise InputError(
            f"sample_fn must be a function (rng, step) -> batch: called so, {error}."
        ) from None
    try:
        found = jax.eval_shape(sample_fn, jax.random.key(0), jnp.zeros((), jnp.int32))
    except jax.errors.JAXTypeError as error:
        raise InputError(
            "sample_fn must work on a key and a step that jax traces, and fails there "
            f"({first_line(error)}); take slices by jax.lax.dynamic_slice, or give an iterable."
        ) from error
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"sample_fn fails on a key and a step: {first_line(error)}") from error
    for path, leaf in jax.tree_util.tree_flatten_with_path(found)[0]:
        if not leaf.ndim or not leaf.shape[0]:
            what = "no example" if leaf.ndim else "a single number"
            raise InputError(
                f"sample_fn must give arrays that lead with the examples; {named(path)} holds "
                f"{what}."
            )
    if not jax.tree.leaves(found):
        raise InputError("sample_fn gives no array; give a batch of inputs.")
    return found


def always_alike(sample_fn: Callable | Batches) -> bool:
    """Whether a sampler gives the same batch whatever it is given, as far as its jaxpr says."""
    if isinstance(sample_fn, Batches):
        return False
    shapes(sample_fn)  # says what is wrong with it
    jaxpr = jax.make_jaxpr(sample_fn)(jax.random.key(0), jnp.zeros((), jnp.int32)).jaxpr
    return not reaching_outputs(jaxpr).intersection(jaxpr.invars)


def calls(
    sample_fn: Callable | Batches | None, start: int, num_steps: int, steps_per_call: int
) -> Iterator[tuple[int, tuple[PyTree, ...]]]:
    """The XLA calls from step `start` to `num_steps`: (number of steps, the batches it is given).

    The batches are () for a sampler, and (batches,) for an iterable, with leaves [steps, B, ...]:
    no more than fit into MAX_STACK_BYTES.
    """
    stream = None
    if isinstance(sample_fn, Batches):
        num_bytes = sum(
            math.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(sample_fn.shapes)
        )
        steps_per_call = max(1, min(steps_per_call, MAX_STACK_BYTES // max(1, num_bytes)))
        stream = sample_fn.since(start)
    for first in range(start, num_steps, steps_per_call):
        length = min(steps_per_call, num_steps - first)
        yield length, () if stream is None else (_stacked(stream, length, shapes(sample_fn)),)


def _stacked(stream: Iterator[PyTree], length: int, shapes: PyTree) -> PyTree:
    """The next batches along a new leading axis.

    Each is copied before the next is pulled: a loader may use its memory again.
    """
    stack = jax.tree.map(lambda s: np.empty((length, *s.shape), s.dtype), shapes)
    for i, batch in zip(range(length), stream, strict=False):
        jax.tree.map(lambda into, a, i=i: np.copyto(into[i], a), stack, batch)
    return stack
