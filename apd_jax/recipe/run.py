"""One run, trained once or in the stages of a recipe, in a workdir that belongs to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax.core import meta
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from apd_jax.components import Components, path_name
from apd_jax.errors import InputError
from apd_jax.methods import registry
from apd_jax.methods.base import Method
from apd_jax.methods.optimizers import Trained
from apd_jax.network.problem import Problem
from apd_jax.paths import quoted, user_path
from apd_jax.recipe import pieces, scales, stages
from apd_jax.train import checks, fingerprint, loop, parallel
from apd_jax.train.begin import begin
from apd_jax.train.progress import say
from apd_jax.train.workdir import claim, keep_settings

Keep = Callable[[epath.PathLike, Problem, Components], None]


def run(
    problem: Problem,
    method: Method,
    recipe: Any = None,
    workdir: epath.PathLike | None = None,
    given: Trained | None = None,
    step: int = 0,
    keep: Keep | None = None,
    on_log: loop.OnLog | None = None,
) -> tuple[Trained, list[dict[str, Any]], Method]:
    """Trains from where the method (or its recipe) begins, or from what is given at a step.

    Args:
      on_log: as `apd_jax.decompose` takes it.
      keep: writes what else the workdir is to hold of the network, once it belongs to this run.
    Returns: what was trained, the logged rows, and the settings as training read them (with a
      recipe in its last stage).
    Raises:
      InputError: settings, or a workdir of another run; and as `train.loop.fit`.
    """
    if on_log is not None and not callable(on_log):
        raise InputError(f"on_log must be a function of a row {{name: value}}; got {on_log!r}.")
    if recipe is None:
        method.check()
        checks.data_fits(problem, method)
    else:
        stages.check(method, recipe)
    ready = method if recipe is not None else scales.prepared(problem, method)
    start = given
    if given is None and ready.finds_beginning:
        start = Trained(pieces.found(problem, ready))
    state = None if start is None else begin(problem, ready, start, step)
    if workdir is not None:
        settings = registry.settings(method)
        asked = settings if recipe is None else ConfigDict({"apd": settings, "recipe": recipe})
        network = fingerprint.of_problem(problem)
        if given is not None:
            network["init"] = [step, fingerprint.of_tree(given)]
        begins = _shapes(problem, ready) if state is None else state.components

        def begun() -> None:
            claim(workdir, asked, network)
            try:
                if recipe is None:
                    keep_settings(workdir, ready)
                if keep is not None:
                    keep(workdir, problem, begins)
            except OSError as error:
                raise InputError(
                    f"workdir {workdir} cannot be written ({error.strerror}); choose another "
                    "workdir."
                ) from None

        parallel.from_primary(begun)
        folder = user_path(workdir)
        say(
            f"Losses: {folder / 'metrics.jsonl'}; the same call goes on from its checkpoints. "
            f"A page: python -m apd_jax.main --mode=evaluate --workdir={quoted(folder)} (--help)."
        )
    if recipe is None:
        trained, history = loop.fit(problem, ready, state, workdir=workdir, on_log=on_log)
    else:
        trained, history, ready = stages.fit(problem, ready, recipe, workdir=workdir, on_log=on_log)
    return jax.tree.map(jnp.asarray, trained), history, ready


def given(init: Any) -> Trained | None:
    """What training begins with: components, with the gate where a decomposition is given.

    Raises:
      InputError: it is neither.
    """
    if init is None or isinstance(init, Components):
        return None if init is None else Trained(init)
    if isinstance(trained := getattr(init, "trained", None), Trained):
        return trained
    raise InputError(
        f"init must be a decomposition or its components; got a {type(init).__name__}."
    )


def _shapes(problem: Problem, method: Method) -> Components:
    """Of the components that the method begins with."""
    return jax.eval_shape(lambda key: method.make_components(key, problem), jax.random.key(0))


def as_arrays(params: PyTree) -> PyTree:
    """Params as arrays of one device each, without boxes with Linen's partitioning.

    Raises:
      InputError: a leaf that is no array.
    """
    return jax.tree_util.tree_map_with_path(_array, meta.unbox(params))


def _array(path: tuple[Any, ...], leaf: Any) -> Array:
    if isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1:
        leaf = parallel.whole(leaf)
    try:
        return jnp.asarray(leaf)
    except TypeError:
        raise InputError(
            f"params leaf {path_name(path)!r} is a {type(leaf).__name__}, not an "
            "array; keep what is not a weight in apply_fn, not in params."
        ) from None
