"""The component pytree: parameter components P_c in factored form.

Shapes: C components, n pieces at a site, a site's weight matrix [d_in, d_out], rank m.

A component is a number c. A decomposed leaf of the params is a site, a `Factors` node: it holds
pieces U_j V_j, each of which belongs to the component with number `ids[j]`, and P_c at this site is
the sum of its pieces there. APD holds every number at every site, SPD gives each site numbers of
its own, a cluster gives one number to several pieces. Stacked weights (one matrix per layer or
expert) have an axis of matrices after n. A leaf that is not decomposed is None.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from apd_jax.components.layout import Layout, fold, path_name
from apd_jax.errors import InputError, listed

Ids = range | tuple[int, ...] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    """The pieces of one site.

    shape: the leaf's own. layout: how its axes make a matrix (None: `Layout.default`).
    uses: how often the forward pass multiplies with the leaf; a tied weight has 2, and counts
      twice in the sums over matrices.
    axis: the mapped device axis that components are split over, where they are; n and C are then
      those of this device.
    ids: the component that each piece belongs to. None: piece c belongs to component c.
    """

    U: Array  # [n, *batch, d_in, m]; instances and transformations add or take leading axes
    V: Array  # [n, *batch, m, d_out]
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    uses: int = dataclasses.field(default=1, metadata={"static": True})
    layout: Layout | None = dataclasses.field(default=None, metadata={"static": True})
    axis: str | None = dataclasses.field(default=None, metadata={"static": True})
    ids: Ids = dataclasses.field(default=None, metadata={"static": True})

    @property
    def axes(self) -> Layout:
        return self.layout or Layout.default(len(self.shape))

    @property
    def num_params(self) -> int:
        return math.prod(self.shape)

    @property
    def num_pieces(self) -> int:
        return self.U.shape[-3 - len(self.axes.batch)]

    @property
    def rank(self) -> int:
        return self.U.shape[-1]

    @property
    def weights(self) -> Array:
        """U_j V_j in the leaf's shape, [n, *shape]; without the first axis for one piece."""
        return _product(self)

    def take(self, values: Array, axis: int = -1) -> Array:
        """What `values` says of each piece, from what it says of each component along `axis`.

        All numbers: no operation. A range: a static slice. A list: a gather.
        """
        if self.ids is None:
            return values
        if isinstance(self.ids, range):
            return jax.lax.slice_in_dim(
                values, self.ids.start, self.ids.stop, axis=axis % values.ndim
            )
        return jnp.take(values, np.asarray(self.ids, np.int32), axis=axis)

    def sums(self, values: Array, num_components: int) -> Array:
        """Of every component, the sum of what `values` [n, ...] says of its pieces: [C, ...]."""
        if self.ids is None:
            return values
        out = jnp.zeros((num_components, *values.shape[1:]), values.dtype)
        return out.at[np.asarray(self.ids, np.int32)].add(values)


@functools.partial(jax.jit, inline=True)
def _product(f: Factors) -> Array:
    return fold(f.U @ f.V, f.shape, f.axes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Components:
    """C components of a network: `tree` has the structure of its params, of `Factors` or None.

    count: C, where no site holds all numbers.
    """

    tree: PyTree[Any]
    count: int | None = dataclasses.field(default=None, metadata={"static": True})

    def __repr__(self) -> str:
        sites = [name for name, slot in named_leaves(self.tree).items() if _is_factors(slot)]
        return f"<{self.num_components} components at {len(sites)} sites: {listed(sites, 4)}>"

    @property
    def factors(self) -> dict[str, Factors]:
        """The sites by dotted path, in the order of the params pytree."""
        return {name: slot for name, slot in named_leaves(self.tree).items() if slot is not None}

    @property
    def num_components(self) -> int:
        """C, on this device."""
        whole = [f.num_pieces for f in self.factors.values() if f.ids is None]
        return whole[0] if whole else self.count or 0

    @property
    def axis(self) -> str | None:
        return next(iter(self.factors.values())).axis

    @property
    def num_params(self) -> int:
        """N: entries of the decomposed matrices, each counted `uses` times."""
        return sum(f.uses * f.num_params for f in self.factors.values())


def _is_factors(node: Any) -> bool:
    return isinstance(node, Factors)


def is_slot(node: Any) -> bool:
    """Where a leaf of params stands in `Components.tree`."""
    return node is None or isinstance(node, Factors)


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """{dotted path: leaf}, sites and None counting as leaves."""
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_slot)[0]
    return {path_name(path): leaf for path, leaf in flat}


def map_sites(fn: Callable[..., Any], *trees: Components) -> Components:
    """`fn` of every site's Factors (of several alike decompositions)."""
    tree = jax.tree.map(fn, *(t.tree for t in trees), is_leaf=_is_factors)
    return dataclasses.replace(trees[0], tree=tree)


def decomposed_leaves(components: Components, params: PyTree) -> dict[str, Array]:
    """The leaves of params that are decomposed, by dotted path.

    Raises:
      InputError: components and params differ in structure or leaf shapes.
    """
    theirs, ours = (jax.tree.structure(tree, is_leaf=is_slot) for tree in (params, components.tree))
    leaves = named_leaves(params)
    if theirs != ours:
        differing = sorted(set(leaves) ^ set(named_leaves(components.tree)))
        raise InputError(
            "components and params differ in structure: "
            f"{listed(differing) or 'same leaves in other containers'}."
        )
    for name, factors in components.factors.items():
        if tuple(leaves[name].shape) != factors.shape:
            raise InputError(
                f"params leaf {name!r} has shape {tuple(leaves[name].shape)}, but the components "
                f"were made for {factors.shape}."
            )
    return {name: leaves[name] for name in components.factors}


def replace_leaves(params: PyTree, values: Mapping[str, Any]) -> PyTree:
    """params with the leaves named by `values` replaced."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: values.get(path_name(path), leaf), params
    )


def split_over(components: Components, axis: str | None) -> Components:
    """The same arrays, taken as this device's share of components split over a mapped axis.

    Every Σ_c then runs over all devices of the axis.
    """
    return map_sites(lambda f: dataclasses.replace(f, axis=axis), components)


def without_arrays(components: Components, value: Any) -> Components:
    """The same structure with `value` in the place of every array."""
    return map_sites(lambda f: dataclasses.replace(f, U=value, V=value), components)
