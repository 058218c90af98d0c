"""Orbax checkpoints of a TrainState: asynchronous, atomic, a few kept, and a torn one skipped.

What is on disk is the whole state as plain arrays, so a run goes on with any number of devices and
component shards. A state of which every device has a copy is written and read by one process alone.
One that is split over devices is written and read by all of them together, each with its own part.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
from etils import epath
from jaxtyping import PyTree

from apd_jax.errors import InputError
from apd_jax.paths import run_folder, user_path
from apd_jax.train import parallel

# Orbax takes a third of a second to import: what uses it imports it.
if TYPE_CHECKING:
    from orbax.checkpoint import CheckpointManager
else:
    CheckpointManager = Any

log = logging.getLogger(__name__)
log.setLevel(logging.WARNING)  # whatever level the root logger is set to


def open_manager(
    folder: epath.PathLike, keep: int = 2, *, together: bool = False
) -> CheckpointManager:
    """The checkpoints of one run; the `keep` newest ones are kept.

    together: all processes have opened it and use it alike.
    """
    folder = run_folder(folder).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"  # said before the first step, not at the first checkpoint
        probe.touch()
        probe.unlink(missing_ok=True)  # several processes do this at once
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}); choose another workdir."
        ) from error
    return _manager(
        folder,
        together,
        max_to_keep=keep,
        enable_async_checkpointing=True,
        cleanup_tmp_directories=True,
    )


def _manager(folder: epath.Path, together: bool, **options: Any) -> CheckpointManager:
    """One that this process uses alone, whether or not there are others, or that all use."""
    import orbax.checkpoint as ocp

    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    who = ocp.options.MultiprocessingOptions() if together else alone
    # With a handler: else orbax guesses the layout from the newest step, which may be torn.
    return ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(create=False, multiprocessing_options=who, **options),
        item_handlers=ocp.StandardCheckpointHandler(),
    )


def steps(folder: epath.Path) -> list[int]:
    """The steps that have a checkpoint, read or torn."""
    if not folder.is_dir():
        return []
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()]


def save(manager: CheckpointManager, step: int, state: PyTree) -> None:
    """Starts writing `state`; returns before it is on disk.

    Raises:
      InputError: this or an earlier one could not be written.
    """
    import orbax.checkpoint as ocp

    with _told_if_unwritten(manager):
        if step not in manager.all_steps():
            manager.save(step, args=ocp.args.StandardSave(state))


def check(manager: CheckpointManager) -> None:
    """Raises InputError where a checkpoint that was being written could not be."""
    with _told_if_unwritten(manager):
        manager.check_for_errors()


def wait(manager: CheckpointManager) -> None:
    """Until all that was saved is on disk.

    Raises:
      InputError: a checkpoint could not be written.
    """
    with _told_if_unwritten(manager):
        manager.wait_until_finished()


@contextlib.contextmanager
def closing(manager: CheckpointManager) -> Iterator[None]:
    """At the end waits for what was saved, and closes; after another error it only closes.

    Raises:
      InputError: a checkpoint could not be written.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # what it says comes from the first error, or is less
            manager.close()
        raise
    with _told_if_unwritten(manager):
        manager.close()


@contextlib.contextmanager
def _told_if_unwritten(manager: CheckpointManager) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a full disk has many types, of orbax, tensorstore and the system
        folder = epath.Path(manager.directory)
        there = steps(folder)
        kept = f"step {max(there)} is kept" if there else "none is there"
        raise InputError(
            f"a checkpoint cannot be written to {folder} ({_reason(error)}); {kept}; make room, "
            "and run the same again."
        ) from error


def _reason(error: Exception) -> str:
    """What the system said, where it can be found; else the first words of the error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    if said := re.search(r"([^:]+) \[os_error_code", str(error)):  # tensorstore's form
        return said[1].strip()
    return " ".join(str(error).split())[:200] or type(error).__name__


def restore_latest(
    manager: CheckpointManager, like: PyTree, *, together: bool = False
) -> tuple[int, PyTree] | None:
    """The newest checkpoint that can be read, as (step, state); None where there is none at all.

    A torn one is skipped, with a warning, and deleted once an older one was read, so that training
    can write its step anew.

    Args:
      like: a state of the same structure, shapes and dtypes (abstract or not); what is read is
        placed as it is.
      together: as the manager was opened; a checkpoint counts if every process could read its part.
    Raises:
      InputError: there are checkpoints, but none can be read.
    """
    found = _newest_readable(manager, like, together=together)
    if found is not None:
        for torn in [step for step in manager.all_steps() if step > found[0]]:
            manager.delete(torn)
    return found


def read(
    folder: epath.PathLike, like: PyTree = None, *, until: int | None = None
) -> tuple[dict[int, int], int, Any]:
    """What a checkpoint folder holds: {step: bytes on disk}, the newest readable step, its state.

    Changes nothing: a run may be writing.

    Args:
      like: as in `restore_latest`; None gives nested dicts of arrays, without knowing the network.
      until: checkpoints of later steps are passed over.

    Raises:
      InputError: no such folder, no checkpoint in it, or none that can be read.
    """
    folder = user_path(folder).absolute()
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist; let the run write its first checkpoint.")
    with contextlib.closing(_manager(folder, together=False, read_only=True)) as manager:
        found = _newest_readable(manager, like, until)
        if found is None:
            raise InputError(f"{folder} holds no checkpoint yet; let the run write its first one.")
        sizes = {step: _bytes(folder / str(step)) for step in manager.all_steps()}
    return dict(sorted(sizes.items())), *found


def _abstract(like: PyTree) -> PyTree:
    """Shapes, dtypes and places.

    What has no place of its own goes to this process's first device, wherever it was when it was
    saved.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def one(a: Any) -> jax.ShapeDtypeStruct:
        placed = isinstance(a, jax.Array | jax.ShapeDtypeStruct) and a.sharding is not None
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding if placed else here)

    return jax.tree.map(one, like)


def _newest_readable(
    manager: CheckpointManager,
    like: PyTree,
    until: int | None = None,
    *,
    together: bool = False,
) -> tuple[int, Any] | None:
    import orbax.checkpoint as ocp

    there = sorted(
        [step for step in manager.all_steps() if until is None or step <= until], reverse=True
    )
    for step in there:
        state, reason = None, ""
        try:
            with _abandoned_reads_unheard():
                wanted = manager.item_metadata(step).tree if like is None else like
                state = manager.restore(step, args=ocp.args.StandardRestore(_abstract(wanted)))
        except Exception as error:  # orbax and tensorstore raise many types for a damaged folder
            reason = _reason(error)
        unread = bool(reason)
        if together:
            unread = bool(parallel.largest(unread))
        if not unread:
            return step, state
        if reason:
            log.warning(
                "checkpoint %d in %s cannot be read (%s); trying the one before.",
                step,
                manager.directory,
                reason,
            )
    if there:
        raise InputError(
            f"none of the checkpoints {there} in {manager.directory} can be read; delete that "
            "folder to start the decomposition again."
        )
    return None


@contextlib.contextmanager
def _abandoned_reads_unheard() -> Iterator[None]:
    """Drops what Python would print of orbax's other reads when one of them fails.

    Each reports to an event loop that is gone by then.
    """
    hook = sys.unraisablehook
    sys.unraisablehook = lambda args: None if _of_closed_loop(args) else hook(args)
    try:
        yield
    except Exception:
        time.sleep(0.2)  # for the last of them
        raise
    finally:
        sys.unraisablehook = hook


def _of_closed_loop(args: Any) -> bool:
    """Whether this exception was raised where asyncio refuses work for a loop that is closed."""
    tb = args.exc_traceback
    while tb is not None and tb.tb_next is not None:
        tb = tb.tb_next
    refusing = getattr(asyncio.BaseEventLoop, "_check_closed", None)  # private: may be renamed
    return tb is not None and tb.tb_frame.f_code is getattr(refusing, "__code__", None)


def _bytes(path: epath.Path) -> int:
    return sum(_bytes(child) for child in path.iterdir()) if path.is_dir() else path.stat().length
