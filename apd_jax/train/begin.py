"""Training that begins at given components, and more of them: the state of its first step."""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from apd_jax import components as components_lib
from apd_jax.components import Components
from apd_jax.errors import InputError
from apd_jax.methods.base import Method
from apd_jax.methods.optimizers import Trained
from apd_jax.network.problem import Problem
from apd_jax.train.state import TrainState, begin_at

log = logging.getLogger(__name__)


def begin(problem: Problem, method: Method, given: Trained, step: int = 0) -> TrainState:
    """The components and gate, as if training had come to this step; the optimizer begins anew.

    Where the method has more components, the others begin at zero (U as the method draws it,
    V = 0), so that the sum is what it was. The gate is kept where its arrays fit, or lack only rows
    for the new components; otherwise it begins anew, which is logged.

    Args:
      given: with a leading axis of instances if the method trains several. Without arrays of a
        gate, the method's begins anew.
    Raises:
      InputError: other sites or shapes, more components than the method has, another number of
        instances.
    """
    _fits(problem, method, given.components)
    several = method.num_instances > 1

    def fresh(key: Array) -> Trained:
        components = method.make_components(key, problem)
        return Trained(components, method.make_gate(key, problem, components))

    keys = jax.random.split(jax.random.key(method.seed), method.num_instances)
    make = jax.vmap(fresh) if several else lambda keys: fresh(keys[0])
    like = jax.eval_shape(make, keys)
    have, want = given.components.num_components, like.components.num_components
    if have > want:
        raise InputError(
            f"init holds {have} components, more than the {want} that the settings ask for; raise "
            "num_components."
        )
    components, gate = given.components, given.gate
    if have < want:
        like = jax.jit(make)(keys)
        components = components_lib.grown(components, like.components)
    if jax.tree.leaves(gate) and (gate := _grown(gate, like.gate, int(several))) is None:
        log.warning("the gate of init does not fit these settings, and begins anew.")

    def state(trained: Trained, key: Array) -> TrainState:
        own = trained.gate if jax.tree.leaves(trained.gate) else None
        return begin_at(trained.components, problem, method, rng=key, gate=own, step=step)

    start = jax.tree.map(jnp.asarray, Trained(components, () if gate is None else gate))
    return jax.vmap(state)(start, keys) if several else state(start, keys[0])


def _fits(problem: Problem, method: Method, given: Components) -> None:
    components_lib.decomposed_leaves(given, problem.params)
    if other := set(given.factors) ^ set(problem.site_names):
        raise InputError(
            f"init decomposes {', '.join(given.factors)}, and this call "
            f"{', '.join(problem.site_names)}: {min(other)!r} is in one of them only; give the "
            "same select."
        )
    for name, f in given.factors.items():
        lead = f.U.shape[: f.U.ndim - 3 - len(f.axes.batch)]
        if lead != (() if method.num_instances == 1 else (method.num_instances,)):
            raise InputError(
                f"init holds {lead[0] if lead else 1} decompositions at {name!r}, and "
                f"num_instances = {method.num_instances}; make them equal, or take .instance(i)."
            )


def _grown(old: PyTree, new: PyTree, axis: int) -> PyTree:
    """The arrays of a gate in the place of the first rows of a larger one's.

    None where they do not fit.
    """
    if jax.tree.structure(old) != jax.tree.structure(new):
        return None

    def fits(a: Any, b: Any) -> bool:
        rest = [shape[:axis] + shape[axis + 1 :] for shape in (a.shape, b.shape)]
        grows = a.ndim > axis and rest[0] == rest[1] and a.shape[axis] < b.shape[axis]
        return a.shape == b.shape or grows

    def placed(a: Any, b: Any) -> Any:
        if a.shape == b.shape:
            return a
        kept = jax.lax.slice_in_dim(b, a.shape[axis], b.shape[axis], axis=axis)
        return jnp.concatenate([jnp.asarray(a), kept], axis)

    if not all(map(fits, jax.tree.leaves(old), jax.tree.leaves(new))):
        return None
    return jax.tree.map(placed, old, new)
