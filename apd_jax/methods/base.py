"""A method is a choice: components, a gate, passes with ablations, and terms that score them.

Shapes: B examples, T positions, C components.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from apd_jax import attributions as attributions_lib
from apd_jax import components as components_lib
from apd_jax import losses
from apd_jax.ablations import Ablation
from apd_jax.components import Components
from apd_jax.errors import InputError, one_of, seed_of
from apd_jax.gates.base import Activity, Gate, Observation
from apd_jax.losses import Distance, minimality, written
from apd_jax.methods import optimizers, schedules
from apd_jax.methods.schedules import Annealed, Number, Schedule
from apd_jax.methods.schedules import at as at
from apd_jax.network.headed import Head
from apd_jax.network.problem import Problem

HERE, ELSEWHERE = "here", "elsewhere"  # the two streams of data
Own = TypeVar("Own", bound="Method")
MASK_PER = ("example", "position")
LOSS_UNITS = ("absolute", "target")
SPARSE_ROUTES = ("auto", "materialize", "masked", "dispatch")


@dataclasses.dataclass(frozen=True)
class Pass:
    """One sparse pass of the network.

    sites: "all" are masked at once; "each" masks one after another, in a pass of its own; "subset"
      masks a random subset at every position. Unmasked sites keep the target's weights.
    delta: whether Δ = θ* - ΣP takes part: "none", "masked" by a source of its own, or "on" whole.
    stream: the data that it runs on. nested: with ranks cut to R' ~ U{1, 2, 4, ..., m}.
    """

    ablation: Ablation
    sites: str = "all"
    delta: str = "none"
    stream: str = HERE
    nested: bool = False


@dataclasses.dataclass(frozen=True)
class Scene:
    """What is known of one stream's batch before any component is judged; no gradient flows here.

    attribute: components -> A_c(x)², for the one loss whose gradient flows through it.
    head: what makes outputs of `out`; None where they are it. See `Problem.body`.
    """

    seen: Observation
    out: Any
    hidden: Mapping[str, Any]
    weights: Float[Array, "B T"] | None
    hidden_weights: Mapping[str, Any] | None
    share: Any
    attribute: Callable[[Components], Float[Array, "B *T C"]]
    head: Head | None = None

    @property
    def x(self) -> PyTree:
        return self.seen.x

    def distance(self, runs: Sequence[tuple[Any, Any]], kind: Distance) -> Float[Array, ""]:
        """How far the outputs of a pass are from the target's; of several runs the mean."""
        given = (self.out, kind, self.weights, self.x, self.seen.axis_name, self.head)
        found = [minimality(out, *given) for out, _ in runs]
        return jnp.asarray(sum(found)) / len(found)


@dataclasses.dataclass(frozen=True)
class Run:
    """What a term sees: the components, what gates say of each stream, and the passes by name."""

    components: Components
    params: PyTree
    scenes: Mapping[str, Scene]
    activity: Mapping[str, Activity]
    forward: Callable[[str], list[tuple[Any, Any]]]  # (outputs, hidden) of each run of a pass
    passes: Mapping[str, Pass]
    on: frozenset[str]  # the terms whose coefficients are above 0
    step: Any
    axis_name: str | None = None

    @functools.cached_property
    def squared_attributions(self) -> Float[Array, "B *T C"]:
        """A_c(x)² with its gradient by the components."""
        return self.scenes[HERE].attribute(self.components)

    def scene_of(self, name: str) -> Scene:
        return self.scenes[self.passes[name].stream]


@dataclasses.dataclass(frozen=True)
class Term:
    """One loss with its coefficient, a number or a schedule. It is off where that is 0."""

    coeff: Schedule
    score: Callable[[Run], Float[Array, ""]]
    passes: tuple[str, ...] = ()  # those that it scores

    @property
    def on(self) -> bool:
        """Decided before tracing, by the method's own numbers."""
        if isinstance(self.coeff, Annealed):
            return bool(self.coeff.first > 0 or self.coeff.last > 0)
        return bool(self.coeff > 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What all methods have: sizes, optimisation, execution. A method of its own is a subclass.

    Fields annotated `Number` may be traced; the others decide the program. What each means stands
    beside it; `apd_jax.explain(method)` lists them.
    """

    name: ClassVar[str] = ""
    about: ClassVar[str] = ""  # the method in a line, with its source
    # The coefficients that `loss_units` = "target" measures, each by a field of `scales.Scales`.
    measured_in: ClassVar[Mapping[str, str]] = {}

    # Components.
    num_components: int = 10  # C
    rank: int | None = None  # m of every site; None is full rank
    init_scale: Number = 1.0  # multiplies the initial standard deviation of U, and of V
    num_instances: int = 1  # independent decompositions (seeds) trained side by side by vmap

    # Masks.
    mask_per: str = "example"  # example | position (every position uses the weights in its own way)
    # mse | kl (outputs are logits) | next_token | a function; see `apd_jax.losses.minimality`
    minimality_loss: Distance = "mse"
    # absolute: as the papers write losses | target: in units of `apd_jax.recipe.scales.Scales`
    loss_units: str = "absolute"

    # Optimisation.
    seed: int = 0  # of initial components, batches and all other draws
    num_steps: int = 10_000  # how long to train; schedules go by it
    learning_rate: Number = 1e-3  # the largest of the schedule
    # constant | linear | cosine (quarter wave) | half_cosine | exponential
    schedule: str = "cosine"
    warmup_fraction: float = 0.05  # share of the steps in which the learning rate rises from 0
    optimizer: str = "adam"  # adam | adamw | sgd
    weight_decay: Number = 0.0  # adamw only
    gradient_clip: float | None = None  # the largest norm of the components' gradient
    batch_size: int = 2048  # examples per step over all devices; what the sampler draws

    # Execution: none of these changes the result beyond float rounding.
    sparse_route: str = "auto"  # auto | materialize | masked | dispatch
    num_component_shards: int = 1  # M: devices that share the components, C/M each; 1: a copy each
    steps_per_call: int = 100  # steps in one XLA call
    log_every_steps: int = 100  # steps from one logged row to the next
    checkpoint_every_steps: int = 1000  # steps from one checkpoint to the next
    keep_checkpoints: int = 2  # how many of the newest are kept

    def __new__(cls, *_: Any, **settings: Any) -> Any:
        """Raises InputError for a mistyped setting, with the nearest one."""
        for field in settings:
            one_of(f"setting of {cls.name or cls.__name__}", field, cls.fields())
        return super().__new__(cls)

    # What a method says

    @property
    def streams(self) -> tuple[str, ...]:
        return (HERE,)

    @property
    def own_numbers(self) -> bool:
        """Whether every site has components of its own."""
        return False

    def by_stream(self, x: PyTree) -> dict[str, PyTree]:
        """The batch of every stream."""
        return {HERE: x} if self.streams == (HERE,) else {name: x[name] for name in self.streams}

    @property
    def k(self) -> Any:
        """The mean number of active components per input, where it is set; None where it is not."""
        return None

    @property
    def num_kept(self) -> Any:
        """k, where only the k·B kept pairs need be computed in a sparse pass; else None."""
        return None

    @property
    def always_on(self) -> int:
        """How many components, the first, are active on every input."""
        return 0

    @property
    def norm_p(self) -> Any:
        """The p of Schatten norms that are reported."""
        return 0.9

    @property
    def metric(self) -> str:
        """How a change of the outputs is measured by attributions."""
        return "kl" if self.distance == "kl" else "mse"

    @property
    def distance(self) -> Distance:
        """How far outputs are from the target's, where both are compared."""
        return "kl" if self.minimality_loss == "next_token" else self.minimality_loss

    @property
    def gradients_at(self) -> str | None:
        """Where the gate's attributions are plain gradients, in squares and per example.

        "target" or "components": the weights they are taken at. None: they are something else.
        """
        return None

    @property
    def estimates(self) -> bool:
        """Whether attributions are estimated from random directions."""
        return False

    @property
    def per_position(self) -> bool:
        return self.mask_per == "position"

    @property
    def finds_beginning(self) -> bool:
        """Whether components begin at what `apd_jax.recipe.pieces` finds on the data."""
        return False

    def make_components(self, rng: PRNGKeyArray, problem: Problem) -> Components:
        """Components to begin with; all numbers at every site unless a method says otherwise."""
        return components_lib.init(
            rng,
            problem.params,
            num_components=self.num_components,
            rank=self.rank,
            init_scale=self.init_scale,
            select=problem.chosen,
            uses=problem.uses,
            layouts=problem.layouts,
        )

    def make_gate(self, rng: PRNGKeyArray, problem: Problem, components: Components) -> PyTree:
        """The arrays of the gate to begin with; () where it has none."""
        return ()

    def gate(self, arrays: PyTree, problem: Problem) -> Gate:
        raise NotImplementedError

    def attribute(self, problem: Problem) -> Callable[..., Float[Array, "B *T C"]]:
        """(components, params, x, rng) -> A_c(x)², as the method takes attributions."""

        def attribute(components: Components, params: PyTree, x: PyTree, rng: Any = None) -> Array:
            return attributions_lib.squared(
                "gradient",
                problem.apply_fn,
                params,
                components,
                x,
                metric=self.metric,
                valid=problem.valid(x),
                per_position=self.per_position,
                rng=rng,
            )

        return attribute

    def passes(self) -> dict[str, Pass]:
        raise NotImplementedError

    def terms(self) -> dict[str, Term]:
        raise NotImplementedError

    def transformation(self) -> optax.GradientTransformation:
        """The optimizer of `optimizers.Trained`."""
        return optimizers.make(self)

    def constrain(self, components: Components) -> Components:
        """The components as a step uses them."""
        return components

    def project(self, gradient: Components, components: Components) -> Components:
        """Their gradient, within what `constrain` allows."""
        return gradient

    def fitted(self, problem: Problem) -> Method:
        """The same settings, with what they leave to the network decided."""
        return self

    def check(self) -> None:
        """Raises InputError, one sentence, for a value that no type check catches."""
        one_of("mask_per", self.mask_per, MASK_PER)
        losses.known(self.minimality_loss)
        one_of("sparse_route", self.sparse_route, SPARSE_ROUTES)
        one_of("loss_units", self.loss_units, LOSS_UNITS)
        one_of("schedule", self.schedule, schedules.KINDS)
        one_of("optimizer", self.optimizer, optimizers.KINDS)
        if not (self.own_numbers and self.num_components == 0):
            self.at_least_one("num_components")
        self.at_least_one(
            *("num_instances", "num_component_shards", "num_steps", "batch_size"),
            *("steps_per_call", "log_every_steps", "checkpoint_every_steps", "keep_checkpoints"),
        )
        seed_of("seed", self.seed)
        if self.num_components % self.num_component_shards:
            raise InputError(
                f"num_components = {self.num_components} is not divisible by num_component_shards "
                f"= {self.num_component_shards}; every shard holds as many components."
            )
        if self.rank is not None and not 1 <= self.rank < 2**31:
            raise InputError(f"rank must be at least 1, or None for full rank; got {self.rank}.")
        self.above_zero("learning_rate", "init_scale")
        self.not_negative("weight_decay")
        if self.gradient_clip is not None:
            self.above_zero("gradient_clip")
        if not 0 <= self.warmup_fraction < 1:
            raise InputError(f"warmup_fraction must lie in [0, 1); got {self.warmup_fraction}.")

    def at_least_one(self, *fields: str) -> None:
        for field in fields:
            value = getattr(self, field)
            if not 1 <= value < 2**31:
                bound = "at least 1" if value < 1 else "below 2**31"
                raise InputError(f"{field} must be {bound}; got {value}.")

    def above_zero(self, *fields: str) -> None:
        for field in fields:
            if not 0 < getattr(self, field) < float("inf"):
                raise InputError(
                    f"{field} must be a finite number above 0; got {getattr(self, field)}."
                )

    def not_negative(self, *fields: str) -> None:
        for field in fields:
            if not 0 <= getattr(self, field) < float("inf"):
                raise InputError(
                    f"{field} must be a finite number of at least 0; got {getattr(self, field)}."
                )

    def some_term(self) -> None:
        """Raises InputError where all coefficients are 0."""
        if not any(term.on for term in self.terms().values()):
            names = ", ".join(f"{name}_coeff" for name in self.terms())
            raise InputError(f"all loss coefficients are 0; set at least one of {names}.")

    def read_with(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """{field: (another field, its values)}: settings that only one choice of another reads."""
        return {"weight_decay": ("optimizer", ("adamw",))}

    # Settings as values

    def replace(self: Own, **changes: Any) -> Own:
        """The same method with other settings.

        Raises:
          InputError: a field that it does not have.
        """
        for field in changes:
            one_of(f"setting of {self.name}", field, self.fields())
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Its settings as files hold them: of a function its name."""
        values = {name: getattr(self, name) for name in self.fields()}
        return {"method": self.name} | {name: written(value) for name, value in values.items()}

    @classmethod
    def fields(cls) -> tuple[str, ...]:
        return tuple(f.name for f in dataclasses.fields(cls))

    @classmethod
    def hints(cls) -> dict[str, Any]:
        """The type of every field."""
        found = typing.get_type_hints(cls)
        return {name: found[name] for name in cls.fields()}

    @classmethod
    def numbers(cls) -> tuple[str, ...]:
        """The fields that may be traced: a sweep is a vmap over some of them."""
        return tuple(name for name, hint in cls.hints().items() if jax.Array in allowed_types(hint))


def allowed_types(hint: Any) -> tuple[Any, ...]:
    """The types that a union allows, or the one type."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)
