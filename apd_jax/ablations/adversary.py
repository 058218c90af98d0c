"""Adversaries: the sources that make a pass worst, found by gradient ascent within [0, 1].

fresh       signed ascent from a random start in every pass.
persistent  sources kept from step to step, with ascents by Adam  (VPD).
pooled      several persistent particles per example slot, of which each step draws one  (pd).

Sources may be shared over the batch, or over the positions of an example, or be free.
Shapes: B examples (over all devices, where a state is kept), T positions, C components, L sites.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from apd_jax.ablations.base import Ablation, Shape, Sources
from apd_jax.ablations.stochastic import draws
from apd_jax.errors import one_of

SHARED = ("batch", "example", "position")
_DELTA = 0xDE17A
_EPSILON = 1e-8


def _uniform_like(key: Array, lead: tuple[int, ...], shape: Shape) -> Sources:
    """U(0, 1) of these leading axes, the same on every device."""
    r = draws(key[None], lead, shape.num_components, shape.component_axis)[0]
    delta = None
    if shape.with_delta:
        delta = draws(jax.random.fold_in(key, _DELTA)[None], lead, shape.num_sites)[0]
    return Sources(r, delta)


def _lead(shared: str, size: int, positions: tuple[int, ...]) -> tuple[int, ...]:
    """The leading axes of sources."""
    one_of("adversary_shared", shared, SHARED)
    if shared == "batch":
        return (1, *[1 for _ in positions])
    if shared == "example":
        return (size, *[1 for _ in positions])
    return (size, *positions)


def _over_devices(gradient: PyTree, shared: str, axis_name: str | None) -> PyTree:
    """The gradient of the mean over the whole batch, from that of this device's own mean.

    What all devices share has a part of it on each.
    """
    if axis_name is None:
        return gradient
    if shared == "batch":
        return lax.pmean(gradient, axis_name)
    return jax.tree.map(lambda g: g / lax.axis_size(axis_name), gradient)


@dataclasses.dataclass(frozen=True)
class Adversary(Ablation):
    """Fresh: `steps` of signed ascent by `step_size` from U(0, 1)."""

    steps: int = 20
    step_size: Any = 0.1
    shared: str = "batch"
    axis_name: str | None = None
    ascends = True

    def draw(self, state: PyTree, keys: Array, shape: Shape) -> Sources:
        if self.shared == "batch":
            # all devices draw alike: from the first example's key of the whole batch
            key = keys[0]
            if shape.axis_name is not None:
                data = lax.all_gather(jax.random.key_data(key), shape.axis_name)[0]
                key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
            return _uniform_like(key, _lead("batch", 1, shape.positions), shape)
        lead = _lead(self.shared, 1, shape.positions)[1:]
        return jax.vmap(lambda k: _uniform_like(k, lead, shape))(keys)

    def ascend(
        self, state: PyTree, sources: Any, gradient: Callable[[Sources], Sources]
    ) -> tuple[PyTree, Any]:
        def once(_: Any, r: Sources) -> Sources:
            g = _over_devices(gradient(r), self.shared, self.axis_name)
            return jax.tree.map(
                lambda r, g: jnp.clip(r + self.step_size * jnp.sign(g), 0.0, 1.0), r, g
            )

        return state, lax.fori_loop(0, self.steps, once, sources)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
    """Persistent sources with Adam's moments, [B, ...] over the whole batch; `count` ascents."""

    sources: Sources
    first: Sources
    second: Sources
    count: Array


@dataclasses.dataclass(frozen=True)
class PersistentAdversary(Ablation):
    """Sources per slot of the batch, kept from step to step  (VPD's PPGD).

    In every step `ascents` of Adam (β .5, .99; ε after the root), then the training pass, whose
    gradient makes one ascent more. The state is of the whole batch, the same on all devices; each
    works on its own examples' slots.
    """

    ascents: int = 2
    learning_rate: Any = 0.01
    shared: str = "position"
    axis_name: str | None = None
    betas: tuple[float, float] = (0.5, 0.99)
    ascends = True

    def init(self, key: Array, shape: Shape) -> PyTree:
        start = _uniform_like(key, _lead(self.shared, shape.size, shape.positions), shape)
        zeros = jax.tree.map(jnp.zeros_like, start)
        return Kept(start, zeros, zeros, jnp.zeros((), jnp.int32))

    def draw(self, state: Any, keys: Array, shape: Shape) -> Sources:
        return jax.tree.map(self._mine, state.sources)

    def ascend(
        self, state: PyTree, sources: Any, gradient: Callable[[Sources], Sources]
    ) -> tuple[PyTree, Any]:
        def once(_: Any, carry: tuple[Kept, Sources]) -> tuple[Kept, Sources]:
            kept, r = carry
            kept = self._ascended(kept, gradient(r))
            return kept, jax.tree.map(self._mine, kept.sources)

        return lax.fori_loop(0, self.ascents, once, (state, sources))

    def finish(self, state: Any, sources: Any, gradient: Any) -> Any:
        return self._ascended(state, gradient)

    def _ascended(self, state: Kept, gradient: Sources) -> Kept:
        gradient = _over_devices(gradient, self.shared, self.axis_name)
        gradient = jax.tree.map(self._everyone, gradient)
        b1, b2 = self.betas
        count = state.count + 1
        first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.first, gradient)
        second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.second, gradient)

        def moved(r: Array, m: Array, v: Array) -> Array:
            m, v = m / (1 - b1**count), v / (1 - b2**count)
            return jnp.clip(r + self.learning_rate * m / (jnp.sqrt(v) + _EPSILON), 0.0, 1.0)

        return Kept(jax.tree.map(moved, state.sources, first, second), first, second, count)

    def _mine(self, whole: Array) -> Array:
        """This device's slots."""
        if self.axis_name is None or self.shared == "batch":
            return whole
        size = whole.shape[0] // lax.axis_size(self.axis_name)
        return lax.dynamic_slice_in_dim(whole, lax.axis_index(self.axis_name) * size, size)

    def _everyone(self, mine: Array) -> Array:
        if self.axis_name is None or self.shared == "batch":
            return mine
        return lax.all_gather(mine, self.axis_name, tiled=True)


@dataclasses.dataclass(frozen=True)
class Pool(PersistentAdversary):
    """K particles per slot, shared over positions; a pass draws one of them  (pd)."""

    particles: int = 4
    learning_rate: Any = 0.02
    betas: tuple[float, float] = (0.01, 0.99)
    shared: str = "example"

    def init(self, key: Array, shape: Shape) -> PyTree:
        keys = jax.random.split(key, self.particles)
        one = dataclasses.replace(self)
        kept = jax.vmap(lambda k: PersistentAdversary.init(one, k, shape))(keys)
        return kept, jnp.zeros((), jnp.int32)

    def draw(self, state: Any, keys: Array, shape: Shape) -> Sources:
        kept, _ = state
        return super().draw(self._one(kept, self._turn(state)), keys, shape)

    def ascend(
        self, state: Any, sources: Any, gradient: Callable[[Sources], Sources]
    ) -> tuple[PyTree, Any]:
        kept, turn = state
        one, sources = super().ascend(self._one(kept, self._turn(state)), sources, gradient)
        return (self._put(kept, one, self._turn(state)), turn), sources

    def finish(self, state: Any, sources: Any, gradient: Any) -> Any:
        kept, turn = state
        which = self._turn(state)
        one = self._ascended(self._one(kept, which), gradient)
        return self._put(kept, one, which), turn + 1

    def _turn(self, state: Any) -> Array:
        """Which particle: one after another, in an order that `turn` alone decides."""
        key = jax.random.fold_in(jax.random.key(0), state[1])
        return jax.random.randint(key, (), 0, self.particles)

    def _one(self, kept: Kept, which: Array) -> Kept:
        return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, which, keepdims=False), kept)

    def _put(self, kept: Kept, one: Kept, which: Array) -> Kept:
        return jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, which, 0), kept, one)
