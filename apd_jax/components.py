"""The component pytree: parameter components P_c in factored form.

Shapes: C components, a leaf's weight matrix [d_in, d_out], rank m.
A decomposed leaf is a `Factors` node with U [C, d_in, m] and V [C, m, d_out]; P_c = U_c V_c, reshaped
to the leaf. A leaf that is not decomposed is None: every sparse model uses the target's value there.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from apd_jax.errors import InputError

Select = str | Sequence[str] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    """All C components of one leaf.

    `shape` is the leaf's own shape, matricised as (all axes but the last) x (last axis). `uses` is how often the
    forward pass multiplies with the leaf; a tied weight has 2, and counts twice in the sums over matrices.
    """

    U: Array  # [C, d_in, m]; instances and transformations add or take leading axes
    V: Array  # [C, m, d_out]
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    uses: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def num_params(self) -> int:
        return math.prod(self.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Components:
    """`tree` has the structure of the target's params, with `Factors` or None for leaves."""

    tree: PyTree[Any]

    @property
    def factors(self) -> dict[str, Factors]:
        """The decomposed leaves by dotted path, in the order of the params pytree."""
        return {name: slot for name, slot in _named_leaves(self.tree).items() if slot is not None}

    @property
    def num_components(self) -> int:
        return next(iter(self.factors.values())).U.shape[-3]

    @property
    def num_params(self) -> int:
        """N: entries of the decomposed matrices, each counted `uses` times."""
        return sum(f.uses * f.num_params for f in self.factors.values())


def _is_factors(node: Any) -> bool:
    return isinstance(node, Factors)


def is_slot(node: Any) -> bool:
    """Where a leaf of params stands in `Components.tree`."""
    return node is None or isinstance(node, Factors)


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's dotted path, e.g. `params.Dense_0.kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(d_in, d_out) of a leaf: the last axis is the output; a vector is one row."""
    return math.prod(shape[:-1]), (shape[-1] if shape else 1)


def selected_paths(params: PyTree, select: Select = None) -> list[str]:
    """Dotted paths of the leaves to decompose.

    Args:
      select: glob patterns over dotted paths (`*.kernel`); None takes every floating leaf of two or more axes.
    Raises:
      InputError: a pattern matches nothing, or matches a leaf that is not floating point.
    """
    leaves = {name: leaf for name, leaf in _named_leaves(params).items() if leaf is not None}
    floating = {name for name, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    if select is None:
        chosen = [name for name in leaves if name in floating and leaves[name].ndim >= 2]
        if not chosen:
            raise InputError(f"params has no floating leaf with two or more axes to decompose; its leaves: {', '.join(leaves)}.")
        return chosen
    chosen = set()
    for pattern in [select] if isinstance(select, str) else select:
        hits = fnmatch.filter(leaves, pattern)
        if not hits:
            raise InputError(f"select pattern {pattern!r} matches no leaf of params; its leaves: {', '.join(leaves)}.")
        if bad := [name for name in hits if name not in floating]:
            raise InputError(
                f"select pattern {pattern!r} matches {bad[0]!r} of dtype {leaves[bad[0]].dtype}; only floating leaves can be decomposed."
            )
        chosen.update(hits)
    return [name for name in leaves if name in chosen]


def init(
    rng: PRNGKeyArray,
    params: PyTree,
    *,
    num_components: int,
    rank: int | None = None,
    select: Select = None,
    uses: Mapping[str, int] | None = None,
    init_scale: float = 1.0,
) -> Components:
    r"""Random components, small on purpose.

    U ~ N(0, s²/((C+1)·d_in·m/2)),  V ~ N(0, s²/((C+1)·m·d_out/2)),  s = init_scale

    This is Glorot's formula with the component axis counted among the fans, as in the released code of APD: about
    sqrt(C·min(d, m)) times smaller than Glorot on the matrix itself. Small initial components are what lets single
    features win; with matrix-scale Glorot TMS 40-10 sticks at MMCS 0.88.

    Args:
      num_components: C.
      rank: m for every leaf; None is full rank, min(d_in, d_out). May exceed it.
      select: see `selected_paths`.
      uses: {dotted path: times the forward pass uses the leaf}, 1 where absent.
    Raises:
      InputError: C or rank below 1, or `select`/`uses` name a leaf that is not there.
    """
    if num_components < 1 or (rank is not None and rank < 1):
        raise InputError(f"num_components and rank must be at least 1; got {num_components} and {rank}.")
    chosen = selected_paths(params, select)
    uses = dict(uses or {})
    if unknown := set(uses) - set(chosen):
        raise InputError(f"uses names {sorted(unknown)}, which are not decomposed leaves; these are {chosen}.")

    def make(path, leaf):
        name = path_name(path)
        if name not in chosen:
            return None
        d_in, d_out = matrix_shape(leaf.shape)
        m = rank or min(d_in, d_out)
        key_u, key_v = jax.random.split(jax.random.fold_in(rng, chosen.index(name)))

        def draw(key, a, b):
            std = init_scale * math.sqrt(2 / ((num_components + 1) * a * b))
            return std * jax.random.normal(key, (num_components, a, b), leaf.dtype)

        return Factors(draw(key_u, d_in, m), draw(key_v, m, d_out), shape=tuple(leaf.shape), uses=uses.get(name, 1))

    return Components(jax.tree_util.tree_map_with_path(make, params))


def from_materialized(weights: PyTree, *, rank: int | None = None, uses: Mapping[str, int] | None = None) -> Components:
    """Components with given P_c: the inverse of `materialize`, by one SVD per matrix (exact when rank is None).

    Args:
      weights: pytree like params, leaves [C, *leaf.shape] or None where not decomposed.
    """
    uses = dict(uses or {})

    def make(path, weight):
        if weight is None:
            return None
        d_in, d_out = matrix_shape(weight.shape[1:])
        m = rank or min(d_in, d_out)
        u, s, vt = jnp.linalg.svd(weight.reshape(-1, d_in, d_out), full_matrices=False)
        root = jnp.sqrt(s[:, None, :m])
        return Factors(
            u[..., :m] * root, jnp.swapaxes(root, 1, 2) * vt[:, :m], shape=tuple(weight.shape[1:]), uses=uses.get(path_name(path), 1)
        )

    return Components(jax.tree_util.tree_map_with_path(make, weights, is_leaf=lambda w: w is None))


def from_raw(tree: Mapping[str, Any]) -> Components:
    """Components from nested dicts that end in {"U", "V"}, as a checkpoint read without its network gives them.

    Leaf shapes are those of the matrices; for norms, ranks and tables.
    """

    def visit(node):
        if not isinstance(node, Mapping):
            return None
        if set(node) == {"U", "V"}:
            return Factors(node["U"], node["V"], shape=(node["U"].shape[-2], node["V"].shape[-1]))
        return {name: visit(child) for name, child in node.items()}

    return Components(visit(tree))


def decomposed_leaves(components: Components, params: PyTree) -> dict[str, Array]:
    """The leaves of params that are decomposed, by dotted path.

    Raises:
      InputError: components and params differ in structure or leaf shapes.
    """
    if jax.tree.structure(params, is_leaf=is_slot) != jax.tree.structure(components.tree, is_leaf=is_slot):
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
    return jax.tree_util.tree_map_with_path(lambda path, leaf: values.get(path_name(path), leaf), params)


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_slot)[0]}


def leaf_total(factors: Factors) -> Float[Array, ...]:
    """Σ_c P_c of one leaf, in the leaf's shape: one matmul over the joint (component, rank) axis, no P_c is formed."""
    C, d_in, m = factors.U.shape
    return (jnp.moveaxis(factors.U, 0, 1).reshape(d_in, C * m) @ factors.V.reshape(C * m, -1)).reshape(factors.shape)


def total(components: Components, params: PyTree) -> PyTree:
    """Σ_c P_c as a pytree like params; leaves that are not decomposed are those of params.

    Cost: one matmul [d_in, C·m] x [C·m, d_out] per leaf.
    """
    leaves = decomposed_leaves(components, params)
    return replace_leaves(params, {name: leaf_total(f).astype(leaves[name].dtype) for name, f in components.factors.items()})


def materialize(components: Components) -> PyTree:
    """Every P_c: pytree like params, leaves [C, *leaf.shape]; None where not decomposed."""
    return jax.tree.map(lambda f: None if f is None else (f.U @ f.V).reshape(-1, *f.shape), components.tree, is_leaf=is_slot)


def weighted_sum(components: Components, params: PyTree, weights: Float[Array, " C"]) -> PyTree:
    """Σ_c w_c P_c as a pytree like params: `weights` scales or switches components for *every* input."""

    scaled = _map_factors(lambda f: dataclasses.replace(f, U=f.U * weights[:, None, None].astype(f.U.dtype)), components)
    return total(scaled, params)


def normalize_U(components: Components) -> Components:
    """Every column U_c[:, j] scaled to unit length over d_in; V is left alone."""
    return _map_factors(lambda f: dataclasses.replace(f, U=f.U / jnp.linalg.norm(f.U, axis=-2, keepdims=True)), components)


def project_U_gradient(gradient: Components, components: Components) -> Components:
    """g - (g·u)u for every column u of U: the part of the gradient that would only change the column's length."""

    def one(g: Factors, f: Factors) -> Factors:
        along = jnp.sum(g.U * f.U, axis=-2, keepdims=True)
        return dataclasses.replace(g, U=g.U - along * f.U)

    return _map_factors(one, gradient, components)


def _map_factors(fn: Callable[..., Factors], *trees: Components) -> Components:
    return Components(jax.tree.map(fn, *(t.tree for t in trees), is_leaf=_is_factors))


def squared_norms(components: Components) -> dict[str, Float[Array, " C"]]:
    """‖P_c‖²_F per leaf, from the factors: tr(UᵀU · VVᵀ). Cost: C·m²·(d_in + d_out) per leaf."""

    def one(f: Factors):
        gram_u = jnp.einsum("cim,cin->cmn", f.U, f.U)
        gram_v = jnp.einsum("cmo,cno->cmn", f.V, f.V)
        return jnp.sum(gram_u * gram_v, axis=(-2, -1))

    return {name: one(f) for name, f in components.factors.items()}


def singular_values(components: Components) -> dict[str, Float[Array, "C r"]]:
    """Singular values of every P_c per leaf, largest first."""
    return {name: jnp.linalg.svd(f.U @ f.V, compute_uv=False) for name, f in components.factors.items()}


def effective_ranks(components: Components, tolerance: float = 1e-2) -> dict[str, Int[Array, " C"]]:
    """Number of singular values above `tolerance` times the largest one of the leaf over *all* components.

    Relative to the leaf, not to the component: a dead component has rank 0.
    """

    def one(s):
        return jnp.sum(s > tolerance * jnp.max(s), axis=-1)

    return {name: one(s) for name, s in singular_values(components).items()}
