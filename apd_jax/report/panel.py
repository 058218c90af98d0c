"""What the page needs to run a small network itself: its layers, its weights, and the components as short factors.

Shapes: C components, a decomposed leaf [a, b], r_c the singular values that component c keeps there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from apd_jax import components as components_lib
from apd_jax import sparse
from apd_jax import step as step_lib
from apd_jax.components import Components, Factors
from apd_jax.config import Config
from apd_jax.decomposition import Decomposition
from apd_jax.targets.base import Target

TOLERANCES = (1e-4, 1e-5, 1e-6, 1e-7)  # of the leaf's largest singular value
UNCHANGED = 1e-6  # largest change of an output by what is left out, over max(1, largest output)
NUM_CHECKED = 64  # examples on which that is checked


def build(target: Target, decomposition: Decomposition, x: Float[Array, "B F"], cut: float) -> dict[str, Any]:
    """The network as data: layers by name, its leaves, and P_c = U_c V_c with as few singular values as leave the outputs unchanged.

    Args:
      target: one with `layers`.
      x: inputs, on which the change is checked with all components and with random factors of them.
      cut: the attribution from which on a component is kept, as the batch top-k has cut this data.
    Cost: one SVD per component and leaf, and up to 4 sparse passes of NUM_CHECKED examples.
    """
    params, components = decomposition.problem.params, decomposition.components
    matrices = {
        name: jax.jit(jnp.linalg.svd, static_argnames="full_matrices")(f.weights, full_matrices=False)
        for name, f in components.factors.items()
    }
    short = _shortest(target, params, components, matrices, x[:NUM_CHECKED])
    leaves = {layer.leaf for layer in target.layers if layer.leaf}
    named = {components_lib.path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    return {
        "layers": [dataclasses.asdict(layer) for layer in target.layers],
        "leaves": {name: named[name] for name in sorted(leaves)},
        "factors": short,
        "num_inputs": x.shape[1],
        "lowest": -1 if bool((x < 0).any()) else 0,
        "highest": max(1.0, float(jnp.max(x))),
        "start": _example(x),
        "rule": mask_rule(decomposition.config, cut),
    }


def mask_rule(config: Config, cut: float) -> dict[str, Any] | None:
    """How one input's components are chosen on the page; None for attributions that the page cannot take.

    Batch top-k keeps what lies above a cut that only the batch decides: one input alone is held against the cut that the
    report's inputs had.
    """
    if config.attribution != "gradient" or config.attribution_metric != "mse" or config.mask_per != "example":
        return None
    kept = {"topk": int(config.topk)} if config.mask == "topk" else {"cut": None if np.isinf(cut) else cut}
    return {"at": config.attributions_at, "num_always_on": config.num_always_on, "all": config.mask == "none", **kept}


def _example(x: Float[Array, "B F"]) -> Float[np.ndarray, " F"]:
    """An input with something in it, but not much: the one with the fewest nonzero entries, the largest of those."""
    x = np.asarray(x)
    active = np.where((x != 0).any(axis=1), (x != 0).sum(axis=1), x.shape[1] + 1)
    return x[np.lexsort((-np.abs(x).max(axis=1), active))[0]]


def _shortest(target: Target, params: PyTree, components: Components, matrices: dict[str, Any], x: Array) -> dict[str, Any]:
    """{leaf: {ranks [C], U: every U_c [a, r_c] one after the other, V: every V_c [r_c, b]}} at the first tolerance that will do."""
    random = jax.random.uniform(jax.random.key(0), (x.shape[0], components.num_components)).at[0].set(1.0)

    @jax.jit
    def outputs(components: Components) -> Array:
        return step_lib.split_result(sparse.apply(target.apply_fn, params, components, random, x))[0]

    exact, factors = outputs(components), {}
    for tolerance in TOLERANCES:
        cut = {}
        for name, (u, s, vt) in matrices.items():
            kept = s > tolerance * jnp.max(s)
            cut[name] = Factors(u * (s * kept)[:, None, :], vt, components.factors[name].shape, components.factors[name].uses)
        tree = jax.tree_util.tree_map_with_path(
            lambda path, slot, cut=cut: cut.get(components_lib.path_name(path)), components.tree, is_leaf=components_lib.is_slot
        )
        factors = cut
        if float(jnp.max(jnp.abs(outputs(Components(tree)) - exact))) < UNCHANGED * max(1.0, float(jnp.max(jnp.abs(exact)))):
            break
    short = {}
    for name, f in factors.items():
        U, V = np.asarray(f.U), np.asarray(f.V)
        ranks = (np.abs(U).max(axis=1) > 0).sum(axis=1)
        short[name] = {
            "ranks": ranks.tolist(),
            "U": np.concatenate([U[c, :, :r].ravel() for c, r in enumerate(ranks)]),
            "V": np.concatenate([V[c, :r].ravel() for c, r in enumerate(ranks)]),
        }
    return short
