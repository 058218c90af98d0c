"""TMS with co-active features: the network of `tms` on data whose features come in groups that are always active together.

x̂ = ReLU( x W Wᵀ + b )

No input has a feature without the others of its group, so nothing in the data tells them apart: the truth is one component per
group, with the group's rows of W and of their rank, not one per feature.

Shapes: B examples, G groups of S features, F = G·S features, H hidden dimensions, C components. W [F, H] is used twice and is one
leaf; group g has its rows gS, ..., gS + S - 1, called W_g [S, H], and P_{c,g} is component c's part there.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from scipy.optimize import linear_sum_assignment

from apd_jax import components as components_lib
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.methods.config import Config
from apd_jax.targets.base import Panel, Score, Target, at_least_one
from apd_jax.targets.tms import TMS, contracted, layers

FOUND_COSINE = 0.9  # a group is found if its component points its way in the group's rows ...
FOUND_NORM_RATIO = 0.5  # ... holds at least this part of their norm ...
FOUND_PURITY = 0.9  # ... and has at least this part of its own squared norm there


def group_sampler(
    batch_size: int, num_groups: int, group_size: int, probability: float
) -> Callable[..., Float[Array, "B F"]]:
    """(rng, step) -> x: every group is active with `probability`, then all its features are uniform in [0, 1], independently; else 0.

    Raises:
      InputError: a batch below 1, or a probability outside (0, 1].
    """
    at_least_one(batch_size=batch_size)
    if not 0 < probability <= 1:
        raise InputError(f"group_probability must lie in (0, 1]; got {probability}.")

    def sample_fn(rng: PRNGKeyArray, step: Int[Array, ""] | int) -> Float[Array, "B F"]:
        key_active, key_value = jax.random.split(jax.random.fold_in(rng, step))
        active = jax.random.bernoulli(key_active, probability, (batch_size, num_groups, 1))
        value = jax.random.uniform(key_value, (batch_size, num_groups, group_size))
        return jnp.where(active, value, 0.0).reshape(batch_size, -1)

    return sample_fn


def score(decomposition: Decomposition, num_groups: int) -> Score:
    """Compares components with the true ones, W_g with zeros in all other rows; every group has its one, no component twice.

    They are matched by the cosine of whole components times min(‖P_{c,g}‖ / ‖W_g‖, 1): neither a small part of another group's
    component nor a small component wins because it happens to point the right way.

    Metrics, means over groups with 0 for one that is left over
      mmcs_groups, ml2r_groups: cos(P_{c,g}, W_g) and ‖P_{c,g}‖ / ‖W_g‖ of the matched component c. purity: ‖P_{c,g}‖² / ‖P_c‖².
      mean_rank: effective rank of the matched component. true_rank: that of W_g.
      num_groups, groups_found: see FOUND_COSINE, FOUND_NORM_RATIO, FOUND_PURITY.
    """
    weights = np.asarray(components_lib.materialize(decomposition.components)["W"], np.float64)
    W = np.asarray(decomposition.problem.params["W"], np.float64)
    C, G = len(weights), num_groups
    P, parts = weights.reshape(C, G, -1), W.reshape(G, -1)
    inner, norms, true_norms = (
        np.einsum("cgd,gd->cg", P, parts),
        np.linalg.norm(P, axis=2),
        np.linalg.norm(parts, axis=1),
    )
    whole = np.linalg.norm(norms, axis=1, keepdims=True)

    ratios = _divide(norms, np.broadcast_to(true_norms, norms.shape))
    component, group = linear_sum_assignment(
        _divide(inner, whole * true_norms) * np.minimum(ratios, 1), maximize=True
    )
    matched = {
        "mmcs_groups": _divide(inner, norms * true_norms),
        "ml2r_groups": ratios,
        "purity": _divide(norms**2, whole**2),
        "mean_rank": np.broadcast_to(
            components_lib.effective_ranks(decomposition.components)["W"][:, None], norms.shape
        ),
    }
    each = {name: np.zeros(G) for name in matched}
    for name, values in matched.items():
        each[name][group] = values[component, group]
    found = (
        (each["mmcs_groups"] >= FOUND_COSINE)
        & (each["ml2r_groups"] >= FOUND_NORM_RATIO)
        & (each["purity"] >= FOUND_PURITY)
    )
    true_ranks = np.linalg.matrix_rank(W.reshape(G, -1, W.shape[1]), rtol=1e-2)
    metrics = {name: float(values.mean()) for name, values in each.items()}

    order = [
        *component[np.argsort(group)],
        *(c for c in np.argsort(-whole[:, 0]) if c not in component),
    ]
    panels = {
        "groups": Panel(
            title="Which component holds which group",
            caption="Norm of every component's part in the rows of each group, over the norm of the target's rows. Good: one bright "
            "diagonal, a single component for each group, and the components left over dark throughout.",
            xlabel="component (ordered by its group)",
            ylabel="group",
            matrix=ratios[order].T,
            unit="norm of the component's part / norm in the target",
            columns=[str(c) for c in order],
        ),
        "ranks": Panel(
            title="Rank of every group's component",
            caption="Effective rank of the matched component beside that of the target's rows of the group. Good: the same; a lower one "
            "holds only a part of the group, a higher one something else too.",
            xlabel="group",
            ylabel="effective rank",
            x=np.arange(G),
            lines={"component": each["mean_rank"], "target's rows": true_ranks},
        ),
    }
    labels = {
        "groups_found": f"groups found, of {G} (all)",
        "mmcs_groups": "cosine with the group's rows (1)",
        "ml2r_groups": "norm over that of the group's rows (1)",
        "purity": "share of its squared norm in them (1)",
        "mean_rank": f"effective rank of a group's component ({true_ranks.mean():.3g})",
    }
    return Score(
        metrics
        | {
            "true_rank": float(true_ranks.mean()),
            "num_groups": G,
            "groups_found": int(found.sum()),
        },
        labels,
        panels,
    )


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def build(config: Config, batch_size: int) -> Target:
    """The co-active TMS target of `config` (fields: configs/tms_coactive.py).

    Raises:
      InputError: a size below 1, or a probability outside (0, 1].
    """
    G, S, H, probability = (
        config.num_groups,
        config.group_size,
        config.d_hidden,
        config.group_probability,
    )
    at_least_one(num_groups=G, group_size=S, d_hidden=H)
    model = TMS(G * S, H)

    def apply_fn(params: PyTree, x: Array):
        out, products = model.apply({"params": params}, x)
        return out, {
            "linear1": products["linear1"]
        }  # before the ReLU, other groups' outputs need other groups' rows

    return Target(
        name="tms_coactive",
        init_fn=lambda key: model.init(key, jnp.zeros((1, G * S)))["params"],
        apply_fn=apply_fn,
        attribution_fn=contracted,
        loss_fn=lambda params, x: jnp.mean((apply_fn(params, x)[0] - x) ** 2),
        sample_fn=group_sampler(batch_size, G, S, probability),
        pretrain_sample_fn=group_sampler(config.pretrain.batch_size, G, S, probability),
        num_active_fn=lambda x: jnp.sum(
            jnp.any(x.reshape(-1, G, S) != 0, axis=2), axis=1, dtype=jnp.int32
        ),
        select=("W",),
        uses={"W": 2},
        score_fn=lambda decomposition, key, alive: score(decomposition, G),
        layers=layers(),
    )
