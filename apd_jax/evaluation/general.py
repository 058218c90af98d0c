"""What can be measured of a decomposition of any network.

Shapes: B examples, C components, L decomposed leaves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import wadler_lindig as wl
from jaxtyping import Array, Float, PyTree

from apd_jax import components as components_lib
from apd_jax import losses
from apd_jax.components import Components
from apd_jax.decomposition import Decomposition
from apd_jax.evaluation import masks
from apd_jax.forward import sparse
from apd_jax.gates.base import Activity
from apd_jax.methods import observe
from apd_jax.methods.optimizers import Trained
from apd_jax.network import data
from apd_jax.network.outputs import outputs, position_weights
from apd_jax.targets.base import Panel, Target
from apd_jax.targets.scoring import alive_components

STREAM = 0x7E57  # sets the draws of an evaluation apart from training with the same seed


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table as data: the first cell of a row says what the others are of."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """metrics: flat and JSON-able. arrays: what `apd_jax.report.figures` reads.

    panels: further figures, by file name. labels: {metric: what it says and what is good}, for
    metrics that only this target has. grids: further tables.
    """

    metrics: dict[str, float | int]
    arrays: dict[str, np.ndarray]
    panels: dict[str, Panel] = dataclasses.field(default_factory=dict)
    labels: dict[str, str] = dataclasses.field(default_factory=dict)
    grids: tuple[Grid, ...] = ()

    def __repr__(self) -> str:
        return wl.pformat(self)


def fired(activity: Activity) -> Array:
    """Which components are active with a score above 0, like the mask."""
    return activity.active & (activity.scores > 0)


def chosen_masks(activity: Activity, key: Array) -> dict[str, Array]:
    """The masks that every evaluation asks about, by name.

    topk: that of training, on or off. For a gate that also knows degrees, gates: its values as they
    are; stochastic: with the rest times U(0, 1).
    """
    mask = activity.active
    found = {"topk": mask, "all": jnp.ones_like(mask), "none": jnp.zeros_like(mask)}
    if activity.hard:
        return found
    return found | {"gates": activity.values, "stochastic": masks.stochastic(activity, key)}


def evaluate(
    target: Target | None, decomposition: Decomposition, *, num_batches: int, seed: int
) -> Evaluation:
    """Measures a decomposition of one instance on fresh batches of `target.fresh_fn`.

    Without a target on batches of the decomposition's own data.

    Metrics
      faithfulness, simplicity: as trained. relative_parameter_error: see the components' algebra.
      minimality_{topk,all,none}: distance to the target's output, in the method's
        `distance`, with the mask of training, with all components, and with none; of gates
        with degrees also with {gates,stochastic}, see `chosen_masks`.
      num_alive_components: those that fire (are active with a score above 0) and have more than
        ALIVE_NORM of the largest component's norm; num_dead_components: the others.
        mean_active_components: firing per example.
      total_rank: effective ranks of the alive components, summed over components and leaves.

    Cost: num_batches · four forward passes and the gate, in one XLA program.
    """
    components, params = decomposition.components, decomposition.problem.params
    drawn = _on_batches(target, decomposition, num_batches, seed)
    norms = np.asarray(components_lib.norms(components))
    firing_rates = drawn.pop("fired").mean(axis=0)
    alive = alive_components(firing_rates, norms)
    ranks = jax.device_get(components_lib.effective_ranks(components))
    of_leaf = _leaf_norms(components, params)
    missing = components_lib.relative_parameter_error(components, params)
    metrics = {
        "faithfulness": float(losses.faithfulness(components, params)),
        "relative_parameter_error": float(missing),
        **{name: float(values.mean()) for name, values in drawn.items()},
        "num_components": len(alive),
        "num_alive_components": int(alive.sum()),
        "num_dead_components": int((~alive).sum()),
        "mean_active_components": float(firing_rates.sum()),
        "total_rank": int(sum(rank[alive].sum() for rank in ranks.values())),
    }
    arrays = {
        "firing_rates": firing_rates,
        "component_norms": norms,
        **{f"leaf_norms_{name}": share for name, share in of_leaf.items()},
    }
    return Evaluation(metrics, arrays, panels(firing_rates, of_leaf))


def _on_batches(
    target: Target | None, decomposition: Decomposition, num_batches: int, seed: int
) -> dict[str, np.ndarray]:
    """What is measured on the batches, one value (of `fired` one row) per batch."""
    method, problem = decomposition.method, decomposition.problem
    source = problem.sample_fn if target is None else target.fresh_fn
    draw = data.as_sampler(source, num_batches)
    key = jax.random.fold_in(jax.random.key(seed), STREAM)

    def one(trained: Trained, params: PyTree, step: Array) -> dict[str, Array]:
        x = draw(key, step)
        target_out = outputs(problem.apply_fn(params, x))
        activity = observe.activity(method, problem, trained, params, x)
        weights = position_weights(problem.valid(x))[0]
        fires = fired(activity)
        found = {
            "fired": jnp.mean(fires, axis=range(fires.ndim - 1), dtype=jnp.float32),
            "simplicity": losses.simplicity(trained.components, activity.active, method.norm_p),
        }

        def minimality(mask: Array) -> Array:
            result = sparse.apply(problem.apply_fn, params, trained.components, mask, x)
            return losses.minimality(outputs(result), target_out, method.distance, weights)

        masks_of = chosen_masks(activity, jax.random.fold_in(key, step))
        dtype = bool if activity.hard else activity.values.dtype
        stacked = jnp.stack([mask.astype(dtype) for mask in masks_of.values()])
        values = jax.lax.map(minimality, stacked)  # compiled once for all masks
        return found | {f"minimality_{n}": v for n, v in zip(masks_of, values, strict=True)}

    @jax.jit
    def measure(trained: Trained, params: PyTree) -> dict[str, Array]:
        return jax.lax.map(lambda step: one(trained, params, step), jnp.arange(num_batches))

    return jax.device_get(measure(decomposition.trained, problem.params))


def _leaf_norms(components: Components, params: PyTree) -> dict[str, Float[np.ndarray, " C"]]:
    """{leaf: ‖P_c‖ / ‖θ*‖ there}."""
    leaves = components_lib.decomposed_leaves(components, params)
    squares = jax.device_get(components_lib.squared_norms(components))
    return {
        name: np.sqrt(np.maximum(squares[name], 0) / float(jnp.sum(leaf**2)))
        for name, leaf in leaves.items()
    }


def panels(
    firing_rates: Float[np.ndarray, " C"], of_leaf: Mapping[str, Float[np.ndarray, " C"]]
) -> dict[str, Panel]:
    """Norm of every component in every leaf, and how often it fires; ordered by that."""
    order = np.argsort(-firing_rates, kind="stable")
    return {
        "components": Panel(
            title="Where the components live",
            caption="Norm of every component's part in each decomposed leaf over the leaf's own "
            "norm, components ordered by how often they are kept. Good: each component sits in the "
            "leaves of one mechanism, and dead ones are dark throughout.",
            xlabel="component (ordered by firing rate)",
            ylabel="",
            matrix=np.stack([share[order] for share in of_leaf.values()]),
            unit="norm of the component's part / norm of the leaf",
            rows=list(of_leaf),
            columns=[str(c) for c in order],
        ),
        "firing": Panel(
            title="How often components are kept",
            caption="Share of examples (or positions) on which each component is kept. Good: a "
            "sharp edge between the components that are used and those that never are.",
            xlabel="component (ordered by firing rate)",
            ylabel="share of examples",
            x=np.arange(len(order)),
            lines={"firing rate": firing_rates[order]},
        ),
    }
