"""Running the step on devices: one per-device program by `jax.pmap`, of one process or several.

With several processes (one per machine, or per GPU), every process runs the same Python. Process 0
alone reads and writes files and prints. What it read reaches the others by `from_primary`, so they
need not see its files.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from apd_jax.errors import InputError
from apd_jax.train import step as step_lib

AXIS = "data"
Devices = Sequence[Any]  # of jax.Device

_LONGEST_WAIT_S = 24 * 3600  # for what process 0 does alone: a target's training, an evaluation
_wait_number = itertools.count()


def whole(array: jax.Array) -> jax.Array:
    """An array that is split over devices as one on this process's first device.

    Of several processes every one must call this.
    """
    if not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return jax.device_put(array, jax.local_devices()[0])


def initialize() -> None:
    """Joins the processes that were started together, if any were.

    Call it before anything uses a device. JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID say who they are. Under srun with several tasks, and where
    APD_JAX_MULTIHOST=1 (TPU pods), JAX finds these out itself. With none of them set nothing
    happens.

    Raises:
      InputError: the first of the three variables is set without the others.
    """
    env = os.environ
    if "JAX_COORDINATOR_ADDRESS" in env:
        try:
            num, index = int(env["JAX_NUM_PROCESSES"]), int(env["JAX_PROCESS_ID"])
        except (KeyError, ValueError):
            raise InputError(
                "JAX_COORDINATOR_ADDRESS is set; set JAX_NUM_PROCESSES and JAX_PROCESS_ID to "
                "numbers, or unset it."
            ) from None
        where = {
            "num_processes": num,
            "process_id": index,
            "cluster_detection_method": "deactivate",
        }
    elif env.get("APD_JAX_MULTIHOST") == "1" or int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        where = {}
    else:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # The service would take SIGTERM away from `train.loop`, and from everything else.
    jax.config.update("jax_enable_preemption_service", False)
    # They end together, unless one has failed.
    jax.distributed.initialize(**where, shutdown_timeout_seconds=60)
    sys.excepthook = _leave_at_once


def _leave_at_once(*exception: Any) -> None:
    """A process that crashes must not wait for the others at exit: they wait for it in the step."""
    try:
        sys.__excepthook__(*exception)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(1)


def is_primary() -> bool:
    """Whether this process is the one that reads, writes and prints."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def global_devices() -> Devices:
    """The devices of all processes.

    Raises:
      InputError: the processes do not know of each other.
    """
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise InputError(
            f"there are {jax.process_count()} processes that are not joined; start them as "
            "launch/README.md says."
        )
    return jax.devices()


def from_primary(fn: Callable[[], Any], like: PyTree = None) -> Any:
    """What `fn()` returns on process 0, on every process.

    The others wait for it, however long it takes.

    Args:
      fn: called on process 0 only; may use files and local devices.
      like: pytree with the shapes and dtypes of what it returns.
    Raises:
      What fn raised, on process 0. On the others InputError if it was one, otherwise RuntimeError.
    """
    if not jax.distributed.is_initialized():
        return fn()
    value, error = jax.tree.map(lambda a: np.zeros(np.shape(a), jnp.result_type(a)), like), None
    if is_primary():
        try:
            value = fn()
        except BaseException as caught:  # nor may the others go on waiting after a Ctrl-C
            error = caught
    import orbax.checkpoint as ocp  # here, because it takes a third of a second

    # Not by a collective of the devices, which would give up waiting sooner.
    ocp.multihost.get_barrier_sync_fn()(
        key=f"apd_jax_{next(_wait_number)}", timeout_ms=1000 * _LONGEST_WAIT_S
    )
    if outcome := largest(0 if error is None else 1 if isinstance(error, InputError) else 2):
        raise error or (InputError if outcome == 1 else RuntimeError)(
            "process 0 has stopped; its message says why."
        )
    return jax.tree.map(jnp.asarray, multihost_utils.broadcast_one_to_all(value))


def largest(value: int) -> int:
    """The largest value that a process gives. Every process must call it.

    Cost: one number per process.
    """
    if not jax.distributed.is_initialized():
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def check_batch(batch_size: int, num_devices: int) -> None:
    """Raises InputError if the batch cannot be split evenly."""
    if batch_size % num_devices:
        raise InputError(
            f"batch_size = {batch_size} is not divisible by the {num_devices} devices; choose a "
            f"multiple of {num_devices}."
        )


def pmap_steps(step: Callable, num_steps: int, devices: Devices) -> Callable:
    """`num_steps` steps in one XLA call, data parallel over `devices`.

    Args:
      step: the per-device step, built with axis_name = `AXIS`.
      devices: of all processes, in the same order on each.
    Returns: (replicated state, params, key) -> (replicated state, metrics of one device, stacked
      over steps). The state's buffers are donated. Batches from the host come as one more argument,
      leaves [num_steps, B, ...], the same in every process. The step's `settings` are passed on.
    """
    program = pmap_program(step, num_steps, devices)

    def run(
        state: PyTree, params: PyTree, key: jax.Array, *batches: PyTree, settings: PyTree = None
    ):
        state, metrics = program(state, params, key, batches, settings)
        return state, jax.tree.map(lambda a: _own(a).reshape(a.shape[1:]), metrics)

    return run


def pmap_program(step: Callable, num_steps: int, devices: Devices) -> Any:
    """The mapped function of `pmap_steps`, to be called or lowered.

    (state, params, key, batches, settings) -> (state, metrics)
    """
    many = step_lib.scan_steps(step, num_steps)
    return jax.pmap(
        lambda state, params, key, batches, settings: many(
            state, params, key, *batches, settings=settings
        ),
        axis_name=AXIS,
        in_axes=(0, None, None, None, None),
        donate_argnums=0,
        devices=devices,
    )


def replicate(tree: PyTree, devices: Devices) -> PyTree:
    """A copy per device along a new leading axis, as `jax.pmap` takes them.

    Of those `devices` that are this process's own. By way of the host, so that no array's shape
    needs a program of its own.
    """
    local = [device for device in devices if device.process_index == jax.process_index()]
    mesh = jax.sharding.Mesh(local, (AXIS,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))

    def copies(a: Any) -> jax.Array:
        row = np.asarray(a)[None]
        each = [jax.device_put(row, device, may_alias=False) for device in local]
        shape = (len(local), *row.shape[1:])
        return jax.make_array_from_single_device_arrays(shape, sharding, each)

    return jax.tree.map(copies, tree)


def unreplicate(tree: PyTree) -> PyTree:
    """The first device's copy, on the host."""
    return jax.tree.map(lambda a: a[0], jax.device_get(jax.tree.map(_own, tree)))


def _own(a: jax.Array) -> jax.Array:
    """This process's first part of an array that is split over devices."""
    return a.addressable_data(0)
