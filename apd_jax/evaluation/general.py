"""What can be measured of a decomposition of any network.

Shapes: B examples, C components, L decomposed leaves.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from apd_jax import components as components_lib
from apd_jax import losses
from apd_jax.components import Components
from apd_jax.decomposition import Decomposition
from apd_jax.methods.config import Config
from apd_jax.targets.base import Panel, Target
from apd_jax.targets.scoring import alive_components
from apd_jax.train import step as step_lib

STREAM = 0x7E57  # sets the draws of an evaluation apart from training with the same seed


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """metrics: flat and JSON-able. arrays: what `apd_jax.report.figures` reads. panels: further figures, by file name.

    labels: {metric: what it says and what is good}, for metrics that only this target has.
    """

    metrics: dict[str, float | int]
    arrays: dict[str, np.ndarray]
    panels: dict[str, Panel] = dataclasses.field(default_factory=dict)
    labels: dict[str, str] = dataclasses.field(default_factory=dict)


def evaluate(target: Target, params: PyTree, components: Components, config: Config) -> Evaluation:
    """Measures a decomposition on fresh batches of `target.sample_fn`.

    Metrics
      faithfulness, simplicity: as trained. relative_parameter_error: Σ_l ‖θ*_l - Σ_c P_{c,l}‖² / Σ_l ‖θ*_l‖².
      minimality_{topk,all,none}: distance to the target's output, in `apd.minimality_loss`, with the mask of training, with all
        components, and with none.
      num_alive_components: those that fire (are kept with an attribution above 0) and have more than ALIVE_NORM of the largest
        component's norm; num_dead_components: the others. mean_active_components: firing per example.
      total_rank: effective ranks of the alive components, summed over components and leaves.

    Args:
      components: of one instance.
      config: the experiment's; reads `apd` and `evaluation` (num_batches, seed). The batch size is that of `target.sample_fn`.
    Cost: num_batches · four forward passes and the attributions, in one XLA program.
    """
    apd = config.apd
    decomposition = Decomposition(target.problem(params), components, apd, [])
    key = jax.random.fold_in(jax.random.key(config.evaluation.seed), STREAM)

    def one(step: Array) -> dict[str, Array]:
        x = target.sample_fn(key, step)
        target_out, _ = step_lib.split_result(target.apply_fn(params, x))
        attributions = decomposition.attributions(x)
        mask = decomposition.mask_of(attributions, x)
        chosen = {"topk": mask, "all": jnp.ones_like(mask), "none": jnp.zeros_like(mask)}
        outs = {
            name: step_lib.split_result(decomposition.sparse_output(x, m))[0]
            for name, m in chosen.items()
        }
        return {
            "fired": jnp.mean(
                mask & (attributions > 0), axis=range(mask.ndim - 1), dtype=jnp.float32
            ),
            "simplicity": losses.simplicity(components, mask, apd.schatten_p),
            **{
                f"minimality_{name}": losses.minimality(out, target_out, apd.minimality_loss)
                for name, out in outs.items()
            },
        }

    drawn = jax.device_get(
        jax.jit(lambda: jax.lax.map(one, jnp.arange(config.evaluation.num_batches)))()
    )
    leaves = components_lib.decomposed_leaves(components, params)
    errors = [
        jnp.sum((components_lib.leaf_total(f) - leaves[name]) ** 2)
        for name, f in components.factors.items()
    ]
    squares = jax.device_get(components_lib.squared_norms(components))
    norms = np.sqrt(np.maximum(sum(squares.values(), np.zeros(())), 0))
    firing_rates = drawn["fired"].mean(axis=0)
    alive = alive_components(firing_rates, norms)
    ranks = jax.device_get(components_lib.effective_ranks(components))
    of_leaf = {
        name: np.sqrt(np.maximum(squares[name], 0) / float(jnp.sum(leaves[name] ** 2)))
        for name in leaves
    }

    metrics = {
        "faithfulness": float(losses.faithfulness(components, params)),
        "relative_parameter_error": float(sum(errors))
        / float(sum(jnp.sum(leaf**2) for leaf in leaves.values())),
        **{name: float(values.mean()) for name, values in drawn.items() if name != "fired"},
        "num_components": len(alive),
        "num_alive_components": int(alive.sum()),
        "num_dead_components": int((~alive).sum()),
        "mean_active_components": float(firing_rates.sum()),
        "total_rank": int(sum(rank[alive].sum() for rank in ranks.values())),
    }
    order = np.argsort(-firing_rates, kind="stable")
    panels = {
        "components": Panel(
            title="Where the components live",
            caption="Norm of every component's part in each decomposed leaf over the leaf's own norm, components ordered by how often they "
            "are kept. Good: each component sits in the leaves of one mechanism, and dead ones are dark throughout.",
            xlabel="component (ordered by firing rate)",
            ylabel="",
            matrix=np.stack([share[order] for share in of_leaf.values()]),
            unit="norm of the component's part / norm of the leaf",
            rows=list(of_leaf),
            columns=[str(c) for c in order],
        ),
        "firing": Panel(
            title="How often components are kept",
            caption="Share of examples (or positions) on which each component is kept. Good: a sharp edge between the components "
            "that are used and those that never are.",
            xlabel="component (ordered by firing rate)",
            ylabel="share of examples",
            x=np.arange(len(order)),
            lines={"firing rate": firing_rates[order]},
        ),
    }
    arrays = {
        "firing_rates": firing_rates,
        "component_norms": norms,
        **{f"leaf_norms_{name}": share for name, share in of_leaf.items()},
    }
    return Evaluation(metrics, arrays, panels)
