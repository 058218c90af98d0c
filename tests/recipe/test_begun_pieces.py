"""Pieces of methods with learned gates at what the recipe finds: a network whose truth is plain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apd_jax import components as lib
from apd_jax.errors import InputError
from apd_jax.methods.spd import SPD
from apd_jax.methods.whole import Whole
from apd_jax.network.problem import Problem
from apd_jax.recipe import beginning, pieces, run

F = 8
# Two features share every hidden dimension, with opposite signs; the nonlinearity drops the other.
READ = np.kron(np.eye(F // 2), [[1.0], [-1.0]]).astype(np.float32)  # [F, F / 2]
WRITE = 1.5 * READ.T


def apply_fn(params, x):
    return jax.nn.relu(x @ params["read"] @ params["write"])


def sample(key, step):
    on, size = jax.random.split(jax.random.fold_in(key, step))
    rare = jax.random.bernoulli(on, 0.08, (256, F))
    return rare * jax.random.uniform(size, (256, F), minval=0.2)


@pytest.fixture(scope="module")
def problem():
    params = {"read": jnp.asarray(READ), "write": jnp.asarray(WRITE)}
    return Problem(apply_fn, params, sample)


METHOD = SPD(num_components=12, batch_size=256, initial="found", num_steps=1)


@pytest.fixture(scope="module")
def begun(problem):
    return pieces.found(problem, METHOD)


def parts(f):
    """The pieces of a site that are not 0."""
    P = np.asarray(f.weights)
    return P[np.abs(P).max(axis=(1, 2)) > 0]


def in_order(P, axis):
    """By the entry along this axis of the weight that a piece reads or writes."""
    return P[np.argsort(np.abs(P).sum(axis=3 - axis).argmax(axis=1))]


def test_sites_with_own_numbers_take_a_piece_for_every_feature(problem, begun):
    assert begun.num_components == 24
    read, write = (in_order(parts(begun.factors[n]), i) for n, i in (("read", 1), ("write", 2)))
    for f in range(F):
        wanted = np.zeros_like(READ), np.zeros_like(WRITE)
        wanted[0][f], wanted[1][:, f] = READ[f], WRITE[:, f]
        np.testing.assert_allclose(read[f], wanted[0], atol=1e-3)
        np.testing.assert_allclose(write[f], wanted[1], atol=1e-3)
    total = lib.total(begun, problem.params)
    for name, matrix in (("read", READ), ("write", WRITE)):
        np.testing.assert_allclose(total[name], matrix, atol=1e-5)
        # What is left over can learn, and adds nothing.
        f = begun.factors[name]
        assert f.num_pieces == 12 and np.abs(np.asarray(f.U)).max(axis=(1, 2)).all()


def test_a_split_that_is_refused_leaves_the_leaf_whole(problem, monkeypatch):
    refusal = beginning._Search._refusal

    def refuse(self, kind, modes, *about):
        return "no" if modes.writes else refusal(self, kind, modes, *about)

    monkeypatch.setattr(beginning._Search, "_refusal", refuse)
    begun = pieces.found(problem, METHOD)
    assert len(parts(begun.factors["read"])) == F
    assert len(parts(begun.factors["write"])) == np.linalg.matrix_rank(WRITE)


def test_sites_may_have_ranks_of_their_own(problem):
    select = {"read": {"components": 10}, "write": {"rank": 2}}
    own = Problem(apply_fn, problem.params, sample, select=select)
    begun = pieces.found(own, METHOD)
    shapes = {name: (f.num_pieces, f.rank) for name, f in begun.factors.items()}
    assert shapes == {"read": (10, 1), "write": (12, 2)}
    np.testing.assert_allclose(lib.total(begun, own.params)["write"], WRITE, atol=1e-5)


def test_one_number_holds_a_feature_at_both_sites(problem):
    method = Whole(num_components=12, rank=1, batch_size=256, initial="found", num_steps=2)
    begun = pieces.found(problem, method)
    read, write = (np.asarray(begun.factors[n].weights) for n in ("read", "write"))
    alive = np.flatnonzero(np.abs(read).max(axis=(1, 2)))
    assert len(alive) == F
    for c in alive:
        np.testing.assert_array_equal(
            np.abs(read[c]).sum(axis=1).argmax(), np.abs(write[c]).sum(axis=0).argmax()
        )


def test_training_begins_there(problem, begun, tmp_path):
    method = METHOD.replace(learning_rate=1e-9, steps_per_call=1)
    trained = run.run(problem, method, workdir=tmp_path)[0]
    for name, f in begun.factors.items():
        np.testing.assert_allclose(trained.components.factors[name].V, f.V, atol=1e-6)


def test_too_few_pieces_are_said(problem, caplog):
    begun = pieces.found(problem, METHOD.replace(num_components=6))
    assert "room for 6 of 8 parts" in caplog.text
    assert len(parts(begun.factors["read"])) == 6


def test_where_nothing_is_found_it_is_said(problem, monkeypatch):
    monkeypatch.setattr(beginning, "KINDS", {})
    with pytest.raises(InputError, match=r"initial = 'found'.*begin at 'svd' or 'random'"):
        pieces.found(problem, METHOD)
