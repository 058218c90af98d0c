"""`load`: a trained language model from a local path, as a function, its parameters, its tokenizer.

Families: GPT-2; Pythia (GPT-NeoX); Llama and SmolLM, Qwen2, Qwen3; as Hugging Face folders
(safetensors, whole or in shards), as GGUF (the Llama and Qwen ones) or as a glassllm archive.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from apd_jax.errors import InputError, one_of
from apd_jax.language import families, files, last_token, sampling
from apd_jax.language.decoder import Decoder, DecoderConfig, logits
from apd_jax.language.interventions import Intervention
from apd_jax.language.stepwise import Stepwise
from apd_jax.language.tokenizer import Tokenizer
from apd_jax.network.headed import Headed
from apd_jax.paths import user_path
from apd_jax.storage import arrays as arrays_lib

log = logging.getLogger(__name__)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A language model that can be decomposed: `apd_jax.decompose(m.apply_fn, m.params, tokens)`.

    params: {name in the file: array}, float32; their dotted paths are those names.
    dtype: of products and activations, "float32" or "bfloat16".
    remat: activations of a layer are computed again in the backward pass instead of kept.
    ignored: arrays of the file that no forward pass needs. source: its config, as it was.
    """

    params: dict[str, Array]
    config: DecoderConfig
    tokenizer: Tokenizer | None = None
    dtype: str = "float32"
    remat: bool = False
    ignored: tuple[str, ...] = ()
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        c, count = self.config, sum(a.size for a in self.params.values())
        return (
            f"<LanguageModel: {count:,} parameters, {c.num_layers} layers of width {c.d_model}, "
            f"{c.vocab_size:,} tokens, context {c.context}>"
        )

    @functools.cached_property
    def module(self) -> Decoder:
        return Decoder(self.config, DTYPES[self.dtype], self.remat)

    @functools.cached_property
    def apply_fn(self) -> Any:
        """(params, tokens [B, T]) -> logits [B, T, V]; of a wide vocabulary scored in chunks."""
        module = Decoder(self.config, DTYPES[self.dtype], self.remat, body=True)
        unembed = self.config.name("embed" if self.config.tied else "unembed")

        def body(params: PyTree, tokens: Any) -> Any:
            return module.apply({"params": params}, jnp.asarray(tokens))

        def head(params: PyTree, x: Any) -> Any:
            return logits(x, params[unembed], module.dtype)

        return Headed(body, head)

    @functools.cached_property
    def steps(self) -> Stepwise:
        """The same a token at a time, with keys and values kept, for `language.generate`."""
        return Stepwise(Decoder(self.config, DTYPES[self.dtype]))

    def matrices(self, which: str = "all", layers: Any = None) -> list[str]:
        """Names of the matrices in layers, for `select`: all, "attention" or "mlp"."""
        return self.config.matrices(which, layers)

    def last_token(self, layer: int) -> last_token.LastToken:
        """The last position's way through the layers from `layer` on, as a network of its own."""
        return last_token.of(self.config, self.params, layer, DTYPES[self.dtype])

    def encode(self, text: str) -> np.ndarray:
        """Raises InputError where the model came without a tokenizer."""
        return self._tokenizer().encode(text)

    def decode(self, tokens: Any) -> str:
        return self._tokenizer().decode(tokens)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError("this model came without a tokenizer; give tokens, not text.")
        return self.tokenizer

    def generate(
        self,
        text: str,
        params: PyTree | Intervention = None,
        *,
        num_tokens: int = 40,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """The text and what the model goes on with; see `sampling.generate`.

        Args:
          params: edited weights, or what `steer` and `swap` return; None: the model's own.
        Raises:
          InputError: no tokenizer, no text, or more tokens than the context.

        Keys and values are kept, but where a change is at chosen positions only: `where` may look
        at all tokens, so each new one then costs a pass over all.
        """
        tokens, start = self.encode(text), self._tokenizer().document
        if not len(tokens) and start is None:
            raise InputError("the text is empty; give the beginning that is to be gone on with.")
        tokens = tokens if len(tokens) else np.asarray([start], np.int32)
        run, weights = self.steps, self.params if params is None else params
        if isinstance(params, Intervention):
            weights = params.params
            run = self.steps if weights is params.weights else params.apply_fn
        length = sampling.buffer_length(len(tokens) + num_tokens, self.config.context)
        found = sampling.generate(
            run,
            weights,
            tokens,
            num_tokens=num_tokens,
            temperature=temperature,
            seed=seed,
            length=length,
        )
        return self.decode(found[0])

    def before_and_after(
        self, text: str, params: PyTree | Intervention, **options: Any
    ) -> tuple[str, str]:
        """What the model itself goes on with, and the changed one, with the same draws."""
        return self.generate(text, **options), self.generate(text, params, **options)

    def save(self, path: str | os.PathLike[str], params: PyTree = None) -> None:
        """See `save`."""
        save(path, self, params)


def load(
    path: str | os.PathLike[str], *, dtype: str = "float32", remat: bool = False
) -> LanguageModel:
    """A trained language model from a local path. No code in it is executed.

    Args:
      path: a folder with config.json, model.safetensors (or shards and their index) and
        tokenizer.json; a .gguf file; or a glassllm .npz, its tokenizer beside it.
      dtype: of products and activations; parameters are float32 whatever the file holds.
      remat: less memory in the backward pass, for another forward pass.
    Raises:
      InputError: an unknown family, what this decoder does not do, missing or damaged files,
        weights of another shape or that are not finite, more tokens than embeddings.
    """
    where = user_path(path)
    found = files.read(where)
    shapes = {name: tuple(a.shape) for name, a in found.arrays.items()}
    ignored = families.checked(found.config, shapes, str(where))
    params = {name: _weight(found.arrays[name], name, where) for name in found.config.shapes()}
    tokenizer, rows = found.tokenizer, found.config.vocab_size
    if tokenizer is not None and tokenizer.vocab_size > rows:
        raise InputError(
            f"the tokenizer of {where} has {tokenizer.vocab_size} tokens, but the model only "
            f"{rows} embeddings; they belong to different models."
        )
    if ignored:
        log.info("%s: %s not used by this decoder: %s", where, len(ignored), ", ".join(ignored))
    if found.notes:
        log.info("%s: loaded without a tokenizer: %s", where, "; ".join(found.notes))
    one_of("dtype", dtype, DTYPES)
    return LanguageModel(
        params, found.config, tokenizer, dtype, remat, tuple(ignored), found.source
    )


def _weight(array: Any, name: str, where: Any) -> Array:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputError(f"{where} holds {name!r} as {array.dtype}; weights must be floats.")
    whole = np.asarray(array, np.float32)
    if not np.isfinite(whole).all():
        raise InputError(f"{where} holds NaN or infinities in {name!r}; get the file again.")
    return jnp.asarray(whole)


def initial(config: DecoderConfig, tokenizer: Tokenizer | None, key: Array) -> LanguageModel:
    """An untrained model: weights ~ N(0, 0.02²), norms 1, biases 0."""
    model = LanguageModel({}, config, tokenizer)
    tokens = jnp.zeros((1, 1), jnp.int32)
    return dataclasses.replace(model, params=jax.jit(model.module.init)(key, tokens)["params"])


def save(path: str | os.PathLike[str], model: LanguageModel, params: PyTree = None) -> None:
    """Writes a folder that `load` reads: model.safetensors under the original names, in float32.

    Where the model came from a Hugging Face folder, others read it too.

    Args:
      params: other weights of the same names and shapes, e.g. edited ones; None: the model's.
    Raises:
      InputError: other names or shapes.
    """
    params = model.params if params is None else dict(params)
    wanted, given = model.config.shapes(), {name: tuple(a.shape) for name, a in params.items()}
    if wanted != given:
        other = sorted(name for name in wanted | given if wanted.get(name) != given.get(name))
        raise InputError(
            f"params do not fit the model: {other[0]!r} is {given.get(other[0], 'absent')}, and "
            f"should be {wanted.get(other[0], 'absent')}."
        )
    folder = user_path(path)
    folder.mkdir(parents=True, exist_ok=True)
    source = dict(model.source)
    if "model_type" in source:
        source |= {"torch_dtype": "float32"}
    else:
        source = {"model_type": files.OWN, "decoder": dataclasses.asdict(model.config)}
    unfinished = folder / ".model.safetensors.unfinished"
    unfinished.write_bytes(arrays_lib.encode(params))
    unfinished.replace(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(source, indent=2))
    if model.tokenizer is not None:
        model.tokenizer.save(folder / "tokenizer.json")
