"""`decompose`: the library's one call, and what it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import Array, Bool, Float, PyTree
from ml_collections import ConfigDict

from apd_jax import components as components_lib
from apd_jax.components import Components, Select
from apd_jax.errors import InputError
from apd_jax.forward import sparse
from apd_jax.methods import config as config_lib
from apd_jax.methods.config import Config
from apd_jax.network import data
from apd_jax.network.problem import Problem, check_examples, check_function
from apd_jax.recipe import stages as recipe_lib
from apd_jax.train import loop as train
from apd_jax.train import parallel
from apd_jax.train import step as step_lib
from apd_jax.train.workdir import claim


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """A network's components, with what is needed to run them. Several instances: see `instance`."""

    problem: Problem
    components: Components
    config: Config
    history: Sequence[Mapping[str, Any]]  # the logged rows: step, losses
    recipe: Config | None = None  # in whose stages it was trained; `config` is then the last one's

    def attributions(self, x: PyTree) -> Float[Array, "B *T C"]:
        """A_c(x), in units of the output, of the kind that the config names; per position if it says so."""
        p = self.problem
        attribute = step_lib.make_attribution_fn(
            p.apply_fn, self.config, attribution_fn=p.attribution_fn, valid_fn=p.valid_fn
        )
        return jnp.sqrt(attribute(self.components, p.params, x, jax.random.key(self.config.seed)))

    def mask(self, x: PyTree) -> Bool[Array, "B *T C"]:
        """Which components are kept on each example (or position) of this batch, as in training."""
        return self.mask_of(self.attributions(x), x)

    def mask_of(self, attributions: Float[Array, "B *T C"], x: PyTree) -> Bool[Array, "B *T C"]:
        """The same, from attributions that are known already."""
        options = {"num_active_fn": self.problem.num_active_fn, "valid_fn": self.problem.valid_fn}
        choose = step_lib.make_mask_fn(
            self.config, thresholds=self.components.thresholds, **options
        )
        return choose(attributions, x)

    def sparse_output(
        self, x: PyTree, mask: Bool[Array, "B *T C"] | Float[Array, "B *T C"] | None = None
    ) -> Any:
        """What apply_fn returns with only the kept components (or those of a given mask)."""
        mask = self.mask(x) if mask is None else mask
        return sparse.apply(self.problem.apply_fn, self.problem.params, self.components, mask, x)

    def ablate(self, components: Sequence[int], x: PyTree) -> Any:
        """What apply_fn returns with all components but the given ones."""
        weights = (
            jnp.ones(self.components.num_components).at[jnp.asarray(components, jnp.int32)].set(0.0)
        )
        return self.problem.apply_fn(
            components_lib.weighted_sum(self.components, self.problem.params, weights), x
        )

    def component(self, i: int) -> PyTree:
        """P_i as a pytree like params; zeros where params are not decomposed."""
        zeros = jax.tree.map(jnp.zeros_like, self.problem.params)
        return components_lib.weighted_sum(
            self.components, zeros, jnp.zeros(self.components.num_components).at[i].set(1.0)
        )

    def save(
        self,
        path: epath.PathLike,
        *,
        metrics: Mapping[str, Any] | None = None,
        evidence: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes this decomposition as a folder of safetensors and JSON, with a card for a model hub: see `apd_jax.storage`.

        Args:
          metrics, evidence: what evaluation.json and evidence.json hold, for the card.
        """
        from apd_jax.storage import folder as storage  # which knows this class

        storage.save(self, path, metrics=metrics, evidence=evidence)

    def report(self, path: epath.PathLike, x: PyTree = None) -> epath.Path:
        """Writes one HTML file that shows every component: its weights, the inputs that need it, what it changes.

        Args:
          path: the file, e.g. "report.html".
          x: inputs [B, ...] on which that is measured. None: one batch of the data that was decomposed on, if it is there.
        Raises:
          InputError: this holds several instances; choose one by `instance`.
        Cost: the attributions of x, and a forward pass for every component.
        """
        from apd_jax.report import html  # which knows this class

        if self.config.num_instances > 1:
            raise InputError(
                f"this holds {self.config.num_instances} decompositions; report one of them, e.g. .instance(0).report(path)."
            )
        path, sample_fn = epath.Path(path), self.problem.sample_fn
        if x is None and sample_fn is not None:
            x = (
                sample_fn.first
                if isinstance(sample_fn, data.Batches)
                else sample_fn(jax.random.key(self.config.seed), 0)
            )
        metrics = {"seed": self.config.seed} | (
            {"step": self.history[-1]["step"]} if self.history else {}
        )
        settings = {"apd": self.config.to_dict()}
        name = path.resolve().parent.name if path.stem == "report" else path.stem
        return html.write(path, html.Source(name, self, x, settings=settings, metrics=metrics))

    def evidence(self, **options: Any) -> Any:
        """What can be said for these components, and what not: see `apd_jax.evidence.evidence` for the options."""
        from apd_jax.evidence import evidence

        return evidence(self, **options)

    @staticmethod
    def load(
        path: epath.PathLike, apply_fn: Callable, params: PyTree = None, **more: Any
    ) -> Decomposition:
        """The decomposition that `save` wrote: see `apd_jax.storage.load` for the arguments."""
        from apd_jax.storage import folder as storage

        return storage.load(path, apply_fn, params, **more)

    def train_again(self, problem: Problem, **changes: Any) -> Components:
        """The components of another run by the same settings (and recipe), but for `changes` of the config."""
        config = (
            self.config if self.recipe is None else recipe_lib.base_config(self.config)
        ).copy_and_resolve_references()
        config.update(changes)
        components = (
            train.fit(problem, config)
            if self.recipe is None
            else recipe_lib.fit(problem, config, self.recipe)
        )[0]
        return jax.tree.map(jnp.asarray, components)

    def instance(self, i: int) -> Decomposition:
        """One of several decompositions that were trained side by side."""
        if not 0 <= i < self.config.num_instances:
            raise InputError(f"instance {i} does not exist; there are {self.config.num_instances}.")
        if self.config.num_instances == 1:
            return self
        config = self.config.copy_and_resolve_references()
        config.num_instances = 1
        return dataclasses.replace(
            self, components=jax.tree.map(lambda a: a[i], self.components), config=config
        )


def decompose(
    apply_fn: Callable,
    params: PyTree,
    sample_fn: Callable | Iterable,
    config: Config,
    *,
    select: Select = None,
    uses: Mapping[str, int] | None = None,
    attribution_fn: Callable | None = None,
    num_active_fn: Callable | None = None,
    valid_fn: Callable | None = None,
    recipe: Config | None = None,
    workdir: epath.PathLike | None = None,
) -> Decomposition:
    """Splits a trained network's parameters into components that sum to them, few of which are needed on any input.

    Args:
      apply_fn: (params, x) -> outputs [B, ...], or (outputs, hidden) with hidden a dict of named activations. Example b
        of the output depends on example b of the input alone. `model.apply` of a Flax Linen module is one.
      params: pytree of arrays: a dict, Flax Linen variables, an NNX state.
      sample_fn: the data, in batches x of `config.batch_size` examples. A function (rng, step) -> x that draws one on the device,
        pure, since a resumed run calls it again with the same arguments; `apd_jax.data.from_arrays` makes one of arrays in memory.
        Or any iterable of batches; where it ends it is begun again. A resumed run begins it from its start and drops the batches
        that were used before, so it is bit-identical if the same batches come again.
      config: from `apd_jax.default_config()`.
      select: glob patterns over dotted leaf paths; None decomposes every floating leaf of two or more axes.
      uses: {leaf path: times the forward pass multiplies with it}, for tied weights; 1 where absent.
      attribution_fn: the same function as apply_fn (outputs only), with products of weights associated so that its
        tangents are cheaper. None: apply_fn.
      num_active_fn: x -> [B], how many features are truly active; only for mask = "exact".
      valid_fn: x -> bool [B, T], which positions of outputs [B, T, ...] are real and not padding; the others count in no loss, no
        attribution and no mask.
      recipe: from `apd_jax.default_recipe()`: trains in its stages, instead of once with the coefficients of `config`. `config.topk` = 0
        then leaves k to the modes. The returned decomposition has the settings of the last stage, and what was found.
      workdir: folder for config.json, checkpoints, metrics.jsonl and TensorBoard scalars. The same call then resumes. None: nothing
        is written.
    Raises:
      InputError: anything that does not fit, in one sentence.
    """
    params = jax.tree_util.tree_map_with_path(_array, params)
    problem = Problem(
        apply_fn, params, sample_fn, attribution_fn, num_active_fn, select, uses, valid_fn
    )
    check_function(problem)
    check_examples(problem)
    if workdir is not None:
        if recipe is None:
            config_lib.validate(config)
        else:
            recipe_lib.check(config, recipe)
        parallel.from_primary(
            lambda: claim(
                workdir, config if recipe is None else ConfigDict({"apd": config, "recipe": recipe})
            )
        )
    if recipe is None:
        components, history = train.fit(problem, config, workdir=workdir)
    else:
        components, history, config = recipe_lib.fit(problem, config, recipe, workdir=workdir)
    return Decomposition(problem, jax.tree.map(jnp.asarray, components), config, history, recipe)


def _array(path: tuple[Any, ...], leaf: Any) -> Array:
    try:
        return jnp.asarray(leaf)
    except TypeError:
        raise InputError(
            f"params leaf {components_lib.path_name(path)!r} is a {type(leaf).__name__}, not an array; "
            "keep what is not a weight in apply_fn, not in params."
        ) from None
