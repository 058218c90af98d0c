"""A decomposition with the data that it is judged on.

Shapes: n examples, C components; masks are [n, C], or [n, T, C] where every position has its own.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from apd_jax import components as components_lib
from apd_jax import losses
from apd_jax.components import Components
from apd_jax.evaluation import masks
from apd_jax.forward import sparse
from apd_jax.gates.base import INPUTS
from apd_jax.methods import observe
from apd_jax.methods.base import Method
from apd_jax.methods.optimizers import Trained
from apd_jax.network.outputs import outputs as outputs_of
from apd_jax.network.outputs import position_weights
from apd_jax.network.problem import Problem


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """What of a decomposition is not an array.

    Equal for the same problem and the same settings: checks are then compiled once.
    """

    problem: Problem
    method: Method

    def __hash__(self) -> int:
        return id(self.problem)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Setting):
            return False
        return self.problem is other.problem and self.method == other.method

    def largest(
        self, scores: Float[Array, "n *T C"], x: PyTree, k: Any, *, each: bool = False
    ) -> Bool[Array, "n *T C"]:
        """The k (which may be traced) largest, over the batch or of each; always-on stay on."""
        valid = self.problem.valid(x)
        return masks.largest(scores, k, self.method.always_on, each=each, valid=valid)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Subject:
    """One target network, its components and n examples.

    A pytree: what is measured of it are jitted functions of it.
    """

    params: Any
    trained: Any
    x: Any
    target_out: Any  # [n, ...]
    scores: Any  # like mask: what the gate ranks components by; for APD the attributions
    mask: Any  # the components that count as active: those of training
    values: Any  # bool like mask, or the causal importances of a gate with degrees
    setting: Setting = dataclasses.field(metadata={"static": True})

    @property
    def components(self) -> Components:
        return self.trained.components

    @property
    def attributions(self) -> Any:
        return self.scores

    @property
    def ranks_by_attributions(self) -> bool:
        """Whether the scores are attributions, at least 0; else logits of a learned gate."""
        gate = self.setting.method.gate(self.trained.gate, self.setting.problem)
        return INPUTS not in gate.reads

    @property
    def ranked_by(self) -> str:
        """What the scores are, in words."""
        return "attribution" if self.ranks_by_attributions else "score of the gate"

    @property
    def num_components(self) -> int:
        return self.mask.shape[-1]

    @property
    def choosable(self) -> Bool[np.ndarray, " C"]:
        """Which components are not on for every input whatever it is."""
        return np.arange(self.num_components) >= self.setting.method.always_on

    @property
    def num_choosable(self) -> int:
        return int(self.choosable.sum())

    def mean(self, values: Array) -> Float[Array, ""]:
        """Of values [n], or [n, T] without padding."""
        weights, _ = position_weights(self.setting.problem.valid(self.x))
        return jnp.mean(values if values.ndim == 1 else losses.weighted(values, weights))

    @property
    def active(self) -> Float[Array, ""]:
        """The mean number of components that are active, beside those always on."""
        return self.mean(jnp.sum(self.mask[..., self.choosable], axis=-1))

    @property
    def k(self) -> float:
        """k as it was set, else the mean number of active components per input (position)."""
        k = self.setting.method.k
        return float(self.active if k is None else k)

    @property
    def kept(self) -> str:
        """What components are kept by, in words."""
        return self.setting.method.gate(self.trained.gate, self.setting.problem).says


def make(setting: Setting, params: PyTree, trained: Trained, x: PyTree) -> Subject:
    """Runs the target and asks the gate on x."""
    return Subject(params, trained, x, *_measured(setting, params, trained, x), setting=setting)


@functools.partial(jax.jit, static_argnames="setting")
def _measured(setting: Setting, params: PyTree, trained: Trained, x: PyTree) -> tuple[Array, ...]:
    problem = setting.problem
    activity = observe.activity(setting.method, problem, trained, params, x)
    out = outputs_of(problem.apply_fn(params, x))
    return out, activity.scores, activity.active, activity.values


def distance(subject: Subject, out: Float[Array, "n ..."]) -> Float[Array, " n"]:
    """D(target, out) of every example, in the method's `distance`."""
    setting = subject.setting
    weights, _ = position_weights(setting.problem.valid(subject.x))
    kind = setting.method.distance

    def one(out: Array, target_out: Array, weights: Any) -> Array:
        row = None if weights is None else weights[None]
        return losses.minimality(out[None], target_out[None], kind, row)

    return jax.vmap(one)(out, subject.target_out, weights)


def outputs(
    subject: Subject, mask: Bool[Array, "n *T C"] | Float[Array, "n *T C"]
) -> Float[Array, "n ..."]:
    """What the network gives with these components, or these factors of them."""
    apply_fn = subject.setting.problem.apply_fn
    return outputs_of(sparse.apply(apply_fn, subject.params, subject.components, mask, subject.x))


@jax.jit
def errors(
    subject: Subject, mask: Bool[Array, "n *T C"] | Float[Array, "n *T C"]
) -> Float[Array, " n"]:
    """D(target, sparse) of every example. Cost: a sparse pass."""
    return distance(subject, outputs(subject, mask))


def scaled(subject: Subject, factors: Float[Array, "..."]) -> Float[Array, "n *T C"]:
    """m = g + (1 - g)·r: a component that is active is whole, an inactive one is worth r of itself.

    One that a gate with degrees needs by g is worth at least g, as in its training: an adversary
    may choose all of [g, 1], so that rounding g up to 1 would hide what it finds there.

    factors: r, one for all, one of each component [1, C], or like the mask.
    """
    g = subject.values.astype(jnp.float32)
    return g + (1 - g) * factors


@jax.jit
def fired(subject: Subject) -> Float[Array, " C"]:
    """The share of examples (of positions without padding) on which each component is active.

    And has a score above 0.
    """
    on = subject.mask & (subject.scores > 0)
    share = 1.0
    if on.ndim == 3:
        share = position_weights(subject.setting.problem.valid(subject.x))[1]
    return jnp.mean(on, axis=range(on.ndim - 1), dtype=jnp.float32) / share


@jax.jit
def baselines(subject: Subject) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean distances of outputs that owe the components nothing.

    constant: the best constant output's; with mse the output's variance, with kl how much the
      output tells of the input, in nats.
    none: with the decomposed weights at zero. Less than the other where much of the output bypasses
      them (a residual stream).
    """
    out, kind = subject.target_out, subject.setting.method.distance
    weights, _ = position_weights(subject.setting.problem.valid(subject.x))
    constant = losses.best_constant(out, kind, weights)
    none = errors(subject, jnp.zeros(subject.mask.shape))
    return jnp.mean(distance(subject, jnp.broadcast_to(constant, out.shape))), jnp.mean(none)


def fresh(rng: PRNGKeyArray, subject: Subject) -> Trained:
    """Untrained components of the same numbers, ranks and layouts; with the same gate."""
    components = subject.components
    factors = components.factors
    drawn = components_lib.init(
        rng,
        subject.params,
        num_components=components.num_components,
        select={n: {"rank": f.rank, "components": f.ids} for n, f in factors.items()},
        uses={name: f.uses for name, f in factors.items()},
        layouts={name: f.layout for name, f in factors.items() if f.layout is not None},
        init_scale=subject.setting.method.init_scale,
    )
    return Trained(drawn, subject.trained.gate)


def joined(first: Components, second: Components) -> Components:
    """The components of both, C + C of them, with all numbers at every site."""
    both = [components_lib.aligned(one) for one in (first, second)]

    def one(a: Any, b: Any) -> Any:
        U, V = _same_rank(a.U, b.U, -1), _same_rank(a.V, b.V, -2)
        return dataclasses.replace(a, U=jnp.concatenate(U), V=jnp.concatenate(V))

    return components_lib.map_sites(one, *both)


def _same_rank(a: Array, b: Array, axis: int) -> list[Array]:
    """Both with zeros up to the larger rank."""
    most = max(a.shape[axis], b.shape[axis])

    def padded(x: Array) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, most - x.shape[axis])
        return jnp.pad(x, widths)

    return [padded(a), padded(b)]


norms = components_lib.norms
