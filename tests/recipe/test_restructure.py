"""Joining and clearing between stages, on TMS with components that are pieces of the truth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apd_jax import components
from apd_jax.components import Components
from apd_jax.components.layout import Layout
from apd_jax.methods.apd import APD
from apd_jax.network.problem import Problem
from apd_jax.recipe import restructure
from apd_jax.recipe.restructure import Usage

W = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, -0.2]], np.float32)  # three features in two dimensions


def rows(*parts):
    """Components from {row: part of W's row} each."""
    P = np.zeros((len(parts), 3, 2), np.float32)
    for c, part in enumerate(parts):
        for row, share in part.items():
            P[c, row] = share * W[row]
    return components.from_materialized({"W": jnp.asarray(P)}, uses={"W": 2})


def usage(groups, C, square=1.0):
    """Components of a group matter on the same inputs, a tenth of all.

    Those of different groups never matter together.
    """
    member = np.array([[c in group for c in range(C)] for group in groups], np.float32)
    together = 0.1 * member.T @ member
    return Usage(together, np.diag(together), np.full(C, square) * np.diag(together))


def weights(c):
    return np.asarray(c.factors["W"].weights)


def test_two_halves_become_one():
    c = rows({0: 0.5}, {0: 0.5}, {1: 1}, {2: 1})
    joined, alive = restructure.restructure(c, usage([{0, 1}, {2}, {3}], 4), 0.3)
    np.testing.assert_allclose(weights(joined)[0, 0], W[0], atol=1e-6)
    assert alive.tolist() == [True, False, True, True] and not weights(joined)[1].any()
    np.testing.assert_allclose(components.total(joined, {"W": jnp.asarray(W)})["W"], W, atol=1e-6)


def test_pieces_that_are_not_parallel_are_joined_where_that_is_simpler():
    """Halves [1, 1]/2 and [1, -1]/2 of one row: always together, their sum has rank 1.

    sqrt(1) < 2·sqrt(√½) = 1.68, joined.
    """
    P = np.zeros((2, 3, 2), np.float32)
    P[0, 0], P[1, 0] = [0.5, 0.5], [0.5, -0.5]
    c = components.from_materialized({"W": jnp.asarray(P)})
    assert restructure.restructure(c, usage([{0, 1}], 2), 0.2)[1].sum() == 1
    # Never together: two mechanisms.
    assert restructure.restructure(c, usage([{0}, {1}], 2), 0.2)[1].sum() == 2


def test_two_features_stay_apart_though_always_together():
    """Rows 0 and 1 in one component have rank 2: sqrt(1) + sqrt(1) = 2, no less than the two."""
    _, alive = restructure.restructure(rows({0: 1}, {1: 1}, {2: 1}), usage([{0, 1}, {2}], 3), 0.3)
    assert alive.all()


def test_what_hardly_matters_is_cleared_or_begun_anew():
    c = rows({0: 1}, {1: 1}, {2: 1}, {0: 0.1, 1: 0.1})
    seen = usage([{0}, {1}, {2}, {3}], 4, square=np.array([1, 1, 1, 0.05]))
    cleared, alive = restructure.restructure(c, seen, 0.4)
    assert alive.tolist() == [True, True, True, False] and not weights(cleared)[3].any()
    fresh = components.init(
        jax.random.key(0), {"W": jnp.asarray(W)}, num_components=4, rank=2, uses={"W": 2}
    )
    revived, _ = restructure.restructure(c, seen, 0.4, fresh=fresh)
    np.testing.assert_allclose(weights(revived)[3], weights(fresh)[3], rtol=1e-6)
    rare = seen._replace(firing=seen.firing * np.array([1, 1, 1e-4, 1]))
    assert restructure.restructure(c, rare, 0.4)[1].tolist() == [True, True, False, False]


def test_stacked_matrices_and_low_rank():
    """A stack of two 3x2 matrices per component; the joined rank-1 halves fit rank 1 exactly."""
    U = np.ones((2, 2, 3, 1), np.float32)
    V = np.full((2, 2, 1, 2), 0.5, np.float32)
    c = components.init(
        jax.random.key(0), {"W": jnp.zeros((2, 3, 2))}, num_components=2, rank=1, layouts=stacked()
    )
    f = dataclasses.replace(c.factors["W"], U=jnp.asarray(U), V=jnp.asarray(V))
    joined, alive = restructure.restructure(Components({"W": f}), usage([{0, 1}], 2), 0.2)
    assert alive.tolist() == [True, False]
    np.testing.assert_allclose(weights(joined)[0], np.ones((2, 3, 2)), atol=1e-6)


def test_sites_that_hold_some_numbers_only_keep_their_pieces():
    """Halves 0 and 1 stand at both sites and are joined; 2 is parallel to them, but stands at the
    first only, where it is never kept, and is begun anew."""
    c = components.init(
        jax.random.key(0),
        {"V": jnp.zeros((2, 2)), "W": jnp.zeros((3, 2))},
        num_components=4,
        select={"V": {"components": [0, 1]}, "W": {"rank": [1, 1, 1, 2]}},
    )
    e, V = np.eye(3, dtype=np.float32)[:, :, None], np.array([[0.5, 0.5]], np.float32)
    U, V = jnp.asarray(e[[0, 0, 0, 1, 2]]), jnp.asarray(np.stack([V] * 5))
    W = dataclasses.replace(c.factors["W"], U=U, V=V)
    c = Components({"V": c.factors["V"], "W": W}, c.count)
    before = components.materialize(c)
    joined, alive = restructure.restructure(c, usage([{0, 1, 2}, {3}], 4), 0.2)
    assert alive.tolist() == [True, False, True, True]
    assert [f.ids for f in joined.factors.values()] == [range(0, 2), (0, 1, 2, 3, 3)]
    after = components.materialize(joined)
    for name in ("V", "W"):
        np.testing.assert_allclose(after[name].sum(0), before[name].sum(0), atol=1e-6)
        np.testing.assert_allclose(after[name][2:], before[name][2:], atol=1e-6)
        assert not after[name][1].any()


def stacked():
    return {"W": Layout((0,), (1,), (2,))}


@pytest.mark.parametrize("iterable", [False, True])
def test_usage_counts_what_numpy_counts(iterable):
    """Linear network: A_c(x)² = mean_o (x P_c)_o², brute force over the same batches."""
    c = rows({0: 1}, {1: 1}, {2: 1}, {0: 0.3, 2: 0.3})
    method = APD(batch_size=5000, topk=1.0)

    def sample(key, step):
        return jax.random.normal(jax.random.fold_in(key, step), (5000, 3))

    key = jax.random.key(3)
    batches = [sample(key, step) for step in range(4)]
    problem = Problem(
        lambda p, x: x @ p["W"], {"W": jnp.asarray(W)}, batches if iterable else sample
    )
    found = restructure.measure(problem, method, 0.4, key)(c)
    kept, A = [], []
    for x in map(np.asarray, batches):
        a = np.sqrt(np.mean(np.einsum("bf,cfh->bch", x, weights(c)) ** 2, axis=-1))
        kept.append(a >= np.sort(a.ravel())[-5000])
        A.append(a)
    kept, A = np.concatenate(kept), np.concatenate(A)
    matters = A > 0.4
    np.testing.assert_allclose(
        found.together, matters.T.astype(float) @ matters / len(A), atol=1e-3
    )
    np.testing.assert_allclose(found.firing, (kept & matters).mean(0), atol=1e-3)
    np.testing.assert_allclose(found.square, (A**2 * (kept & matters)).mean(0), rtol=2e-3)
