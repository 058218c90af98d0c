"""Where the train state lives, and the program that steps it there.

One per-device step, two ways to map it over devices:

Copies  `jax.pmap`: every device holds the whole state and a slice of the batch.
Shards  `jax.shard_map` on a mesh ("data", "component") of D x M devices: each holds C/M components
        with their optimizer state. The devices of one component shard have the same state and D
        slices of the batch; those of one slice have all components.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from apd_jax import components as components_lib
from apd_jax.components import Components, Factors
from apd_jax.errors import InputError
from apd_jax.methods.base import Method
from apd_jax.methods.optimizers import Trained
from apd_jax.train import parallel
from apd_jax.train import step as step_lib
from apd_jax.train.parallel import AXIS, Devices
from apd_jax.train.state import TrainState

COMPONENT_AXIS = "component"


def arrange(config: Method, devices: Devices) -> Copies | Shards:
    """How `config.num_component_shards` says.

    Raises:
      InputError: the devices do not make a mesh, or the batch cannot be split evenly.
    """
    M = config.num_component_shards
    if len(devices) % M:
        raise InputError(
            f"num_component_shards = {M} does not divide the {len(devices)} devices; choose a "
            f"divisor of {len(devices)}."
        )
    parallel.check_batch(config.batch_size, len(devices) // M)
    return (
        Copies(devices)
        if M == 1
        else Shards(Mesh(np.asarray(devices).reshape(-1, M), (AXIS, COMPONENT_AXIS)))
    )


@dataclasses.dataclass(frozen=True)
class Copies:
    """A copy of everything on every device."""

    devices: Devices

    @property
    def axes(self) -> dict[str, str]:
        """What `step.make_step` is told."""
        return {"axis_name": AXIS}

    @property
    def shape(self) -> dict[str, int]:
        """Devices along each axis."""
        return {AXIS: len(self.devices)}

    def make(self, init: Callable, *args: Any) -> PyTree:
        """The state that `init(*args)` gives, before `put`."""
        return jax.jit(init)(*args)

    def put(self, state: PyTree) -> PyTree:
        return parallel.replicate(state, self.devices)

    def get(self, state: PyTree) -> PyTree:
        """The whole of it, on this process's host."""
        return parallel.unreplicate(state)

    def share(self, tree: PyTree) -> PyTree:
        """What is the same on all devices, as `steps` takes it."""
        return tree

    def program(self, step: Callable, num_steps: int) -> Any:
        """The mapped function (state, params, key, batches, settings), to be called or lowered."""
        return parallel.pmap_program(step, num_steps, self.devices)

    def steps(self, step: Callable, num_steps: int) -> Callable:
        """(state, params, key, *batches, settings) -> (state, metrics stacked over steps).

        The state's buffers are donated.
        """
        return parallel.pmap_steps(step, num_steps, self.devices)


@dataclasses.dataclass(frozen=True)
class Shards:
    """Components split over one axis of the mesh, the batch over the other.

    A state is of global arrays, the same as on one device.
    """

    mesh: Mesh

    @property
    def axes(self) -> dict[str, str]:
        return {"axis_name": AXIS, "component_axis": COMPONENT_AXIS}

    @property
    def shape(self) -> dict[str, int]:
        return dict(self.mesh.shape)

    def make(self, init: Callable, *args: Any) -> PyTree:
        """No device or host holds the whole of it. The random draws are those of one device."""
        shardings = self._shardings(jax.eval_shape(init, *args))
        return jax.jit(init, out_shardings=shardings)(*self.share(args))

    def put(self, state: PyTree) -> PyTree:
        return jax.tree.map(_placed, state, self._shardings(state))

    def get(self, state: PyTree) -> PyTree:
        """Of several processes every one must call this.

        Cost: one shard of one array at a time on the devices, all on every host.
        """
        if jax.process_count() == 1:
            return jax.device_get(state)
        return jax.tree.map(self._gathered, state, _specs(state))

    def share(self, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda a: _placed(a, NamedSharding(self.mesh, P())), tree)

    def program(self, step: Callable, num_steps: int) -> Any:
        many = step_lib.scan_steps(step, num_steps)

        def steps(state, params, key, batches, settings):
            specs = _specs(state)
            mapped = jax.shard_map(
                lambda state, params, key, batches, settings: many(
                    state, params, key, *batches, settings=settings
                ),
                mesh=self.mesh,
                in_specs=(specs, P(), P(), P(), P()),
                out_specs=(specs, P()),
                # A network's own loops start from constants, which would have to be marked as
                # differing by device.
                check_vma=False,
            )
            return mapped(state, params, key, batches, settings)

        return jax.jit(steps, donate_argnums=0)

    def steps(self, step: Callable, num_steps: int) -> Callable:
        program = self.program(step, num_steps)

        def run(
            state: PyTree, params: PyTree, key: jax.Array, *batches: PyTree, settings: PyTree = None
        ):
            return program(state, params, key, self.share(batches), settings)

        return run

    def _shardings(self, state: PyTree) -> PyTree:
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), _specs(state))

    def _gathered(self, array: jax.Array, spec: P) -> np.ndarray:
        if COMPONENT_AXIS not in spec:
            return np.asarray(array)
        one_of_them = jax.shard_map(
            lambda a, i: lax.psum(
                jnp.where(lax.axis_index(COMPONENT_AXIS) == i, a, 0), COMPONENT_AXIS
            ),
            mesh=self.mesh,
            in_specs=(spec, P()),
            out_specs=P(),
            check_vma=False,
        )
        pieces = [
            np.asarray(jax.jit(one_of_them)(array, np.int32(i)))
            for i in range(self.mesh.shape[COMPONENT_AXIS])
        ]
        return np.concatenate(pieces, axis=spec.index(COMPONENT_AXIS))


def _specs(state: PyTree) -> PyTree:
    """Which axis of each array counts components; like the state, of specs.

    That is so of U and V, of the gate's arrays (their last axis), and of what the optimizer keeps
    for them.
    """
    held = (Components, TrainState, Trained)

    def one(node: Any) -> Any:
        if isinstance(node, Components):
            return components_lib.map_sites(_site_specs, node)
        if isinstance(node, Trained):
            return Trained(one(node.components), jax.tree.map(_last_axis, node.gate))
        if isinstance(node, TrainState):
            return dataclasses.replace(
                node,
                step=P(),
                components=one(node.components),
                opt_state=_specs(node.opt_state),
                gate=jax.tree.map(_last_axis, node.gate),
                ablation=jax.tree.map(lambda _: P(), node.ablation),
            )
        return P()

    return jax.tree.map(one, state, is_leaf=lambda node: isinstance(node, held))


def _site_specs(f: Factors) -> Factors:
    if f.ids is not None:
        raise InputError(
            "components cannot be split over devices where a site holds only some of them, or one "
            "in several pieces; use num_component_shards = 1, or change `select`."
        )
    before = f.U.ndim - 3 - len(f.axes.batch)  # instances come first
    spec = P(*[None] * before, COMPONENT_AXIS)
    return dataclasses.replace(f, U=spec, V=spec)


def _last_axis(a: Any) -> P:
    return P(*[None] * (a.ndim - 1), COMPONENT_AXIS)


def _placed(a: Any, sharding: NamedSharding) -> jax.Array:
    """A global array of what every process holds the whole of, or that is one already."""
    if isinstance(a, jax.Array) and a.sharding == sharding:
        return a
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(
            _placed(jax.random.key_data(a), sharding), impl=jax.random.key_impl(a)
        )
    host = np.asarray(a)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
