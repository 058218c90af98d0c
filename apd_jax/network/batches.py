"""An iterable of batches as one endless stream, whatever it is and wherever it ends."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from apd_jax.components import path_name
from apd_jax.errors import InputError, first_line

log = logging.getLogger(__name__)

MAX_KEPT_BYTES = 2**28  # of the batches of an iterator, which cannot be begun again


class Batches:
    """An iterable of batches as one endless stream: where it ends, it is begun again.

    A resumed run begins it from its start and drops the batches that the steps before have used.
    If it yields the same batches again, the run ends bit for bit as if it had never been stopped.
    Of several processes, every one must iterate over the same batches; each device takes its slice
    of them. All instances see the same batches.

    Batches may be numpy or jax arrays, or what numpy can read, such as torch tensors. What they
    hold is copied at once. A list is looked through before the first step. An iterator cannot be
    begun again: its batches are kept as they are read, up to MAX_KEPT_BYTES.

    Args:
      drop: whether batches with fewer examples than the first are left out, or refused.
    """

    def __init__(self, iterable: Iterable[PyTree], drop: bool = True):
        self._iterable, self._drop, self._warned = iterable, drop, False
        self._begun: Iterator[PyTree] | None = None  # whose first batch `shapes` has looked at

    @property
    def once(self) -> bool:
        """Whether it is an iterator, which cannot be begun again."""
        return isinstance(self._iterable, Iterator)

    @functools.cached_property
    def first(self) -> PyTree[np.ndarray]:
        """The first batch; it is kept for step 0 too.

        Raises:
          InputError: there is none, or it holds something else than numbers; of a list, one of the
            others does not fit to it.
        """
        iterator = iter(self._iterable)
        try:
            first = jax.tree.map(np.copy, _host_arrays(next(iterator), 0))
        except StopIteration:
            raise InputError(
                "the data has no batch at all; give an iterable that has not been used up."
            ) from None
        self._begun = itertools.chain([first], iterator)
        if isinstance(self._iterable, Sequence):
            for number, batch in enumerate(self._iterable):
                self._fits(_host_arrays(batch, number), _shapes(first), number)
        return first

    @property
    def shapes(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the first batch, which all others must have."""
        return _shapes(self.first)

    def looks(self, count: int) -> list[PyTree]:
        """The first `count` batches of one pass, on the host, fewer where there are fewer.

        Of an iterator, which cannot be begun again, the first alone.

        Raises:
          InputError: a batch that differs from the first one.
        """
        first = self.first
        if self.once or count == 1:
            return [first]
        found: list[PyTree] = []
        for number, batch in enumerate(_host_arrays(b, i) for i, b in enumerate(self._iterable)):
            if len(found) == count:
                break
            if self._fits(batch, _shapes(first), number):
                found.append(jax.tree.map(np.copy, batch))
        return found

    def since(self, step: int) -> Iterator[PyTree]:
        """The batches of steps `step`, `step` + 1, ..., without end.

        They are numpy arrays that the iterable may own.

        Raises:
          InputError: a batch that differs from the first one, or an end after which it cannot be
            begun again.
        """
        shapes, used = self.shapes, 0  # which may begin it
        begun, self._begun = self._begun, None
        if begun is None:
            begun = iter(self._iterable)
            if begun is self._iterable:
                raise InputError(
                    "this iterator of batches was begun by an earlier run; give a new one, or a "
                    "list or loader."
                )
        for number, batch in enumerate(self._again_and_again(begun)):
            if batch is None:
                raise InputError(
                    f"the data ended before step {used + 1} and cannot be begun again; give more "
                    "batches, or a list or loader."
                )
            if self._fits(batch, shapes, number):
                if used >= step:
                    yield batch
                used += 1

    def _again_and_again(self, begun: Iterator[PyTree]) -> Iterator[PyTree]:
        """All batches, pass by pass; None after a pass without any."""
        kept: list[PyTree] | None = [] if self.once else None
        size, passes = 0, itertools.count()
        for number in passes:
            empty = True
            for i, given in enumerate(begun):
                batch, empty = _host_arrays(given, i), False
                if kept is not None and number == 0:
                    size += sum(a.nbytes for a in jax.tree.leaves(batch))
                    kept.append(jax.tree.map(np.copy, batch))
                    kept = kept if size <= MAX_KEPT_BYTES else None
                yield batch
            begun = iter(self._iterable if kept is None else kept)
            if empty or begun is self._iterable:
                yield None

    def _fits(self, batch: PyTree, shapes: PyTree, number: int) -> bool:
        """Whether a batch is used. Raises InputError where it is refused."""
        if not (self._drop and _fewer(batch, shapes)):
            _same(batch, shapes, number)
            return True
        if not self._warned:
            self._warned = True
            log.warning(
                "batch %d has fewer examples than the first (%d instead of %d): left out, as are "
                "others like it; ragged='join' would use them.",
                number,
                *(jax.tree.leaves(tree)[0].shape[0] for tree in (batch, shapes)),
            )
        return False


@dataclasses.dataclass(frozen=True)
class Restarted:
    """A generator function as an iterable that can be begun again."""

    fn: Callable[[], Iterator[PyTree]]

    def __iter__(self) -> Iterator[PyTree]:
        return self.fn()


def cut_anew(batches: Iterable[PyTree], batch_size: int) -> Iterator[PyTree]:
    """The examples of all batches in their order, as batches of this size; not the rest."""
    left: list[PyTree] = []
    for number, batch in enumerate(batches):
        left.append(jax.tree.map(np.copy, _host_arrays(batch, number)))
        sizes = [jax.tree.leaves(one)[0].shape[:1] for one in left]
        if () in sizes:
            raise InputError(f"batch {number} holds a single number; give arrays of examples.")
        if sum(size for (size,) in sizes) < batch_size:
            continue
        try:
            whole = jax.tree.map(lambda *a: np.concatenate(a), *left)
        except ValueError as error:
            raise InputError(
                f"batch {number} cannot be joined with those before: {first_line(error)}."
            ) from error
        size = jax.tree.leaves(whole)[0].shape[0]
        for first in range(0, size - batch_size + 1, batch_size):
            yield jax.tree.map(lambda a, i=first: a[i : i + batch_size], whole)
        rest = size % batch_size
        left = [jax.tree.map(lambda a, n=rest: a[len(a) - n :], whole)] if rest else []


def _host_arrays(batch: PyTree, number: int) -> PyTree:
    return jax.tree_util.tree_map_with_path(
        lambda path, a: numbers(a, f"batch {number}, leaf {named(path)}"), batch
    )


def numbers(a: Any, what: str) -> np.ndarray:
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


def _shapes(batch: PyTree) -> PyTree[jax.ShapeDtypeStruct]:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch)


def _fewer(batch: PyTree, shapes: PyTree) -> bool:
    """Whether a batch differs from the first by fewer examples alone."""
    leaves, wanted = jax.tree.leaves(batch), jax.tree.leaves(shapes)
    if (
        jax.tree.structure(batch) != jax.tree.structure(shapes)
        or len({a.shape[:1] for a in leaves}) > 1
        or not all(a.ndim for a in leaves)
    ):
        return False
    alike = all(
        (a.dtype, a.shape[1:]) == (s.dtype, s.shape[1:])
        for a, s in zip(leaves, wanted, strict=True)
    )
    return bool(leaves) and alike and len(leaves[0]) < wanted[0].shape[0]


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
                f"batch {number}, leaf {named(path)} is {a.dtype}{list(a.shape)}, but the first "
                f"one was {s.dtype}{list(s.shape)}; give equal batches, or say by ragged = 'drop' "
                "or 'join' what becomes of the rest of an epoch."
            )
    return batch


def named(path: tuple[Any, ...]) -> str:
    return repr(path_name(path)) if path else "itself"
