"""One train step of any method, in the order of the papers; all of it one XLA program.

Shapes: B examples (of this device), C components. `params` are the target's, θ*; `components` are
the P_c.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from apd_jax import components as components_lib
from apd_jax.ablations import Sources
from apd_jax.collectives import psum
from apd_jax.components import Components
from apd_jax.forward.dispatch import slots_for
from apd_jax.gates.base import Activity
from apd_jax.methods import observe
from apd_jax.methods.base import HERE, Method, Run, Scene, at
from apd_jax.methods.optimizers import Trained
from apd_jax.network.problem import Problem
from apd_jax.train.passes import PassRunner, runners
from apd_jax.train.state import Settings, TrainState, begin_at, used_passes, with_settings

Metrics = dict[str, Float[Array, ""]]
_PROBES = 0x960BE  # sets the draws of attribution probes apart from those of the data


def make_step(
    problem: Problem,
    method: Method,
    *,
    fed: bool = False,
    update: bool = True,
    axis_name: str | None = None,
    component_axis: str | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The train step, pure: for jit, scan, vmap or pmap.

    (state, target_params, key, x = None, settings = None) -> (state, metrics)

    `settings` are values, traced or not, of the method's numbers, to be used instead of its own.
    What is decided before tracing stays the method's: a term whose coefficient is 0 there is left
    out, and topk there should be the largest, for which the sparse pass makes room (a larger one
    is as exact, but slower).

    Args:
      fed: the step is given x; else it draws the batch of *all* devices, and each takes its slice.
      update: False, on one device: the state comes back as it was, and no gradient is compiled.
      axis_name: the mapped axis over which the batch is split.
      component_axis: the mapped axis over which the components are split: the state then holds
        this device's share of them, in order. Activations, their cotangents and counts cross it,
        components and their gradients never.
    Returns: metrics holds every loss term before its coefficient, their weighted sum `total`, and
      `mean_active`.
    """
    on = frozenset(name for name, term in method.terms().items() if term.on)

    def step(
        state: TrainState,
        params: PyTree,
        key: PRNGKeyArray,
        x: PyTree = None,
        settings: Settings | None = None,
    ) -> tuple[TrainState, Metrics]:
        now = with_settings(method, settings)
        before = Trained(now.constrain(state.components), state.gate)
        x = _local_batch(x if fed else problem.source(key, state.step), axis_name)

        # The target's own pass on each stream of data, and what the gate reads there.
        gate = now.gate(before.gate, problem)
        scenes = {}
        for stream, batch in now.by_stream(x).items():
            rng = _probe_keys(now, key, state.step, batch, axis_name)
            scenes[stream] = observe.scene(
                *(now, problem, gate, before.components, params, batch, rng),
                axis_name=axis_name,
                component_axis=component_axis,
            )

        # What the others are worth in each pass: drawn, and where there is an adversary made worse.
        slots = _slots(method, scenes[HERE])
        used = used_passes(method, now)
        passes = runners(used, now, problem, params, scenes, key, state.step, slots)
        drawn, kept = _ablations(passes, state.ablation, before, gate, scenes)

        # The terms, and their gradient by components, gate and the adversaries' sources.
        def loss(trained: Trained, worst: Mapping[str, Sources]) -> tuple[Array, Metrics]:
            return _loss(trained, {**drawn, **worst}, now, problem, passes, scenes, on, state.step)

        worst = {name: drawn[name] for name, p in passes.items() if p.spec.ablation.ascends}
        if not update:
            return state, loss(before, worst)[1]
        (_, metrics), (gradient, by_source) = jax.value_and_grad(
            loss, argnums=(0, 1), has_aux=True
        )(before, worst)
        for name, slope in by_source.items():
            p = passes[name]
            kept[name] = p.spec.ablation.finish(
                kept.get(name, ()), drawn[name], _unscaled(slope, now, name, state.step)
            )

        # One update.
        metrics["mean_active"] = psum(metrics["mean_active"], component_axis)
        if axis_name is not None and lax.axis_size(axis_name) > 1:  # of one XLA would copy it all
            gradient, metrics = lax.pmean((gradient, metrics), axis_name)
        projected = now.project(gradient.components, before.components)
        gradient = dataclasses.replace(gradient, components=projected)
        updates, opt_state = now.transformation().update(gradient, state.opt_state, before)
        after: Any = optax.apply_updates(before, updates)
        ablation = {name: kept[name] for name in state.ablation}
        return TrainState(
            state.step + 1, after.components, opt_state, after.gate, ablation
        ), metrics

    return step


def _loss(
    trained: Trained,
    sources: Mapping[str, Sources | None],
    method: Method,
    problem: Problem,
    passes: Mapping[str, PassRunner],
    scenes: Mapping[str, Scene],
    on: frozenset[str],
    step: Any,
) -> tuple[Array, Metrics]:
    """Σ_terms coefficient · term, and with it in metrics the terms before their coefficients."""
    seen = scenes[HERE].seen
    components = components_lib.split_over(trained.components, seen.component_axis)
    gate = method.gate(trained.gate, problem)
    activity = {stream: _activity(gate, components, scene) for stream, scene in scenes.items()}

    @functools.cache
    def forward(name: str) -> list[tuple[Any, Any]]:
        p = passes[name]
        return p.run(components, activity[p.spec.stream], sources[name])

    run = Run(
        components=components,
        params=next(iter(passes.values())).params if passes else problem.params,
        scenes=scenes,
        activity=activity,
        forward=forward,
        passes={name: p.spec for name, p in passes.items()},
        on=on,
        step=step,
        axis_name=seen.axis_name,
    )
    terms = {name: term for name, term in method.terms().items() if name in on}
    found = {name: term.score(run) for name, term in terms.items()}
    weighted = [at(terms[n].coeff, step, method.num_steps) * v for n, v in found.items()]
    total = jnp.asarray(sum(weighted))
    return total, {"total": total, **found, "mean_active": activity[HERE].mean_active(seen)}


def _activity(gate: Any, components: Components, scene: Scene) -> Activity:
    return gate(dataclasses.replace(scene.seen, components=components))


def _ablations(
    passes: Mapping[str, PassRunner],
    kept: Mapping[str, PyTree],
    before: Trained,
    gate: Any,
    scenes: Mapping[str, Scene],
) -> tuple[dict[str, Any], dict[str, PyTree]]:
    """The sources of every pass, and what its adversary keeps after its ascents."""
    sources, after = {}, {}
    component_axis = scenes[HERE].seen.component_axis
    components = components_lib.split_over(before.components, component_axis)
    for name, p in passes.items():
        state = kept.get(name, ())
        drawn = p.draw(state, components)
        if p.spec.ablation.ascends:
            activity = _activity(gate, components, scenes[p.spec.stream])
            state, drawn = p.attack(state, drawn, components, activity)
            after[name] = state
        sources[name] = drawn
    return sources, after


def _unscaled(slope: PyTree, method: Method, name: str, step: Any) -> PyTree:
    """The gradient of a pass's own distance, from that of its term in the total."""
    coeff = jnp.maximum(at(method.terms()[name].coeff, step, method.num_steps), 1e-30)
    return jax.tree.map(lambda g: g / coeff, slope)


def _slots(method: Method, scene: Scene) -> int | None:
    """Examples (positions) per component that the dispatch route makes room for."""
    attributions = scene.seen.attributions
    if not method.num_kept or attributions is None:
        return None
    C = attributions.shape[-1]
    return slots_for(method.num_kept, attributions.size // C, method.num_components)


def _probe_keys(
    method: Method, key: PRNGKeyArray, step: Any, x: PyTree, axis_name: str | None
) -> Array | None:
    if not method.estimates:
        return None
    draws = jax.random.fold_in(jax.random.fold_in(key, _PROBES), step)
    return observe.example_keys(draws, x, axis_name)


def _local_batch(x: PyTree, axis_name: str | None) -> PyTree:
    """This device's slice of the batch.

    Every device draws the whole batch: the draw is then the same on any number of devices.
    """
    if axis_name is None:
        return x
    devices, index = lax.axis_size(axis_name), lax.axis_index(axis_name)

    def cut(a: Array) -> Array:
        size = a.shape[0] // devices
        return lax.dynamic_slice_in_dim(a, index * size, size)

    return jax.tree.map(cut, x)


def make_loss(problem: Problem, method: Method, *, step: int = 0) -> Callable[..., Any]:
    """(components, gate, params, key, x) -> the total loss of train step number `step`, jitted."""
    one = make_step(problem, method, fed=True, update=False)

    @jax.jit
    def loss(components: Components, gate: PyTree, params: PyTree, key: PRNGKeyArray, x: PyTree):
        state = begin_at(components, problem, method, gate=gate, step=step)
        return one(state, params, key, x)[1]["total"]

    return loss


def scan_steps(step: Callable, num_steps: int) -> Callable:
    """`num_steps` steps in one program: (state, params, key) -> (state, metrics over steps).

    Batches that are not drawn on the device come as one more argument, leaves [num_steps, B, ...];
    `settings` is passed on.
    """

    def many(state, params, key, *batches, settings=None):
        def one(state: TrainState, x: tuple) -> tuple[TrainState, PyTree]:
            return step(state, params, key, *x, settings=settings)

        return lax.scan(one, state, batches, length=num_steps)

    return many
