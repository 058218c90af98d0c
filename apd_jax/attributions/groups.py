"""Sites in groups that share numbers: what goes through components one by one takes each alone.

A component whose pieces lie at a few sites only need not be moved at the others. In SPD every site
is a group of its own.

Shapes: B examples, C components, n of them in a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from apd_jax import components as components_lib
from apd_jax.components import Components, Factors, is_slot, path_name


@dataclasses.dataclass(frozen=True)
class Group:
    """Some sites, with all numbers that they hold and no others.

    components: n of them, at every site of the group; None at the sites of others.
    numbers: which of all components they are. None: all, in order.
    """

    components: Components
    numbers: np.ndarray | None


def group_by_group(
    components: Components, of_group: Callable[[Components], Float[Array, "n B"]]
) -> Float[Array, "B C"]:
    """What `of_group` says of the components of every group, each at its own number."""
    found = [(group.numbers, of_group(group.components).T) for group in groups(components)]
    if found[0][0] is None:
        return found[0][1]
    values = found[0][1]
    out = jnp.zeros((values.shape[0], components.num_components), values.dtype)
    for numbers, values in found:
        out = out.at[:, numbers].set(values)
    return out


def groups(components: Components) -> list[Group]:
    """Sites that have a number in common are in one group. Pieces are then aligned in the group."""
    C = components.num_components
    sites = components.factors
    if all(f.ids is None for f in sites.values()):
        return [Group(components, None)]
    found: list[tuple[set[str], set[int]]] = []
    for name, f in sites.items():
        names, numbers, apart = {name}, set(range(C) if f.ids is None else f.ids), []
        for group in found:
            if group[1].isdisjoint(numbers):
                apart.append(group)
            else:
                names, numbers = names | group[0], numbers | group[1]
        found = [*apart, (names, numbers)]
    return [_group(components, names, sorted(numbers)) for names, numbers in found]


def _group(components: Components, names: set[str], numbers: list[int]) -> Group:
    place = {c: i for i, c in enumerate(numbers)}
    everything = tuple(range(len(numbers)))

    def one(path: tuple, f: Factors | None) -> Factors | None:
        if f is None or path_name(path) not in names:
            return None
        if f.ids is None:
            return f
        ids = tuple(place[c] for c in f.ids)
        return dataclasses.replace(f, ids=None if ids == everything else ids)

    tree = jax.tree_util.tree_map_with_path(one, components.tree, is_leaf=is_slot)
    own = components_lib.aligned(Components(tree, len(numbers)))
    return Group(own, np.asarray(numbers, np.int32))
