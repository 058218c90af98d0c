"""Text as tokens: one array of all documents, a part of them held out, and batches of it.

A folder holds tokens.npy (uint16 or uint32, memory-mapped), tokens.json (where documents start,
which are held out, whose tokens they are) and tokenizer.json.

A batch [B, T] is cut so that a row never holds two documents: row r of a document has its tokens
from r(T - 1) to r(T - 1) + T, and PAD where the document ends before. Rows share one token with
the next, so that every token but a document's first is predicted once.

Shapes: B sequences, T positions, N tokens, D documents.
"""

from __future__ import annotations

import dataclasses
import glob
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import wadler_lindig as wl
from etils import epath
from jaxtyping import Array, Bool, Float, Int

from apd_jax.errors import InputError, first_line
from apd_jax.language.files import read_json
from apd_jax.language.tokenizer import Tokenizer
from apd_jax.network import data
from apd_jax.network.headed import Head, by_rows
from apd_jax.paths import user_path

PAD = -1  # no token: what stands behind the end of a document
_ARRAY, _ABOUT, _TOKENIZER = "tokens.npy", "tokens.json", "tokenizer.json"


def documents(pattern: str, longest: int) -> Iterator[str]:
    """The texts of the files that a glob pattern matches, cut at blank lines where they are long.

    Args:
      longest: characters from which on a document ends at the next blank line.
    Raises:
      InputError: no file matches, one cannot be read as UTF-8, or there is no text in them.
    """
    paths = sorted(p for p in glob.glob(str(user_path(pattern)), recursive=True))
    files = [path for path in map(epath.Path, paths) if not path.is_dir()]
    if not files:
        raise InputError(f"no text file matches {pattern!r}; give a glob pattern, e.g. '~/*.txt'.")
    found = False
    for path in files:
        try:
            text = path.read_text()
        except (UnicodeDecodeError, OSError) as error:
            raise InputError(
                f"{path} cannot be read as UTF-8 text ({first_line(error)}); leave it out."
            ) from None
        for document in _cut(text, longest):
            found = True
            yield document
    if not found:
        raise InputError(f"the {len(files)} files of {pattern!r} hold no text; give others.")


def _cut(text: str, longest: int) -> Iterator[str]:
    while text.strip():
        end = text.find("\n\n", longest)
        yield text if end < 0 else text[: end + 2]
        text = "" if end < 0 else text[end + 2 :]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Documents as tokens.

    array: [N] of unsigned integers. starts: where each document begins, and N. held_out: [D].
    """

    array: np.ndarray
    starts: Int[np.ndarray, " ends"]
    held_out: Bool[np.ndarray, " D"]
    tokenizer: Tokenizer

    def __repr__(self) -> str:
        return wl.pformat(self)

    @staticmethod
    def of(
        texts: Iterable[str], tokenizer: Tokenizer, *, held_out: float = 0.1, seed: int = 0
    ) -> Tokens:
        """Documents as tokens, each begun by the tokenizer's `document` where it has one.

        Args:
          held_out: the share of documents that training never sees: at least one, and not all.
        Raises:
          InputError: fewer than two documents.
        """
        first = [] if tokenizer.document is None else [tokenizer.document]
        small = tokenizer.vocab_size <= 2**16
        kind = np.uint16 if small else np.uint32
        rows = [np.concatenate([first, tokenizer.encode(text)]).astype(kind) for text in texts]
        rows = [row for row in rows if len(row) > 1]
        if len(rows) < 2:
            raise InputError(
                f"the text has {len(rows)} document with anything to predict, but one must be held "
                "out and one trained on; give more text, or a smaller length of documents."
            )
        if not 0 < held_out < 1:
            raise InputError(f"held_out must lie between 0 and 1, exclusively; got {held_out}.")
        count = min(max(1, round(held_out * len(rows))), len(rows) - 1)
        chosen = np.zeros(len(rows), bool)
        chosen[np.random.default_rng(seed).permutation(len(rows))[:count]] = True
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return Tokens(np.concatenate(rows), starts, chosen, tokenizer)

    def write(self, folder: epath.PathLike) -> None:
        """Writes a folder that `read` reads; what says that it is whole comes last."""
        path = user_path(folder)
        path.mkdir(parents=True, exist_ok=True)
        with (path / _ARRAY).open("wb") as file:
            np.save(file, self.array)
        self.tokenizer.save(path / _TOKENIZER)
        about = {
            "num_tokens": len(self.array),
            "tokenizer_sha256": self.tokenizer.sha256,
            "starts": self.starts.tolist(),
            "held_out": np.flatnonzero(self.held_out).tolist(),
        }
        unfinished = path / f".{_ABOUT}.unfinished"
        unfinished.write_text(json.dumps(about))
        unfinished.replace(path / _ABOUT)

    def rows(self, length: int, *, held_out: bool = False) -> Rows:
        """The rows of all documents of one part, in their order.

        Raises:
          InputError: a length below 2.
        """
        if length < 2:
            raise InputError(f"sequences need at least 2 tokens, to predict one; got {length}.")
        spans = [
            (first, min(first + length, end))
            for start, end, out in zip(
                self.starts[:-1].tolist(), self.starts[1:].tolist(), self.held_out, strict=True
            )
            if out == held_out
            for first in range(start, end - 1, length - 1)
        ]
        return Rows(self.array, np.array(spans, np.int64), length)


def read(folder: epath.PathLike, tokenizer: Tokenizer | None = None) -> Tokens:
    """The tokens of a folder, memory-mapped.

    Args:
      tokenizer: whose tokens they must be; None: any.
    Raises:
      InputError: a file is missing, torn, of another tokenizer, or holds tokens outside of its
        vocabulary.
    """
    path = user_path(folder)
    about = read_json(path / _ABOUT, "give a folder that `Tokens.write` has written")
    own = Tokenizer.load(path / _TOKENIZER)
    try:
        array = np.load(path / _ARRAY, mmap_mode="r", allow_pickle=False)
        starts = np.asarray(about["starts"], np.int64)
        held_out = np.isin(np.arange(len(starts) - 1), about["held_out"])
        whole = len(array) == about["num_tokens"] == starts[-1]
        sha256 = about["tokenizer_sha256"]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(
            f"{path} holds torn tokens ({first_line(error)}); write them again."
        ) from None
    if not whole:
        raise InputError(
            f"{path / _ARRAY} holds {len(array)} tokens, but {about['num_tokens']} were written; "
            "write them again."
        )
    if own.sha256 != sha256 or (tokenizer is not None and tokenizer.sha256 != sha256):
        raise InputError(f"the tokens of {path} are of another tokenizer; write them again.")
    if len(array) and int(array.max()) >= own.vocab_size:
        raise InputError(
            f"{path / _ARRAY} holds token {int(array.max())}, outside of the vocabulary of "
            f"{own.vocab_size}; write it again."
        )
    return Tokens(array, starts, held_out, own)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of T tokens, each of one document.

    spans: [n, 2], where each begins and ends in the array.
    """

    array: np.ndarray
    spans: Int[np.ndarray, "n 2"]
    length: int

    def __repr__(self) -> str:
        return wl.pformat(self)

    def __len__(self) -> int:
        return len(self.spans)

    def take(self, numbers: Any) -> Int[np.ndarray, "B T"]:
        """Rows by their numbers; PAD behind a document's end."""
        spans = self.spans[numbers]
        places = spans[:, :1] + np.arange(self.length)
        inside = places < spans[:, 1:]
        found = self.array[np.minimum(places, len(self.array) - 1)].astype(np.int32)
        return np.where(inside, found, PAD)

    def sampler(self, batch_size: int, shuffle: bool = True) -> Callable[..., Array]:
        """All rows in memory as `apd_jax.data.from_arrays`: (rng, step) -> tokens [B, T]."""
        self._fill(batch_size)
        return data.from_arrays(self.take(np.arange(len(self))), batch_size, shuffle)

    def batch(self, batch_size: int, seed: int, step: int) -> Int[np.ndarray, "B T"]:
        """Batch `step`, a pure function of its arguments, read from the disk.

        Epoch e goes through the rows in an order drawn from (seed, e), without the rest that fills
        no batch.
        """
        epoch, i = divmod(step, len(self) // batch_size)
        order = np.random.default_rng([seed, epoch]).permutation(len(self))
        return self.take(order[i * batch_size : (i + 1) * batch_size])

    def batches(self, batch_size: int, seed: int) -> Batches:
        """The same as an iterable, for text that is too long for memory."""
        self._fill(batch_size)
        return Batches(self, batch_size, seed)

    def _fill(self, batch_size: int) -> None:
        if len(self) < batch_size:
            raise InputError(
                f"the text fills {len(self)} sequences of {self.length} tokens, fewer than a batch "
                f"of {batch_size}; give more text, or a smaller batch."
            )


@dataclasses.dataclass(frozen=True)
class Batches:
    """Endless batches of rows, the same at every iteration."""

    rows: Rows
    batch_size: int
    seed: int

    def __iter__(self) -> Iterator[np.ndarray]:
        step = 0
        while True:
            yield self.rows.batch(self.batch_size, self.seed, step)
            step += 1


def predicting(tokens: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Which positions count: those whose next token is in the row, and thus in their document."""
    following = tokens[:, 1:] >= 0
    return jnp.concatenate([following, jnp.zeros_like(following[:, :1])], axis=1)


def cross_entropy(
    logits: Float[Array, "B T V"],
    tokens: Int[Array, "B T"],
    counts: Any = None,
    head: Head | None = None,
) -> Float[Array, ""]:
    """Nats per predicted token, the mean over the positions that count, as `predicting` has it.

    Args:
      head: logits are what it makes of [B, T, D], in chunks of positions.
    """
    counts = (predicting(tokens) if counts is None else counts)[:, :-1]
    score = optax.softmax_cross_entropy_with_integer_labels
    before, after = logits[:, :-1], jnp.maximum(tokens[:, 1:], 0)
    each = score(before, after) if head is None else by_rows(head, score, before, after)
    return jnp.sum(each, where=counts) / jnp.maximum(jnp.sum(counts), 1)
