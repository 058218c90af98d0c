"""Language models: a pretrained one from a path, or a small one that is trained on any text.

The network is `language.Decoder`; outputs are logits [B, T, V] of the next token. Every position
has components of its own, and only positions whose next token is in the same document count.
A small model is a Llama (RMS norms, rotary embeddings, gated MLPs, tied embeddings) with a
byte-level BPE of the text itself. Tokens and tokenizer are kept in the run's folder: an evaluation
needs no text.

The true decomposition is not known; `evaluation.language` says what components are worth on text
that was held out.

Shapes: B sequences, T positions, V tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from etils import epath
from jaxtyping import Array

from apd_jax import components as components_lib
from apd_jax.errors import InputError, one_of
from apd_jax.language import LanguageModel, Tokenizer, families, load, pretrained
from apd_jax.language import tokens as tokens_lib
from apd_jax.language.decoder import DecoderConfig
from apd_jax.language.tokens import Rows, Tokens, cross_entropy, documents, predicting
from apd_jax.targets.base import Config, Target, at_least_one

SITES = ("all", "attention", "mlp")
SAMPLE = Path(__file__).with_name("northanger_abbey.txt")  # chapters 1 to 15; public domain
_TEXT, _CHOSEN = "target/tokens", "target/chosen"  # in a run's folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageTarget(Target):
    """A target whose outputs are logits of the next token.

    rows: the text that components are found on. held_out: of the same kind, kept apart.
    """

    model: LanguageModel
    tokens: Tokens
    rows: Rows
    held_out: Rows


def build(config: Config, batch_size: int, folder: epath.Path | None = None) -> Target:
    """The language model of `config` (fields: configs/language.py).

    Args:
      folder: of the run, where an earlier one may have kept tokens and tokenizer; else they are
        made from the text.
    Raises:
      InputError: text, model or sizes that cannot be used.
    """
    at_least_one(context=config.context, batch_size=batch_size)
    one_of("target.sites", config.sites, SITES)
    model, tokens, chosen = _kept(config, folder) or _made(config)
    if config.context > model.config.context:
        raise InputError(
            f"target.context = {config.context}, but the model's is {model.config.context}."
        )
    layers = config.layers or range(model.config.num_layers)
    if bad := [i for i in layers if not 0 <= i < model.config.num_layers]:
        raise InputError(
            f"target.layers names layer {bad[0]}; there are {model.config.num_layers}, counted "
            "from 0."
        )
    T, apply_fn = config.context, model.apply_fn
    trained, loaded = tokens.rows(T), bool(config.model)
    select, shuffled = tuple(model.matrices(config.sites, layers)), config.shuffled
    if shuffled and not loaded:
        raise InputError("target.shuffled is for a model from a path, which prose is not.")
    held_out = (chosen or tokens).rows(T, held_out=True)
    sampler = trained.sampler(batch_size)

    def loss_fn(params: Any, x: Array) -> Array:
        return cross_entropy(apply_fn(params, x), x)

    return LanguageTarget(
        name="language",
        init_fn=_loader(model, select, shuffled) if loaded else _initialiser(model),
        apply_fn=apply_fn,
        loss_fn=None if loaded else loss_fn,
        pretrain_sample_fn=None if loaded else trained.sampler(config.pretrain.batch_size),
        sample_fn=sampler if chosen is None else chosen.rows(T).sampler(batch_size),
        elsewhere_fn=None if chosen is None else sampler,
        held_out_fn=held_out.sampler(min(batch_size, len(held_out))),
        valid_fn=predicting,
        keep_fn=functools.partial(_keep, tokens=tokens, chosen=chosen),
        select=select,
        model=model,
        tokens=tokens,
        rows=trained if chosen is None else chosen.rows(T),
        held_out=held_out,
    )


def _loader(
    model: LanguageModel, select: Sequence[str], shuffled: bool
) -> Callable[[Array], dict[str, Array]]:
    """The weights of the file; `shuffled`: with the entries of what is decomposed mixed up."""

    def params(key: Array) -> dict[str, Array]:
        chosen = {name: model.params[name] for name in select}
        return model.params | (components_lib.shuffled(key, chosen) if shuffled else {})

    return params


def _initialiser(model: LanguageModel) -> Callable[[Array], Any]:
    return lambda key: model.module.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


Parts = tuple[LanguageModel, Tokens, Tokens | None]  # the model, its text, and the chosen text


def _kept(config: Config, folder: epath.Path | None) -> Parts | None:
    """What an earlier call has kept; None if it has not come so far."""
    if folder is None or not (folder / _TEXT / "tokens.json").exists():
        return None
    model = _loaded(config) if config.model else None
    tokens = tokens_lib.read(folder / _TEXT, model and model.tokenizer)
    chosen = tokens_lib.read(folder / _CHOSEN, tokens.tokenizer) if config.chosen else None
    return model or _untrained(config, tokens.tokenizer), tokens, chosen


def _keep(folder: epath.Path, *, tokens: Tokens, chosen: Tokens | None) -> None:
    if (folder / _TEXT / "tokens.json").exists():
        return
    if chosen is not None:
        chosen.write(folder / _CHOSEN)
    tokens.write(folder / _TEXT)


def _made(config: Config) -> Parts:
    texts = list(documents(config.text or str(SAMPLE), config.document_chars))
    if config.model:
        model = _loaded(config)
        if model.tokenizer is None:
            raise InputError(f"the model {config.model} came without a tokenizer for the text.")
    else:
        model = _untrained(config, Tokenizer.train(texts, config.vocab_size))
    tokenizer = model.tokenizer
    assert tokenizer is not None
    share = {"held_out": config.held_out, "seed": config.seed}
    chosen = None
    if config.chosen:
        chosen = Tokens.of(documents(config.chosen, config.document_chars), tokenizer, **share)
    return model, Tokens.of(texts, tokenizer, **share), chosen


def _loaded(config: Config) -> LanguageModel:
    return _load(config.model, config.dtype, config.remat)


@functools.lru_cache(maxsize=1)  # a run builds its target several times
def _load(path: str, dtype: str, remat: bool) -> LanguageModel:
    return load(path, dtype=dtype, remat=remat)


def _untrained(config: Config, tokenizer: Tokenizer) -> LanguageModel:
    D, H = config.d_model, config.num_heads
    at_least_one(d_model=D, num_heads=H, num_layers=config.num_layers, d_mlp=config.d_mlp)
    if D % (2 * H):
        raise InputError(
            f"target.d_model = {D} must be a multiple of twice num_heads = {H}: rotary embeddings "
            "turn pairs."
        )
    decoder = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        d_model=D,
        num_layers=config.num_layers,
        num_heads=H,
        num_kv_heads=H,
        d_head=D // H,
        d_mlp=config.d_mlp,
        context=config.context,
        names=families.LLAMA,
        rotary=D // H,
    )
    one_of("target.dtype", config.dtype, pretrained.DTYPES)
    return LanguageModel({}, decoder, tokenizer, config.dtype, config.remat)
