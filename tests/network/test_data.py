"""Batches from arrays and from iterables.

What they hold, that they train as a sampler does, and how a stopped run goes on.
"""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_method

import apd_jax
from apd_jax.errors import InputError, Interrupted
from apd_jax.network import batches as batches_lib
from apd_jax.network import data
from apd_jax.network.problem import Problem
from apd_jax.train import checkpoint, progress
from apd_jax.train import loop as train

PARAMS = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)}
# Of 15 steps, which are three calls of 5.
BATCHES = np.random.default_rng(1).normal(size=(15, 8, 4)).astype(np.float32)


def apply_fn(params, x):
    return x @ params["w"]


def method_of(**fields):
    small = {
        "num_components": 3,
        "num_steps": 15,
        "batch_size": 8,
        "init_scale": 3.0,
        "learning_rate": 1e-2,
    }
    return make_method(
        **small | {"steps_per_call": 5, "log_every_steps": 4, "checkpoint_every_steps": 10} | fields
    )


def factors(sample_fn, apply_fn=apply_fn, **fields):
    trained, _ = train.fit(Problem(apply_fn, PARAMS, sample_fn), method_of(**fields))
    return trained.components.factors["w"]


def assert_equal(one, other):
    np.testing.assert_array_equal(one.U, other.U)
    np.testing.assert_array_equal(one.V, other.V)


def stream(iterable, since, number):
    batches = data.Batches(iterable).since(since)
    return [next(batches) for _ in range(number)]


class Loader:
    """Yields the same batches whenever it is begun, into the same memory, as some loaders do."""

    def __init__(self, batches):
        self.batches, self.memory, self.begun = batches, np.empty_like(batches[0]), 0

    def __iter__(self):
        self.begun += 1
        for batch in self.batches:
            self.memory[:] = batch
            yield self.memory


# Arrays


def test_an_epoch_has_every_example_once():
    # 11 examples in batches of 3: 3 batches per epoch, and 2 examples are left out, not always the
    # same ones.
    rows = {"x": np.arange(11), "y": (np.arange(11.0)[:, None] + 0.5,)}
    sample = jax.jit(data.from_arrays(rows, 3))
    epochs = []
    for epoch in range(20):
        batches = [sample(jax.random.key(0), 3 * epoch + i) for i in range(3)]
        assert all(
            np.array_equal(b["x"] + 0.5, b["y"][0][:, 0]) and b["x"].shape == (3,) for b in batches
        )
        epochs.append(np.concatenate([b["x"] for b in batches]))
        assert len(set(epochs[-1])) == 9
    assert len({tuple(epoch) for epoch in epochs}) == 20
    assert set(np.concatenate(epochs)) == set(range(11))
    # Pure in rng and step, and another rng has other orders.
    assert np.array_equal(sample(jax.random.key(0), 4)["x"], epochs[1][3:6])
    assert not np.array_equal(sample(jax.random.key(1), 4)["x"], epochs[1][3:6])


def test_arrays_in_their_order():
    sample = data.from_arrays(np.arange(7), 3, shuffle=False)
    assert [sample(jax.random.key(0), step).tolist() for step in range(3)] == [
        [0, 1, 2],
        [3, 4, 5],
        [0, 1, 2],
    ]


@pytest.mark.parametrize(
    ("arrays", "batch_size", "message"),
    [
        ({}, 1, r"arrays must all lead with the number of examples; their leading sizes are \[\]"),
        ({"x": np.ones((4, 2)), "y": np.ones(5)}, 2, r"their leading sizes are \[\(4,\), \(5,\)\]"),
        (np.float32(1), 1, r"their leading sizes are \[\(\)\]"),
        (np.ones((4, 2)), 5, "batch_size must lie between 1 and the number of examples, 4; got 5"),
        (np.ones((4, 2)), 0, "batch_size must lie between 1"),
        ({"x": np.array(["a", "b"])}, 1, "arrays leaf 'x' has dtype <U1; give arrays of numbers"),
        (np.array([None, 1]), 1, "arrays leaf itself has dtype object"),
        (
            np.broadcast_to(np.float32(1), (2**15, 2**14)),
            8,
            "arrays hold 2.0 GiB, but at most 1 GiB fits",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays, batch_size, message):
    with pytest.raises(InputError, match=message):
        data.from_arrays(arrays, batch_size)


# Iterables


def test_the_stream_begins_anywhere_and_never_ends():
    # 15 batches and again from the first: step 18 has batch 3.
    for iterable in (BATCHES, list(BATCHES), Loader(BATCHES)):
        for since in (0, 3, 18):
            got = [batch.copy() for batch in stream(iterable, since, 1)]
            np.testing.assert_array_equal(got[0], BATCHES[since % 15])


def test_the_first_batch_is_looked_at_without_beginning_twice():
    loader = Loader(BATCHES)
    batches = data.Batches(loader)
    assert (batches.shapes.shape, batches.shapes.dtype) == ((8, 4), np.float32)
    for (_, (stack,)), first in zip(data.calls(batches, 0, 15, 5), (0, 5, 10), strict=True):
        np.testing.assert_array_equal(stack, BATCHES[first : first + 5])
    assert loader.begun == 1
    next(batches.since(4))
    assert loader.begun == 2


def test_dtypes_are_those_of_jax():
    batch = {
        "tokens": np.arange(8),
        "weight": np.ones(8),
        "on": np.ones(8, bool),
        "half": jnp.ones(8, jnp.bfloat16),
    }
    shapes = data.Batches([batch]).shapes
    assert {name: s.dtype for name, s in shapes.items()} == {
        "tokens": np.int32,
        "weight": np.float32,
        "on": bool,
        "half": jnp.bfloat16,
    }


def test_an_iterable_trains_as_a_sampler_of_the_same_batches():
    held = jnp.asarray(BATCHES)
    wanted = factors(lambda rng, step: held[step])
    assert_equal(factors(iter(BATCHES)), wanted)
    assert_equal(factors(Loader(BATCHES)), wanted)
    assert not np.array_equal(factors(list(BATCHES[::-1])).U, wanted.U)


def test_all_instances_see_the_same_batches():
    held = jnp.asarray(BATCHES)
    wanted = factors(lambda rng, step: held[step], num_instances=2)
    found = factors(list(BATCHES), num_instances=2)
    np.testing.assert_allclose(
        found.U, wanted.U, rtol=1e-5, atol=1e-6
    )  # a sampler draws for every instance: other products, other rounding
    np.testing.assert_allclose(found.V, wanted.V, rtol=1e-5, atol=1e-6)


def test_dicts_and_tuples():
    wanted = factors(list(BATCHES))
    halves = [
        {"a": batch[:, :2], "rest": (batch[:, 2:], np.zeros(8, np.int32))} for batch in BATCHES
    ]
    assert_equal(
        factors(
            halves,
            lambda params, x: apply_fn(params, jnp.concatenate([x["a"], x["rest"][0]], axis=1)),
        ),
        wanted,
    )


def test_steps_per_call_and_memory_do_not_matter(monkeypatch):
    wanted = factors(list(BATCHES))
    for steps_per_call, limit in ((15, 2**28), (5, 130)):  # all in one call, and one step in each
        monkeypatch.setattr(data, "MAX_STACK_BYTES", limit)
        found = factors(list(BATCHES), steps_per_call=steps_per_call)
        np.testing.assert_allclose(found.U, wanted.U, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found.V, wanted.V, rtol=1e-5, atol=1e-7)


def test_no_more_is_stacked_than_fits(monkeypatch):
    # A batch has 8·4·4 = 128 bytes: two fit into 300, and one is taken where none fits.
    for limit, lengths in ((300, [2, 2, 2, 1]), (2**28, [5, 2]), (1, [1] * 7)):
        monkeypatch.setattr(data, "MAX_STACK_BYTES", limit)
        stacks = list(data.calls(data.Batches(BATCHES), 3, 10, 5))
        assert [length for length, _ in stacks] == lengths == [len(stack) for _, (stack,) in stacks]
        np.testing.assert_array_equal(
            np.concatenate([stack for _, (stack,) in stacks]), BATCHES[3:10]
        )
    assert list(data.calls(lambda rng, step: BATCHES[0], 3, 10, 5)) == [(5, ()), (2, ())]


def test_no_batch_is_pulled_that_is_not_needed():
    generator = (batch for batch in BATCHES)
    factors(generator, num_steps=10)
    np.testing.assert_array_equal(next(generator), BATCHES[10])


@pytest.mark.parametrize(
    "given",
    [lambda: Loader(BATCHES[:6]), lambda: (BATCHES[i % 6] for i in range(15))],
    ids=["loader", "generator"],
)
def test_interrupted_twice_ends_the_same(tmp_path, monkeypatch, given):
    wanted, _ = train.fit(
        Problem(apply_fn, PARAMS, given()), method_of(), workdir=tmp_path / "whole"
    )

    class Display(progress.ProgressDisplay):
        def update(self, step, values):
            if step in (5, 10):
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "ProgressDisplay", Display)
    for expected in (5, 10):
        with pytest.raises(Interrupted, match=f"interrupted at step {expected}"):
            train.fit(Problem(apply_fn, PARAMS, given()), method_of(), workdir=tmp_path / "stopped")
    found, rows = train.fit(
        Problem(apply_fn, PARAMS, given()), method_of(), workdir=tmp_path / "stopped"
    )
    assert_equal(found.components.factors["w"], wanted.components.factors["w"])
    assert [row["step"] for row in rows] == [4, 8, 12, 15]
    states = [checkpoint.read(tmp_path / name / "checkpoints")[2] for name in ("whole", "stopped")]
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_library_call_takes_them():
    method = method_of(num_steps=5)
    for given in (list(BATCHES), data.from_arrays(BATCHES.reshape(-1, 4), 8)):
        found = apd_jax.decompose(apply_fn, PARAMS, given, method)
        assert found.components.factors["w"].U.shape[0] == 3 and np.isfinite(
            found.history[-1]["total"]
        )


narrow = [BATCHES[0], BATCHES[1], BATCHES[2][:5, :3]]


@pytest.mark.parametrize(
    ("sample_fn", "message"),
    [
        ([], "the data has no batch at all"),
        ([BATCHES[0][:6]], r"leading sizes \['6'\], but batch_size is 8"),
        (
            [{"x": BATCHES[0], "n": np.float32(1)}],
            r"leading sizes \['8', 'None'\], but batch_size is 8",
        ),
        (
            narrow,
            r"batch 2, leaf itself is float32\[5, 3\], but the first one was float32\[8, 4\]; .* "
            "ragged = 'drop' or 'join'",
        ),
        (
            [{"x": BATCHES[0]}, {"x": BATCHES[0].astype(int)}],
            r"batch 1, leaf 'x' is int32\[8, 4\], but the first one was float32\[8, 4\]",
        ),
        (
            [{"x": BATCHES[0]}, {"y": BATCHES[0]}],
            r"batch 1 is PyTreeDef\(\{'y': \*\}\), but the first one was PyTreeDef\(\{'x': \*\}\)",
        ),
        ([np.full((8, 4), None)], "batch 0, leaf itself has dtype object; give arrays of numbers"),
        ([{"x": np.full(8, "a")}], "batch 0, leaf 'x' has dtype <U1"),
        (None, "there is no data to train on"),
        (lambda rng: BATCHES[0], r"function \(rng, step\) -> batch: called so, too many"),
        (
            3,
            r"sample_fn must be a function \(rng, step\) -> batch, or an iterable of batches; got "
            "a int",
        ),
    ],
)
def test_data_that_does_not_fit_is_refused(sample_fn, message):
    with pytest.raises(InputError, match=message) as error:
        factors(sample_fn, lambda params, x: apply_fn(params, x["x"] if isinstance(x, dict) else x))
    assert "\n" not in str(error.value)


RAGGED = [BATCHES[0], BATCHES[1], BATCHES[2][:5]]


def test_a_last_batch_with_fewer_examples(caplog):
    """By choice left out, joined with what comes next, or refused before the first step."""
    dropped = data.source(RAGGED).since(2)
    np.testing.assert_array_equal(next(dropped), BATCHES[0])
    assert "5 instead of 8" in caplog.text
    joined = data.source([b[:5] for b in BATCHES[:4]], "join", 8)
    whole = np.concatenate([b[:5] for b in BATCHES[:4]])
    assert joined.shapes.shape == (8, 4)
    for batch, first in zip(joined.since(0), (0, 8, 0), strict=False):
        np.testing.assert_array_equal(batch, whole[first : first + 8])
    refused = data.source(RAGGED, "refuse")
    with pytest.raises(InputError, match=r"batch 2, leaf itself is float32\[5, 4\]"):
        refused.shapes  # noqa: B018
    with pytest.raises(InputError, match="unknown ragged 'pad'"):
        data.source(RAGGED, "pad")


def test_an_iterator_that_ends_is_gone_through_again(monkeypatch):
    got = stream(iter(BATCHES[:3]), 2, 3)
    np.testing.assert_array_equal(got, BATCHES[[2, 0, 1]])
    joined = data.source(iter(BATCHES[:3]), "join", 6).since(3)
    np.testing.assert_array_equal(next(joined), BATCHES[:3].reshape(-1, 4)[18:24])
    monkeypatch.setattr(batches_lib, "MAX_KEPT_BYTES", 2 * BATCHES[0].nbytes)
    with pytest.raises(InputError, match="ended before step 4 and cannot be begun again"):
        stream(iter(BATCHES[:3]), 2, 3)


def test_data_that_ends_in_mid_training_loses_no_step(tmp_path, monkeypatch):
    monkeypatch.setattr(batches_lib, "MAX_KEPT_BYTES", 0)
    problem = Problem(apply_fn, PARAMS, iter(BATCHES[:12]))
    with pytest.raises(InputError, match="the data ended before step 13"):
        train.fit(problem, method_of(), workdir=tmp_path)
    again = Problem(apply_fn, PARAMS, list(BATCHES))
    assert train.restore_trained(again, method_of(), tmp_path)[0] == 10


def test_what_is_looked_at_before_training():
    """Of a list one pass, the same twice; of an iterator the first batch, kept for training."""
    key = jax.random.key(0)
    ragged = [*BATCHES[:2], BATCHES[2][:3], BATCHES[3]]
    for given, count, expected in (
        (ragged, 2, BATCHES[:2]),
        (ragged, 9, BATCHES[[0, 1, 3]]),
        (iter(BATCHES), 3, BATCHES[:1]),
    ):
        problem = Problem(apply_fn, PARAMS, given)
        looked = problem.looks(key, count)
        for _ in range(2):
            np.testing.assert_array_equal(np.stack(list(looked)), expected)
        np.testing.assert_array_equal(next(problem.sample_fn.since(0)), BATCHES[0])
    drawn = Problem(apply_fn, PARAMS, lambda rng, step: jax.random.normal(rng, (8, 4)) + step)
    once, again = (np.stack(list(drawn.looks(key, 3))) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    np.testing.assert_array_equal(once[2], drawn.example_batch(key, 2))


def test_a_sampler_that_is_always_alike_is_known():
    """As one that draws by NumPy, which happens once."""
    numpy_draws = lambda rng, step: np.random.default_rng().normal(size=(8, 4))  # noqa: E731
    assert data.always_alike(numpy_draws)
    for drawn in (
        lambda rng, step: jax.random.normal(rng, (8, 4)),
        lambda rng, step: jnp.full((8, 4), step),
        data.from_arrays(BATCHES[0], 2),
        data.source(list(BATCHES)),
    ):
        assert not data.always_alike(drawn)


def test_an_iterator_cannot_serve_two_runs():
    problem = Problem(apply_fn, PARAMS, iter(BATCHES))
    train.fit(problem, method_of(num_steps=5))
    with pytest.raises(InputError, match="this iterator of batches was begun by an earlier run"):
        train.fit(problem, method_of(num_steps=5))


def test_a_loader_that_comes_back_empty_is_refused():
    class Once:
        def __init__(self):
            self.left = list(BATCHES[:3])

        def __iter__(self):
            while self.left:
                yield self.left.pop(0)

    with pytest.raises(InputError, match="the data ended before step 4 and cannot be begun again"):
        factors(Once())
