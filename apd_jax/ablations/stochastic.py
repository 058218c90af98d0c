"""Random ablation: the rest times U(0, 1), at all sites or at a random subset of them.

Shapes: B examples, T positions, C components, L sites.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from apd_jax.ablations.base import Ablation, Shape, Sources
from apd_jax.collectives import num_devices, place

_DELTA = 0xDE17A  # sets the draws for Δ apart from those for components


@dataclasses.dataclass(frozen=True)
class Drop(Ablation):
    """r = 0: what is not needed is not there. Of Δ too, where it takes part."""


@dataclasses.dataclass(frozen=True)
class Uniform(Ablation):
    """r ~ U(0, 1), independently for every example (position) and component  (SPD)."""

    def draw(self, state: PyTree, keys: Array, shape: Shape) -> Sources:
        r = draws(keys, shape.positions, shape.num_components, shape.component_axis)
        delta = None
        if shape.with_delta:
            others = jax.vmap(lambda k: jax.random.fold_in(k, _DELTA))(keys)
            delta = draws(others, shape.positions, shape.num_sites)
        return Sources(r, delta)


@dataclasses.dataclass(frozen=True)
class Keep(Ablation):
    """r = 1: everything is left as it is. Of Δ too, where it takes part."""

    def draw(self, state: PyTree, keys: Array, shape: Shape) -> Sources:
        lead = (1, *[1 for _ in shape.positions])
        delta = jnp.ones((*lead, shape.num_sites)) if shape.with_delta else None
        return Sources(jnp.ones((*lead, shape.num_components)), delta)


def draws(
    keys: Array, positions: tuple[int, ...], count: int, component_axis: str | None = None
) -> Float[Array, "B *T n"]:
    """U(0, 1) from one key per example: the same on any number of devices, and of shares."""
    first = place(component_axis) * count
    whole = count * num_devices(component_axis)
    drawn = jax.vmap(lambda k: jax.random.uniform(k, (*positions, whole)))(keys)
    return lax.dynamic_slice_in_dim(drawn, first, count, axis=-1)


def subset_of_sites(
    keys: Array, positions: tuple[int, ...], names: Sequence[str]
) -> dict[str, Bool[Array, "..."]]:
    """Which sites are masked: at every position k ~ U{1..L} of the L, chosen at random  (VPD).

    The others keep the target's weight.
    """
    L = len(names)

    def one(key: Array) -> Bool[Array, "*T L"]:
        count_key, order_key = jax.random.split(key)
        k = jax.random.randint(count_key, positions, 1, L + 1)
        order = jax.random.uniform(order_key, (*positions, L))
        place_of = jnp.sum(order[..., None, :] < order[..., :, None], axis=-1)  # rank of each site
        return place_of < k[..., None]

    chosen = jax.vmap(one)(keys)
    return {name: chosen[..., i] for i, name in enumerate(names)}
