"""From causal importances to the weights of a pass: m = g + (1 - g) r.

The sources r in [0, 1] say how much of a component is left where it is not needed: 0 drops it, a
random draw ablates it in part, an adversary chooses the worst. Δ_l = θ*_l - Σ_c P_{c,l} may take
part as one more component at every site, whose mask is its own source.

Shapes: B examples, T positions, C components, L sites, n pieces at a site.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from apd_jax.components import Components
from apd_jax.forward.sparse import SiteWeights
from apd_jax.gates.base import Activity


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sources:
    """r of every component, and of Δ at every site (None: Δ takes no part, or is never ablated).

    An axis of size 1 is shared by all examples, or all positions.
    """

    components: Float[Array, "b *t C"]
    delta: Float[Array, "b *t L"] | None = None


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes that sources have in one pass; size is B over all devices, first this device's."""

    size: int
    positions: tuple[int, ...]  # (T,), or () where masks are per example
    num_components: int
    num_sites: int
    axis_name: str | None = None
    component_axis: str | None = None
    with_delta: bool = False


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Where the sources of a pass come from. This one drops: r = 0, also for Δ.

    A stateless ablation draws afresh in every pass. One with a state keeps it from step to step.
    An ablation that `ascends` is given the gradient of its pass's loss by the sources.
    """

    ascends = False

    def init(self, key: Array, shape: Shape) -> PyTree:
        """What is kept between steps; () for nothing."""
        return ()

    def draw(self, state: PyTree, keys: Array, shape: Shape) -> Sources | None:
        """The sources that a pass begins with; None drops. keys: one per example, [B]."""
        return None

    def ascend(
        self, state: PyTree, sources: Any, gradient: Callable[[Sources], Sources]
    ) -> tuple[PyTree, Any]:
        """State and sources after the ascents that come before the training pass."""
        return state, sources

    def finish(self, state: PyTree, sources: Any, gradient: Any) -> PyTree:
        """The state after the training pass, whose own gradient by the sources is known."""
        return state


def masked(
    values: Bool[Array, "B *T C"] | Float[Array, "B *T C"], r: Float[Array, "b *t C"] | None
) -> Bool[Array, "B *T C"] | Float[Array, "B *T C"]:
    """m = g + (1 - g) r. Without sources g itself, bool where it is."""
    if r is None:
        return values
    if values.dtype == jnp.bool_:
        return jnp.where(values, 1.0, jnp.broadcast_to(r, values.shape))
    return values + (1 - values) * r


def site_weights(
    components: Components,
    activity: Activity,
    sources: Sources | None,
    *,
    delta: str = "none",
    routed: Mapping[str, Bool[Array, "..."]] | None = None,
    only: Sequence[str] | None = None,
) -> dict[str, SiteWeights]:
    r"""What every site's weight is in a pass: κ_l = β_l θ*_l + Σ_c w_c P_{c,l}.

    delta = "none"    κ = Σ_c m_c P_c:                       w = m,         β = 0
    delta = "masked"  κ = Σ_c m_c P_c + r_Δ Δ:               w = m - r_Δ,   β = r_Δ
    delta = "on"      κ = Σ_c m_c P_c + Δ:                   w = m - 1,     β = 1

    since Σ_c m_c P_c + m_Δ (θ* - Σ_c P_c) = m_Δ θ* + Σ_c (m_c - m_Δ) P_c. Where `routed` is False
    the site keeps the target's weight: w = 0, β = 1. Sites not in `only` keep it throughout.
    """
    m = masked(activity.values, None if sources is None else sources.components)
    found = {}
    for i, (name, f) in enumerate(components.factors.items()):
        if only is not None and name not in only:
            continue
        w, target = f.take(m), None
        if delta != "none":
            target = jnp.ones(m.shape[:-1])
            if delta == "masked":
                r = None if sources is None else sources.delta
                left = jnp.zeros(()) if r is None else r[..., i]
                target = jnp.broadcast_to(left, m.shape[:-1])
            w = w.astype(jnp.float32) - target[..., None]
        if routed is not None:
            here = routed[name]
            w = jnp.where(here[..., None], w, 0.0)
            target = jnp.where(here, 0.0 if target is None else target, 1.0)
        found[name] = SiteWeights(w, target)
    return found
