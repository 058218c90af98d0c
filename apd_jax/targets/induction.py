"""Induction: an attention-only transformer that continues a repeated block of random tokens.

  x = E[tokens]
  x += O_l concat_heads( softmax(Q_l x · K_l x / sqrt(d)) V_l x )   for the layers l = 0, 1
  logits = x W_U                                                    (Olsson et al. 2022)

Shapes: B sequences, T positions, V symbols, D the residual width, H heads of width d,
C components. Every sequence begins with token V; symbols are 0..V-1.

Positions enter by rotary embeddings, so what a head writes does not contain its position. With an
absolute embedding, training finds a pointer ("at which position was this token?", then "which
token is one further?") as often as a previous-token head.

Data. A sequence is a random order of distinct symbols. With `repeat_probability`, its first n
symbols are repeated to the end, n uniform in [min_block, max_block]. Otherwise no symbol comes
twice. A position is *determined* if its token came before: the next token is then certain, and
only the earlier occurrence tells which it is. Elsewhere the label is the uniform distribution.
n varies because a fixed n could be solved by attending a fixed distance back.

Expected result. Sequences without repetition need no head. Those with repetition always need both
heads, the previous-token head (layer 0) and the induction head (layer 1). With a mask per example
the two heads are therefore one mechanism, and one component spans both layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from apd_jax import components as components_lib
from apd_jax.components import Components
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.targets.base import Config, Score, Target, at_least_one
from apd_jax.targets.induction_panels import attention_panels, component_panels
from apd_jax.targets.scoring import CORRELATION_LABELS, accuracy_labels, rank_correlations

NUM_LAYERS = 2
# A component is in a layer if that layer holds more than this share of its norm.
IN_LAYER = 0.1
# A component serves one step if more than this share of its two firing rates, in first blocks and
# at determined positions, falls on one of the two.
ONE_STEP = 0.9
# A measure needs a component if ablating it lowers the measure by more than this share.
NEEDED = 0.1
MEASURED = ("accuracy", "previous_token_score", "induction_score")
LABELS = {
    **accuracy_labels("accuracy, where the next token is determined,"),
    "sparse_previous_token_score": (
        "attention of the previous-token head with that mask; the target's"
    ),
    "target_previous_token_score": "attention of the previous-token head of the target",
    "sparse_induction_score": "attention of the induction head with that mask; the target's",
    "target_induction_score": "attention of the induction head of the target",
    "num_accuracy_components": "components that cost over 10 % of the accuracy; 1 or 2",
    "num_previous_token_components": (
        "components that cost over 10 % of the previous-token score; 1"
    ),
    "num_induction_components": "components that cost over 10 % of the induction score; 1",
    "components_of_one_step": (
        "share of components kept only in first blocks or only where the token came before; "
        "1 (per position)"
    ),
    "spans_layers": "share of alive components in both layers",
    **CORRELATION_LABELS,
}


class InductionTransformer(nn.Module):
    """Returns logits [B, T, V] and attention_l [B, H, T, T] of both layers.

    Entry (t, s) of the last two axes is how much position t attends to position s.
    """

    num_symbols: int
    d_model: int
    num_heads: int
    d_head: int

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T V"], dict[str, Float[Array, "B H T T"]]]:
        project = functools.partial(nn.DenseGeneral, (self.num_heads, self.d_head), use_bias=False)
        causal = jnp.tril(jnp.ones((1, 1, tokens.shape[1], tokens.shape[1]), jnp.bool_))
        normal = nn.initializers.normal(1.0)
        embed = nn.Embed(self.num_symbols + 1, self.d_model, embedding_init=normal, name="embed")
        x = embed(tokens)
        attention = {}
        for i in range(NUM_LAYERS):
            Q, K, V = (project(name=f"{kind}_{i}")(x) for kind in ("query", "key", "value"))
            scores = jnp.einsum("bthd,bshd->bhts", rotate(Q), rotate(K)) / math.sqrt(self.d_head)
            attention[f"attention_{i}"] = nn.softmax(jnp.where(causal, scores, -1e9))
            mixed = jnp.einsum("bhts,bshd->bthd", attention[f"attention_{i}"], V)
            output = nn.DenseGeneral(
                self.d_model, axis=(-2, -1), use_bias=False, name=f"output_{i}"
            )
            x += output(mixed)
        return nn.Dense(self.num_symbols, use_bias=False, name="unembed")(x), attention


def rotate(x: Float[Array, "B T H d"]) -> Float[Array, "B T H d"]:
    """Rotary embedding: pair j of the d entries is turned by t·10000^(-2j/d) at position t."""
    rates = 10_000.0 ** (-jnp.arange(0, x.shape[-1], 2) / x.shape[-1])
    angles = (jnp.arange(x.shape[1])[:, None] * rates[None])[None, :, None]
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def sample(
    key: PRNGKeyArray,
    batch_size: int,
    num_symbols: int,
    min_block: int,
    max_block: int,
    repeat_probability: float,
) -> Int[Array, "B T"]:
    """Sequences of 1 + 2·max_block tokens, as the module's docstring describes them."""
    key_order, key_length, key_kind = jax.random.split(key, 3)
    order = jnp.argsort(jax.random.uniform(key_order, (batch_size, num_symbols)), axis=1)
    length = jax.random.randint(key_length, (batch_size, 1), min_block, max_block + 1)
    repeated = jax.random.uniform(key_kind, (batch_size, 1)) < repeat_probability
    place = jnp.arange(2 * max_block)[None]
    symbols = jnp.take_along_axis(order, jnp.where(repeated, place % length, place), axis=1)
    start = jnp.full((batch_size, 1), num_symbols)
    return jnp.concatenate([start, symbols], axis=1).astype(jnp.int32)


def follows_same(tokens: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """True at (t, s), s <= t, where the token at s - 1 equals the token at t.

    Position s is what an induction head at t attends to: its token is the answer.
    """
    T = tokens.shape[1]
    same = jnp.pad(tokens[:, :, None] == tokens[:, None, :-1], ((0, 0), (0, 0), (1, 0)))
    return same & jnp.tril(jnp.ones((1, T, T), jnp.bool_))


def determined(tokens: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Positions whose token came before: from there the next one is known."""
    return jnp.any(follows_same(tokens), axis=2)


def cross_entropy(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"]) -> Float[Array, ""]:
    """Mean over all positions but the last.

    The label is the next token at determined positions, the uniform distribution elsewhere.
    """
    labels = jax.nn.one_hot(tokens[:, 1:], logits.shape[-1])
    labels = jnp.where(determined(tokens)[:, :-1, None], labels, 1 / logits.shape[-1])
    return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits[:, :-1]), axis=-1))


def accuracy(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"]) -> Float[Array, ""]:
    """Share of determined positions whose next token has the largest logit."""
    known = determined(tokens)[:, :-1]
    return jnp.sum(known & (jnp.argmax(logits[:, :-1], axis=-1) == tokens[:, 1:])) / jnp.sum(known)


def previous_token_scores(
    attention: Float[Array, "B H T T"], tokens: Int[Array, "B T"]
) -> Float[Array, " H"]:
    """Mean attention from t to t-1 in the first block of sequences that repeat.

    Only there does the induction head need it.
    """
    known = determined(tokens)
    needed = (~known & jnp.any(known, axis=1, keepdims=True))[:, 2:]
    to_previous = jnp.diagonal(attention[:, :, 2:, 1:-1], axis1=2, axis2=3)
    return jnp.sum(to_previous * needed[:, None], axis=(0, 2)) / jnp.sum(needed)


def induction_scores(
    attention: Float[Array, "B H T T"], tokens: Int[Array, "B T"]
) -> Float[Array, " H"]:
    """Mean attention from determined positions t to the token that followed the last time.

    With a block of n tokens that is position t - n + 1.
    """
    found = jnp.sum(attention * follows_same(tokens)[:, None], axis=(0, 2, 3))
    return found / jnp.sum(determined(tokens))


def kept_by_kind(
    mask: Bool[Array, "B *T C"], tokens: Int[Array, "B T"]
) -> Float[np.ndarray, "3 C"]:
    """How often a component is kept, for three kinds of position.

    In the first block of a sequence that repeats, at determined positions, and elsewhere.
    """
    known = np.asarray(determined(tokens))
    first = ~known & known.any(axis=1, keepdims=True)
    kinds = np.stack([first, known, ~known & ~first])
    C = mask.shape[-1]
    everywhere = np.broadcast_to(np.asarray(mask).reshape(len(tokens), -1, C), (*tokens.shape, C))
    kept = np.einsum("kbt,btc->kc", kinds.astype(float), everywhere)
    return kept / np.maximum(kinds.sum(axis=(1, 2))[:, None], 1)


def layer_shares(components: Components) -> Float[np.ndarray, "C 2"]:
    """Norm of every component's part in each layer, over the norm of the whole component.

    0 for a component that is 0.
    """
    squares = {
        name: np.asarray(square)
        for name, square in components_lib.squared_norms(components).items()
    }
    of_layer = [
        sum(square for name, square in squares.items() if f"_{i}." in name)
        for i in range(NUM_LAYERS)
    ]
    layers = np.stack(of_layer, axis=1)
    whole = np.maximum(layers.sum(axis=1, keepdims=True), np.finfo(layers.dtype).tiny)
    return np.sqrt(layers / whole)


@dataclasses.dataclass(frozen=True)
class Heads:
    """The heads to measure: in each layer the one that scores best in the target."""

    previous: int  # of layer 0
    induction: int  # of layer 1

    @classmethod
    def of(cls, attention: dict[str, Array], tokens: Int[Array, "B T"]) -> Heads:
        return cls(
            int(jnp.argmax(previous_token_scores(attention["attention_0"], tokens))),
            int(jnp.argmax(induction_scores(attention["attention_1"], tokens))),
        )

    def measure(self, result: tuple, tokens: Int[Array, "B T"]) -> Float[np.ndarray, " 3"]:
        """Accuracy, previous-token score and induction score, in the order of MEASURED."""
        logits, attention = result
        return np.array(
            [
                accuracy(logits, tokens),
                previous_token_scores(attention["attention_0"], tokens)[self.previous],
                induction_scores(attention["attention_1"], tokens)[self.induction],
            ]
        )


def score(
    decomposition: Decomposition,
    key: PRNGKeyArray,
    alive: Bool[np.ndarray, " C"],
    *,
    sample_fn: Callable,
) -> Score:
    """What every component does for the two heads, on one batch of `sample_fn`.

    Metrics:
      {target,sparse,all}_accuracy: on determined positions, of the target, with the mask of
        training, with all components.
      {target,sparse,all}_previous_token_score, _induction_score: of the head of layer 0 (of
        layer 1) that scores best in the target.
      num_{accuracy,previous_token,induction}_components: number of alive components whose ablation
        lowers the measure by more than NEEDED of it.
      components_of_one_step: share of alive components with more than ONE_STEP of their two rates,
        in first blocks and at determined positions, on one of the two.
      spans_layers: share of alive components with more than IN_LAYER of their norm in each layer.
      attribution_rank_correlation_{kind}: see `scoring.rank_correlations`.
    Cost: C + 3 forward passes, the gate, and attributions of every kind.
    """
    problem, components = decomposition.problem, decomposition.components
    tokens = sample_fn(key, 0)
    activity = decomposition.activity(tokens)
    target = problem.apply_fn(problem.params, tokens)
    sparse = decomposition.sparse_output(tokens, activity.active)
    heads = Heads.of(target[1], tokens)
    measured = {
        "target": heads.measure(target, tokens),
        "sparse": heads.measure(sparse, tokens),
        "all": heads.measure(decomposition.ablate([], tokens), tokens),
    }
    without = np.stack(
        [
            heads.measure(decomposition.ablate([c], tokens), tokens)
            for c in range(components.num_components)
        ]
    )
    lost = measured["all"] - without  # [C, 3]
    needed = (lost > NEEDED * measured["all"]) & alive[:, None]
    kept = kept_by_kind(activity.active & (activity.scores > 0), tokens)
    steps = kept[:2].max(axis=0) > ONE_STEP * kept[:2].sum(axis=0)
    spans = layer_shares(components).min(axis=1) > IN_LAYER
    metrics = {
        f"{who}_{what}": float(value)
        for who, values in measured.items()
        for what, value in zip(MEASURED, values, strict=True)
    }
    metrics |= {
        f"num_{what.removesuffix('_score')}_components": int(n)
        for what, n in zip(MEASURED, needed.sum(axis=0), strict=True)
    }
    metrics["components_of_one_step"] = float(steps[alive].mean()) if alive.any() else 0.0
    metrics["spans_layers"] = float(spans[alive].mean()) if alive.any() else 0.0
    metrics |= rank_correlations(decomposition, tokens, alive)
    repeating = int(jnp.argmax(jnp.any(determined(tokens), axis=1)))
    panels = attention_panels(target[1], sparse[1], heads, tokens, repeating)
    return Score(metrics, LABELS, panels | component_panels(lost, kept))


def build(config: Config, batch_size: int) -> Target:
    """The induction target of `config` (fields: configs/induction.py).

    Raises:
      InputError: a size below 1, an odd d_head, blocks that need more symbols than there are, or a
        probability outside (0, 1].
    """
    V, D, H, d = config.num_symbols, config.d_model, config.num_heads, config.d_head
    shortest, longest, probability = config.min_block, config.max_block, config.repeat_probability
    at_least_one(num_symbols=V, d_model=D, num_heads=H, d_head=d)
    if d % 2:
        raise InputError(
            f"target.d_head must be even, since rotary embeddings turn pairs; got {d}."
        )
    if not 2 <= shortest <= longest or 2 * longest > V:
        raise InputError(
            "target blocks need 2 <= min_block <= max_block <= num_symbols / 2, so that sequences "
            f"without repetition have distinct symbols; got {shortest}, {longest} and {V} symbols."
        )
    if not 0 < probability <= 1:
        raise InputError(f"target.repeat_probability must lie in (0, 1]; got {probability}.")
    model = InductionTransformer(V, D, H, d)

    def apply_fn(params: PyTree, tokens: Array):
        return model.apply({"params": params}, tokens)

    def sampler(batch_size: int) -> Callable[..., Int[Array, "B T"]]:
        at_least_one(batch_size=batch_size)
        return lambda rng, step: sample(
            jax.random.fold_in(rng, step), batch_size, V, shortest, longest, probability
        )

    return Target(
        name="induction",
        init_fn=lambda key: model.init(key, jnp.zeros((1, 1 + 2 * longest), jnp.int32))["params"],
        apply_fn=apply_fn,
        loss_fn=lambda params, tokens: cross_entropy(apply_fn(params, tokens)[0], tokens),
        sample_fn=sampler(batch_size),
        pretrain_sample_fn=sampler(config.pretrain.batch_size),
        select=("query_*", "key_*", "value_*", "output_*"),
        score_fn=functools.partial(score, sample_fn=sampler(batch_size)),
    )
