"""A harvest of planted components, against counting by hand; resumed, refused."""

import dataclasses
import itertools
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from planted import SIZES, TEXT, A, B, C, G, V, decomposition

from apd_jax.errors import InputError
from apd_jax.interpretation import harvest as harvest_lib
from apd_jax.interpretation import windows
from apd_jax.interpretation.harvest import Harvest, Sizes, harvest, load
from apd_jax.interpretation.token_counts import TokenCounts
from apd_jax.methods.apd import APD

ROWS = TEXT.reshape(-1, TEXT.shape[-1])
PAIRS = [(a, b) for row in ROWS for a, b in itertools.pairwise(row) if b >= 0]
HERE, AFTER = np.array(PAIRS).T  # the tokens that count, and those after them


@pytest.fixture(scope="module")
def planted():
    return decomposition()


@pytest.fixture(scope="module")
def folder(planted, tmp_path_factory):
    """Of an undisturbed harvest that saves its state after every second batch."""
    where = tmp_path_factory.mktemp("harvest")
    harvest(planted, TEXT, folder=where, sizes=SIZES, save_every=2)
    return where


@pytest.fixture(scope="module")
def found(folder):
    return load(folder)


def test_rates_are_those_of_counting(found):
    on = G[HERE] > 0
    assert found.num_tokens == len(HERE) == 7 * (3 * 8 + 4) and found.vocab_size == V
    np.testing.assert_allclose(found.firing_rate, on.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.mean_activity, G[HERE].mean(0), rtol=1e-6)


def test_others_on_together_are_those_of_counting(found):
    # On at the same token: 0 with 3, 1 with 3, never 0 with 1.
    assert found.coactive[:3].tolist() == [[3, -1], [3, -1], [-1, -1]]
    np.testing.assert_allclose(found.coactive_share[:2], [[1, 0], [1, 0]])
    counts = (G[HERE] > 0).sum(0)
    both = sorted([(-counts[0], 0), (-counts[1], 1)])
    assert found.coactive[3].tolist() == [number for _, number in both]
    np.testing.assert_allclose(
        found.coactive_share[3], [-n / counts[3] for n, _ in both], rtol=1e-6
    )


def test_tokens_of_largest_pmi_are_those_of_counting(found):
    # Component 0 is on at A alone: PMI = log(n_A N / (n_A n_A)) = -log of A's frequency.
    assert found.input_token[0].tolist() == [A, -1, -1, -1]
    assert found.input_pmi[0, 0] == pytest.approx(-np.log((HERE == A).mean()), rel=1e-6)
    assert found.input_count[0, 0] == (HERE == A).sum()
    for c in range(C):
        on = G[HERE, c] > 0
        pmi = {
            v: np.log((on & (v == AFTER)).sum() * len(HERE) / (on.sum() * (v == AFTER).sum()))
            for v in np.unique(AFTER[on])
        }
        best = sorted(pmi.values(), reverse=True)[:4]
        np.testing.assert_allclose(found.next_pmi[c, : len(best)], best, rtol=1e-5, atol=1e-7)
        for v, value in zip(found.next_token[c], found.next_pmi[c], strict=True):
            assert v < 0 or pmi[v] == pytest.approx(value, abs=1e-6)
    assert not found.input_missed.any() and not found.next_missed.any()


def test_windows_show_the_text_around_what_is_on(found):
    rows = {
        tuple(np.pad(row, 2, constant_values=-1)[i : i + 5])
        for row in TEXT.reshape(-1, 9)
        for i in range(9)
    }
    for tokens, activity in (
        (found.top_tokens, found.top_activity),
        (found.random_tokens, found.random_activity),
    ):
        there = tokens[..., 2] >= 0
        assert there[[0, 1, 3]].all() and not there[2].any()
        for c, k in zip(*np.nonzero(there), strict=True):
            assert tuple(tokens[c, k]) in rows
            g = np.where(tokens[c, k] >= 0, G[tokens[c, k], c], 0)
            # 0 at a row's last token, which predicts nothing.
            assert all(a in (0, b) for a, b in zip(activity[c, k], g, strict=True))
            assert activity[c, k, 2] == g[2] > 0
    assert (found.top_activity[1, :, 2] == 1).all()  # there are more than five 1s: no 0.5 is kept
    assert (np.diff(found.top_activity[..., 2]) <= 0).all()


def test_random_windows_are_a_uniform_sample():
    # One component on at 6 of 8 positions in two batches; a sample of 2: each with 1/3.
    on = jnp.asarray([[[1, 1, 1, 0]], [[1, 0, 1, 1]]], bool)[..., None]
    tokens = jnp.arange(8).reshape(2, 1, 4)
    g, draws = on.astype(jnp.float32), 400

    def sample(key):
        kept = windows.Kept.empty(1, 1, 2, 1)
        for i in range(2):
            here = jax.random.fold_in(key, i)
            kept = windows.update(kept, g[i], g[i], on[i], tokens[i], here)
        return kept.random.tokens

    drawn = jax.jit(jax.vmap(sample))(jax.random.split(jax.random.key(0), draws))
    count = np.bincount(np.asarray(drawn).ravel(), minlength=8)
    assert count[[3, 5]].tolist() == [0, 0] and count.sum() == 2 * draws
    # Standard deviation of a count: √(400 · 1/3 · 2/3) = 9.4; five of them.
    assert np.abs(count[[0, 1, 2, 4, 6, 7]] - draws / 3).max() < 5 * 9.5


def test_token_counts_in_bounded_memory():
    drawn = np.random.default_rng(3)
    component = drawn.integers(0, 3, 5000)
    token = np.minimum(drawn.geometric(0.15, 5000) * (1 + component), 49)
    exact = np.zeros((3, 50), int)
    np.add.at(exact, (component, token), 1)
    for slots in (4, 10, 50):
        table = TokenCounts.empty(3, 50, slots)
        for part in np.array_split(np.arange(5000), 9):
            table.add(component[part], token[part], token[part])
            table.settle()
        dense = np.zeros((3, 50), int)
        dense.ravel()[table.keys] = table.counts
        assert ((dense > 0).sum(1) <= slots).all()
        assert (dense <= exact).all() and (exact - dense <= table.taken[:, None]).all()
        assert (table.taken <= exact.sum(1) / (slots + 1)).all()
        assert slots < 50 or (dense == exact).all()
        np.testing.assert_array_equal(table.total, exact.sum(0))


def parquets(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.*"))}


def stops_after(n):
    yield from TEXT[:n]
    raise KeyboardInterrupt


@pytest.mark.parametrize("n", [1, 5])
def test_a_stopped_harvest_ends_with_the_same_bytes(planted, folder, tmp_path, n):
    options = {"folder": tmp_path, "sizes": SIZES, "save_every": 2}
    with pytest.raises(KeyboardInterrupt):
        harvest(planted, stops_after(n), **options)
    assert (tmp_path / "unfinished.npz").exists() == (n >= 2)
    harvest(planted, TEXT, **options)
    assert parquets(tmp_path) == parquets(folder)
    assert set(parquets(folder)) == {"components.parquet", "contexts.parquet", "harvest.json"}


KILLED = """
import os, signal, sys
sys.path.insert(0, {here!r})
from planted import SIZES, TEXT, decomposition
from apd_jax.interpretation.harvest import harvest

def killed():
    yield from TEXT[:5]
    os.kill(os.getpid(), signal.SIGKILL)

harvest(decomposition(), killed(), folder=sys.argv[1], sizes=SIZES, save_every=2)
"""


def test_after_kill_9_it_ends_with_the_same_bytes(planted, folder, tmp_path):
    code = KILLED.format(here=str(ROOT / "tests"))
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(parquets(tmp_path)) == ["unfinished.npz"]
    harvest(planted, TEXT, folder=tmp_path, sizes=SIZES, save_every=2)
    assert parquets(tmp_path) == parquets(folder)


def test_what_goes_on_must_be_the_same(planted, tmp_path):
    options = {"folder": tmp_path, "sizes": SIZES, "save_every": 2}
    with pytest.raises(KeyboardInterrupt):
        harvest(planted, stops_after(3), **options)
    with pytest.raises(InputError, match="first 2 batches are not those"):
        harvest(planted, TEXT[::-1], **options)
    with pytest.raises(InputError, match="holds 2 batches of a harvest, but only 1 came"):
        harvest(planted, TEXT[:1], **options)
    with pytest.raises(InputError, match="unfinished harvest of another decomposition"):
        harvest(decomposition(scale=2.0), TEXT, **options)
    state = tmp_path / "unfinished.npz"
    state.write_bytes(state.read_bytes()[:-300])
    with pytest.raises(InputError, match=r"unfinished.npz is torn \(.*\); remove it\."):
        harvest(planted, TEXT, **options)


def test_a_finished_harvest_is_read(planted, folder, found):
    again = harvest(planted, iter(()), folder=folder, sizes=SIZES)
    for name in Harvest.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    with pytest.raises(InputError, match="holds a harvest of another decomposition"):
        harvest(decomposition(scale=2.0), TEXT, folder=folder, sizes=SIZES)
    with pytest.raises(InputError, match="or one with other settings; remove it"):
        harvest(planted, TEXT, folder=folder, threshold=0.3, sizes=SIZES)


def test_torn_files_are_refused_in_a_sentence(folder, tmp_path):
    with pytest.raises(InputError, match="holds no finished harvest"):
        load(tmp_path)
    for name in ("components.parquet", "contexts.parquet", "harvest.json"):
        for other, content in parquets(folder).items():
            (tmp_path / other).write_bytes(content[:-20] if other == name else content)
        with pytest.raises(InputError, match=r"is torn"):
            load(tmp_path)
    other = harvest_lib.Harvest(**{**vars(load(folder)), "num_tokens": 5})
    harvest_lib.save(other, tmp_path)
    for name in ("contexts.parquet", "harvest.json"):
        (tmp_path / name).write_bytes(parquets(folder)[name])
    with pytest.raises(InputError, match=r"components.parquet belongs to another harvest"):
        load(tmp_path)


def test_what_cannot_be_harvested(planted):
    with pytest.raises(InputError, match="needs text"):
        harvest(planted, [])
    with pytest.raises(InputError, match="needs text"):
        harvest(planted, [np.full((2, 4), -1)])
    with pytest.raises(InputError, match=f"holds token 12, but the network's outputs are {V} to"):
        harvest(planted, [np.full((2, 4), 12)])
    with pytest.raises(InputError, match="reads tokens"):
        harvest(planted, [np.zeros((2, 4))])
    with pytest.raises(InputError, match="must be odd; got 4"):
        Sizes(width=4)


def test_one_mask_for_a_sequence_is_refused(planted):
    method = APD(num_components=C, mask_per="example")
    with pytest.raises(InputError, match="one mask for a whole sequence"):
        harvest(dataclasses.replace(planted, method=method), TEXT)


def test_a_bigram_is_gone_after_its_component_is_edited_out(planted):
    tokens = jnp.asarray([[A, 1]])
    whole = planted.problem.apply_fn(planted.problem.params, tokens)
    without = planted.problem.apply_fn(planted.edit({0: 0.0}), tokens)
    change = np.asarray(whole - without)
    assert change[0, 0, B] == pytest.approx(6.0, abs=1e-4)
    assert np.abs(np.delete(change[0, 0], B)).max() < 1e-4 and np.abs(change[0, 1]).max() < 1e-4
