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

Shapes: H heads of width d, K of them for keys; n pieces of rank one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from apd_jax import components as components_lib
from apd_jax.components import Components
from apd_jax.errors import InputError
from apd_jax.language.decoder import DecoderConfig, rotate


@dataclasses.dataclass(frozen=True)
class Table:
    """values: [H, queries, keys, distances], in units of attention scores, before the softmax.

    queries, keys: the component of every row and column; more than one of higher rank.
    """

    queries: Int[np.ndarray, " q"]
    keys: Int[np.ndarray, " k"]
    values: Float[np.ndarray, "H q k T"]


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
    of_q, q = _written(components, config, "q", layer, queries)
    of_k, k = _written(components, config, "k", layer, keys)
    if config.qk_norm:
        q = q * jnp.asarray(params[config.name("norm_q", layer)])[None, None]
        k = k * jnp.asarray(params[config.name("norm_k", layer)])[None, None]
    q = jnp.broadcast_to(q[:, None], (len(q), distances, *q.shape[1:]))
    if config.rotary:
        q = rotate(q, config.rotary, config.rope_base, config.rope_pairs)
    k = jnp.repeat(k, config.num_heads // config.num_kv_heads, axis=1)
    values = jnp.einsum("qthd,khd->hqkt", q, k) / math.sqrt(config.d_head)
    return Table(of_q, of_k, np.asarray(values))


def _written(
    components: Components,
    config: DecoderConfig,
    role: str,
    layer: int,
    chosen: Sequence[int] | None,
) -> tuple[Int[np.ndarray, " n"], Float[Array, "n H d"]]:
    """The components of a matrix's rank-one parts, and ‖v‖ u of each, by head."""
    name = config.name(role if config.qkv == "apart" else "qkv", layer)
    if name not in components.factors:
        raise InputError(
            f"{name!r} is not decomposed, so its pieces make no attention; choose a layer whose "
            f"queries and keys are among {', '.join(components.factors)}."
        )
    f = components.factors[name]
    own = np.arange(f.num_pieces) if f.ids is None else np.asarray(f.ids)
    on = np.ones(len(own), bool)
    if chosen is not None:
        on = components_lib.chosen(components, np.asarray(chosen, int))[own]
    lengths = jnp.linalg.norm(f.U[on], axis=-2)  # [n, m]
    written = (f.V[on] * lengths[..., None]).reshape(-1, f.V.shape[-1])
    H, K, d = config.num_heads, config.num_kv_heads, config.d_head
    if config.qkv == "per_head":
        cut = written.reshape(-1, H, 3, d)[:, :, "qk".index(role)]
    else:
        first = H * d if role == "k" and config.qkv == "packed" else 0
        heads = H if role == "q" else K
        cut = written[:, first : first + heads * d].reshape(-1, heads, d)
    return np.repeat(own[on], f.rank), cut
