r"""Prompt graphs: the few components, by position, that what a network says next is owed to.

Logits z [T, C] are optimised from the gate's own causal importances on, g = clip(z, 0, 1):

  β Σ_tc g_tc^p / T + ½ D(m with r ~ U(0, 1)) + ½ D(m with the worst r)     m = g + (1 - g) r (VPD)

D is the distance of the pass's logits at one position: KL(target ‖ pass), or the cross-entropy of a
token. The worst r is found afresh in every step, by a few ascents by sign. Components that
are not alive are off, whatever r. Δ = θ* - Σ P takes part
with sources of its own. Nodes are the (position, component) whose g is above 0 in the end.

Without the adversary, the random r counts whole. Such graphs are smaller, and mostly fall apart
when the rest is chosen against them: so both are made, and both are attacked.

Shapes: T positions, C components, n nodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import wadler_lindig as wl
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from apd_jax import components as components_lib
from apd_jax import losses
from apd_jax.ablations import Adversary, Uniform, site_weights
from apd_jax.ablations.base import Shape, Sources
from apd_jax.components import Components
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError, one_of
from apd_jax.forward import sparse
from apd_jax.gates.base import Activity
from apd_jax.gates.sigmoids import lower_leaky, upper_leaky
from apd_jax.interpretation import edges
from apd_jax.interpretation.edges import PromptEdges
from apd_jax.network.outputs import outputs
from apd_jax.targets.scoring import large_components

DISTANCES = ("kl", "ce")
_OFF = -0.1  # where logits begin that are off: below 0, where the price's gradient is endless


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a graph is pruned."""

    num_steps: int = 2000  # of AdamW
    learning_rate: float = 0.01  # the largest of a cosine
    price: float = 0.05  # β
    p: float = 0.3  # the power of the price
    ascents: int = 4  # of the adversary, in every step
    ascent_size: float = 1.0
    distance: str = "kl"  # kl | ce (of the token)
    attack_steps: int = 20  # by which the finished graph is attacked ...
    attack_size: float = 0.1
    attack_starts: int = 4  # ... from so many random beginnings, of which the worst counts

    def check(self) -> None:
        one_of("distance", self.distance, DISTANCES)
        counts = (self.num_steps, self.ascents, self.attack_steps, self.attack_starts)
        if min(counts) < 1:
            raise InputError(
                "num_steps, ascents, attack_steps and attack_starts of a graph must be at least 1; "
                f"got {', '.join(map(str, counts))}."
            )
        if not (self.price >= 0 and self.p > 0 and self.learning_rate > 0):
            raise InputError(
                "the price must be at least 0, its power and the learning rate above 0; got "
                f"{self.price}, {self.p} and {self.learning_rate}."
            )


@dataclasses.dataclass(frozen=True)
class Pruned:
    """What is left of a prompt's components.

    gates: g [T, C]. kl: KL(target ‖ pass), in nats, of the nodes alone: 1 for these, 0 for all
    others and for Δ. kl_attacked: with the others chosen against them, by their own source at every
    position.
    """

    gates: Float[np.ndarray, "T C"]
    kl: float
    kl_attacked: float

    def __repr__(self) -> str:
        return wl.pformat(self)

    @property
    def nodes(self) -> Bool[np.ndarray, "T C"]:
        return self.gates > 0

    @property
    def num_nodes(self) -> int:
        return int(self.nodes.sum())


@dataclasses.dataclass(frozen=True)
class PromptGraph:
    """A prompt's graph.

    tokens: [T]. position: where the network is asked. token: what comes next, with the
    target's own probability. before: how many nodes the gate has. robust, plain: pruned with and
    without an adversary. edges: among the nodes of `robust`, and to the token's logit.
    """

    tokens: Int[np.ndarray, " T"]
    position: int
    token: int
    probability: float
    before: int
    robust: Pruned
    plain: Pruned
    edges: PromptEdges

    def __repr__(self) -> str:
        return wl.pformat(self)

    def must_be_named_by(self, words: Sequence[str]) -> None:
        """Raises InputError where there is not one word for every token."""
        if len(words) != len(self.tokens):
            raise InputError(
                f"words has {len(words)} names for a prompt of {len(self.tokens)} tokens; give one "
                "for each."
            )


def prompt_graph(
    decomposition: Decomposition,
    tokens: Any,
    *,
    position: int = -1,
    token: int | None = None,
    alive: Bool[np.ndarray, " C"] | None = None,
    settings: Settings | None = None,
    seed: int = 0,
) -> PromptGraph:
    """Prunes a prompt's components with and without an adversary, and draws the edges.

    Args:
      tokens: [T], all of which count. The network's outputs are logits [B, T, V].
      position: of the token before the one asked about.
      token: what comes next; None: what the target holds most likely.
      alive: which components an ablation may bring in, e.g. `firing_rate > 0` of a harvest; None:
        all that are not small. Those that are on in the prompt may in any case.
    Raises:
      InputError: an empty prompt, a position or token that is not there, settings out of range, or
        a price at which nothing is left.
    Cost: with the adversary `ascents` + 2 sparse passes of one sequence with backward per step,
      without it 1; then a backward pass per node.
    """
    settings = settings or Settings()
    settings.check()
    x = np.asarray(tokens, np.int32)
    if x.ndim != 1 or not len(x):
        raise InputError(f"a prompt is one row of tokens [T], at least one; got {x.shape}.")
    if not -len(x) <= position < len(x):
        raise InputError(f"position {position} is outside of the prompt of {len(x)} tokens.")
    position %= len(x)
    g, problem = edges.gates_on(decomposition, x), decomposition.problem
    run = jax.jit(lambda params, x: outputs(problem.apply_fn(params, x)))
    chances = np.asarray(jax.nn.softmax(run(problem.params, x[None])[0, position]))
    token = int(chances.argmax()) if token is None else token
    if not 0 <= token < len(chances):
        raise InputError(f"token {token} is outside of the vocabulary of {len(chances)}.")
    if alive is None:
        alive = large_components(np.asarray(components_lib.norms(decomposition.components)))
    alive = alive | (np.asarray(g) > 0).any(axis=0)
    prune, of = _Pruning(decomposition, settings, position, token), (jnp.asarray(x), g)
    robust, plain = (
        prune(*of, jnp.asarray(alive)[None], jax.random.key(seed), adversary=on)
        for on in (True, False)
    )
    if not robust.num_nodes:
        raise InputError(
            f"at a price of {settings.price:g} nothing is left of the prompt's components; give a "
            "lower one."
        )
    return PromptGraph(
        tokens=x,
        position=position,
        token=token,
        probability=float(chances[token]),
        before=int((np.asarray(g) > 0).sum()),
        robust=robust,
        plain=plain,
        edges=edges.of_prompt(decomposition, x, robust.gates, output=(position, token)),
    )


class _Pruning:
    """The programs for one prompt."""

    def __init__(self, decomposition: Decomposition, settings: Settings, position: int, token: int):
        self.decomposition, self.settings = decomposition, settings
        self.position, self.token = position, token
        self.optimised = jax.jit(self._optimised, static_argnames="adversary")
        self.measured = jax.jit(self._measured)

    def __call__(self, x: Any, g: Array, alive: Array, key: Array, *, adversary: bool) -> Pruned:
        of = (self.decomposition.problem.params, self.decomposition.components, x)
        gates = self.optimised(*of, g * alive, alive, key, adversary=adversary)
        kl, attacked = self.measured(*of, (gates > 0).astype(jnp.float32), alive, key)
        return Pruned(np.asarray(gates), float(kl), float(attacked))

    def _logits(
        self, params: PyTree, components: Components, x: Array, g: Array, sources: Sources | None
    ) -> Float[Array, " V"]:
        """What a pass says at the position."""
        activity = Activity(g[None], g[None] > 0, g[None])
        weights = site_weights(
            components, activity, sources, delta="none" if sources is None else "masked"
        )
        apply_fn = self.decomposition.problem.apply_fn
        out = sparse.run(apply_fn, params, components, weights, x[None])
        return outputs(out)[0, self.position]

    def _target(self, params: PyTree, x: Array) -> Float[Array, " V"]:
        return outputs(self.decomposition.problem.apply_fn(params, x[None]))[0, self.position]

    def _shape(self, x: Array, components: Components) -> Shape:
        return Shape(
            size=1,
            positions=(len(x),),
            num_components=components.num_components,
            num_sites=len(components.factors),
            with_delta=True,
        )

    def _optimised(
        self,
        params: PyTree,
        components: Components,
        x: Array,
        g: Array,
        alive: Array,
        key: Array,
        *,
        adversary: bool,
    ) -> Float[Array, "T C"]:
        s, target = self.settings, self._target(params, x)
        shape = self._shape(x, components)
        worst = Adversary(steps=s.ascents, step_size=s.ascent_size, shared="position")

        def distance(g: Array, sources: Sources) -> Array:
            out = self._logits(params, components, x, g, _only(sources, alive))
            if s.distance == "ce":
                return -jax.nn.log_softmax(out)[self.token]
            return _kl(out, target)

        def loss(z: Array, keys: Array) -> Array:
            g = lower_leaky(z) * alive
            price = jnp.sum(losses.importance((upper_leaky(z) * alive)[None], s.p))
            found = distance(g, Uniform().draw((), keys[:1], shape))
            if adversary:
                start, fixed = worst.draw((), keys[1:], shape), lax.stop_gradient(g)
                ascent = jax.grad(lambda r: distance(fixed, r))
                found = 0.5 * found + 0.5 * distance(g, worst.ascend((), start, ascent)[1])
            return s.price * price + found

        optimizer = optax.adamw(optax.cosine_decay_schedule(s.learning_rate, s.num_steps))

        def step(carry: Any, i: Array) -> Any:
            z, state = carry
            gradient = jax.grad(loss)(z, jax.random.split(jax.random.fold_in(key, i)))
            updates, state = optimizer.update(gradient, state, z)
            return (optax.apply_updates(z, updates), state), None

        z = jnp.where(g > 0, g, _OFF)
        start = (z, optimizer.init(z))
        (z, _), _ = lax.scan(step, start, jnp.arange(s.num_steps))
        return lower_leaky(z) * alive

    def _measured(
        self, params: PyTree, components: Components, x: Array, m: Array, alive: Array, key: Array
    ) -> tuple[Array, Array]:
        """KL of these nodes alone, and with all others chosen against them."""
        s, target = self.settings, self._target(params, x)

        def distance(sources: Sources | None) -> Array:
            own = None if sources is None else _only(sources, alive)
            return _kl(self._logits(params, components, x, m, own), target)

        attack = Adversary(steps=s.attack_steps, step_size=s.attack_size, shared="position")
        shape, ascent = self._shape(x, components), jax.grad(distance)

        def attacked(key: Array) -> Array:
            start = attack.draw((), key[None], shape)
            return distance(attack.ascend((), start, ascent)[1])

        every = lax.map(attacked, jax.random.split(key, s.attack_starts))
        return distance(None), jnp.max(every)


def _only(sources: Sources, alive: Bool[Array, "1 C"]) -> Sources:
    """Components that are not alive stay off."""
    return dataclasses.replace(sources, components=sources.components * alive[None])


def _kl(out: Float[Array, " V"], target: Float[Array, " V"]) -> Float[Array, ""]:
    """KL(target ‖ out) of logits, in nats."""
    return losses.minimality(out[None], target[None], "kl")
