"""What `decompose` returns: components with their gate, and what can be done with them."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, PyTree

from apd_jax import components as components_lib
from apd_jax.components import Components
from apd_jax.errors import InputError, number_of, shown
from apd_jax.forward import sparse
from apd_jax.gates.base import ATTRIBUTIONS, Activity, at_valid
from apd_jax.methods import observe, registry
from apd_jax.methods.base import Method
from apd_jax.methods.optimizers import Trained, instances, one_instance
from apd_jax.network import data
from apd_jax.network.problem import Problem, check_function
from apd_jax.network.takes import check_batch, on_device
from apd_jax.recipe import run, scales, stages
from apd_jax.train import loop

_HOOKS: dict[str, Callable] = {}  # what rooms above this one do with a decomposition


def register(**hooks: Callable) -> None:
    """Makes functions of rooms above this one callable as methods: save, load, keep, ..."""
    _HOOKS.update(hooks)


def hook(name: str) -> Callable:
    """What a room above this one has registered under a name."""
    return _HOOKS[name]


@dataclasses.dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        factors = self.components.factors
        pieces = sum(f.num_pieces for f in factors.values())
        said = [
            f"{self.components.num_components} components at {len(factors)} sites ({pieces} pieces)"
        ]
        if (count := self.method.num_instances) > 1:
            said.append(f"{count} instances")
        if self.history:
            last = self.history[-1]
            total = np.asarray(last.get("total", np.nan), np.float64)
            said.append(f"{last['step']} steps, total loss {total.mean():.3g}")
        return f"<Decomposition by {self.method.name}: {'; '.join(said)}>"

    def _repr_html_(self) -> str:
        """What a notebook shows of it."""
        return _HOOKS["html"](self)

    @property
    def config(self) -> Method:
        """The name of `method` while there was one method."""
        return self.method

    @property
    def trained(self) -> Trained:
        return Trained(self.components, self.gate)

    @functools.cached_property
    def _observed(self) -> Callable[..., tuple[Activity, Array]]:
        """(components, gate, params, x) -> activity, and whether a score is NaN that counts.

        Jitted, with the weights as arguments.
        """
        self._only_one()
        problem = self.problem

        def fn(components: Components, gate: PyTree, params: PyTree, x: PyTree) -> Any:
            found = observe.activity(self.method, problem, Trained(components, gate), params, x)
            return found, at_valid(jnp.isnan(found.scores), problem.valid(x)).any()

        return jax.jit(fn)

    @functools.cached_property
    def _attributed(self) -> Callable[..., Array]:
        self._only_one()
        method, problem = self.method, self.problem

        def fn(components: Components, params: PyTree, x: PyTree) -> Array:
            check_batch(problem.apply_fn, params, x)
            rng = jax.random.key(method.seed)
            return jnp.sqrt(method.attribute(problem)(components, params, x, rng))

        return jax.jit(fn)

    @functools.cached_property
    def _masked(self) -> Callable[..., Any]:
        """(components, params, mask, x) -> outputs of the sparse pass; jitted."""
        self._only_one()
        problem = self.problem

        def fn(components: Components, params: PyTree, mask: Array, x: PyTree) -> Any:
            check_batch(problem.apply_fn, params, x)
            return sparse.apply(problem.apply_fn, params, components, mask, x)

        return jax.jit(fn)

    @functools.cached_property
    def _run(self) -> Callable[..., Any]:
        """(components, params, weights [C], x) -> outputs with P_c times w_c, on every input."""
        self._only_one()
        problem = self.problem

        def fn(components: Components, params: PyTree, weights: Array, x: PyTree) -> Any:
            check_batch(problem.apply_fn, params, x)
            moved = components_lib.weighted_sum(components, params, weights)
            return problem.apply_fn(moved, x)

        return jax.jit(fn)

    def _only_one(self) -> None:
        """Raises InputError where there are several instances, which have no common numbers."""
        if (count := self.method.num_instances) > 1:
            raise InputError(
                f"this holds {count} decompositions; take one of them, e.g. .instance(0)."
            )

    def activity(self, x: PyTree) -> Activity:
        """Which components the gate says are active on x, and by how much.

        Raises:
          InputError: the network does not take x, or the gate's scores are NaN there.
        """
        arrays = (self.components, self.gate, self.problem.params)
        found, lost = self._observed(*arrays, on_device(x))
        if not isinstance(lost, Tracer) and lost:
            raise InputError(
                "the gate's scores are NaN on x; is it finite, and made for this network (tokens "
                "of its own vocabulary)?"
            )
        return found

    def attributions(self, x: PyTree) -> Float[Array, "B *T C"]:
        """A_c(x), in units of the output, as the method takes them; per position if it says so."""
        return self._attributed(self.components, self.problem.params, on_device(x))

    def mask(self, x: PyTree, cut: Any = None) -> Bool[Array, "B *T C"]:
        """Which components are active on each example (or position) of this batch, as in training.

        Batch top-k depends on the whole batch: an example alone may keep others. With a cut, from
        `cut`, every example is judged by itself.
        """
        if cut is None:
            return self.activity(x).active
        cut = cut if isinstance(cut, Tracer) else number_of("cut", cut)
        scores = self.attributions(x)
        kept = (scores >= cut) | self._always_on(scores.ndim)
        return at_valid(kept, self.problem.valid(on_device(x)))

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

        Raises:
          InputError: the network does not take x, or mask is none of this shape or holds NaN.
        """
        mask = self.mask(x) if mask is None else _shares(mask)
        return self._masked(self.components, self.problem.params, mask, on_device(x))

    def ablate(self, components: Sequence[int] | np.ndarray | Array, x: PyTree) -> Any:
        """What apply_fn returns with all components but the given ones: numbers, or a bool mask."""
        on = jnp.asarray(~components_lib.chosen(self.components, components), jnp.float32)
        return self._run(self.components, self.problem.params, on, on_device(x))

    def component(self, i: int) -> PyTree:
        """P_i as a pytree like params; zeros where params are not decomposed."""
        self._only_one()
        try:
            number = operator.index(i)
        except TypeError:
            raise InputError(f"component takes one number; got {shown(i)}.") from None
        only = jnp.asarray(components_lib.chosen(self.components, [number]), jnp.float32)
        return _alone(self.components, self.problem.params, only)

    def edit(self, scales: Mapping[int, float]) -> PyTree:
        """The network's weights with some components scaled: θ* + Σ_c (scale_c - 1) P_c.

        {17: 0.0, 23: 2.0} takes component 17 out and doubles 23. What the components' sum misses of
        θ* stays as it is, so {} gives θ* itself. Leaves have the dtypes of params.

        Raises:
          InputError: no such mapping, a component that does not exist, a scale that is not finite.
        """
        self._only_one()
        if not isinstance(scales, Mapping):
            raise InputError(f"edit takes {{component: scale}}; got a {type(scales).__name__}.")
        change = np.zeros(self.components.num_components, np.float32)
        for number, scale in scales.items():
            factor = number_of(f"the scale of component {number}", scale)
            if not np.isfinite(factor):
                raise InputError(f"component {number} cannot be scaled by {scale}.")
            change[components_lib.chosen(self.components, [number])] = factor - 1
        moved = _alone(self.components, self.problem.params, jnp.asarray(change))
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), self.problem.params, moved)

    def save(self, path: epath.PathLike, **options: Any) -> None:
        """Writes a folder of safetensors and JSON: see `apd_jax.storage.folder.save`."""
        _HOOKS["save"](self, path, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads it with its card: see `apd_jax.storage.hub.push_to_hub`."""
        return _HOOKS["push_to_hub"](self, repo_id, **options)

    def report(
        self,
        path: epath.PathLike,
        x: PyTree = None,
        tokens: Any = None,
        harvest: Any = None,
        effects: Any = None,
        decoder: Any = None,
        groups: Any = None,
    ) -> epath.Path:
        """Writes one HTML file that shows every component: see `apd_jax.report.html.report`.

        With a harvest of a language model it shows text: see `apd_jax.report.text.report`.
        """
        if harvest is None:
            return _HOOKS["report"](self, path, x, tokens)
        return _HOOKS["text_report"](self, path, x, tokens, harvest, effects, decoder, groups)

    def evidence(self, **options: Any) -> Any:
        """What can be said for these components, and what not: see `apd_jax.evidence.evidence`."""
        return _HOOKS["evidence"](self, **options)

    @staticmethod
    def load(
        path: epath.PathLike, apply_fn: Callable | None, params: PyTree = None, **more: Any
    ) -> Decomposition:
        """The decomposition that `save` wrote: see `apd_jax.storage.folder.load`."""
        return _HOOKS["load"](path, apply_fn, params, **more)

    def train(
        self,
        steps: int,
        sample_fn: Callable | Iterable | None = None,
        *,
        elsewhere: Callable | Iterable | None = None,
        workdir: epath.PathLike | None = None,
        on_log: Callable[[dict[str, Any]], Any] | None = None,
        **changes: Any,
    ) -> Decomposition:
        """Goes on from here: `steps` more, with other settings if `changes` names some.

        The count of steps goes on, too: after n steps of training this is steps n + 1 to n + steps
        of a run of n + steps, with the batches, learning rates and annealed coefficients that such
        a run has there. Components and gate are kept; the optimizer (and what a persistent
        adversary keeps) begins anew. To keep these as well, give `decompose` the same workdir and
        more `num_steps`.

        With more components (`num_components`) the new ones begin at zero. After a recipe, its
        last stage goes on, at a learning rate in proportion to √loss unless one is given.

        Args:
          sample_fn, elsewhere: other data; needed after `load` without data.
          workdir, on_log: as `decompose` takes them; the same call then resumes.
          changes: settings by name. Coefficients are absolute, as `method` holds them: twice the
            price is `simplicity_coeff=2 * found.method.simplicity_coeff`.
        Returns: a new decomposition, with the rows of both runs; this one stays as it is.
        Raises:
          InputError: steps below 1, no data, or as `decompose`.
        """
        whole = isinstance(steps, int | np.integer) and steps >= 1
        if not whole or "num_steps" in changes:
            what = "num_steps is counted by steps" if whole else f"got {steps!r}"
            raise InputError(f"train takes how many steps to go on for, at least 1; {what}.")
        if data.holds_examples(sample_fn):
            size = changes.get("batch_size", self.method.batch_size)
            sample_fn = data.from_arrays(sample_fn, size)
        streams = {"sample_fn": sample_fn, "elsewhere": elsewhere}
        given = {name: source for name, source in streams.items() if source is not None}
        problem = dataclasses.replace(self.problem, **given)
        check_function(problem)
        begun = self.history[-1]["step"] if self.history else 0
        method = self.method.replace(num_steps=begun + steps, **changes)
        if self.recipe is not None and "learning_rate" not in changes:
            method = stages.in_proportion(problem, method, self.trained)
        trained, rows, method = run.run(
            problem, method, None, workdir, self.trained, begun, _HOOKS["keep"], on_log
        )
        scales.warn_if_far(problem, method, [one.components for one in instances(trained, method)])
        rows = [*self.history, *rows]
        components, gate = trained.components, trained.gate
        return Decomposition(problem, components, method, rows, self.recipe, gate)

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
        if not isinstance(i, int | np.integer) or not 0 <= i < count:
            raise InputError(f"instance {i!r} does not exist; there are {count}.")
        if count == 1:
            return self
        one = one_instance(self.trained, i)
        return dataclasses.replace(
            self,
            components=one.components,
            gate=one.gate,
            method=self.method.replace(num_instances=1),
        )


@jax.jit
def _alone(components: Components, params: PyTree, weights: Float[Array, " C"]) -> PyTree:
    """Σ_c w_c P_c, and zeros where params are not decomposed."""
    return components_lib.weighted_sum(components, jax.tree.map(jnp.zeros_like, params), weights)


def _shares(mask: Any) -> Array:
    """What is left of components, as an array."""
    try:
        found = jnp.asarray(mask)
    except (TypeError, ValueError):
        raise InputError(
            f"mask must be an array [B, *T, C], bool or shares; got {shown(mask)}."
        ) from None
    if found.ndim < 2:
        raise InputError(f"mask must be an array [B, *T, C]; its shape is {found.shape}.")
    if not isinstance(found, Tracer) and jnp.isnan(found).any():
        raise InputError("mask must be bool or shares, and holds NaN.")
    return found
