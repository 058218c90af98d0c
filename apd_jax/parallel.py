"""Running the step on devices: the same per-device program by `jax.pmap` on one device or many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from apd_jax import step as step_lib
from apd_jax.errors import InputError

AXIS = "data"
Devices = Sequence[Any]  # of jax.Device


def check_batch(batch_size: int, num_devices: int) -> None:
    """Raises InputError if the batch cannot be split evenly."""
    if batch_size % num_devices:
        raise InputError(f"batch_size = {batch_size} is not divisible by the {num_devices} devices; choose a multiple of {num_devices}.")


def pmap_steps(step: Callable, num_steps: int, devices: Devices) -> Callable:
    """`num_steps` steps in one XLA call, data parallel over `devices`.

    Args:
      step: the per-device step, built with axis_name = `AXIS`.
    Returns: (replicated state, params, key) -> (replicated state, metrics of one device, stacked over steps). The state's
      buffers are donated.
    """
    program = jax.pmap(step_lib.scan_steps(step, num_steps), axis_name=AXIS, in_axes=(0, None, None), donate_argnums=0, devices=devices)

    def run(state: PyTree, params: PyTree, key: jax.Array):
        state, metrics = program(state, params, key)
        return state, jax.tree.map(lambda a: a[0], metrics)

    return run


def replicate(tree: PyTree, devices: Devices) -> PyTree:
    """A copy per device along a new leading axis."""
    mesh = jax.sharding.Mesh(devices, (AXIS,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))
    return jax.tree.map(lambda a: jax.device_put(jax.numpy.broadcast_to(a[None], (len(devices), *a.shape)), sharding), tree)


def unreplicate(tree: PyTree) -> PyTree:
    """The first device's copy, on the host."""
    return jax.device_get(jax.tree.map(lambda a: a[0], tree))
