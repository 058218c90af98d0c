"""The masks that evaluations ask about: that of training, and others that were not trained on.

Shapes: B examples, T positions, C components.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from apd_jax.ablations import masked
from apd_jax.components import Components
from apd_jax.gates import selection
from apd_jax.gates.base import Activity


def always_on(count: int, C: int) -> Bool[Array, "1 C"]:
    """The mask of none but the first `count` components."""
    return jnp.arange(C)[None, :] < count


def largest(
    scores: Float[Array, "B *T C"], k: Any, count: int = 0, *, each: bool = False, valid: Any = None
) -> Bool[Array, "B *T C"]:
    """The k largest scores over the batch (or of `each` input), beside `count` always on.

    These are not counted in k, which may be traced.
    """
    C = scores.shape[-1]
    rows, on = scores.reshape(-1, C), always_on(count, C)
    shown = jnp.where(on, -jnp.inf, rows) if count else rows
    flat = None if valid is None or scores.ndim == 2 else valid.reshape(-1)
    if each:
        mask = selection.topk(shown, k) | on
    else:
        mask = selection.batch_topk(shown, k, valid=flat) | on
    return (mask if flat is None else mask & flat[:, None]).reshape(scores.shape)


def stochastic(activity: Activity, key: PRNGKeyArray) -> Float[Array, "B *T C"]:
    """g + (1 - g) r with r ~ U(0, 1): what is not needed, ablated in part."""
    return masked(activity.values, jax.random.uniform(key, activity.values.shape))


def at_random(
    mask: Bool[Array, "B *T C"], components: Components, key: PRNGKeyArray
) -> Bool[Array, "B *T C"]:
    """At every position as many as in `mask`, others: a control for how few are on.

    As many of every site, where each has components of its own; else of all.
    """
    own = [np.unique(f.ids) for f in components.factors.values() if f.ids is not None]
    if len(own) < len(components.factors) or sum(map(len, own)) > components.num_components:
        own = [np.arange(components.num_components)]
    alike: dict[int, list[int]] = {}
    for i, numbers in enumerate(own):
        alike.setdefault(len(numbers), []).append(i)

    def drawn(site: tuple[Array, Array]) -> Array:
        i, here = site
        place = jax.random.uniform(jax.random.fold_in(key, i), here.shape).argsort().argsort()
        return place < here.sum(-1, keepdims=True)

    found = jnp.zeros_like(mask)
    for which in alike.values():  # in one loop: a program of many sorts takes long to compile
        numbers = np.stack([own[i] for i in which])
        here = jnp.moveaxis(mask[..., numbers], -2, 0)
        on = jax.lax.map(drawn, (jnp.asarray(which), here))
        found = found.at[..., numbers].set(jnp.moveaxis(on, 0, -2))
    return found


def of_others(
    mask: Bool[Array, "B *T C"], counts: Bool[Array, "..."], key: PRNGKeyArray
) -> Bool[Array, "B *T C"]:
    """Every position that counts has the mask of one that counts: a control for when they are on.

    counts: [B, T], or [B] where masks are per example.
    """
    rows, among = mask.reshape(-1, mask.shape[-1]), counts.reshape(-1)
    drawn = jnp.where(among, jax.random.uniform(key, among.shape), 2.0)
    drawn_at, at = jnp.argsort(drawn), jnp.argsort(~among, stable=True)  # those that count first
    return rows.at[at].set(rows[drawn_at]).reshape(mask.shape)
