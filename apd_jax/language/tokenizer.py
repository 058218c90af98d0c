"""Text to tokens and back, by the `tokenizers` package.

From a tokenizer.json, from the fields of a GGUF file, from a glassllm tokenizer, or trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsInt

import numpy as np
from etils import epath

from apd_jax.errors import InputError, first_line, one_of

if TYPE_CHECKING:
    import tokenizers

DOCUMENT = "<|endoftext|>"  # begins a document, in vocabularies that have it
_SPACE = "▁"


class Tokenizer:
    """A tokenizer of the `tokenizers` package, which is `.inner`, by what models need of it."""

    def __init__(self, inner: tokenizers.Tokenizer):
        self.inner = inner

    @property
    def vocab_size(self) -> int:
        """One more than the largest token."""
        return max(self.inner.get_vocab().values(), default=-1) + 1

    @property
    def document(self) -> int | None:
        """The token that begins a document, where there is one."""
        return self.inner.token_to_id(DOCUMENT)

    @property
    def sha256(self) -> str:
        """Of all that decides how text is cut."""
        return hashlib.sha256(self.inner.to_str().encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, int32 [n], without any that mark its beginning or end."""
        return np.asarray(self.inner.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, tokens: Sequence[SupportsInt] | np.ndarray) -> str:
        """The text of tokens; padding (below 0) has none."""
        return self.inner.decode([int(t) for t in tokens if int(t) >= 0], skip_special_tokens=False)

    def strings(self, tokens: Sequence[SupportsInt] | np.ndarray) -> list[str]:
        """Each token as the text it stands for; half a character as "�"."""
        return [self.decode([t]) for t in tokens]

    def save(self, path: epath.PathLike) -> None:
        epath.Path(path).write_text(self.inner.to_str(pretty=True))

    @staticmethod
    def load(path: epath.PathLike) -> Tokenizer:
        """From a tokenizer.json, of Hugging Face or of glassllm.

        Raises:
          InputError: it is neither.
        """
        tokenizers = _package()
        try:
            text = epath.Path(path).read_text()
            fields = json.loads(text)
            if {"alphabet", "merges"} <= set(fields):
                return Tokenizer(_glass(fields))
            return Tokenizer(tokenizers.Tokenizer.from_str(text))
        except InputError:
            raise
        except Exception as error:  # tokenizers raises plain Exceptions
            raise InputError(f"{path} is no tokenizer ({first_line(error)}).") from error

    @staticmethod
    def from_gguf(fields: Mapping[str, Any]) -> Tokenizer:
        """From the fields of a GGUF file, byte-level BPE only.

        Raises:
          InputError: there is none, or it is of another kind.
        """
        return Tokenizer(_from_gguf(fields))

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """A byte-level BPE: any text can be encoded, and comes back unchanged.

        Raises:
          InputError: the vocabulary has no room for all bytes, or there is no text.
        """
        tokenizers = _package()
        if vocab_size < 257:
            raise InputError(
                f"vocab_size must be at least 257, for every byte and the start of a document; got "
                f"{vocab_size}."
            )
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        _byte_level(inner)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[DOCUMENT],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return Tokenizer(inner)


def _package() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise InputError(
            "to turn text into tokens, the package tokenizers is needed: "
            "pip install 'apd_jax[language]'."
        ) from None
    return tokenizers


def _byte_level(inner: Any, *before: Any, regex: bool = True) -> None:
    tokenizers = _package()
    bytes_ = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*before, bytes_])
    inner.decoder = tokenizers.decoders.ByteLevel()


_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"llama-bpe": _LLAMA_3, "qwen2": _LLAMA_3.replace("{1,3}", "")}
_CONTROL = (3, 4)  # of tokenizer.ggml.token_type: control, and the user's own


def _from_gguf(fields: Mapping[str, Any]) -> Any:
    tokenizers = _package()
    kind = fields.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise InputError(f"its tokenizer is of kind {kind!r}; only byte-level BPE is read.")
    pre = one_of(
        "pre-tokenizer of the GGUF file",
        fields.get("tokenizer.ggml.pre", "default"),
        ("default", "gpt-2", "smollm", *_SPLITS),
    )
    words = fields["tokenizer.ggml.tokens"]
    merges = [tuple(line.split(" ", 1)) for line in fields["tokenizer.ggml.merges"]]
    vocab = {word: i for i, word in enumerate(words)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    if pre in _SPLITS:
        split = tokenizers.pre_tokenizers.Split(
            tokenizers.Regex(_SPLITS[pre]), behavior="isolated", invert=False
        )
        _byte_level(inner, split, regex=False)
    elif pre == "smollm":
        _byte_level(inner, tokenizers.pre_tokenizers.Digits(individual_digits=True))
    else:
        _byte_level(inner)
    kinds = fields.get("tokenizer.ggml.token_type", ())
    special = [w for w, k in zip(words, kinds, strict=False) if k in _CONTROL]
    inner.add_special_tokens([tokenizers.AddedToken(w, normalized=False) for w in special])
    return inner


def _glass(fields: Mapping[str, Any]) -> Any:
    """glassllm's: BPE on characters, within a word and the spaces before it."""
    tokenizers = _package()
    merges = [tuple(pair) for pair in fields["merges"]]
    special = ["<pad>", "<unk>", "<bos>", "<eos>"]
    words = [*special, *fields["alphabet"], *("".join(pair) for pair in merges)]
    vocab = {word: i for i, word in enumerate(words)}
    bpe = tokenizers.models.BPE(vocab=vocab, merges=merges, unk_token="<unk>")
    inner = tokenizers.Tokenizer(bpe)
    inner.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFC(), tokenizers.normalizers.Replace(" ", _SPACE)]
    )
    chunk = tokenizers.Regex(rf"\n|{_SPACE}*[^{_SPACE}\n]+|{_SPACE}+")
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(chunk, behavior="isolated")
    inner.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace(_SPACE, " "), tokenizers.decoders.Fuse()]
    )
    inner.add_special_tokens(special)
    return inner
