"""The sparse passes of a train step: their weights, their ablations, their outputs.

Shapes: B examples (of this device), T positions, C components, L sites.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from apd_jax import components as components_lib
from apd_jax.ablations import Sources, site_weights, subset_of_sites
from apd_jax.ablations.base import Shape
from apd_jax.components import Components, Factors
from apd_jax.forward import sparse
from apd_jax.gates.base import Activity
from apd_jax.methods.base import Method, Pass, Scene
from apd_jax.methods.observe import example_keys
from apd_jax.network.outputs import split_result
from apd_jax.network.problem import Problem

_PARTS = 0x9A275  # sets the draws of sources apart from those of the data ...
_ROUTES = 0x2047E  # ... those of the sites that are masked, ...
_RANKS = 0x2A4C5  # ... and those of the ranks that are kept


@dataclasses.dataclass(frozen=True)
class PassRunner:
    """One pass of one step. slots: see `sparse.apply`; None where nothing is dispatched."""

    spec: Pass
    method: Method
    problem: Problem
    params: PyTree
    scene: Scene
    key: Any  # of this pass and step
    slots: int | None = None

    @property
    def _axis_name(self) -> str | None:
        return self.scene.seen.axis_name

    def _keys(self, tag: int) -> Array:
        return example_keys(jax.random.fold_in(self.key, tag), self.scene.x, self._axis_name)

    def shape(self, components: Components) -> Shape:
        size = jax.tree.leaves(self.scene.x)[0].shape[0]
        return Shape(
            size=size,
            positions=self.scene.out.shape[1:2] if self.method.per_position else (),
            num_components=components.num_components,
            num_sites=len(components.factors),
            axis_name=self._axis_name,
            component_axis=self.scene.seen.component_axis,
            with_delta=self.spec.delta == "masked",
        )

    def draw(self, kept: PyTree, components: Components) -> Sources | None:
        """The sources that it begins with."""
        keys = example_keys(self.key, self.scene.x, self._axis_name)
        return self.spec.ablation.draw(kept, keys, self.shape(components))

    def attack(
        self, kept: PyTree, sources: Any, components: Components, activity: Activity
    ) -> tuple[PyTree, Any]:
        """The ascents of its adversary before the training pass, at fixed components and gates."""
        components, activity = lax.stop_gradient((components, activity))

        def distance(sources: Sources) -> Array:
            outs = self.run(components, activity, sources)
            return self.scene.distance(outs, self.method.minimality_loss)

        return self.spec.ablation.ascend(kept, sources, jax.grad(distance))

    def run(
        self, components: Components, activity: Activity, sources: Sources | None
    ) -> list[tuple[Any, Any]]:
        """(outputs, hidden) of the pass; of "each" one for every site."""
        if self.spec.nested:
            components = _first_ranks(components, jax.random.fold_in(self.key, _RANKS))
        names, routed = list(components.factors), None
        if self.spec.sites == "subset":
            positions = self.shape(components).positions
            routed = subset_of_sites(self._keys(_ROUTES), positions, names)
        runs = [[name] for name in names] if self.spec.sites == "each" else [names]
        return [
            self._through(
                components,
                site_weights(
                    components, activity, sources, delta=self.spec.delta, routed=routed, only=only
                ),
            )
            for only in runs
        ]

    def _through(self, components: Components, weights: Mapping[str, Any]) -> tuple[Any, Any]:
        result = sparse.run(
            self.problem.body,
            self.params,
            components,
            weights,
            self.scene.x,
            route=self.method.sparse_route,
            slots=self.slots,
        )
        return split_result(result)


def _first_ranks(components: Components, key: Array) -> Components:
    """Every piece cut to its first R' rank-one parts, R' ~ U{1, 2, 4, ..., the largest rank}."""
    most = max(f.rank for f in components.factors.values())
    choices = [1 << i for i in range(most.bit_length()) if 1 << i < most] + [most]
    kept = jnp.asarray(choices)[jax.random.randint(key, (), 0, len(choices))]

    def one(f: Factors) -> Factors:
        stays = (jnp.arange(f.rank) < kept).reshape(*[1] * (f.V.ndim - 2), -1, 1)
        return dataclasses.replace(f, V=f.V * stays.astype(f.V.dtype))

    return components_lib.map_sites(one, components)


def runners(
    passes: Mapping[str, Pass],
    method: Method,
    problem: Problem,
    params: PyTree,
    scenes: Mapping[str, Scene],
    key: Any,
    step: Any,
    slots: int | None,
) -> dict[str, PassRunner]:
    """The passes of this step, each with draws of its own."""
    made = {}
    for i, (name, spec) in enumerate(passes.items()):
        own = jax.random.fold_in(jax.random.fold_in(key, _PARTS + i), step)
        on_devices = scenes[spec.stream].seen.axis_name
        if spec.ablation.ascends:  # what it ascends may be shared by all devices
            ablation: Any = spec.ablation
            spec = dataclasses.replace(
                spec, ablation=dataclasses.replace(ablation, axis_name=on_devices)
            )
        made[name] = PassRunner(spec, method, problem, params, scenes[spec.stream], own, slots)
    return made
