"""What is to be decomposed: a function, its parameters, its data.

All that a method knows of a network.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from apd_jax import components as components_lib
from apd_jax.components import Select, layout
from apd_jax.errors import InputError, first_line
from apd_jax.network import data
from apd_jax.network.headed import WIDE, Head, Headed
from apd_jax.network.outputs import reaching_outputs, split_result
from apd_jax.network.takes import check_result, meant

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, repr=False)
class Problem:
    """See `apd_jax.decompose` for the fields.

    elsewhere: the second stream of data, of methods that have one.
    """

    apply_fn: Callable
    params: PyTree
    sample_fn: Any  # a sampler or None as it was given, an iterable as `data.Batches`
    attribution_fn: Callable | None = None
    num_active_fn: Callable | None = None
    select: Select = None
    uses: Mapping[str, SupportsIndex] | None = None
    valid_fn: Callable | None = None
    elsewhere: Any = None

    def __post_init__(self):
        for field in ("apply_fn", "attribution_fn"):
            object.__setattr__(self, field, _unmeshed(getattr(self, field)))
        object.__setattr__(self, "select", components_lib.as_select(self.select, self.params))
        object.__setattr__(self, "uses", self._uses())
        object.__setattr__(self, "sample_fn", data.source(self.sample_fn))
        object.__setattr__(self, "elsewhere", data.source(self.elsewhere))

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.params)
        return f"<Problem: {len(leaves)} leaves, {sum(leaf.size for leaf in leaves):,} numbers>"

    @functools.cached_property
    def source(self) -> Any:
        """Where the batches of a train step come from: the data, or both streams together."""
        if self.elsewhere is None:
            return self.sample_fn
        return data.paired(self.sample_fn, self.elsewhere)

    @property
    def fed(self) -> bool:
        """Whether batches come from the host."""
        return isinstance(self.source, data.Batches)

    def with_params(self, params: PyTree) -> Problem:
        """The same problem of other weights of the same shapes, which may be traced."""
        other = dataclasses.replace(self, params=params)
        other.__dict__.update(layouts=self.layouts, chosen=self.chosen, _headed=self._headed)
        return other

    @property
    def site_names(self) -> list[str]:
        """The leaves to decompose."""
        return components_lib.selected_paths(self.params, self.chosen, self.layouts)

    @functools.cached_property
    def chosen(self) -> Any:
        """`select`; where it is None, every matrix that is no table (`components.tables`)."""
        if self.select is not None:
            return self.select
        found = components_lib.selected_paths(self.params, None, self.layouts)
        tables = components_lib.tables_of(
            self.apply_fn, self.params, data.shapes(self.sample_fn)
        ).intersection(found)
        if tables == set(found):
            raise InputError(
                f"params has only tables that are looked up or added ({', '.join(found)}), which "
                "are not decomposed unless `select` names them."
            )
        if tables:
            log.info(
                "not decomposed, since they are looked up or added: %s; select names leaves.",
                ", ".join(name for name in found if name in tables),
            )
        return [name for name in found if name not in tables]

    def _uses(self) -> dict[str, int] | None:
        leaves, uses = components_lib.named_leaves(self.params), whole_numbers(self.uses)
        return uses and {components_lib.full_name(n, leaves): times for n, times in uses.items()}

    @property
    def sites(self) -> dict[str, Any]:
        """Their weights, by dotted path."""
        leaves = components_lib.named_leaves(self.params)
        return {name: leaves[name] for name in self.site_names}

    def valid(self, x: PyTree) -> Bool[Array, "B T"] | None:
        """Which positions of x are real and not padding; None where all are.

        Numbers, such as those of segments or an attention mask, count where they are above 0.
        """
        if self.valid_fn is None:
            return None
        try:
            found = jnp.asarray(self.valid_fn(x))
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"valid_fn fails on a batch: {first_line(error)}.") from error
        return found if found.dtype == bool else found > 0

    @functools.cached_property
    def _headed(self) -> Headed | None:
        """The network in two parts where its outputs are wide and its head is not decomposed."""
        whole = getattr(self.apply_fn, "fn", None)
        if not isinstance(whole, Headed):
            return None
        x = data.shapes(self.sample_fn)
        out = split_result(jax.eval_shape(whole.body, self.params, x))[0]
        jaxpr, result = jax.make_jaxpr(whole.head, return_shape=True)(self.params, out)
        if result.shape[-1] <= WIDE or self._read_by(jaxpr.jaxpr).intersection(self.site_names):
            return None
        return Headed(_unmeshed(whole.body), _unmeshed(whole.head))

    @property
    def body(self) -> Callable:
        """What is run where outputs are only compared: `apply_fn`, or that without its head."""
        return self.apply_fn if self._headed is None else self._headed.body

    def head(self, params: PyTree) -> Head | None:
        """What makes outputs of those of `body`; None where they are the outputs."""
        return None if self._headed is None else functools.partial(self._headed.head, params)

    def _read_by(self, jaxpr: Any) -> set[str]:
        """The leaves of params, a jaxpr's first arguments, that its outputs may depend on."""
        reaching, leaves = reaching_outputs(jaxpr), components_lib.named_leaves(self.params)
        names = [name for name, leaf in leaves.items() if leaf is not None]
        return {name for name, var in zip(names, jaxpr.invars, strict=False) if var in reaching}

    def example_batch(self, key: Any = None, step: int = 0) -> PyTree:
        """A batch of the data, on the device: of an iterable always the first."""
        if isinstance(self.sample_fn, data.Batches):
            return jax.tree.map(jnp.asarray, self.sample_fn.first)
        key = jax.random.key(0) if key is None else key
        return jax.jit(self.sample_fn)(key, jnp.asarray(step, jnp.int32))

    def looks(self, key: Any, count: int) -> Iterable[PyTree]:
        """Batches to look at outside of training; the same at every iteration.

        Of a sampler those of steps 0 to count - 1 under `key`, drawn anew each time. Of an iterable
        the first of one pass, as many as there are and fit into `data.MAX_STACK_BYTES`, whatever
        the key; of an iterator, which cannot be begun again, the first alone.
        """
        if isinstance(self.sample_fn, data.Batches):
            num_bytes = sum(a.nbytes for a in jax.tree.leaves(self.sample_fn.first))
            return self.sample_fn.looks(min(count, max(1, data.MAX_STACK_BYTES // num_bytes)))
        return Drawn(self._draw, key, count)

    @functools.cached_property
    def _draw(self) -> Callable[..., PyTree]:
        return jax.jit(self.sample_fn)

    @functools.cached_property
    def layouts(self) -> dict[str, layout.Layout]:
        """How the network uses the axes of its weights."""
        return layout.infer(self.apply_fn, self.params, data.shapes(self.sample_fn))


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The batches of the first `count` steps of a sampler, drawn at every iteration."""

    draw: Callable[..., PyTree]
    key: Any
    count: int

    def __iter__(self) -> Iterator[PyTree]:
        return (self.draw(self.key, jnp.asarray(i, jnp.int32)) for i in range(self.count))


def _unmeshed(fn: Callable | None) -> Callable | None:
    """The function outside of the mesh that it is run on: its own axis names mean other axes."""
    return fn if fn is None or isinstance(fn, _Unmeshed) else _Unmeshed(fn)


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, whatever the function is
class _Unmeshed:
    fn: Callable

    def __call__(self, *args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            return self.fn(*args)


def whole_numbers(uses: Any) -> Any:
    """Plain numbers of `uses`.

    Raises:
      InputError: it is no mapping to whole numbers of at least 1.
    """
    if uses is None:
        return None
    if not isinstance(uses, Mapping):
        raise InputError(f"uses must be {{leaf path: times it is used}}; got {uses!r}.")
    for name, times in uses.items():
        if not hasattr(times, "__index__") or operator.index(times) < 1:
            raise InputError(f"uses[{name!r}] must be a whole number of at least 1; got {times!r}.")
    return {name: operator.index(times) for name, times in uses.items()}


def check_function(problem: Problem) -> None:
    """Checks that apply_fn returns what a method can work with, by shapes alone.

    Nothing is computed.

    Raises:
      InputError: apply_fn fails on params and a batch; its output is not a floating array (or
        (array, {name: array})) with the batch's leading size; or it does not depend on a leaf that
        is to be decomposed, or has no derivative by it.
    """
    x = data.shapes(problem.sample_fn)
    try:
        jaxpr, result = jax.make_jaxpr(problem.apply_fn, return_shape=True)(problem.params, x)
    except Exception as error:
        raise InputError(
            f"apply_fn fails on params and a batch of sample_fn: {first_line(error)}{meant(x)}."
        ) from error
    check_result(result, {leaf.shape[:1] for leaf in jax.tree.leaves(x)})
    _check_valid(problem, x, split_result(result)[0].shape)
    _check_beside(problem, x, split_result(result)[0].shape)
    _check_dependence(problem, jaxpr.jaxpr)
    _check_derivative(problem, x)


def _check_valid(problem: Problem, x: PyTree, shape: tuple[int, ...]) -> None:
    valid = jax.eval_shape(problem.valid, x)
    if valid is not None and valid.shape != shape[:2]:
        raise InputError(
            f"valid_fn gives {valid.shape}, but the outputs have {shape}; they must agree in "
            "examples and positions."
        )


def _check_beside(problem: Problem, x: PyTree, shape: tuple[int, ...]) -> None:
    """The functions beside apply_fn: what they must give of a batch."""
    asked = {
        "attribution_fn": (shape, problem.attribution_fn, (problem.params, x)),
        "num_active_fn": (shape[:1], problem.num_active_fn, (x,)),
    }
    for name, (wanted, fn, args) in asked.items():
        if fn is None:
            continue
        try:
            found = jax.eval_shape(fn, *args)
        except Exception as error:
            raise InputError(f"{name} fails on a batch: {first_line(error)}.") from error
        if getattr(split_result(found)[0], "shape", None) != wanted:
            raise InputError(f"{name} must give an array of shape {wanted}; it gives {found}.")


def _check_dependence(problem: Problem, jaxpr: Any) -> None:
    """Whether the outputs of this jaxpr of apply_fn depend on all leaves to be decomposed."""
    read = problem._read_by(jaxpr)
    for name in problem.site_names:
        if name not in read:
            raise InputError(
                f"the output of apply_fn does not depend on params leaf {name!r}; pass the weights "
                "as its first argument, not by closure, or leave that leaf out of `select`."
            )


def _check_derivative(problem: Problem, x: PyTree) -> None:
    def summed(leaves: dict[str, Any], params: PyTree, x: PyTree) -> Any:
        result = problem.apply_fn(components_lib.replace_leaves(params, leaves), x)
        return jnp.sum(split_result(result)[0])

    try:
        jax.eval_shape(jax.grad(summed), problem.sites, problem.params, x)
    except Exception as error:
        raise InputError(
            f"apply_fn has no derivative by its weights: {first_line(error)}"
        ) from error


def check_params(problem: Problem) -> None:
    """Checks that what is to be decomposed is finite.

    Raises:
      InputError: a leaf holds NaN or an infinity.
    """
    finite = {name: _all_finite(leaf) for name, leaf in problem.sites.items()}
    for name, fine in jax.device_get(finite).items():
        if not fine:
            raise InputError(
                f"params leaf {name!r} holds NaN or an infinity; give a network's finite weights, "
                "or leave that leaf out of `select`."
            )


@jax.jit  # once for every shape, however many leaves and looks there are
def _all_finite(leaf: Any) -> Array:
    return jnp.isfinite(leaf).all()


def check_examples(problem: Problem, kind: Any = "mse") -> None:
    """Checks outputs on one batch: finite, and of each example without the others.

    Args:
      kind: of the minimality loss; logits may be -inf.
    Raises:
      InputError: outputs are not finite where they count; apply_fn cannot take one example, or
        mixes examples (batch statistics, dropout, attention over the batch).
    Cost: apply_fn on two batches.
    """
    if any(data.always_alike(s) for s in (problem.sample_fn, problem.elsewhere) if s is not None):
        log.warning(
            "a sampler reads neither rng nor step: every step has the same batch; draw by "
            "jax.random from rng (what NumPy draws there is drawn once)."
        )
    x = problem.example_batch()
    apply_fn = jax.jit(problem.apply_fn)
    whole = jax.device_get(apply_fn(problem.params, x))
    valid = None if problem.valid_fn is None else jax.device_get(jax.jit(problem.valid)(x))
    _check_finite(split_result(whole)[0], x, valid, kind)
    one = jax.tree.map(lambda a: a[:1], x)
    try:
        jax.eval_shape(problem.apply_fn, problem.params, one)
    except Exception as error:
        raise InputError(
            "apply_fn must take any number of examples; with a batch of one it fails: "
            f"{first_line(error)}"
        ) from error
    # The first example in every place: the program of the whole batch, so that none is compiled.
    alike = apply_fn(problem.params, jax.tree.map(lambda a, b: jnp.repeat(b, len(a), 0), x, one))
    for there, here in zip(jax.tree.leaves(whole), jax.tree.leaves(alike), strict=True):
        there, here = np.asarray(there, np.float32), np.asarray(here, np.float32)
        size = np.abs(there, where=np.isfinite(there), out=np.zeros_like(there)).max(initial=0.0)
        if not np.allclose(there[:1], here, rtol=1e-2, atol=1e-2 * size, equal_nan=True):
            raise InputError(
                "apply_fn gives the first example another output in another place or among other "
                "examples; it must treat examples one by one: use the inference mode of batch "
                "normalisation and dropout."
            )


def _check_finite(out: Any, x: PyTree, valid: Any, kind: Any) -> None:
    out = np.asarray(out, np.float32)
    fine = np.isfinite(out) | np.isneginf(out) if kind == "kl" else np.isfinite(out)
    if valid is not None:
        fine |= ~valid.reshape(*valid.shape, *[1] * (out.ndim - 2))
    if fine.all():
        return
    floats = [a for a in jax.tree.leaves(x) if jnp.issubdtype(a.dtype, jnp.floating)]
    if all(jnp.isfinite(a).all() for a in floats):
        raise InputError(
            f"apply_fn's outputs are not finite on {(~fine).mean():.0%} of their entries of a "
            "batch of sample_fn; give a network that is finite on its data."
        )
    raise InputError(
        "a batch of sample_fn holds NaN or infinities, and so do apply_fn's outputs; clean the "
        "data, or say by valid_fn which positions are padding."
    )
