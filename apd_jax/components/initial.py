"""Where components come from: random draws, given matrices, a checkpoint without its network."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from apd_jax.components import draws
from apd_jax.components.factors import Components, Factors, Ids, is_slot, named_leaves
from apd_jax.components.layout import Layout, matrix_shape, path_name, unfold
from apd_jax.errors import InputError, first_line

Select = str | Sequence[str] | Mapping[str, Mapping[str, Any]] | Callable[[str, Any], Any] | None
_OPTIONS = ("rank", "components")
_VALUE = ".value"


def as_select(select: Any, params: PyTree) -> Any:
    """`select` as None, a list of patterns or {pattern: options}, with plain numbers in it.

    Args:
      select: see `init`; a function (dotted path, leaf) -> bool or options chooses leaves one by
        one. It is asked of paths with and without the `.value` of NNX.
    Raises:
      InputError: it is something else, or chooses nothing.
    """
    if callable(select) and not isinstance(select, Mapping):
        leaves = {name: a for name, a in named_leaves(params).items() if a is not None}
        try:
            given = {n: select(n, a) or select(short_name(n, leaves), a) for n, a in leaves.items()}
        except Exception as error:
            raise InputError(
                f"select, as a function of (path, leaf), fails: {first_line(error)}."
            ) from error
        select = {n: {} if o is True else o for n, o in given.items() if o or o == {}}
    if select is None or isinstance(select, str):
        return None if select is None else [select]
    patterns = list(select) if isinstance(select, Mapping | Sequence | set) else [None]
    if any(not isinstance(pattern, str) for pattern in patterns):
        raise InputError(
            "select must be glob patterns over dotted paths, {pattern: options} or a function "
            f"(path, leaf) -> bool; got {select!r}."
        )
    if not patterns:
        raise InputError("select chooses no leaf; leave it out to decompose all matrices.")
    if not isinstance(select, Mapping):
        return patterns
    return {pattern: _as_options(pattern, options) for pattern, options in select.items()}


def _as_options(pattern: str, options: Any) -> dict[str, Any]:
    if not isinstance(options, Mapping):
        raise InputError(
            f"select gives {pattern!r} {options!r}; give a dict of options, such as {{}} or "
            '{"rank": 2}.'
        )
    found = {}
    for name, value in options.items():
        value = value.tolist() if isinstance(value, np.ndarray | np.generic | Array) else value
        listed = isinstance(value, Sequence | range | set) and not isinstance(value, str)
        numbers = [operator.index(v) if _is_whole(v) else v for v in (value if listed else [value])]
        if value is not None and not all(isinstance(v, int) for v in numbers):
            raise InputError(
                f"select gives {pattern!r} {name} = {value!r}; give a whole number, or a list of "
                "whole numbers."
            )
        found[name] = value if isinstance(value, range) else numbers if listed else numbers[0]
    return found


def _is_whole(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def matches(name: str, pattern: str, names: Iterable[str]) -> bool:
    """Whether a pattern means this leaf: an exact name means no other, brackets or not.

    The `.value` that ends the paths of NNX variables may be left out.
    """
    if (exact := full_name(pattern, names)) in names:
        return name == exact
    return any(fnmatch.fnmatchcase(n, pattern) for n in (name, short_name(name, names)))


def short_name(name: str, names: Iterable[str]) -> str:
    """A dotted path without the `.value` at its end, if that is all that its parent holds."""
    short = name.removesuffix(_VALUE)
    return name if any(n.startswith(f"{short}.") and n != name for n in names) else short


def full_name(name: str, names: Iterable[str]) -> str:
    """The dotted path of which `name` is the short one; else `name`."""
    full = name + _VALUE
    return full if full in names and short_name(full, names) == name else name


def selected_paths(
    params: PyTree, select: Select = None, layouts: Mapping[str, Layout] | None = None
) -> list[str]:
    """Dotted paths of the leaves to decompose.

    Args:
      select: glob patterns over dotted paths (`*.kernel`), or a mapping from them to options (see
        `init`); None takes every floating leaf of two or more axes.
      layouts: from `apd_jax.components.layout.infer`: None then leaves out vectors that are stacked
        for a scan, too.
    Raises:
      InputError: a pattern matches nothing, or only leaves that are not floating point.
    """
    leaves = {name: leaf for name, leaf in named_leaves(params).items() if leaf is not None}
    if len(leaves) < len(jax.tree.leaves(params)):
        named = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
        twice = next(name for name in named if named.count(name) > 1)
        raise InputError(
            f"params has two leaves of the dotted path {twice!r}; rename a key that holds a dot."
        )
    floating = {n for n, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    if select is None:
        vectors = {name for name, layout in (layouts or {}).items() if not layout.ins}
        chosen = [n for n in leaves if n in floating and leaves[n].ndim >= 2 and n not in vectors]
        if not chosen:
            raise InputError(
                "params has no floating leaf with two or more axes to decompose; its leaves: "
                f"{', '.join(leaves)}."
            )
        return chosen
    chosen = set()
    for pattern in as_select(select, params):
        hits = [name for name in leaves if matches(name, pattern, leaves)]
        if not hits:
            raise InputError(
                f"select pattern {pattern!r} matches no leaf of params; its leaves: "
                f"{', '.join(leaves)}."
            )
        if not floating & set(hits):
            raise InputError(
                f"select pattern {pattern!r} matches {hits[0]!r} of dtype {leaves[hits[0]].dtype}; "
                "only floating leaves can be decomposed."
            )
        chosen.update(floating & set(hits))
    return [name for name in leaves if name in chosen]


def init(
    rng: PRNGKeyArray,
    params: PyTree,
    *,
    num_components: int,
    rank: int | None = None,
    select: Select = None,
    uses: Mapping[str, int] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    init_scale: Float[ArrayLike, ""] = 1.0,
    ids: Mapping[str, range] | None = None,
    like_target: bool = False,
) -> Components:
    r"""Random components.

    small (the default):   U ~ N(0, s²/((C+1)·d_in·m/2)),  V ~ N(0, s²/((C+1)·m·d_out/2))
    like_target:           U ~ N(0, s²/d_in),  V ~ N(0, d_in·var(θ*)/(n·m)):  Σ_j U_j V_j has the
                           spread of the leaf's own entries (s = 1)

    with s = init_scale. The first is Glorot's formula with the component axis counted among the
    fans, as in the released code of APD: about sqrt(C·min(d, m)) times smaller than Glorot on the
    matrix itself. Small initial components are what lets single features win; with matrix-scale
    Glorot TMS 40-10 sticks at MMCS 0.88. The second is what methods with gates begin with.

    Args:
      num_components: C.
      rank: m at every site; None is full rank, min(d_in, d_out). May exceed it.
      select: glob patterns over dotted leaf paths; None takes every floating leaf of two or more
        axes. A mapping from patterns to options gives sites a rank of their own, or pieces of only
        some components: {"*.kernel": {}, "embed": {"rank": 4}, "layer_0.*": {"components":
        range(10)}}; of several matching patterns the last wins. A list of ranks is one per piece:
        such a site holds pieces of rank one, as many with a component's number as its rank.
      uses: {dotted path: times the forward pass uses the leaf}, 1 where absent.
      layouts: {dotted path: Layout} as `apd_jax.components.layout.infer` finds them; where absent
        the last axis is the output.
      ids: {dotted path: the numbers of the components that this site has pieces of}; where absent
        what `select` says, or all.
    Returns: factors in at least single precision, whatever the leaf has.
    Raises:
      InputError: C or a rank below 1, an unknown option, a component that does not exist, or
        `select`/`uses` name a leaf that is not there.
    """
    if num_components < 1:
        raise InputError(f"num_components must be at least 1; got {num_components}.")
    select, every = as_select(select, params), named_leaves(params)
    chosen = selected_paths(params, select, layouts)
    uses, layouts, ids = dict(uses or {}), dict(layouts or {}), dict(ids or {})
    if unknown := set(uses) - set(chosen):
        raise InputError(
            f"uses names {sorted(unknown)}, which are not decomposed leaves; these are {chosen}."
        )

    sides, made = {}, {}
    scales = (init_scale, 1.0 if like_target else init_scale)
    for name, own_keys in zip(chosen, draws.pairs_of_keys(rng, len(chosen)), strict=True):
        leaf = every[name]
        layout = layouts.get(name, Layout.default(leaf.ndim))
        options = {"rank": rank, "components": ids.get(name)} | _options(select, name, every)
        own, m = _pieces(name, options, num_components, min(matrix_shape(leaf.shape, layout)))
        n = num_components if own is None else len(own)
        stds = _stds(leaf, layout, n if like_target else num_components, m, like_target)
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)  # half has no room for small steps
        batch = tuple(leaf.shape[axis] for axis in layout.batch)
        d_in, d_out = matrix_shape(leaf.shape, layout)
        both = zip("UV", own_keys, ((d_in, m), (m, d_out)), scales, stds, strict=True)
        for side, key, shape, scale, std in both:
            sides[name, side] = (key, (n, *batch, *shape), dtype, scale * std)
        kept = None if layout == Layout.default(leaf.ndim) else layout
        made[name] = (tuple(leaf.shape), uses.get(name, 1), kept, own)
    drawn = draws.normals(sides)

    def make(path: tuple[Any, ...], _: Any) -> Factors | None:
        if (name := path_name(path)) not in made:
            return None
        shape, times, kept, own = made[name]
        return Factors(drawn[name, "U"], drawn[name, "V"], shape, times, kept, ids=own)

    tree = jax.tree_util.tree_map_with_path(make, params)
    # The count is part of the tree's structure: said only where no site says it.
    whole = any(f.ids is None for f in Components(tree).factors.values())
    return Components(tree, None if whole else num_components)


def _options(select: Select, name: str, names: Iterable[str]) -> dict[str, Any]:
    """What a mapping `select` says of one leaf; of several matching patterns the last wins."""
    if not isinstance(select, Mapping):
        return {}
    found: dict[str, Any] = {}
    for pattern, options in select.items():
        if matches(name, pattern, names):
            found |= options
    if unknown := set(found) - set(_OPTIONS):
        raise InputError(
            f"select has an unknown option {sorted(unknown)[0]!r} for {name!r}; known are rank and "
            "components."
        )
    return found


def _pieces(name: str, options: Mapping[str, Any], C: int, full: int) -> tuple[Ids, int]:
    """The numbers of a site's pieces (None: all, in order) and their rank."""
    own = as_ids(options["components"], C, f"select gives {name!r}")
    rank = options["rank"]
    if isinstance(rank, Sequence | np.ndarray) and not isinstance(rank, str):
        numbers = range(C) if own is None else own
        ranks = [int(r) for r in rank]
        if len(ranks) != len(numbers) or min(ranks, default=0) < 1:
            raise InputError(
                f"select gives {name!r} {len(ranks)} ranks; give one of at least 1 for each of its "
                f"{len(numbers)} components."
            )
        return tuple(c for c, r in zip(numbers, ranks, strict=True) for _ in range(r)), 1
    m = full if rank is None else int(rank)
    if m < 1:
        raise InputError(f"rank must be at least 1; got {m} for {name!r}.")
    return own, m


def as_ids(numbers: Any, num_components: int, where: str) -> Ids:
    """Numbers as a site holds them: None if they are all, a range if they are one, else a tuple.

    Raises:
      InputError: there are none, or one does not exist.
    """
    if numbers is None:
        return None
    if isinstance(numbers, int):
        raise InputError(f"{where} components = {numbers}; give a list of their numbers.")
    listed = tuple(sorted({int(c) for c in numbers}))
    if not listed or listed[0] < 0 or listed[-1] >= num_components:
        raise InputError(f"{where} components outside 0 to {num_components - 1}, or none.")
    if len(listed) == num_components:
        return None
    if listed == tuple(range(listed[0], listed[-1] + 1)):
        return range(listed[0], listed[-1] + 1)
    return listed


def _stds(leaf: Any, layout: Layout, n: int, m: int, like_target: bool) -> tuple[Any, Any]:
    """The standard deviations of the entries of U and V; see `init`."""
    d_in, d_out = matrix_shape(leaf.shape, layout)
    if like_target:
        spread = jnp.std(jnp.asarray(leaf, jnp.promote_types(leaf.dtype, jnp.float32)))
        return 1 / math.sqrt(d_in), spread * math.sqrt(d_in / (n * m))
    return math.sqrt(2 / ((n + 1) * d_in * m)), math.sqrt(2 / ((n + 1) * m * d_out))


@functools.partial(jax.jit, static_argnames=("rank", "layout"))
def factored(weight: Array, rank: int | None, layout: Layout) -> tuple[Array, Array]:
    """U and V of a leaf's P_c, each with the roots of the singular values."""
    whole = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))  # as `init` has them
    u, s, vt = jnp.linalg.svd(unfold(whole, layout), full_matrices=False)
    m = s.shape[-1] if rank is None else rank
    root = jnp.sqrt(s[..., None, :m])
    return u[..., :m] * root, jnp.swapaxes(root, -1, -2) * vt[..., :m, :]


def from_materialized(
    weights: PyTree,
    *,
    rank: int | None = None,
    uses: Mapping[str, int] | None = None,
    layouts: Mapping[str, Layout] | None = None,
) -> Components:
    """Components with given P_c: the inverse of `materialize`, by one SVD per matrix.

    Exact when rank is None.

    Args:
      weights: pytree like params, leaves [C, *leaf.shape] or None where not decomposed.
    """
    uses, layouts = dict(uses or {}), dict(layouts or {})

    def make(path: tuple[Any, ...], weight: Array | None) -> Factors | None:
        if weight is None:
            return None
        name, shape = path_name(path), tuple(weight.shape[1:])
        layout = layouts.get(name)
        U, V = factored(weight, rank, layout or Layout.default(len(shape)))
        return Factors(U, V, shape, uses.get(name, 1), layout)

    return Components(jax.tree_util.tree_map_with_path(make, weights, is_leaf=lambda w: w is None))


def grown(components: Components, larger: Components) -> Components:
    """`components` in the place of the first pieces of every site of `larger`.

    The pieces that are new have the U of `larger` and V = 0: the sum does not change.

    Raises:
      InputError: a site of another rank, or whose pieces belong to components in another way.
    """

    def one(path: tuple[Any, ...], new: Factors | None) -> Factors | None:
        if new is None:
            return None
        old, name = components.factors[path_name(path)], path_name(path)
        ranges = isinstance(old.ids, range) and isinstance(new.ids, range)
        n = old.num_pieces
        if not (ranges or old.ids == new.ids) or n > new.num_pieces:
            raise InputError(
                f"the pieces of {name!r} belong to components in another way than the method "
                "gives them, so more cannot be added; keep their number."
            )
        if old.rank != new.rank:
            raise InputError(
                f"the components have rank {old.rank} at {name!r} and the settings ask for "
                f"{new.rank}; give rank = {old.rank}."
            )
        axis = new.U.ndim - 3 - len(new.axes.batch)
        U, V = (jax.lax.slice_in_dim(a, n, new.num_pieces, axis=axis) for a in (new.U, new.V))
        return dataclasses.replace(
            new,
            U=jnp.concatenate([jnp.asarray(old.U), U], axis),
            V=jnp.concatenate([jnp.asarray(old.V), jnp.zeros_like(V)], axis),
        )

    tree = jax.tree_util.tree_map_with_path(one, larger.tree, is_leaf=is_slot)
    return dataclasses.replace(larger, tree=tree)


def from_raw(tree: Mapping[str, Any]) -> Components:
    """Components from nested dicts that end in {"U", "V"}: a checkpoint read without its network.

    Leaf shapes are those of the matrices, without an axis of instances; for norms, ranks, tables.
    """

    def visit(node: Any) -> Any:
        if not isinstance(node, Mapping):
            return None
        if set(node) == {"U", "V"}:
            batch = node["U"].shape[1:-2]
            n = len(batch)
            shape = (*batch, node["U"].shape[-2], node["V"].shape[-1])
            return Factors(
                node["U"], node["V"], shape, layout=Layout(tuple(range(n)), (n,), (n + 1,))
            )
        return {name: visit(child) for name, child in node.items()}

    return Components(visit(tree))
