"""TMS with co-active features: the network of `tms` on features that come in groups.

  x̂ = ReLU( x W Wᵀ + b )

The features of a group are always active together, so nothing in the data tells them apart. The
truth is one component per group, not one per feature. It holds the group's rows of W and has
their rank.

Shapes: B examples, G groups of S features, F = G·S features, H hidden dimensions, C components.
W [F, H] is used twice and is one leaf. W_g [S, H] are the rows gS, ..., gS + S - 1 of group g, and
P_{c,g} the same rows of component c.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree
from scipy.optimize import linear_sum_assignment

from apd_jax import components as components_lib
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.targets.base import Config, Panel, Score, Target, at_least_one
from apd_jax.targets.tms import TMS, contracted, layers

# A group is found if, for the component matched to it, all three are at least:
FOUND_COSINE = 0.9  # cosine of P_{c,g} and W_g
FOUND_NORM_RATIO = 0.5  # ‖P_{c,g}‖ / ‖W_g‖
FOUND_PURITY = 0.9  # ‖P_{c,g}‖² / ‖P_c‖²


def group_sampler(
    batch_size: int, num_groups: int, group_size: int, probability: float
) -> Callable[..., Float[Array, "B F"]]:
    """(rng, step) -> x: every group is active with `probability`, else its features are 0.

    The features of an active group are independent and uniform in [0, 1].

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


@dataclasses.dataclass(frozen=True)
class Matching:
    """The component matched to every group, one to one, and how it compares with W_g.

    With fewer components than groups some groups are left over: all their values are 0.
    """

    components: Int[np.ndarray, " m"]  # the matched components, in the order of their groups
    cosine: Float[np.ndarray, " G"]  # of P_{c,g} and W_g
    ratio: Float[np.ndarray, " G"]  # ‖P_{c,g}‖ / ‖W_g‖
    purity: Float[np.ndarray, " G"]  # ‖P_{c,g}‖² / ‖P_c‖²
    rank: Float[np.ndarray, " G"]  # effective rank of the component
    norms: Float[np.ndarray, " C"]  # ‖P_c‖ of every component
    ratios: Float[np.ndarray, "C G"]  # ‖P_{c,g}‖ / ‖W_g‖ of every component

    @property
    def found(self) -> Bool[np.ndarray, " G"]:
        return (
            (self.cosine >= FOUND_COSINE)
            & (self.ratio >= FOUND_NORM_RATIO)
            & (self.purity >= FOUND_PURITY)
        )

    @property
    def order(self) -> list[int]:
        """The matched components, then the others by falling norm."""
        others = (c for c in np.argsort(-self.norms) if c not in self.components)
        return [int(c) for c in (*self.components, *others)]


def match(decomposition: Decomposition, num_groups: int) -> Matching:
    """Matches components to groups by cos(P_c, W_g) · min(‖P_{c,g}‖ / ‖W_g‖, 1).

    The cosine is that of the whole component with W_g, which is 0 in all other rows. So neither a
    small part of another group's component nor a small component wins by its direction alone.
    """
    components = decomposition.components
    weights = np.asarray(components_lib.materialize(components)["W"], np.float64)
    W = np.asarray(decomposition.problem.params["W"], np.float64)
    C, G = len(weights), num_groups
    P, true = weights.reshape(C, G, -1), W.reshape(G, -1)
    inner = np.einsum("cgd,gd->cg", P, true)
    norms, true_norms = np.linalg.norm(P, axis=2), np.linalg.norm(true, axis=1)
    whole = np.linalg.norm(norms, axis=1, keepdims=True)
    ratios = _divide(norms, np.broadcast_to(true_norms, norms.shape))
    component, group = linear_sum_assignment(
        _divide(inner, whole * true_norms) * np.minimum(ratios, 1), maximize=True
    )

    def of_group(values: np.ndarray) -> np.ndarray:
        """[C, G] -> [G], 0 for a group that is left over."""
        picked = np.zeros(G)
        picked[group] = values[component, group]
        return picked

    ranks = components_lib.effective_ranks(components)["W"][:, None]
    return Matching(
        components=component[np.argsort(group)],
        cosine=of_group(_divide(inner, norms * true_norms)),
        ratio=of_group(ratios),
        purity=of_group(_divide(norms**2, whole**2)),
        rank=of_group(np.broadcast_to(ranks, norms.shape)),
        norms=whole[:, 0],
        ratios=ratios,
    )


def score(decomposition: Decomposition, num_groups: int) -> Score:
    """Compares components with the true ones, W_g with zeros in all other rows.

    Every group gets at most one component, and no component is used twice: see `match`.

    Metrics (means over groups; a group without a component counts as 0):
      mmcs_groups, ml2r_groups: cos(P_{c,g}, W_g) and ‖P_{c,g}‖ / ‖W_g‖ of the matched component c.
      purity: ‖P_{c,g}‖² / ‖P_c‖².
      mean_rank: effective rank of the matched component. true_rank: rank of W_g.
      num_groups: G. groups_found: see FOUND_COSINE, FOUND_NORM_RATIO, FOUND_PURITY.
    """
    matching = match(decomposition, num_groups)
    W = np.asarray(decomposition.problem.params["W"], np.float64)
    true_ranks = np.linalg.matrix_rank(W.reshape(num_groups, -1, W.shape[1]), rtol=1e-2)
    metrics = {
        "mmcs_groups": float(matching.cosine.mean()),
        "ml2r_groups": float(matching.ratio.mean()),
        "purity": float(matching.purity.mean()),
        "mean_rank": float(matching.rank.mean()),
        "true_rank": float(true_ranks.mean()),
        "num_groups": num_groups,
        "groups_found": int(matching.found.sum()),
    }
    labels = {
        "groups_found": f"groups found, of {num_groups} (all)",
        "mmcs_groups": "cosine with the group's rows (1)",
        "ml2r_groups": "norm over that of the group's rows (1)",
        "purity": "share of its squared norm in them (1)",
        "mean_rank": f"effective rank of a group's component ({true_ranks.mean():.3g})",
    }
    return Score(metrics, labels, panels(matching, true_ranks))


def panels(matching: Matching, true_ranks: Int[np.ndarray, " G"]) -> dict[str, Panel]:
    """Norm of every component's part in every group, and ranks of component and W_g by group."""
    order = matching.order
    return {
        "groups": Panel(
            title="Which component holds which group",
            caption="Norm of every component's part in the rows of each group, over the norm of "
            "the target's rows. Good: one bright diagonal, a single component for each group, and "
            "the components left over dark throughout.",
            xlabel="component (ordered by its group)",
            ylabel="group",
            matrix=matching.ratios[order].T,
            unit="norm of the component's part / norm in the target",
            columns=[str(c) for c in order],
        ),
        "ranks": Panel(
            title="Rank of every group's component",
            caption="Effective rank of the matched component beside the rank of the target's rows "
            "of the group. Good: the same. A lower one holds only a part of the group, a higher "
            "one something else too.",
            xlabel="group",
            ylabel="effective rank",
            x=np.arange(len(true_ranks)),
            lines={"component": matching.rank, "target's rows": true_ranks},
        ),
    }


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient, 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def build(config: Config, batch_size: int) -> Target:
    """The co-active TMS target of `config` (fields: configs/tms_coactive.py).

    Raises:
      InputError: a size below 1, or a probability outside (0, 1].
    """
    G, S, H = config.num_groups, config.group_size, config.d_hidden
    probability = config.group_probability
    at_least_one(num_groups=G, group_size=S, d_hidden=H)
    model = TMS(G * S, H)

    def apply_fn(params: PyTree, x: Array):
        out, products = model.apply({"params": params}, x)
        # Not linear2: before the ReLU, the outputs of other groups need the rows of those groups.
        return out, {"linear1": products["linear1"]}

    def num_active(x: Array):
        return jnp.sum(jnp.any(x.reshape(-1, G, S) != 0, axis=2), axis=1, dtype=jnp.int32)

    return Target(
        name="tms_coactive",
        init_fn=lambda key: model.init(key, jnp.zeros((1, G * S)))["params"],
        apply_fn=apply_fn,
        attribution_fn=contracted,
        loss_fn=lambda params, x: jnp.mean((apply_fn(params, x)[0] - x) ** 2),
        sample_fn=group_sampler(batch_size, G, S, probability),
        pretrain_sample_fn=group_sampler(config.pretrain.batch_size, G, S, probability),
        num_active_fn=num_active,
        select=("W",),
        uses={"W": 2},
        score_fn=lambda decomposition, key, alive: score(decomposition, G),
        layers=layers(),
    )
