"""The component pytree: parameter components P_c in factored form.

Shapes: C components, a leaf's weight matrix [d_in, d_out], rank m.
A decomposed leaf is a `Factors` node with U [C, d_in, m] and V [C, m, d_out]; P_c = U_c V_c, folded
to the leaf. Stacked weights (one matrix per layer or expert) have an axis of matrices after C.
A leaf that is not decomposed is None: every sparse model uses the target's value there.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from apd_jax.collectives import over_components
from apd_jax.components.layout import Layout, fold, matrix_shape, path_name, unfold
from apd_jax.errors import InputError

Select = str | Sequence[str] | Mapping[str, Mapping[str, Any]] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    """All C components of one leaf.

    `shape` is the leaf's own shape, `layout` how its axes make a matrix (None: `Layout.default`). `uses` is how often the forward
    pass multiplies with the leaf; a tied weight has 2, and counts twice in the sums over matrices. `axis` is the mapped device axis
    over which components are split, where they are: C is then the number of those on this device.
    """

    U: Array  # [C, *batch, d_in, m]; instances and transformations add or take leading axes
    V: Array  # [C, *batch, m, d_out]
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    uses: int = dataclasses.field(default=1, metadata={"static": True})
    layout: Layout | None = dataclasses.field(default=None, metadata={"static": True})
    axis: str | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def axes(self) -> Layout:
        return self.layout or Layout.default(len(self.shape))

    @property
    def num_params(self) -> int:
        return math.prod(self.shape)

    @property
    def num_components(self) -> int:
        return self.U.shape[-3 - len(self.axes.batch)]

    @property
    def weights(self) -> Array:
        """P_c in the leaf's shape, [C, *shape]; without the first axis for one component."""
        return fold(self.U @ self.V, self.shape, self.axes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Components:
    """`tree` has the structure of the target's params, with `Factors` or None for leaves.

    log_thresholds: of a learned mask, log τ_c: component c counts as active where its attribution exceeds τ_c (`masks.importances`).
    """

    tree: PyTree[Any]
    log_thresholds: Float[Array, "*i C"] | None = None

    @property
    def thresholds(self) -> Float[Array, "*i C"] | None:
        return None if self.log_thresholds is None else jnp.exp(self.log_thresholds)

    @property
    def factors(self) -> dict[str, Factors]:
        """The decomposed leaves by dotted path, in the order of the params pytree."""
        return {name: slot for name, slot in _named_leaves(self.tree).items() if slot is not None}

    @property
    def num_components(self) -> int:
        return next(iter(self.factors.values())).num_components

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


def selected_paths(
    params: PyTree, select: Select = None, layouts: Mapping[str, Layout] | None = None
) -> list[str]:
    """Dotted paths of the leaves to decompose.

    Args:
      select: glob patterns over dotted paths (`*.kernel`), or a mapping from them to options (see `init`); None takes every
        floating leaf of two or more axes.
      layouts: from `apd_jax.components.layout.infer`: then None leaves out vectors that are stacked for a scan, too.
    Raises:
      InputError: a pattern matches nothing, or matches a leaf that is not floating point.
    """
    leaves = {name: leaf for name, leaf in _named_leaves(params).items() if leaf is not None}
    floating = {name for name, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    if select is None:
        vectors = {name for name, layout in (layouts or {}).items() if not layout.ins}
        chosen = [
            name
            for name in leaves
            if name in floating and leaves[name].ndim >= 2 and name not in vectors
        ]
        if not chosen:
            raise InputError(
                f"params has no floating leaf with two or more axes to decompose; its leaves: {', '.join(leaves)}."
            )
        return chosen
    chosen = set()
    for pattern in [select] if isinstance(select, str) else select:
        hits = fnmatch.filter(leaves, pattern)
        if not hits:
            raise InputError(
                f"select pattern {pattern!r} matches no leaf of params; its leaves: {', '.join(leaves)}."
            )
        if bad := [name for name in hits if name not in floating]:
            raise InputError(
                f"select pattern {pattern!r} matches {bad[0]!r} of dtype {leaves[bad[0]].dtype}; only floating leaves can be decomposed."
            )
        chosen.update(hits)
    return [name for name in leaves if name in chosen]


def _options(select: Select, name: str) -> dict[str, Any]:
    """What a mapping `select` says of one leaf; of several patterns that match it the last one wins."""
    if not isinstance(select, Mapping):
        return {}
    return {
        key: value
        for pattern, options in select.items()
        if fnmatch.fnmatch(name, pattern)
        for key, value in options.items()
    }


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
) -> Components:
    r"""Random components, small on purpose.

    U ~ N(0, s²/((C+1)·d_in·m/2)),  V ~ N(0, s²/((C+1)·m·d_out/2)),  s = init_scale

    This is Glorot's formula with the component axis counted among the fans, as in the released code of APD: about
    sqrt(C·min(d, m)) times smaller than Glorot on the matrix itself. Small initial components are what lets single
    features win; with matrix-scale Glorot TMS 40-10 sticks at MMCS 0.88.

    Args:
      num_components: C.
      rank: m for every leaf; None is full rank, min(d_in, d_out). May exceed it.
      select: glob patterns over dotted leaf paths; None takes every floating leaf of two or more axes. A mapping from patterns to
        options gives leaves a rank of their own, or only some of the components:
        {"*.kernel": {}, "embed": {"rank": 4}, "layer_0.*": {"components": range(10)}}; of several matching patterns the last wins.
        A component that a leaf does not have is 0 there, and stays so: its gradient is 0 where U and V are.
      uses: {dotted path: times the forward pass uses the leaf}, 1 where absent.
      layouts: {dotted path: Layout} as `apd_jax.components.layout.infer` finds them; where absent the last axis is the output.
    Returns: factors in at least single precision, whatever the leaf has.
    Raises:
      InputError: C or a rank below 1, an unknown option, a component that does not exist, or `select`/`uses` name a leaf that is not there.
    """
    if num_components < 1:
        raise InputError(f"num_components must be at least 1; got {num_components}.")
    chosen = selected_paths(params, select, layouts)
    uses, layouts = dict(uses or {}), dict(layouts or {})
    if unknown := set(uses) - set(chosen):
        raise InputError(
            f"uses names {sorted(unknown)}, which are not decomposed leaves; these are {chosen}."
        )

    def make(path, leaf):
        name = path_name(path)
        if name not in chosen:
            return None
        options = {"rank": rank, "components": range(num_components)} | _options(select, name)
        if unknown := set(options) - {"rank", "components"}:
            raise InputError(
                f"select has an unknown option {sorted(unknown)[0]!r} for {name!r}; known are rank and components."
            )
        layout = layouts.get(name, Layout.default(leaf.ndim))
        d_in, d_out = matrix_shape(leaf.shape, layout)
        m = min(d_in, d_out) if options["rank"] is None else options["rank"]
        if m < 1:
            raise InputError(f"rank must be at least 1; got {m} for {name!r}.")
        members = sorted(set(options["components"]))
        if not members or members[0] < 0 or members[-1] >= num_components:
            raise InputError(
                f"select gives {name!r} components outside 0 to {num_components - 1}, or none."
            )
        dtype = jnp.promote_types(
            leaf.dtype, jnp.float32
        )  # half precision has no room for small steps
        here = jnp.zeros(num_components, dtype).at[jnp.asarray(members)].set(1)
        batch = tuple(leaf.shape[axis] for axis in layout.batch)
        key_u, key_v = jax.random.split(jax.random.fold_in(rng, chosen.index(name)))

        def draw(key, a, b):
            std = init_scale * math.sqrt(2 / ((num_components + 1) * a * b))
            drawn = std * jax.random.normal(key, (num_components, *batch, a, b), dtype)
            return drawn * here.reshape(-1, *[1] * (drawn.ndim - 1))

        kept = None if layout == Layout.default(leaf.ndim) else layout
        return Factors(
            draw(key_u, d_in, m), draw(key_v, m, d_out), tuple(leaf.shape), uses.get(name, 1), kept
        )

    return Components(jax.tree_util.tree_map_with_path(make, params))


def from_materialized(
    weights: PyTree,
    *,
    rank: int | None = None,
    uses: Mapping[str, int] | None = None,
    layouts: Mapping[str, Layout] | None = None,
) -> Components:
    """Components with given P_c: the inverse of `materialize`, by one SVD per matrix (exact when rank is None).

    Args:
      weights: pytree like params, leaves [C, *leaf.shape] or None where not decomposed.
    """
    uses, layouts = dict(uses or {}), dict(layouts or {})

    def make(path, weight):
        if weight is None:
            return None
        name, shape = path_name(path), tuple(weight.shape[1:])
        layout = layouts.get(name)
        matrices = unfold(weight, layout or Layout.default(len(shape)))
        u, s, vt = jnp.linalg.svd(matrices, full_matrices=False)
        m = s.shape[-1] if rank is None else rank
        root = jnp.sqrt(s[..., None, :m])
        return Factors(
            u[..., :m] * root,
            jnp.swapaxes(root, -1, -2) * vt[..., :m, :],
            shape,
            uses.get(name, 1),
            layout,
        )

    return Components(jax.tree_util.tree_map_with_path(make, weights, is_leaf=lambda w: w is None))


def from_raw(tree: Mapping[str, Any]) -> Components:
    """Components from nested dicts that end in {"U", "V"}, as a checkpoint read without its network gives them.

    Leaf shapes are those of the matrices, without an axis of instances; for norms, ranks and tables.
    """

    def visit(node):
        if not isinstance(node, Mapping):
            return None
        if set(node) == {"U", "V"}:
            batch = node["U"].shape[1:-2]
            n = len(batch)
            return Factors(
                node["U"],
                node["V"],
                (*batch, node["U"].shape[-2], node["V"].shape[-1]),
                layout=Layout(tuple(range(n)), (n,), (n + 1,)),
            )
        return {name: visit(child) for name, child in node.items()}

    return Components(visit(tree))


def decomposed_leaves(components: Components, params: PyTree) -> dict[str, Array]:
    """The leaves of params that are decomposed, by dotted path.

    Raises:
      InputError: components and params differ in structure or leaf shapes.
    """
    if jax.tree.structure(params, is_leaf=is_slot) != jax.tree.structure(
        components.tree, is_leaf=is_slot
    ):
        theirs, ours = set(_named_leaves(params)), set(_named_leaves(components.tree))
        raise InputError(
            f"components and params differ in structure: {', '.join(sorted(theirs ^ ours)) or 'same leaves in other containers'}."
        )
    leaves = _named_leaves(params)
    for name, factors in components.factors.items():
        if tuple(leaves[name].shape) != factors.shape:
            raise InputError(
                f"params leaf {name!r} has shape {tuple(leaves[name].shape)}, but the components were made for {factors.shape}."
            )
    return {name: leaves[name] for name in components.factors}


def replace_leaves(params: PyTree, values: Mapping[str, Any]) -> PyTree:
    """params with the leaves named by `values` replaced."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: values.get(path_name(path), leaf), params
    )


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    return {
        path_name(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_slot)[0]
    }


def leaf_total(factors: Factors) -> Float[Array, ...]:
    """Σ_c P_c of one leaf, in the leaf's shape: one matmul over the joint (component, rank) axis, no P_c is formed.

    All devices have the whole sum where the components are split over them.
    """
    U, V = (
        jnp.moveaxis(factors.U, 0, -2),
        jnp.moveaxis(factors.V, 0, -3),
    )  # [*batch, d_in, C, m], [*batch, C, m, d_out]
    joint = U.reshape(*U.shape[:-2], -1) @ V.reshape(*V.shape[:-3], -1, V.shape[-1])
    return fold(over_components(joint, factors.axis), factors.shape, factors.axes)


def split_over(components: Components, axis: str | None) -> Components:
    """The same arrays, taken as this device's share of components that are split over a mapped axis: every Σ_c then runs over all."""
    return _map_factors(lambda f: dataclasses.replace(f, axis=axis), components)


def total(components: Components, params: PyTree) -> PyTree:
    """Σ_c P_c as a pytree like params; leaves that are not decomposed are those of params.

    Cost: one matmul [d_in, C·m] x [C·m, d_out] per leaf.
    """
    leaves = decomposed_leaves(components, params)
    return replace_leaves(
        params,
        {name: leaf_total(f).astype(leaves[name].dtype) for name, f in components.factors.items()},
    )


def materialize(components: Components) -> PyTree:
    """Every P_c: pytree like params, leaves [C, *leaf.shape]; None where not decomposed."""
    return jax.tree.map(
        lambda f: None if f is None else f.weights, components.tree, is_leaf=is_slot
    )


def weighted_sum(components: Components, params: PyTree, weights: Float[Array, " C"]) -> PyTree:
    """Σ_c w_c P_c as a pytree like params: `weights` scales or switches components for *every* input."""

    def scale(f: Factors) -> Factors:
        return dataclasses.replace(
            f, U=f.U * weights.reshape(-1, *[1] * (f.U.ndim - 1)).astype(f.U.dtype)
        )

    return total(_map_factors(scale, components), params)


def normalize_U(components: Components) -> Components:
    """Every column U_c[:, j] scaled to unit length over d_in, where it is not 0; V is left alone."""

    def one(f: Factors) -> Factors:
        length = jnp.linalg.norm(f.U, axis=-2, keepdims=True)
        return dataclasses.replace(f, U=f.U / jnp.where(length > 0, length, 1))

    return _map_factors(one, components)


def project_U_gradient(gradient: Components, components: Components) -> Components:
    """g - (g·u)u for every column u of U: the part of the gradient that would only change the column's length."""

    def one(g: Factors, f: Factors) -> Factors:
        along = jnp.sum(g.U * f.U, axis=-2, keepdims=True)
        return dataclasses.replace(g, U=g.U - along * f.U)

    return _map_factors(one, gradient, components)


def _map_factors(fn: Callable[..., Factors], *trees: Components) -> Components:
    return dataclasses.replace(
        trees[0], tree=jax.tree.map(fn, *(t.tree for t in trees), is_leaf=_is_factors)
    )


def squared_norms(components: Components) -> dict[str, Float[Array, " C"]]:
    """‖P_c‖²_F per leaf, from the factors: tr(UᵀU · VVᵀ). Cost: C·m²·(d_in + d_out) per leaf."""

    def one(f: Factors):
        gram_u = jnp.einsum("c...im,c...in->c...mn", f.U, f.U)
        gram_v = jnp.einsum("c...mo,c...no->c...mn", f.V, f.V)
        return jnp.sum(gram_u * gram_v, axis=tuple(range(1, gram_u.ndim)))

    return {name: one(f) for name, f in components.factors.items()}


def singular_values(components: Components) -> dict[str, Float[Array, "C r"]]:
    """Singular values of every P_c per leaf, largest first; stacked matrices one after the other."""
    values = {
        name: jnp.linalg.svd(f.U @ f.V, compute_uv=False) for name, f in components.factors.items()
    }
    return {name: s.reshape(s.shape[0], -1) for name, s in values.items()}


def effective_ranks(components: Components, tolerance: float = 1e-2) -> dict[str, Int[Array, " C"]]:
    """Number of singular values above `tolerance` times the largest one of the leaf over *all* components.

    Relative to the leaf, not to the component: a dead component has rank 0.
    """

    def one(s):
        return jnp.sum(s > tolerance * jnp.max(s), axis=-1)

    return {name: one(s) for name, s in singular_values(components).items()}
