r"""What components do to the next token: logits with a component, less those without it.

  effect_{c,v} = mean_k [ z_v(θ*, x_k) - z_v(θ* - P_c, x_k) ],  z = logits - their mean over V

at the centres of the component's strongest windows x_k: what `decomposition.edit({c: 0})` takes
away there. Any network with logits [B, T, V] will do; what later layers make of the component is
in it. The text before a window is not.

Shapes: C components, V tokens, K windows of W tokens, n tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import wadler_lindig as wl
from etils import epath
from jaxtyping import Array, Float, Int, PyTree

from apd_jax import components as components_lib
from apd_jax.components import Components, Factors
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.interpretation import columns
from apd_jax.interpretation.harvest import Harvest
from apd_jax.network.outputs import outputs
from apd_jax.paths import user_path
from apd_jax.train.progress import ProgressDisplay

FILE = "effects.parquet"
_AT_ONCE = 16  # components in a call


@dataclasses.dataclass(frozen=True)
class Effects:
    """The n tokens that every component pushes up and down the most, in logits, strongest first.

    -1 and 0 for components that are never on.
    """

    up_token: Int[np.ndarray, "C n"]
    up: Float[np.ndarray, "C n"]
    down_token: Int[np.ndarray, "C n"]
    down: Float[np.ndarray, "C n"]

    def __repr__(self) -> str:
        return wl.pformat(self)


def effects(
    decomposition: Decomposition, found: Harvest, *, num_contexts: int = 8, num_tokens: int = 10
) -> Effects:
    """Measures them on the first `num_contexts` of the top windows.

    Raises:
      InputError: the harvest is of another decomposition.
    Cost: 2 forward passes of num_contexts windows for every component that is ever on.
    Memory: one more copy of params, and the logits [num_contexts, W, V].
    """
    found.must_be_of(decomposition)
    d, C, n = decomposition, found.num_components, min(num_tokens, found.vocab_size)
    tokens, places, weights = _aligned(found.top_tokens[:, :num_contexts])
    alive = np.flatnonzero(weights.any(1))
    made = Effects(*(np.full((C, n), fill, t) for fill, t in 2 * ((-1, np.int32), (0, np.float32))))
    rows = {name: jnp.asarray(_pieces(f, C)) for name, f in d.components.factors.items()}
    measure = jax.jit(functools.partial(_measure, d.problem.apply_fn, n))
    with ProgressDisplay("effects", len(alive)) as display:
        for first in range(0, len(alive), _AT_ONCE):
            here = alive[first : first + _AT_ONCE]
            padded = np.resize(here, _AT_ONCE)  # one program for all
            given = tokens[padded], places[padded], weights[padded]
            values = measure(d.problem.params, d.components, rows, padded, *given)
            for field, value in zip(dataclasses.fields(Effects), values, strict=True):
                getattr(made, field.name)[here] = jax.device_get(value)[: len(here)]
            display.update(first + len(here), {})
    return made


def _aligned(
    windows: Int[np.ndarray, "C K W"],
) -> tuple[Int[np.ndarray, "C K T"], Int[np.ndarray, "C K"], Float[np.ndarray, "C K"]]:
    """Windows that begin with their first token, where their centres are then, and mean weights."""
    there = windows >= 0
    order = np.argsort(~there, axis=-1, kind="stable")
    longest = max(int(there.sum(-1).max(initial=1)), 1)
    tokens = np.take_along_axis(windows, order, axis=-1)[..., :longest]
    half = windows.shape[-1] // 2
    places = there[..., :half].sum(-1)
    full = there[..., half].astype(np.float32)
    return tokens, places, full / np.maximum(full.sum(1, keepdims=True), 1)


def _pieces(f: Factors, C: int) -> Int[np.ndarray, "C most"]:
    """The numbers of every component's pieces at a site; -1: no more."""
    ids = np.arange(C) if f.ids is None else np.asarray(f.ids)
    found = np.full((C, max(np.bincount(ids, minlength=C).max(initial=1), 1)), -1, np.int32)
    used = np.zeros(C, int)
    for piece, c in enumerate(ids):
        found[c, used[c]] = piece
        used[c] += 1
    return found


def _measure(
    apply_fn: Callable,
    n: int,
    params: PyTree,
    components: Components,
    rows: Mapping[str, Array],
    numbers: Array,
    tokens: Int[Array, "N K T"],
    places: Int[Array, "N K"],
    weights: Float[Array, "N K"],
) -> tuple[Array, ...]:
    """(tokens, effects) of the n largest, then of the n smallest, [N, n] each."""
    leaves = components_lib.decomposed_leaves(components, params)

    def logits(params: PyTree, tokens: Array, places: Array) -> Float[Array, "K V"]:
        z = outputs(apply_fn(params, tokens))
        z = jnp.take_along_axis(z, places[:, None, None], axis=1)[:, 0].astype(jnp.float32)
        return z - jnp.mean(z, axis=-1, keepdims=True)

    def one(given: tuple[Array, ...]) -> Float[Array, " V"]:
        c, tokens, places, weights = given
        less = {}
        for name, f in components.factors.items():
            pieces = rows[name][c]
            here = (pieces >= 0).reshape(-1, *[1] * (f.U.ndim - 1))
            part = dataclasses.replace(f, U=f.U[pieces] * here, V=f.V[pieces]).weights.sum(0)
            less[name] = (leaves[name] - part).astype(leaves[name].dtype)
        without = components_lib.replace_leaves(params, less)
        change = logits(params, tokens, places) - logits(without, tokens, places)
        return weights @ change

    change = jax.lax.map(one, (numbers, tokens, places, weights))
    up, up_token = jax.lax.top_k(change, n)
    down, down_token = jax.lax.top_k(-change, n)
    return up_token, up, down_token, -down


def save(made: Effects, found: Harvest, folder: epath.PathLike) -> None:
    """Writes effects.parquet beside the files of the harvest."""
    table = {"component": np.arange(found.num_components, dtype=np.int32)} | vars(made)
    columns.write(user_path(folder) / FILE, columns.encode(table, _about(found)))


def load(folder: epath.PathLike, found: Harvest) -> Effects:
    """What `save` has written.

    Raises:
      InputError: it is missing, torn, or of another harvest.
    """
    table = columns.decode(user_path(folder) / FILE, _about(found))
    names = [field.name for field in dataclasses.fields(Effects)]
    if missing := [name for name in names if name not in table]:
        raise InputError(f"{user_path(folder) / FILE} lacks {missing[0]}; harvest again.")
    return Effects(**{name: table[name] for name in names})


def _about(found: Harvest) -> dict[str, Any]:
    counted = json.loads(found.settings) if found.settings else None
    return {"of": found.fingerprint, "num_tokens": found.num_tokens, "settings": counted}
