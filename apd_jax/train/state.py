"""What changes during training, and how it begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from apd_jax.ablations.base import Shape
from apd_jax.components import Components
from apd_jax.methods.base import Method, Pass
from apd_jax.methods.optimizers import Trained
from apd_jax.network import data
from apd_jax.network.outputs import outputs
from apd_jax.network.problem import Problem

Settings = Mapping[str, Float[Array, ""]]
_GATE, _ADVERSARY = 0x6A7E, 0xADE5  # set their draws apart from those of the components


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes during training.

    Random draws come from `fold_in(key, step)`, so there is no RNG state. gate: its arrays.
    ablation: {pass: what its adversary keeps between steps}.
    """

    step: Int[Array, ""]
    components: Components
    opt_state: optax.OptState
    gate: PyTree = ()
    ablation: PyTree = dataclasses.field(default_factory=dict)


def with_settings(method: Method, settings: Settings | None) -> Method:
    """The method with the values of some of its numbers replaced, which may be traced."""
    return dataclasses.replace(method, **settings) if settings else method


def init_state(
    rng: PRNGKeyArray, problem: Problem, method: Method, settings: Settings | None = None
) -> TrainState:
    """Step 0, as the method begins. settings: as in `step.make_step`; init_scale matters here."""
    now = with_settings(method, settings)
    components = now.make_components(rng, problem)
    return begin_at(components, problem, now, rng=rng, passes=used_passes(method, now))


def begin_at(
    components: Components,
    problem: Problem,
    method: Method,
    *,
    rng: PRNGKeyArray | None = None,
    gate: PyTree = None,
    step: int = 0,
    passes: Mapping[str, Pass] | None = None,
) -> TrainState:
    """These components, as if training had come to this step; a fresh gate where none is given.

    passes: those that are used, where the method's own numbers are traced and cannot tell.
    """
    rng = jax.random.key(method.seed) if rng is None else rng
    passes = used_passes(method) if passes is None else passes
    if gate is None:
        gate = method.make_gate(jax.random.fold_in(rng, _GATE), problem, components)
    kept = {}
    for i, (name, spec) in enumerate(passes.items()):
        if not spec.ablation.ascends:
            continue
        key = jax.random.fold_in(jax.random.fold_in(rng, _ADVERSARY), i)
        kept[name] = spec.ablation.init(key, _shape(problem, method, components, spec))
    opt_state = method.transformation().init(Trained(components, gate))
    ablation = {name: state for name, state in kept.items() if jax.tree.leaves(state)}
    return TrainState(jnp.asarray(step, jnp.int32), components, opt_state, gate, ablation)


def used_passes(method: Method, now: Method | None = None) -> dict[str, Pass]:
    """The passes that some term with a coefficient above 0 scores.

    now: the method with settings that may be traced; what is used stays `method`'s to say.
    """
    used = {name for term in method.terms().values() if term.on for name in term.passes}
    passes = (method if now is None else now).passes()
    return {name: spec for name, spec in passes.items() if name in used}


def _shape(problem: Problem, method: Method, components: Components, spec: Pass) -> Shape:
    """Of a pass's sources, over the whole batch."""
    positions: tuple[int, ...] = ()
    if method.per_position:
        x = data.shapes(problem.sample_fn)
        out = jax.eval_shape(lambda p, x: outputs(problem.apply_fn(p, x)), problem.params, x)
        positions = out.shape[1:2]
    return Shape(
        size=method.batch_size,
        positions=positions,
        num_components=components.num_components,
        num_sites=len(components.factors),
        with_delta=spec.delta == "masked",
    )
