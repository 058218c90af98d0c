"""Checkpoints: what is saved comes back, a few are kept, a torn one is skipped and says so."""

import contextlib
import dataclasses
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_method, make_problem

from apd_jax.errors import InputError
from apd_jax.train import checkpoint
from apd_jax.train.state import init_state

PARAMS = {"layer": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}


def apply_fn(params, x):
    return x @ params["layer"]["kernel"] + params["layer"]["bias"][None]


PROBLEM = make_problem(apply_fn, PARAMS, lambda key, step: jnp.ones((8, 4)))
METHOD = make_method(num_components=2, mask="learned", threshold=0.1)  # a gate with arrays


def make_state(seed=0):
    state = init_state(jax.random.key(seed), PROBLEM, METHOD)
    opt_state, gate = jax.tree.map(lambda a: a + seed, (state.opt_state, state.gate))
    return dataclasses.replace(state, step=jnp.int32(seed), opt_state=opt_state, gate=gate)


def write(folder, *steps, keep=9):
    with contextlib.closing(checkpoint.open_manager(folder, keep)) as manager:
        for step in steps:
            checkpoint.save(manager, step, make_state(step))


def restore(folder):
    with contextlib.closing(checkpoint.open_manager(folder)) as manager:
        return checkpoint.restore_latest(manager, make_state())


def same(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def truncate(path):
    for file in path.rglob("*"):
        if file.is_file() and "/d/" in str(file):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(path):
    for file in path.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


def delete_arrays(path):
    for folder in [*path.rglob("d")]:
        shutil.rmtree(folder)


def delete_all_inside(path):
    shutil.rmtree(path / "default")


# orbax reads the arrays side by side and drops the other reads' errors when one fails.
# Python reports those when they are collected.
drops_errors = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
TORN = [truncate, empty, delete_arrays, delete_all_inside]


def test_round_trip(tmp_path):
    assert restore(tmp_path) is None
    write(tmp_path, 3)
    step, state = restore(tmp_path)
    assert step == 3
    assert jax.tree.structure(state) == jax.tree.structure(make_state())
    same(state, make_state(3))


def test_the_newest_ones_are_kept(tmp_path):
    write(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [3, 4]
    assert restore(tmp_path)[0] == 4


def test_saving_a_step_again_is_no_error(tmp_path):
    write(tmp_path, 2)
    write(tmp_path, 2, 3)
    assert restore(tmp_path)[0] == 3


@drops_errors
@pytest.mark.parametrize("tear", TORN)
def test_a_torn_newest_checkpoint_falls_back_and_says_so(tmp_path, tear, caplog):
    write(tmp_path, 1, 2)
    tear(tmp_path / "2")
    with caplog.at_level(logging.WARNING, "apd_jax"):
        step, state = restore(tmp_path)
    assert step == 1
    same(state, make_state(1))
    messages = [
        record.getMessage() for record in caplog.records if record.name.startswith("apd_jax")
    ]
    assert len(messages) == 1 and messages[0].startswith(
        f"checkpoint 2 in {tmp_path} cannot be read ("
    )
    assert messages[0].endswith("trying the one before.") and "\n" not in messages[0]
    # Training then writes step 2 anew.
    write(tmp_path, 2)
    step, state = restore(tmp_path)
    assert step == 2
    same(state, make_state(2))


@drops_errors
@pytest.mark.parametrize("tear", TORN)
def test_all_torn_is_an_error(tmp_path, tear):
    write(tmp_path, 1, 2)
    for step in ("1", "2"):
        tear(tmp_path / step)
    with pytest.raises(
        InputError, match=r"none of the checkpoints \[2, 1\] in .* can be read; delete that folder"
    ):
        restore(tmp_path)
    with pytest.raises(InputError, match=r"none of the checkpoints \[2, 1\]"):
        checkpoint.read(tmp_path)


def test_an_unfinished_save_is_not_a_checkpoint(tmp_path):
    write(tmp_path, 1)
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp-7")
    # Not `restore`: orbax clears such folders in a thread that close() leaves running.
    assert checkpoint.read(tmp_path, make_state(1))[1] == 1
    write(tmp_path, 2)
    assert restore(tmp_path)[0] == 2
    assert not list(tmp_path.glob("*tmp*"))


@drops_errors
def test_read_knows_no_network(tmp_path):
    write(tmp_path, 1, 2)
    sizes, step, arrays = checkpoint.read(tmp_path)
    assert step == 2 and list(sizes) == [1, 2] and all(size > 100 for size in sizes.values())
    factors = make_state(2).components.factors["layer.kernel"]
    np.testing.assert_array_equal(arrays["components"]["tree"]["layer"]["kernel"]["U"], factors.U)
    truncate(tmp_path / "2")
    assert checkpoint.read(tmp_path)[1] == 1


def test_read_refuses_what_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"holds no checkpoint yet"):
        checkpoint.read(tmp_path)
    with pytest.raises(InputError, match=r"does not exist"):
        checkpoint.read(tmp_path / "nowhere")
