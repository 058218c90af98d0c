"""Where batches come from: a sampler on the device, arrays in memory, or any iterable of batches.

Shapes: a batch is a pytree of arrays whose first axis is B = `batch_size`, the examples of one step
over *all* devices.

  sampler    a pure function (rng, step) -> batch, run inside the train step.
  arrays     `from_arrays` makes a sampler of them.
  iterable   a list, a generator, a data loader: pulled on the host, several steps at a time, while
             the devices work.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from apd_jax.components import path_name
from apd_jax.errors import InputError, first_line

# Of the batches of one XLA call; those of the next call are pulled beside them.
MAX_STACK_BYTES = 2**28
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
        lambda path, a: _numbers(a, f"arrays leaf {_named(path)}"), arrays
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


class Batches:
    """An iterable of batches as one endless stream: where it ends, it is begun again.

    A resumed run begins it from its start and drops the batches that the steps before have used.
    If it yields the same batches again, the run ends bit for bit as if it had never been stopped.
    Of several processes, every one must iterate over the same batches; each device takes its slice
    of them. All instances see the same batches.

    Batches may be numpy or jax arrays, or what numpy can read, such as torch tensors. What they
    hold is copied at once.
    """

    def __init__(self, iterable: Iterable[PyTree]):
        self._iterable = iterable
        self._begun: Iterator[PyTree] | None = None  # whose first batch `shapes` has looked at

    @property
    def once(self) -> bool:
        """Whether it is an iterator, which cannot be begun again."""
        return isinstance(self._iterable, Iterator)

    @functools.cached_property
    def first(self) -> PyTree[np.ndarray]:
        """The first batch; it is kept for step 0 too.

        Raises:
          InputError: there is none, or it holds something else than numbers.
        """
        iterator = iter(self._iterable)
        try:
            first = jax.tree.map(np.copy, _host_arrays(next(iterator), 0))
        except StopIteration:
            raise InputError(
                "the data has no batch at all; give an iterable that has not been used up."
            ) from None
        self._begun = itertools.chain([first], iterator)
        return first

    @property
    def shapes(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the first batch, which all others must have."""
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), self.first)

    def since(self, step: int) -> Iterator[PyTree]:
        """The batches of steps `step`, `step` + 1, ..., without end.

        They are numpy arrays that the iterable may own.

        Raises:
          InputError: a batch that differs from the first one, or an end after which it cannot be
            begun again.
        """
        shapes = self.shapes  # which may begin it
        begun, self._begun = self._begun, None
        if begun is None:
            begun = iter(self._iterable)
            if begun is self._iterable:
                raise InputError(
                    "this iterator of batches was begun by an earlier run; give a new one, or a "
                    "list or loader."
                )
        for number in itertools.count():
            try:
                batch = next(begun)
            except StopIteration:
                begun = iter(self._iterable)
                batch = None if begun is self._iterable else next(begun, None)
                if batch is None:
                    raise InputError(
                        f"the data ended before step {number + 1} and cannot be begun again; give "
                        "more batches, or a list or loader."
                    ) from None
            if number >= step:
                yield _same(_host_arrays(batch, number), shapes, number)


def source(sample_fn: Any) -> Any:
    """A sampler (or None) as it is, an iterable as `Batches`.

    Raises:
      InputError: it is neither.
    """
    if inspect.isgeneratorfunction(sample_fn):
        return Batches(_Called(sample_fn))
    if sample_fn is None or callable(sample_fn) or isinstance(sample_fn, Batches):
        return sample_fn
    if hasattr(sample_fn, "__iter__"):
        return Batches(sample_fn)
    raise InputError(
        "sample_fn must be a function (rng, step) -> batch, or an iterable of batches; got a "
        f"{type(sample_fn).__name__}."
    )


@dataclasses.dataclass(frozen=True)
class _Called:
    """A generator function as an iterable that can be begun again."""

    fn: Callable[[], Iterator[PyTree]]

    def __iter__(self) -> Iterator[PyTree]:
        return self.fn()


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
                f"sample_fn must give arrays that lead with the examples; {_named(path)} holds "
                f"{what}."
            )
    if not jax.tree.leaves(found):
        raise InputError("sample_fn gives no array; give a batch of inputs.")
    return found


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


def _host_arrays(batch: PyTree, number: int) -> PyTree:
    return jax.tree_util.tree_map_with_path(
        lambda path, a: _numbers(a, f"batch {number}, leaf {_named(path)}"), batch
    )


def _numbers(a: Any, what: str) -> np.ndarray:
    """`a` as a numpy array of the dtype that JAX gives it.

    Raises:
      InputError: it does not hold numbers.
    """
    try:
        array = np.asarray(a)
    except Exception as error:
        raise InputError(
            f"{what} is a {type(a).__name__}, which is no array of numbers."
        ) from error
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise InputError(f"{what} has dtype {array.dtype}; give arrays of numbers.")
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)


def _same(batch: PyTree, shapes: PyTree, number: int) -> PyTree:
    """The batch, if it is like the first one."""
    if jax.tree.structure(batch) != jax.tree.structure(shapes):
        raise InputError(
            f"batch {number} is {jax.tree.structure(batch)}, but the first one was "
            f"{jax.tree.structure(shapes)}; make them equal."
        )
    for (path, a), s in zip(
        jax.tree_util.tree_flatten_with_path(batch)[0], jax.tree.leaves(shapes), strict=True
    ):
        if (a.shape, a.dtype) != (s.shape, s.dtype):
            raise InputError(
                f"batch {number}, leaf {_named(path)} is {a.dtype}{list(a.shape)}, but the first "
                f"one was {s.dtype}{list(s.shape)}; give equal batches, and drop what is left over "
                "at the end of an epoch."
            )
    return batch


def _named(path: tuple[Any, ...]) -> str:
    return repr(path_name(path)) if path else "itself"
