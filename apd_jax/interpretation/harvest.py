r"""What every component does on text: how often, where, at which tokens, with which others.

  firing rate      n_c / N: the share of positions with g_c > threshold, of those that count
  top windows      around the K rows in which the gate's score is largest, at its place there
  random windows   around a uniform sample of the positions on which the component is on
  PMI              log( n_{c,v} N / (n_c n_v) ) in nats, v the token at, or after, a position
  co-activation    n_{c,d} / n_c: the share of c's firings in which d is on as well

Shapes: B sequences, T positions, C components, V tokens, K windows of W tokens, M tokens, N others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import wadler_lindig as wl
from etils import epath
from jaxtyping import Array, Float, Int, PyTree

from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.evaluation.language import counted
from apd_jax.interpretation import columns
from apd_jax.interpretation.state import UNFINISHED, State
from apd_jax.interpretation.token_counts import TokenCounts
from apd_jax.interpretation.windows import Kept, Windows, update
from apd_jax.language.tokens import PAD
from apd_jax.methods import observe
from apd_jax.methods.optimizers import Trained
from apd_jax.network.outputs import outputs
from apd_jax.network.problem import Problem
from apd_jax.paths import user_path
from apd_jax.train import fingerprint
from apd_jax.train.progress import ProgressDisplay

MOST_COUNTS = 2**23  # entries of each of the two tables of tokens
_NO_TEXT = "a harvest needs text, but there is no position whose next token is known; give more."


@dataclasses.dataclass(frozen=True)
class Harvest:
    """Windows are centred: their column W // 2 is the position that they are about.

    Of tokens and components -1 says that there are no more.
    fingerprint: whose harvest it is, see `fingerprint_of`.
    input_missed, next_missed: how many firings a count may miss; 0: counts are exact.
    """

    num_components: int
    num_tokens: int  # positions that count
    vocab_size: int
    threshold: float
    fingerprint: str
    firing_rate: Float[np.ndarray, " C"]
    mean_activity: Float[np.ndarray, " C"]  # of g, over all positions that count
    top_tokens: Int[np.ndarray, "C K W"]  # -1 outside of the row
    top_activity: Float[np.ndarray, "C K W"]
    random_tokens: Int[np.ndarray, "C K2 W"]
    random_activity: Float[np.ndarray, "C K2 W"]
    input_token: Int[np.ndarray, "C M"]
    input_pmi: Float[np.ndarray, "C M"]
    input_count: Int[np.ndarray, "C M"]
    input_missed: Int[np.ndarray, " C"]
    next_token: Int[np.ndarray, "C M"]
    next_pmi: Float[np.ndarray, "C M"]
    next_count: Int[np.ndarray, "C M"]
    next_missed: Int[np.ndarray, " C"]
    coactive: Int[np.ndarray, "C N"]
    coactive_share: Float[np.ndarray, "C N"]
    settings: str = ""  # what it was asked for, as JSON

    def __repr__(self) -> str:
        return wl.pformat(self)

    def is_of(self, decomposition: Decomposition) -> bool:
        """Whether it was made of this very decomposition."""
        return self.fingerprint == fingerprint_of(decomposition)

    def must_be_of(self, decomposition: Decomposition) -> None:
        """Raises InputError where it was made of another decomposition."""
        if not self.is_of(decomposition):
            raise InputError(
                f"this harvest of {self.num_components} components is of another decomposition; "
                "make one of this, by apd_jax.interpretation.harvest or --mode=harvest."
            )


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is kept of every component."""

    num_top: int = 16
    num_random: int = 8
    width: int = 41  # W, odd
    num_tokens: int = 12  # M
    num_others: int = 12
    min_count: int = 5  # of tokens with a PMI

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise InputError(f"{name} of a harvest must be at least 1; got {value}.")
        if self.width % 2 == 0:
            raise InputError(f"the width of windows must be odd; got {self.width}.")


def harvest(
    decomposition: Decomposition,
    batches: Iterable[Any],
    *,
    num_batches: int | None = None,
    folder: epath.PathLike | None = None,
    sizes: Sizes | None = None,
    threshold: float = 0.0,
    save_every: int = 50,
    seed: int = 0,
) -> Harvest:
    """Reads batches of tokens [B, T], all of one shape, one after the other.

    With a folder the result is saved there, and what was counted so far after every `save_every`
    batches: the same call goes on after a kill, and ends with the same bytes on the same machine.
    Batches are then drawn again from the first, so they must be the same; that is checked.

    Args:
      num_batches: how many to read at most; None: all.
      threshold: of g, above which a component counts as on.
      seed: of the random windows.
    Raises:
      InputError: nothing to count, one mask for a whole sequence, tokens that the network has no
        output for, or a folder that holds something else.
    Cost: per batch the gate, B·T·C² multiply-adds of co-activation, and a sort of the pairs (token,
      active component).
    Memory: 8·C·(K + K')·W bytes of windows, 4·C² of co-activation, up to 1 GB for the two tables
      of tokens, whatever the length of the text; and the batch's own activity, B·T·C floats. Tables
      hold S = min(V, 2^23 / C) tokens of every component: all of them, exactly, for C·V up to 8
      million; else those that make up more than 1/(S + 1) of its firings, see `token_counts`.
    """
    where, sizes = None if folder is None else user_path(folder), sizes or Sizes()
    settings = json.dumps([dataclasses.asdict(sizes), threshold, seed, num_batches])
    if where is not None:
        columns.package()  # or says at once that it is needed
        if (where / columns.ABOUT).exists():
            return _finished(where, decomposition, settings)
    stream = itertools.islice(batches, num_batches)
    if (first := next(stream, None)) is None:
        raise InputError(_NO_TEXT)
    run = _Run(decomposition, first, sizes, threshold, seed, settings)
    state = run.begun(where)
    total, begun, step = num_batches, state.step, -1
    display = ProgressDisplay("harvest", total, begun=begun) if total else contextlib.nullcontext()
    with display as shown:
        for step, batch in enumerate(itertools.chain([first], stream)):
            tokens = run.checked(batch)
            if step < begun:
                state.read(tokens, again=step)
                continue
            run.add(state, tokens)
            if shown is not None:
                alive = float((state.fired > 0).sum())
                shown.update(state.step, {"tokens": float(state.num_tokens), "on": alive})
            if where is not None and state.step % save_every == 0:
                state.write(where)
    if step + 1 < begun:
        raise InputError(f"{where} holds {begun} batches of a harvest, but only {step + 1} came.")
    found = run.result(state)
    if where is not None:
        save(found, where)
        (where / UNFINISHED).unlink(missing_ok=True)
    return found


def _finished(folder: epath.Path, decomposition: Decomposition, settings: str) -> Harvest:
    """The one that a folder holds, if it is what is asked for."""
    found = load(folder)
    if not found.is_of(decomposition) or found.settings != settings:
        raise InputError(
            f"{folder} holds a harvest of another decomposition, or one with other settings; "
            "remove it, or give another folder."
        )
    return found


def fingerprint_of(decomposition: Decomposition) -> str:
    """Tells decompositions apart: of the network's weights, the components and the gate."""
    d = decomposition
    sums = fingerprint.of_tree([d.problem.params, d.components.tree, d.gate])
    ids = {name: str(f.ids) for name, f in d.components.factors.items()}
    said = d.method.gate(d.gate, d.problem).says
    return hashlib.sha256(json.dumps([sums, ids, said], sort_keys=True).encode()).hexdigest()[:16]


class _Run:
    """One decomposition's harvest: what is jitted, once, with all weights as arguments."""

    def __init__(
        self,
        decomposition: Decomposition,
        first: Any,
        sizes: Sizes,
        threshold: float,
        seed: int,
        settings: str,
    ):
        if (count := decomposition.method.num_instances) > 1:
            raise InputError(f"this holds {count} decompositions; harvest one, .instance(0).")
        self.decomposition, self.sizes, self.threshold = decomposition, sizes, threshold
        self.key, self.vocab_size = jax.random.key(seed), 2**31
        self.vocab_size = self._vocab_size(self.checked(first))
        self.settings, self.fingerprint = settings, fingerprint_of(decomposition)
        step = functools.partial(_step, decomposition.method, decomposition.problem, threshold)
        self.step = jax.jit(step, donate_argnums=0)

    def checked(self, batch: Any) -> np.ndarray:
        """A batch as int32 [B, T].

        Raises:
          InputError: it holds no tokens, or some outside of the vocabulary.
        """
        tokens = np.asarray(batch)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise InputError(
                f"a harvest reads tokens, integers [B, T]; got {tokens.dtype} {tokens.shape}."
            )
        tokens = tokens.astype(np.int32)
        if tokens.max(initial=0) >= self.vocab_size:
            raise InputError(
                f"the text holds token {tokens.max()}, but the network's outputs are "
                f"{self.vocab_size} tokens; give its own tokens."
            )
        return tokens

    def _vocab_size(self, tokens: np.ndarray) -> int:
        """V, if the gate speaks of every position."""
        d = self.decomposition
        out, activity = jax.eval_shape(
            lambda trained, params, x: (
                outputs(d.problem.apply_fn(params, x)),
                observe.activity(d.method, d.problem, trained, params, x),
            ),
            d.trained,
            d.problem.params,
            jax.ShapeDtypeStruct(tokens.shape, jnp.int32),
        )
        if activity.values.ndim != 3 or out.ndim != 3:
            raise InputError(
                "a harvest asks at which positions components are on, but this decomposition has "
                'one mask for a whole sequence; decompose with mask_per="position" and a network '
                "with outputs [B, T, V]."
            )
        return out.shape[-1]

    def begun(self, folder: epath.Path | None) -> State:
        """The state to begin with: empty, or as the folder holds it.

        Raises:
          InputError: it is torn, or of something else.
        """
        s, C, V = self.sizes, self.decomposition.components.num_components, self.vocab_size
        kept = Kept.empty(C, s.num_top, s.num_random, s.width)
        slots = min(V, max(MOST_COUNTS // C, 1))
        tables = (TokenCounts.empty(C, V, slots), TokenCounts.empty(C, V, slots))
        state = State(
            self.fingerprint + self.settings, kept, *tables, np.zeros(C, np.int64), np.zeros(C)
        )
        if folder is not None:
            state.resume(folder)
        return state

    def add(self, state: State, tokens: np.ndarray) -> None:
        d, C = self.decomposition, self.decomposition.components.num_components
        key = jax.random.fold_in(self.key, state.step)
        state.kept, counts, on, summed = self.step(
            state.kept, d.trained, d.problem.params, jnp.asarray(tokens), key
        )
        counts, on, summed = jax.device_get((counts, on, summed))
        rows, places = np.nonzero(counts)
        here, after = tokens[rows, places], tokens[rows, places + 1]
        position, component = np.nonzero(on[rows, places])
        state.inputs.add(component, here[position], here)
        state.following.add(component, after[position], after)
        state.fired += np.bincount(component, minlength=C)
        state.summed += summed
        state.num_tokens += len(rows)
        state.read(tokens)
        state.step += 1

    def result(self, state: State) -> Harvest:
        if not state.num_tokens:
            raise InputError(_NO_TEXT)
        s, fired, total = self.sizes, state.fired, state.num_tokens
        tables = {"input": state.inputs, "next": state.following}
        found: dict[str, Any] = {}
        for name, table in tables.items():
            table.settle()
            largest = table.largest_pmi(fired, total, s.num_tokens, s.min_count)
            found |= dict(
                zip((f"{name}_token", f"{name}_pmi", f"{name}_count"), largest, strict=True)
            )
            found |= {f"{name}_missed": table.taken}
        kept = jax.device_get(state.kept)
        for name, windows in {"top": kept.top, "random": kept.random}.items():
            found |= dict(zip((f"{name}_tokens", f"{name}_activity"), _blank(windows), strict=True))
        coactive, share = _others(np.asarray(kept.together), fired, s.num_others)
        return Harvest(
            num_components=len(fired),
            num_tokens=total,
            vocab_size=self.vocab_size,
            threshold=self.threshold,
            fingerprint=self.fingerprint,
            settings=self.settings,
            firing_rate=(fired / total).astype(np.float32),
            mean_activity=(state.summed / total).astype(np.float32),
            coactive=coactive,
            coactive_share=share,
            **found,
        )


def _step(
    method: Any,
    problem: Problem,
    threshold: float,
    kept: Kept,
    trained: Trained,
    params: PyTree,
    tokens: Int[Array, "B T"],
    key: Array,
) -> tuple[Kept, Array, Array, Array]:
    """(what is kept, which positions count [B, T], what is on [B, T, C], Σ g [C])."""
    activity = observe.activity(method, problem, trained, params, tokens)
    counts = counted(problem, tokens)
    g = jnp.where(counts[..., None], activity.values.astype(jnp.float32), 0.0)
    on = (g > threshold) & counts[..., None]
    kept = update(kept, g, activity.scores.astype(jnp.float32), on, tokens, key)
    return kept, counts, on, jnp.sum(g, axis=(0, 1))


def _blank(windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and activity, without the windows that are none."""
    there = np.isfinite(windows.strength)[..., None]
    tokens, activity = np.asarray(windows.tokens), np.asarray(windows.activity)
    return np.where(there, tokens, PAD), np.where(there, activity, 0).astype(np.float32)


def _others(
    together: Int[np.ndarray, "C C"], fired: Int[np.ndarray, " C"], size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The components most often on together with each, and the shares of its firings."""
    C = len(fired)
    found, share = np.full((C, size), -1, np.int32), np.zeros((C, size), np.float32)
    for c in range(C):
        row = together[c].copy()
        row[c] = 0
        order = np.argsort(-row, kind="stable")[:size]
        order = order[row[order] > 0]
        found[c, : len(order)], share[c, : len(order)] = order, row[order] / max(fired[c], 1)
    return found, share


def save(found: Harvest, folder: epath.PathLike) -> None:
    """Writes components.parquet, contexts.parquet and harvest.json, the last one last."""
    columns.save(dataclasses.asdict(found), user_path(folder))


def load(folder: epath.PathLike) -> Harvest:
    """What `save` has written.

    Raises:
      InputError: there is none, or a file is torn or of another harvest.
    """
    where = user_path(folder)
    try:
        return Harvest(**columns.load(where))
    except TypeError as error:
        raise InputError(f"{where} holds a harvest of another version; make it anew.") from error
