"""What a gate sees and says. A gate decides which components are active on an input.

Shapes: B examples, T positions, C components, d the width of what a site reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import wadler_lindig as wl
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, PyTree

from apd_jax.collectives import place, psum
from apd_jax.components import Components, Factors, map_sites

ATTRIBUTIONS, INPUTS = "attributions", "inputs"  # what a gate may read


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Observation:
    """What is seen of one batch in the target's own pass. What no gate reads is None.

    axis_name, component_axis: the mapped device axes that batch and components are split over.
    """

    x: PyTree
    components: Components
    attributions: Float[Array, "B *T C"] | None = None  # A_c(x), in units of the output
    inputs: Mapping[str, Any] | None = None  # {site: `forward.capture.Reading`}, its first use
    valid: Bool[Array, "B T"] | None = None  # which positions are not padding
    axis_name: str | None = dataclasses.field(default=None, metadata={"static": True})
    component_axis: str | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def axes(self) -> dict[str, str | None]:
        return {"axis_name": self.axis_name, "component_axis": self.component_axis}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Activity:
    """Which components are active on each example, or at each position.

    values: bool where a gate only knows on and off, else causal importances g in [0, 1]: the mask
      of a pass without ablation.
    active: which components count as active (g > 0, or g above the half of a soft threshold).
    scores: what the gate ranks components by, larger for the more important.
    upper: what importance losses price; it has a gradient where g is at its bounds. None: values.
    """

    values: Bool[Array, "B *T C"] | Float[Array, "B *T C"]
    active: Bool[Array, "B *T C"]
    scores: Float[Array, "B *T C"]
    upper: Float[Array, "B *T C"] | None = None

    def __repr__(self) -> str:
        return wl.pformat(self)

    @property
    def hard(self) -> bool:
        return self.values.dtype == jnp.bool_

    @property
    def priced(self) -> Float[Array, "B *T C"]:
        return self.values.astype(jnp.float32) if self.upper is None else self.upper

    def mean_active(self, seen: Observation) -> Float[Array, ""]:
        """Active components per example, or per position that counts, on this device's examples."""
        rows = jnp.mean(jnp.sum(self.active, axis=-1, dtype=jnp.float32))
        if seen.valid is None or self.active.ndim == 2:
            return rows
        share = jnp.mean(seen.valid.astype(jnp.float32))
        if seen.axis_name is not None:
            share = lax.pmean(share, seen.axis_name)
        return rows / jnp.maximum(share, 1e-6)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a gate chooses for one input alone, from its attributions.

    top: the so many largest. cuts: those from this attribution on, of each component or of all;
    None: the batch decides, and an input alone is held against the cut that its batch had.
    everything: all of them. always_on: the first so many, not counted in `top`.
    """

    top: int | None = None
    cuts: Any = None
    everything: bool = False
    always_on: int = 0


@runtime_checkable
class Gate(Protocol):
    """Who decides. Its arrays, where it has any, are trained; its numbers are a method's settings.

    reads: of {ATTRIBUTIONS, INPUTS}: nothing else is computed for it.
    """

    @property
    def reads(self) -> frozenset[str]: ...

    @property
    def says(self) -> str:
        """What components are kept by, in words: "k = 2"."""
        ...

    def rule(self) -> Rule | None:
        """How one input alone is judged; None where that takes more than its attributions."""
        ...

    def __call__(self, seen: Observation) -> Activity: ...


def hard(mask: Bool[Array, "B *T C"], scores: Float[Array, "B *T C"]) -> Activity:
    """The activity of a gate that only knows on and off."""
    return Activity(mask, mask, scores)


def in_words(number: Any, form: str = "g") -> str:
    """A number as text; one that is traced has none."""
    return "traced" if isinstance(number, Tracer) else f"{number:{form}}"


def at_valid(values: Array, valid: Bool[Array, "B T"] | None) -> Array:
    """values [B, T, C], off where a position is padding; [B, C] as they are."""
    if valid is None or values.ndim == 2:
        return values
    return jnp.where(valid[..., None], values, jnp.zeros((), values.dtype))


@dataclasses.dataclass(frozen=True)
class AlwaysOn:
    """The first `count` components on every input, the others as `inner` says of them alone."""

    inner: Any
    count: int

    @property
    def reads(self) -> frozenset[str]:
        return self.inner.reads

    @property
    def says(self) -> str:
        return self.inner.says + f" beside {self.count} always on"

    def rule(self) -> Rule | None:
        inner = self.inner.rule()
        return None if inner is None else dataclasses.replace(inner, always_on=self.count)

    def __call__(self, seen: Observation) -> Activity:
        scores = seen.attributions
        C = seen.components.num_components if scores is None else scores.shape[-1]
        on = first_components(self.count, C, seen.component_axis)
        if scores is not None:  # the others are ranked among themselves
            shown = jnp.where(on.reshape(*[1] * (scores.ndim - 1), -1), -jnp.inf, scores)
            seen = dataclasses.replace(seen, attributions=shown)
        found = self.inner(seen)
        on = jnp.broadcast_to(on.reshape(*[1] * (found.active.ndim - 1), -1), found.active.shape)
        on = at_valid(on, seen.valid)
        values = found.values | on if found.hard else jnp.where(on, 1.0, found.values)
        upper = None if found.upper is None else jnp.where(on, 0.0, found.upper)  # no price
        return Activity(
            values, found.active | on, found.scores if scores is None else scores, upper
        )


@dataclasses.dataclass(frozen=True)
class AnyOf:
    """Components that are groups of the `inner` gate's: on where any of their parts is.

    g_c = max over the parts of c. numbers: the component that each part belongs to; (): itself.
    own_numbers: whether parts are numbered one site after another, or alike at every site.
    """

    inner: Any
    numbers: tuple[int, ...]
    own_numbers: bool

    @property
    def reads(self) -> frozenset[str]:
        return self.inner.reads

    @property
    def says(self) -> str:
        return self.inner.says + ", of any part"

    def rule(self) -> Rule | None:
        return None

    def parts(self, components: Components) -> Components:
        """The components that the inner gate knows."""
        if not self.numbers:
            return components
        first = 0

        def one(f: Factors) -> Factors:
            nonlocal first
            ids = range(first, first + f.num_pieces) if self.own_numbers else None
            first += f.num_pieces
            return dataclasses.replace(f, ids=ids)

        return dataclasses.replace(map_sites(one, components), count=len(self.numbers))

    def __call__(self, seen: Observation) -> Activity:
        found = self.inner(dataclasses.replace(seen, components=self.parts(seen.components)))
        numbers, C = jnp.asarray(self.numbers), max(self.numbers) + 1

        def largest(values: Array) -> Array:
            plain = values.astype(jnp.int8) if values.dtype == jnp.bool_ else values
            joined = jax.ops.segment_max(jnp.moveaxis(plain, -1, 0), numbers, C)
            return jnp.moveaxis(joined, 0, -1).astype(values.dtype)

        return jax.tree.map(largest, found)


def first_components(count: int, C: int, component_axis: str | None) -> Bool[Array, " C"]:
    """Which of this device's C components are among the first `count` of all."""
    return place(component_axis) * C + jnp.arange(C) < count


def rows_of(scores: Float[Array, "B *T C"]) -> Float[Array, "n C"]:
    return scores.reshape(-1, scores.shape[-1])


def count_over(flags: Array, *axes: str | None) -> Array:
    """How many are true, over all devices of these axes."""
    return psum(jnp.sum(flags, dtype=jnp.int32), *axes)
