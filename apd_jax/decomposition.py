"""`decompose`: the library's one call, and what it returns."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.core import meta
from jaxtyping import Array, Bool, Float, PyTree
from ml_collections import ConfigDict

from apd_jax import components as components_lib
from apd_jax.components import Components, Select
from apd_jax.errors import InputError
from apd_jax.forward import sparse
from apd_jax.gates.base import ATTRIBUTIONS, Activity, at_valid
from apd_jax.methods import observe, registry
from apd_jax.methods.base import Method
from apd_jax.methods.optimizers import Trained
from apd_jax.network.data import Batches
from apd_jax.network.problem import Problem, check_examples, check_function, check_params
from apd_jax.recipe import stages
from apd_jax.train import fingerprint, loop, parallel
from apd_jax.train.workdir import claim

_HOOKS: dict[str, Callable] = {}  # what rooms above this one do with a decomposition


def register(**hooks: Callable) -> None:
    """Makes functions of rooms above this one callable as methods: save, load, report, evidence."""
    _HOOKS.update(hooks)


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """A network's components with their gate: what is needed to run them.

    method: the settings of the training (with a recipe, of its last stage). history: the logged
    rows: step, losses. gate: the arrays of a learned gate. Several instances: see `instance`.
    """

    problem: Problem
    components: Components
    method: Method
    history: Sequence[Mapping[str, Any]] = ()
    recipe: Any = None
    gate: PyTree = ()

    def __post_init__(self):
        object.__setattr__(self, "method", registry.of(self.method))

    @property
    def config(self) -> Method:
        """The same as `method`."""
        return self.method

    @property
    def trained(self) -> Trained:
        return Trained(self.components, self.gate)

    @functools.cached_property
    def _observed(self) -> Callable[..., Activity]:
        """(components, gate, params, x) -> activity; jitted, with the weights as arguments."""

        def fn(components: Components, gate: PyTree, params: PyTree, x: PyTree) -> Any:
            return activity_of(self.method, self.problem, Trained(components, gate), params, x)

        return jax.jit(fn)

    @functools.cached_property
    def _attributed(self) -> Callable[..., Array]:
        method, problem = self.method, self.problem

        def fn(components: Components, params: PyTree, x: PyTree) -> Array:
            rng = jax.random.key(method.seed)
            return jnp.sqrt(method.attribute(problem)(components, params, x, rng))

        return jax.jit(fn)

    def activity(self, x: PyTree) -> Activity:
        """Which components the gate says are active on x, and by how much."""
        return self._observed(self.components, self.gate, self.problem.params, _on_device(x))

    def attributions(self, x: PyTree) -> Float[Array, "B *T C"]:
        """A_c(x), in units of the output, as the method takes them; per position if it says so."""
        return self._attributed(self.components, self.problem.params, _on_device(x))

    def mask(self, x: PyTree, cut: float | None = None) -> Bool[Array, "B *T C"]:
        """Which components are active on each example (or position) of this batch, as in training.

        Batch top-k depends on the whole batch: an example alone may keep others. With a cut, from
        `cut`, every example is judged by itself.
        """
        if cut is None:
            return self.activity(x).active
        scores = self.attributions(x)
        kept = (scores >= cut) | self._always_on(scores.ndim)
        return at_valid(kept, self.problem.valid(_on_device(x)))

    def cut(self, x: PyTree) -> float:
        """The least attribution that the gate keeps on a large batch x; see `mask`.

        Raises:
          InputError: the gate keeps nothing there, or judges by something else than attributions.
        """
        if ATTRIBUTIONS not in self.method.gate(self.gate, self.problem).reads:
            raise InputError(
                f"the gate of method {self.method.name!r} judges every example by itself; mask(x) "
                "needs no cut."
            )
        found = self.activity(x)
        chosen = found.active & ~self._always_on(found.active.ndim)
        if not chosen.any():
            raise InputError("the gate keeps no component on x, so there is no cut; give more.")
        return float(jnp.min(found.scores, where=chosen, initial=jnp.inf))

    def _always_on(self, ndim: int) -> Bool[Array, "..."]:
        """Which components are on whatever the input, [1, ..., C]."""
        on = jnp.arange(self.components.num_components) < self.method.always_on
        return on.reshape(*[1] * (ndim - 1), -1)

    def sparse_output(
        self, x: PyTree, mask: np.ndarray | Array | Sequence[Any] | None = None
    ) -> Any:
        """What apply_fn returns with only the active components.

        mask: other components [B, *T, C], bool or the share of each that is left.
        """
        mask = self.mask(x) if mask is None else jnp.asarray(mask)
        p = self.problem
        return sparse.apply(p.apply_fn, p.params, self.components, mask, _on_device(x))

    def ablate(self, components: Sequence[int] | np.ndarray | Array, x: PyTree) -> Any:
        """What apply_fn returns with all components but the given ones: numbers, or a bool mask."""
        on = ~self._chosen(components)
        params = components_lib.weighted_sum(
            self.components, self.problem.params, jnp.asarray(on, jnp.float32)
        )
        return self.problem.apply_fn(params, _on_device(x))

    def component(self, i: int) -> PyTree:
        """P_i as a pytree like params; zeros where params are not decomposed."""
        zeros = jax.tree.map(jnp.zeros_like, self.problem.params)
        only = jnp.asarray(self._chosen([i]), jnp.float32)
        return components_lib.weighted_sum(self.components, zeros, only)

    def _chosen(self, components: Any) -> np.ndarray:
        """Which of the C components are meant, bool [C]."""
        C, given = self.components.num_components, np.asarray(components)
        if given.dtype == bool:
            if given.shape != (C,):
                raise InputError(f"a mask of components must have shape ({C},); got {given.shape}.")
            return given
        if given.size and not np.issubdtype(given.dtype, np.integer):
            raise InputError(
                f"components are chosen by whole numbers or by a bool mask; got {given.dtype}."
            )
        numbers = [int(c) for c in given.reshape(-1)]
        if bad := [c for c in numbers if not 0 <= c < C]:
            raise InputError(
                f"component {bad[0]} does not exist; there are {C}, counted from 0 to {C - 1}."
            )
        chosen = np.zeros(C, bool)
        chosen[numbers] = True
        return chosen

    def save(self, path: epath.PathLike, **options: Any) -> None:
        """Writes a folder of safetensors and JSON: see `apd_jax.storage.folder.save`."""
        _HOOKS["save"](self, path, **options)

    def report(self, path: epath.PathLike, x: PyTree = None) -> epath.Path:
        """Writes one HTML file that shows every component: see `apd_jax.report.html.report`."""
        return _HOOKS["report"](self, path, x)

    def evidence(self, **options: Any) -> Any:
        """What can be said for these components, and what not: see `apd_jax.evidence.evidence`."""
        return _HOOKS["evidence"](self, **options)

    @staticmethod
    def load(
        path: epath.PathLike, apply_fn: Callable, params: PyTree = None, **more: Any
    ) -> Decomposition:
        """The decomposition that `save` wrote: see `apd_jax.storage.folder.load`."""
        return _HOOKS["load"](path, apply_fn, params, **more)

    def train_again(self, problem: Problem, **changes: Any) -> Trained:
        """Another run by the same settings (and recipe), but for `changes` of the method's."""
        if self.recipe is None:
            trained = loop.fit(problem, self.method.replace(**changes))[0]
        else:
            base = stages.base_method(self.method).replace(**changes)
            trained = stages.fit(problem, base, self.recipe)[0]
        return jax.tree.map(jnp.asarray, trained)

    def instance(self, i: int) -> Decomposition:
        """One of several decompositions that were trained side by side."""
        count = self.method.num_instances
        if not 0 <= i < count:
            raise InputError(f"instance {i} does not exist; there are {count}.")
        if count == 1:
            return self
        one = one_instance(self.trained, i)
        return dataclasses.replace(
            self,
            components=one.components,
            gate=one.gate,
            method=self.method.replace(num_instances=1),
        )


def one_instance(tree: PyTree, i: int) -> PyTree:
    """Instance i of arrays with a leading axis of instances."""
    return jax.tree.map(lambda a: a[i], tree)


def instances(tree: PyTree, method: Method) -> list[PyTree]:
    """Without an axis of instances: one, or as many as were trained side by side."""
    count = method.num_instances
    return [tree] if count == 1 else [one_instance(tree, i) for i in range(count)]


def activity_of(
    method: Method, problem: Problem, trained: Trained, params: PyTree, x: PyTree
) -> Activity:
    """What the method's gate says of x: the one definition of the mask of training.

    Where the gate reads nothing, and keeps all, the scores are attributions.
    """
    gate = method.gate(trained.gate, problem)
    reads = gate.reads or frozenset({ATTRIBUTIONS})
    rng = jax.random.key(method.seed)
    scene = observe.scene(method, problem, gate, trained.components, params, x, rng, reads=reads)
    return gate(scene.seen)


def decompose(
    apply_fn: Callable,
    params: PyTree,
    sample_fn: Callable | Iterable,
    config: Any = None,
    *,
    method: str | Method | None = None,
    select: Select = None,
    uses: Mapping[str, SupportsIndex] | None = None,
    attribution_fn: Callable | None = None,
    num_active_fn: Callable | None = None,
    valid_fn: Callable | None = None,
    elsewhere: Callable | Iterable | None = None,
    recipe: Any = None,
    workdir: epath.PathLike | None = None,
) -> Decomposition:
    """Splits a trained network's parameters into components that sum to them.

    Few of them are needed on any input.

    Args:
      apply_fn: (params, x) -> outputs [B, ...], or (outputs, hidden) with hidden a dict of named
        activations. Example b of the output depends on example b of the input alone. `model.apply`
        of a Flax Linen module is one.
      params: pytree of arrays: a dict, Flax Linen variables, an NNX state. Leaves that are split
        over devices are put together; boxes with Linen's partitioning are taken off.
      sample_fn: the data, in batches x of `batch_size` examples. A function (rng, step) -> x that
        draws one on the device, pure, since a resumed run calls it again with the same arguments;
        `apd_jax.data.from_arrays` makes one of arrays in memory. Or any iterable of batches, or a
        generator function; where it ends it is begun again. A resumed run begins it from its start
        and drops the batches that were used before, so it is bit-identical if the same batches
        come again.
      config: settings: from `apd_jax.default_config()`, or a method's own settings object, e.g.
        `apd_jax.SPD(num_components=20)`.
      method: instead of config, a method's name for its defaults: "apd", "spd", "vpd", "whole",
        "targeted"; or its settings.
      select: glob patterns over dotted leaf paths, {pattern: options} or a function (path, leaf)
        -> bool or options; see `apd_jax.components.init`. None decomposes every floating leaf of
        two or more axes.
      uses: {leaf path: times the forward pass multiplies with it}, for tied weights; 1 where
        absent.
      attribution_fn: the same function as apply_fn (outputs only), with products of weights
        associated so that its tangents are cheaper. None: apply_fn.
      num_active_fn: x -> [B], how many features are truly active; only for mask = "exact".
      valid_fn: x -> bool [B, T], which positions of outputs [B, T, ...] are real and not padding;
        the others count in no loss, no attribution and no mask, whatever stands there. Numbers (of
        segments, of an attention mask) count where they are above 0.
      elsewhere: data of the second stream, as sample_fn; for method "targeted".
      recipe: from `apd_jax.default_recipe()`: trains in its stages, instead of once with the
        coefficients of `config`. `topk` = 0 then leaves k to the modes. The returned decomposition
        has the settings of the last stage, and what was found.
      workdir: folder for config.json, network.json, checkpoints, metrics.jsonl and TensorBoard
        scalars. The same call then resumes; another network, selection or setting is refused. None:
        nothing is written.
    Raises:
      InputError: anything that does not fit, in one sentence.
    """
    if config is not None and method is not None:
        raise InputError("give config or method, not both: each holds a method's settings.")
    chosen = registry.of(config if config is not None else method or "apd")
    params = jax.tree_util.tree_map_with_path(_array, meta.unbox(params))
    problem = Problem(
        *(apply_fn, params, sample_fn, attribution_fn, num_active_fn),
        *(select, uses, valid_fn, elsewhere),
    )
    if recipe is not None and isinstance(problem.sample_fn, Batches) and problem.sample_fn.once:
        raise InputError(
            "a recipe goes through the data several times, which an iterator cannot; give a list, "
            "a loader or a generator function."
        )
    check_function(problem)
    check_params(problem)
    check_examples(problem, chosen.minimality_loss)
    if workdir is not None:
        if recipe is None:
            chosen.check()
        else:
            stages.check(chosen, recipe)
        settings = registry.settings(chosen)
        asked = settings if recipe is None else ConfigDict({"apd": settings, "recipe": recipe})
        network = fingerprint.of_problem(problem)
        parallel.from_primary(lambda: claim(workdir, asked, network))
    if recipe is None:
        trained, history = loop.fit(problem, chosen, workdir=workdir)
    else:
        trained, history, chosen = stages.fit(problem, chosen, recipe, workdir=workdir)
    trained = jax.tree.map(jnp.asarray, trained)
    return Decomposition(problem, trained.components, chosen, history, recipe, trained.gate)


def _on_device(x: PyTree) -> PyTree:
    """A batch with arrays of any library as its leaves."""
    return jax.tree.map(jnp.asarray, x)


def _array(path: tuple[Any, ...], leaf: Any) -> Array:
    if isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1:
        leaf = parallel.whole(leaf)
    try:
        return jnp.asarray(leaf)
    except TypeError:
        raise InputError(
            f"params leaf {components_lib.path_name(path)!r} is a {type(leaf).__name__}, not an "
            "array; keep what is not a weight in apply_fn, not in params."
        ) from None
