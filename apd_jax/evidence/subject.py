"""A decomposition with the data that it is judged on.

Shapes: n examples, C components; masks are [n, C], or [n, T, C] where every position has its own.
"""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from apd_jax import components as components_lib
from apd_jax import losses
from apd_jax.components import Components
from apd_jax.forward import sparse
from apd_jax.methods.config import Config
from apd_jax.network.problem import Problem
from apd_jax.train import step as step_lib


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """What of a decomposition is not an array. Equal for the same problem and the same settings: checks are then compiled once."""

    problem: Problem
    config: Config

    def __hash__(self) -> int:
        return id(self.problem)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Setting)
            and self.problem is other.problem
            and self.config.to_dict() == other.config.to_dict()
        )

    def mask(
        self, attributions: Float[Array, "n *T C"], x: PyTree, *, kind: str = "batch_topk", k: Any
    ) -> Bool[Array, "n *T C"]:
        """The k (which may be traced) largest, over the batch or per example; always-on components stay on."""
        chosen = SimpleNamespace(mask=kind, topk=k, num_always_on=self.config.num_always_on)
        return step_lib.make_mask_fn(chosen, valid_fn=self.problem.valid_fn)(attributions, x)

    def trained_mask(
        self, attributions: Float[Array, "n *T C"], components: Components, x: PyTree
    ) -> Bool[Array, "n *T C"]:
        """As in training; batch top-k at `topk` where it trained with "none" or "exact"."""
        if self._by_threshold:
            return step_lib.make_mask_fn(
                self.config, thresholds=components.thresholds, valid_fn=self.problem.valid_fn
            )(attributions, x)
        return self.mask(
            attributions,
            x,
            kind="topk" if self.config.mask == "topk" else "batch_topk",
            k=self.config.topk,
        )

    @property
    def _by_threshold(self) -> bool:
        return self.config.mask in ("threshold", "learned")

    @property
    def kept(self) -> str:
        """What `trained_mask` goes by, in words."""
        if self.config.mask == "learned":
            return "learned thresholds"
        return (
            f"threshold {self.config.threshold:.3g}"
            if self._by_threshold
            else f"k = {self.config.topk:g}"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Subject:
    """One target network, its components and n examples. A pytree: what is measured of it are jitted functions of it."""

    params: Any
    components: Any
    x: Any
    target_out: Any  # [n, ...]
    attributions: Any  # like mask
    mask: Any  # the components that count as active: those of training
    setting: Setting = dataclasses.field(metadata={"static": True})

    @property
    def num_components(self) -> int:
        return self.mask.shape[-1]


def make(setting: Setting, params: PyTree, components: Components, x: PyTree) -> Subject:
    """Runs the target and takes attributions and mask on x."""
    return Subject(
        params, components, x, *_measured(setting, params, components, x), setting=setting
    )


@functools.partial(jax.jit, static_argnames="setting")
def _measured(
    setting: Setting, params: PyTree, components: Components, x: PyTree
) -> tuple[Array, Array, Array]:
    problem, config = setting.problem, setting.config
    out = step_lib.split_result(problem.apply_fn(params, x))[0]
    attribute = step_lib.make_attribution_fn(
        problem.apply_fn, config, attribution_fn=problem.attribution_fn, valid_fn=problem.valid_fn
    )
    attributions = jnp.sqrt(attribute(components, params, x, jax.random.key(config.seed)))
    return out, attributions, setting.trained_mask(attributions, components, x)


def distance(subject: Subject, out: Float[Array, "n ..."]) -> Float[Array, " n"]:
    """D(target, out) of every example, in the measure that the components were trained with (`minimality_loss`)."""
    weights, valid_fn, kind = (
        None,
        subject.setting.problem.valid_fn,
        subject.setting.config.minimality_loss,
    )
    if valid_fn is not None:
        valid = valid_fn(subject.x).astype(jnp.float32)
        weights = valid / jnp.maximum(jnp.mean(valid), 1e-6)

    def one(out, target_out, weights):
        return losses.minimality(
            out[None], target_out[None], kind, None if weights is None else weights[None]
        )

    return jax.vmap(one)(out, subject.target_out, weights)


def outputs(
    subject: Subject, mask: Bool[Array, "n *T C"] | Float[Array, "n *T C"]
) -> Float[Array, "n ..."]:
    """What the network gives with these components, or these factors of them."""
    problem = subject.setting.problem
    return step_lib.split_result(
        sparse.apply(problem.apply_fn, subject.params, subject.components, mask, subject.x)
    )[0]


@jax.jit
def errors(
    subject: Subject, mask: Bool[Array, "n *T C"] | Float[Array, "n *T C"]
) -> Float[Array, " n"]:
    """D(target, sparse) of every example. Cost: a sparse pass."""
    return distance(subject, outputs(subject, mask))


def scaled(subject: Subject, factors: Float[Array, "..."]) -> Float[Array, "n *T C"]:
    """The mask with active components at 1 and inactive ones at the given factors: one, of each component [1, C], or like the mask."""
    active = subject.mask.astype(jnp.float32)
    return active + (1 - active) * factors


@jax.jit
def baselines(subject: Subject) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean distances of outputs that owe the components nothing.

    constant: the best constant output's; with mse the output's variance, with kl how much it tells of the input, in nats.
    none: with the decomposed weights at zero. Less than the other where much of the output bypasses them (a residual stream).
    """
    out, valid_fn = subject.target_out, subject.setting.problem.valid_fn
    kl = subject.setting.config.minimality_loss == "kl"
    weight = jnp.ones(out.shape[:-1]) if valid_fn is None else valid_fn(subject.x).astype(out.dtype)
    mean = jnp.average(
        (jax.nn.softmax(out) if kl else out).reshape(-1, out.shape[-1]),
        axis=0,
        weights=weight.reshape(-1),
    )
    constant = jnp.log(mean + 1e-30) if kl else mean
    none = errors(subject, jnp.zeros(subject.mask.shape))
    return jnp.mean(distance(subject, jnp.broadcast_to(constant, out.shape))), jnp.mean(none)


def fresh(
    rng: PRNGKeyArray, components: Components, params: PyTree, init_scale: float
) -> Components:
    """Components of the same ranks and layouts as at the beginning of training."""
    factors = components.factors
    drawn = components_lib.init(
        rng,
        params,
        num_components=components.num_components,
        select={name: {"rank": f.U.shape[-1]} for name, f in factors.items()},
        uses={name: f.uses for name, f in factors.items()},
        layouts={name: f.layout for name, f in factors.items() if f.layout is not None},
        init_scale=init_scale,
    )
    return dataclasses.replace(drawn, log_thresholds=components.log_thresholds)


def joined(first: Components, second: Components) -> Components:
    """The components of both, C + C of them."""
    is_leaf = components_lib.is_slot

    def one(a, b):
        return (
            None
            if a is None
            else dataclasses.replace(
                a, U=jnp.concatenate([a.U, b.U]), V=jnp.concatenate([a.V, b.V])
            )
        )

    return Components(jax.tree.map(one, first.tree, second.tree, is_leaf=is_leaf))


def norms(components: Components) -> Float[Array, " C"]:
    """‖P_c‖ over all leaves."""
    return jnp.sqrt(
        jnp.maximum(sum(components_lib.squared_norms(components).values(), jnp.zeros(())), 0)
    )
