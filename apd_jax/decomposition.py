"""`decompose`: the library's one call, and what it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import Array, Bool, Float, PyTree

from apd_jax import attributions as attributions_lib
from apd_jax import components as components_lib
from apd_jax import config as config_lib
from apd_jax import parallel, sparse, train
from apd_jax import step as step_lib
from apd_jax.components import Components, Select
from apd_jax.config import Config
from apd_jax.errors import InputError
from apd_jax.problem import Problem, check_function
from apd_jax.workdir import claim


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """A network's components, with what is needed to run them. Several instances: see `instance`."""

    problem: Problem
    components: Components
    config: Config
    history: Sequence[Mapping[str, Any]]  # the logged rows: step, losses

    def attributions(self, x: PyTree) -> Float[Array, "B C"]:
        """A_c(x), in units of the output, where `config.attributions_at` says."""
        params = self.problem.params
        at = components_lib.total(self.components, params) if self.config.attributions_at == "components" else params
        fn = self.problem.attribution_fn or self.problem.apply_fn
        return attributions_lib.gradient(fn, at, self.components, x, mode=self.config.attribution_mode)

    def mask(self, x: PyTree) -> Bool[Array, "B C"]:
        """Which components are kept on each example of this batch, as in training."""
        return self.mask_of(self.attributions(x), x)

    def mask_of(self, attributions: Float[Array, "B C"], x: PyTree) -> Bool[Array, "B C"]:
        """The same, from attributions that are known already."""
        return step_lib.make_mask_fn(self.config, num_active_fn=self.problem.num_active_fn)(attributions, x)

    def sparse_output(self, x: PyTree, mask: Bool[Array, "B C"] | Float[Array, "B C"] | None = None) -> Any:
        """What apply_fn returns with only the kept components (or those of a given mask)."""
        mask = self.mask(x) if mask is None else mask
        return sparse.apply(self.problem.apply_fn, self.problem.params, self.components, mask, x)

    def ablate(self, components: Sequence[int], x: PyTree) -> Any:
        """What apply_fn returns with all components but the given ones."""
        weights = jnp.ones(self.components.num_components).at[jnp.asarray(components, jnp.int32)].set(0.0)
        return self.problem.apply_fn(components_lib.weighted_sum(self.components, self.problem.params, weights), x)

    def component(self, i: int) -> PyTree:
        """P_i as a pytree like params; zeros where params are not decomposed."""
        zeros = jax.tree.map(jnp.zeros_like, self.problem.params)
        return components_lib.weighted_sum(self.components, zeros, jnp.zeros(self.components.num_components).at[i].set(1.0))

    def instance(self, i: int) -> Decomposition:
        """One of several decompositions that were trained side by side."""
        if not 0 <= i < self.config.num_instances:
            raise InputError(f"instance {i} does not exist; there are {self.config.num_instances}.")
        if self.config.num_instances == 1:
            return self
        config = self.config.copy_and_resolve_references()
        config.num_instances = 1
        return dataclasses.replace(self, components=jax.tree.map(lambda a: a[i], self.components), config=config)


def decompose(
    apply_fn: Callable,
    params: PyTree,
    sample_fn: Callable,
    config: Config,
    *,
    select: Select = None,
    uses: Mapping[str, int] | None = None,
    attribution_fn: Callable | None = None,
    num_active_fn: Callable | None = None,
    workdir: epath.PathLike | None = None,
) -> Decomposition:
    """Splits a trained network's parameters into components that sum to them, few of which are needed on any input.

    Args:
      apply_fn: (params, x) -> outputs [B, ...], or (outputs, hidden) with hidden a dict of named activations. Example b
        of the output depends on example b of the input alone. `model.apply` of a Flax Linen module is one.
      params: pytree of arrays: a dict, Flax Linen variables, an NNX state.
      sample_fn: (rng, step) -> x, a batch of `config.batch_size` examples, drawn on the device. Must be pure: a
        resumed run calls it again with the same arguments.
      config: from `apd_jax.default_config()`.
      select: glob patterns over dotted leaf paths; None decomposes every floating leaf of two or more axes.
      uses: {leaf path: times the forward pass multiplies with it}, for tied weights; 1 where absent.
      attribution_fn: the same function as apply_fn (outputs only), with products of weights associated so that its
        tangents are cheaper. None: apply_fn.
      num_active_fn: x -> [B], how many features are truly active; only for mask = "exact".
      workdir: folder for config.json, checkpoints, metrics.jsonl and TensorBoard scalars. The same call then resumes. None: nothing
        is written.
    Raises:
      InputError: anything that does not fit, in one sentence.
    """
    params = jax.tree.map(jnp.asarray, params)
    problem = Problem(apply_fn, params, sample_fn, attribution_fn, num_active_fn, select, uses)
    check_function(problem)
    if workdir is not None:
        config_lib.validate(config)
        parallel.from_primary(lambda: claim(workdir, config))
    components, history = train.fit(problem, config, workdir=workdir)
    return Decomposition(problem, jax.tree.map(jnp.asarray, components), config, history)
