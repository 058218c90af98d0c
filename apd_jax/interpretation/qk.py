r"""What attention makes of pairs of components: static tables by relative position.

A rank-one piece of the queries' matrix reads v_q and writes u_q, one of the keys' v_k and u_k (v
the column of U, u the row of V, cut to a head). Of inputs that have the length 1 along v_q and v_k,
τ positions apart, the pair adds to the head's attention score

  S(τ) = ‖v_q‖ u_qᵀ R_τ u_k ‖v_k‖ / √d          R_τ the rotary embedding by τ = t_q - t_k     (VPD)

so that Σ of a_q a_k S / (‖v_q‖ ‖v_k‖) over all pairs, a = x·v, is the score but for biases and what
the components' sum misses. Signs are kept; turning the sign of both v and u of one piece turns that
of its row. Learned positions are part of the inputs, and tables are then the same for every τ.
Where a model normalises queries and keys, the learned scale is in S, the division by their RMS is
not.

The partners of a component are at the other end of its pairs with the highest peaks, max |S(τ)|
over heads and distances. A peak says neither how often both are on, nor how large a_q and a_k are.

Shapes: H heads of width d, K of them for keys; n, m pieces of rank one; T distances; C components.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import wadler_lindig as wl
from jaxtyping import Array, Bool, Float, Int, PyTree

from apd_jax import components as components_lib
from apd_jax.components import Components
from apd_jax.errors import InputError
from apd_jax.language.decoder import DecoderConfig, rotate

_BLOCK = 128  # pieces, or pairs of them, at once: one program for all layers


@dataclasses.dataclass(frozen=True)
class Table:
    """values: [H, queries, keys, distances], in units of attention scores, before the softmax.

    queries, keys: the component of every row and column; more than one of higher rank.
    """

    queries: Int[np.ndarray, " q"]
    keys: Int[np.ndarray, " k"]
    values: Float[np.ndarray, "H q k T"]

    def __repr__(self) -> str:
        return wl.pformat(self)


def table(
    components: Components,
    params: PyTree,
    config: DecoderConfig,
    layer: int,
    *,
    distances: int = 16,
    queries: Sequence[int] | None = None,
    keys: Sequence[int] | None = None,
) -> Table:
    """S(τ) of the attention of one layer, for τ = 0 to distances - 1.

    Args:
      components, params: of a model with this config, e.g. `decomposition.problem.params`.
      queries, keys: the components to look at; None: all that the matrices have.
    Raises:
      InputError: no such layer, its queries or keys are not decomposed, no distance, or a component
        that does not exist.
    Cost: H·d·q·k·distances multiply-adds; H·q·k·distances numbers.
    """
    if not 0 <= layer < config.num_layers:
        raise InputError(
            f"layer {layer} does not exist; there are {config.num_layers}, counted from 0."
        )
    if distances < 1:
        raise InputError(f"distances must be at least 1, for τ = 0; got {distances}.")
    of_q, q = _side(components, params, config, "q", layer, queries)
    of_k, k = _side(components, params, config, "k", layer, keys)
    return Table(of_q, of_k, np.asarray(_scores(q, k, _Turns.of(config, distances))))


@dataclasses.dataclass(frozen=True)
class Partners:
    """The few partners of every component, the strongest first.

    component: [C, P], -1: no more. layer, head: where the pair has its peak. values: S(τ) there, of
    the two pieces that have it where components have several.
    """

    component: Int[np.ndarray, "C P"]
    layer: Int[np.ndarray, "C P"]
    head: Int[np.ndarray, "C P"]
    values: Float[np.ndarray, "C P T"]

    def __repr__(self) -> str:
        return wl.pformat(self)


def partners(
    components: Components,
    params: PyTree,
    config: DecoderConfig,
    on: Bool[np.ndarray, " C"],
    *,
    distances: int = 16,
    most: int = 5,
) -> tuple[Partners, Partners] | None:
    """(the keys that every query goes with, the queries that every key goes with).

    Args:
      components, params: of a model with this config, e.g. `decomposition.problem.params`.
      on: which components are looked at, e.g. `firing_rate > 0` of a harvest.
    Returns: None where no layer has pieces of such components in its queries and in its keys.
    Cost: per layer H·d·n·m·T multiply-adds and n·m numbers, for n pieces of queries and m of keys.
    """
    turns, found = _Turns.of(config, min(distances, config.context)), []
    for layer in range(config.num_layers):
        if all(_site(config, role, layer) in components.factors for role in ("q", "k")):
            q, k = (_side(components, params, config, role, layer, on) for role in ("q", "k"))
            if len(q[0]) and len(k[0]):
                found.append(_strongest(q, k, turns, most, layer))
    if not found:
        return None
    pairs = _Pairs(*map(np.concatenate, zip(*found, strict=True)))
    C = components.num_components
    return _ranked(pairs, C, most), _ranked(
        pairs._replace(own=pairs.other, other=pairs.own), C, most
    )


class _Turns(NamedTuple):
    """How queries are turned, for τ = 0 to distances - 1."""

    distances: int
    rotary: int
    base: float
    pairs: str

    @staticmethod
    def of(config: DecoderConfig, distances: int) -> _Turns:
        return _Turns(distances, config.rotary, config.rope_base, config.rope_pairs)


class _Pairs(NamedTuple):
    """Pairs of components and where they have their peak, [pairs]; S(τ) there, [pairs, T]."""

    own: np.ndarray
    other: np.ndarray
    layer: np.ndarray
    head: np.ndarray
    values: np.ndarray


_Side = tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n H d"]]


def _strongest(queries: _Side, keys: _Side, turns: _Turns, most: int, layer: int) -> _Pairs:
    """Pairs whose peak is among the `most` highest of the query, or of the key."""
    (of_q, q), (of_k, k) = queries, keys
    peaks = np.concatenate(
        [
            np.concatenate([np.asarray(_peaks(a, b, turns)) for b in _blocks(k)], axis=1)
            for a in _blocks(q)
        ]
    )[: len(q), : len(k)]
    numbers, places = zip(*(np.unique(of, return_inverse=True) for of in (of_q, of_k)), strict=True)
    joined, pieces = np.zeros(list(map(len, numbers)), np.float32), np.ix_(*places)
    np.maximum.at(joined, pieces, peaks)  # of components
    rows, columns = np.nonzero(_highest(joined, most)[pieces] & (peaks == joined[pieces]))
    _, first = np.unique(np.stack([of_q[rows], of_k[columns]]), axis=1, return_index=True)
    rows, columns = rows[first], columns[first]
    curves = zip(_blocks(q[rows]), _blocks(k[columns]), strict=True)
    head, values = (
        np.concatenate(parts)[: len(rows)]
        for parts in zip(*(_curves(a, b, turns) for a, b in curves), strict=True)
    )
    return _Pairs(of_q[rows], of_k[columns], np.full(len(rows), layer), head, values)


def _highest(peaks: Float[np.ndarray, "n m"], most: int) -> Bool[np.ndarray, "n m"]:
    """Which are among the `most` highest of their row, or of their column."""
    found = np.zeros(peaks.shape, bool)
    for axis, length in ((1, peaks.shape[1]), (0, peaks.shape[0])):
        count = min(most, length)
        top = np.argpartition(-peaks, count - 1, axis=axis).take(range(count), axis=axis)
        np.put_along_axis(found, top, True, axis=axis)
    return found


def _ranked(pairs: _Pairs, num_components: int, most: int) -> Partners:
    """The `most` partners with the highest peaks of each that is `own`; none whose S is 0."""
    peak = np.abs(pairs.values).max(axis=1)
    order = np.lexsort((-peak, pairs.own))
    order = order[peak[order] > 0]
    own = pairs.own[order]
    place = np.arange(len(own)) - np.searchsorted(own, own)
    kept = place < most
    at = (own[kept], place[kept])

    def table(values: np.ndarray, empty: int) -> Any:
        filled = np.full((num_components, most, *values.shape[1:]), empty, values.dtype)
        filled[at] = values[order[kept]]
        return filled

    return Partners(
        component=table(pairs.other, -1),
        layer=table(pairs.layer, 0),
        head=table(pairs.head, 0),
        values=table(pairs.values, 0),
    )


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    """A few rows at a time, the last ones filled up with zeros."""
    for first in range(0, len(rows), _BLOCK):
        part = rows[first : first + _BLOCK]
        yield np.pad(part, [(0, _BLOCK - len(part)), *[(0, 0)] * (rows.ndim - 1)])


@functools.partial(jax.jit, static_argnames="turns")
def _scores(q: Array, k: Array, turns: _Turns) -> Float[Array, "H n m T"]:
    return jnp.einsum("nthd,mhd->hnmt", _turned(q, turns), k)


@functools.partial(jax.jit, static_argnames="turns")
def _peaks(q: Array, k: Array, turns: _Turns) -> Float[Array, "n m"]:
    return jnp.max(jnp.abs(_scores(q, k, turns)), axis=(0, 3))


@functools.partial(jax.jit, static_argnames="turns")
def _curves(q: Array, k: Array, turns: _Turns) -> tuple[Int[Array, " n"], Float[Array, "n T"]]:
    """Of pairs row by row the head that has the peak, and S(τ) there."""
    values = jnp.einsum("nthd,nhd->nht", _turned(q, turns), k)
    head = jnp.argmax(jnp.max(jnp.abs(values), axis=2), axis=1)
    return head, jnp.take_along_axis(values, head[:, None, None], axis=1)[:, 0]


def _turned(q: Float[Array, "n H d"], turns: _Turns) -> Float[Array, "n T H d"]:
    q = jnp.broadcast_to(q[:, None], (len(q), turns.distances, *q.shape[1:]))
    return rotate(q, turns.rotary, turns.base, turns.pairs) if turns.rotary else q


def _site(config: DecoderConfig, role: str, layer: int) -> str:
    return config.name(role if config.qkv == "apart" else "qkv", layer)


def _side(
    components: Components,
    params: PyTree,
    config: DecoderConfig,
    role: str,
    layer: int,
    chosen: Any,
) -> _Side:
    """The components of a matrix's rank-one parts, and ‖v‖ u of each, by head of the queries.

    So scaled that products of queries and keys are scores. chosen: None for all components.
    """
    of, written = _written(components, config, role, layer, chosen)
    if config.qk_norm:
        written = written * np.asarray(params[config.name(f"norm_{role}", layer)])
    if role == "q":
        return of, written / math.sqrt(config.d_head)
    return of, np.repeat(written, config.num_heads // config.num_kv_heads, axis=1)


def _written(
    components: Components, config: DecoderConfig, role: str, layer: int, chosen: Any
) -> _Side:
    """The same as they are, by head of the matrix."""
    name = _site(config, role, layer)
    if name not in components.factors:
        raise InputError(
            f"{name!r} is not decomposed, so its pieces make no attention; choose a layer whose "
            f"queries and keys are among {', '.join(components.factors)}."
        )
    f = components.factors[name]
    own = np.arange(f.num_pieces) if f.ids is None else np.asarray(f.ids)
    on = np.ones(len(own), bool)
    if chosen is not None:
        on = components_lib.chosen(components, chosen)[own]
    U, V = np.asarray(f.U)[on], np.asarray(f.V)[on]
    lengths = np.linalg.norm(U, axis=-2)  # [n, m]
    written = (V * lengths[..., None]).reshape(-1, V.shape[-1])
    H, K, d = config.num_heads, config.num_kv_heads, config.d_head
    if config.qkv == "per_head":
        cut = written.reshape(-1, H, 3, d)[:, :, "qk".index(role)]
    else:
        first = H * d if role == "k" and config.qkv == "packed" else 0
        heads = H if role == "q" else K
        cut = written[:, first : first + heads * d].reshape(-1, heads, d)
    return np.repeat(own[on], f.rank), cut
