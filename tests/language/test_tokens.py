"""Text as tokens: round trips, parts kept apart, batches, and what is refused."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apd_jax.errors import InputError
from apd_jax.language import Tokenizer
from apd_jax.language import tokens as tokens_lib
from apd_jax.language.tokens import PAD, Tokens, cross_entropy, documents, predicting, read

TEXTS = [
    f"Déjà vu {i}, 日本. " + " ".join(str(7919**j % (997 + i)) for j in range(20)) for i in range(8)
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    tokenizer = Tokenizer.train(TEXTS, 280)
    Tokens.of(TEXTS, tokenizer, held_out=0.25).write(folder)
    return folder


def test_any_text_comes_back(written):
    tokens = read(written)
    tokenizer = tokens.tokenizer
    assert tokenizer.vocab_size == 280 and tokenizer.document == 0
    for i, text in enumerate([*TEXTS, "\x00 ünseen 🎉\n"]):
        encoded = tokenizer.encode(text)
        assert tokenizer.decode(encoded) == text == tokenizer.decode([*encoded, PAD])
        if i < len(TEXTS):  # the document as it was written, behind the token that begins it
            start, end = tokens.starts[i : i + 2]
            assert tokens.array[start] == 0
            np.testing.assert_array_equal(tokens.array[start + 1 : end], encoded)
    assert tokens.array.dtype == np.uint16 and isinstance(tokens.array, np.memmap)


def test_rows_hold_one_document_and_predict_every_token_once(written):
    tokens, T = read(written), 7
    assert tokens.held_out.sum() == 2
    predicted = []
    for part in (False, True):
        rows = tokens.rows(T, held_out=part)
        taken = rows.take(np.arange(len(rows)))
        counts = np.asarray(predicting(jnp.asarray(taken)))
        assert not counts[:, -1].any() and (counts.sum(1) > 0).all()
        np.testing.assert_array_equal(counts[:, :-1], taken[:, 1:] != PAD)
        for (start, end), row in zip(rows.spans, taken, strict=True):
            document = np.searchsorted(tokens.starts, start, side="right") - 1
            assert tokens.held_out[document] == part and end <= tokens.starts[document + 1]
            np.testing.assert_array_equal(row[: end - start], tokens.array[start:end])
            predicted += range(start + 1, end)
    # All tokens but the first of each document.
    expected = sorted(set(range(len(tokens.array))) - set(tokens.starts[:-1].tolist()))
    assert sorted(predicted) == expected


def test_batches_are_a_function_of_seed_and_step(written):
    rows = read(written).rows(7)
    per_epoch = len(rows) // 4
    found = list(itertools.islice(rows.batches(4, seed=3), per_epoch + 2))
    for step in (per_epoch + 1, 0, 2):  # whatever was asked for before
        np.testing.assert_array_equal(rows.batch(4, 3, step), found[step])
    epoch = {tuple(row) for batch in found[:per_epoch] for row in batch}
    assert len(epoch) == 4 * per_epoch  # none twice
    assert not np.array_equal(found[0], found[per_epoch])
    assert not np.array_equal(rows.batch(4, 4, 0), found[0])
    sample = rows.sampler(4)(jax.random.key(0), 1)
    assert sample.shape == (4, 7) and {tuple(row) for row in np.asarray(sample)} <= {
        tuple(row) for row in rows.take(np.arange(len(rows)))
    }


def test_cross_entropy_counts_no_padding():
    # Two predictions, each of probability 1/2 of two tokens: log 2; the third position has none.
    tokens = jnp.array([[0, 1, 1, PAD]])
    logits = jnp.zeros((1, 4, 2)).at[:, 2:].set(jnp.array([9.0, -9.0])[None, None])
    assert cross_entropy(logits, tokens) == pytest.approx(np.log(2))


def test_long_files_are_cut_at_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\nline\n\ntwo\n\nthree")
    (tmp_path / "b.txt").write_text("b")
    assert list(documents(f"{tmp_path}/*.txt", 3)) == ["one\nline\n\n", "two\n\n", "three", "b"]
    assert len(list(documents(f"{tmp_path}/*.txt", 1000))) == 2


def test_text_that_cannot_be_used(tmp_path, written):
    with pytest.raises(InputError, match="no text file matches"):
        list(documents(f"{tmp_path}/*.txt", 10))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InputError, match=r"the 1 files of .* hold no text"):
        list(documents(f"{tmp_path}/*.txt", 10))
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"bytes.txt cannot be read as UTF-8"):
        list(documents(f"{tmp_path}/*.txt", 10))
    tokens = read(written)
    with pytest.raises(InputError, match="has 1 document with anything to predict"):
        Tokens.of(["one"], tokens.tokenizer)
    with pytest.raises(InputError, match="vocab_size must be at least 257"):
        Tokenizer.train(TEXTS, 100)
    with pytest.raises(InputError, match=r"fills \d+ sequences of 7 tokens, fewer than a batch"):
        tokens.rows(7).sampler(10_000)


def copied(written, folder):
    for file in written.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_torn_tokens(written, tmp_path):
    folder = copied(written, tmp_path)
    whole = (folder / "tokens.npy").read_bytes()
    (folder / "tokens.npy").write_bytes(whole[:-6])
    with pytest.raises(InputError, match="holds torn tokens"):
        read(folder)
    np.save(folder / "tokens.npy", read(written).array[:-3])
    with pytest.raises(InputError, match=r"holds \d+ tokens, but \d+ were written"):
        read(folder)
    outside = np.array(read(written).array)
    outside[5] = 280
    np.save(folder / "tokens.npy", outside)
    with pytest.raises(InputError, match="holds token 280, outside of the vocabulary of 280"):
        read(folder)


def test_tokens_of_another_tokenizer(written, tmp_path):
    folder = copied(written, tmp_path)
    other = Tokenizer.train(TEXTS, 270)
    with pytest.raises(InputError, match="of another tokenizer"):
        read(folder, other)
    about = json.loads((folder / "tokens.json").read_text())
    (folder / "tokens.json").write_text(json.dumps(about | {"tokenizer_sha256": "0"}))
    with pytest.raises(InputError, match="of another tokenizer"):
        read(folder)
    (folder / "tokens.json").unlink()
    with pytest.raises(InputError, match=r"tokens.json does not exist"):
        tokens_lib.read(folder)
