"""Components are found again in another order, sign and length; other leaves are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close

from apd_jax import components as components_lib
from apd_jax.components import Components, Factors
from apd_jax.errors import InputError
from apd_jax.evaluation import matching

PARAMS = {"a": jnp.zeros((6, 4)), "b": jnp.zeros((4, 5))}


def drawn(seed, C=5):
    return components_lib.init(jax.random.key(seed), PARAMS, num_components=C, rank=2)


def flat(components):
    parts = components_lib.materialize(components)
    return np.concatenate(
        [np.asarray(parts[name]).reshape(components.num_components, -1) for name in ("a", "b")],
        axis=1,
    )


def test_cosines_of_whole_components():
    first, second = drawn(0), drawn(1, C=3)
    P, Q = flat(first), flat(second)
    lengths = np.outer(np.linalg.norm(P, axis=1), np.linalg.norm(Q, axis=1))
    close(matching.cosines(first, second), P @ Q.T / lengths)


def test_sites_with_numbers_of_their_own():
    # Components 0 to 2 have their pieces in a, 3 and 4 in b.
    first, factors = drawn(0), drawn(1).factors
    own = {
        "a": Factors(factors["a"].U[:3], factors["a"].V[:3], (6, 4), ids=range(3)),
        "b": Factors(factors["b"].U[3:], factors["b"].V[3:], (4, 5), ids=range(3, 5)),
    }
    second = Components(own, 5)
    P, Q = flat(first), flat(second)
    lengths = np.outer(np.linalg.norm(P, axis=1), np.linalg.norm(Q, axis=1))
    close(matching.cosines(first, second), P @ Q.T / lengths)
    close(matching.cosines(second, second)[:3, 3:], np.zeros((3, 2)))


def test_a_permutation_is_found():
    first, order = drawn(0), np.array([3, 0, 4, 1, 2])
    # The last one is nothing, and has cosine 0 with everything.
    scale = jnp.array([2.0, 1.0, 0.5, 1.0, 0.0])
    second = jax.tree.map(lambda a: a[order] * jnp.sqrt(scale)[:, None, None], first)
    cosine = matching.cosines(first, second)
    c, d = matching.one_to_one(cosine)
    pairs = dict(zip(d.tolist(), c.tolist(), strict=True))
    assert [pairs[i] for i in range(5)] == order.tolist()
    close(cosine[c, d], np.array([1.0, 1, 1, 1, 0]), 1e-5)


def test_other_leaves_are_refused():
    other = components_lib.init(jax.random.key(0), {"a": jnp.zeros((6, 4))}, num_components=5)
    with pytest.raises(InputError, match=r"leaf 'b': \(4, 5\) and absent"):
        matching.cosines(drawn(0), other)


def test_mean_largest_cosine_of_pieces():
    first, second = (
        components_lib.init(jax.random.key(seed), PARAMS, num_components=C, rank=1)
        for seed, C in ((0, 5), (1, 4))
    )
    alive = (np.array([1, 1, 0, 1, 1], bool), np.array([0, 1, 1, 1], bool))
    found = matching.mean_max_cosine(first, second, alive)
    best = {"U": [], "V": [], "UV": []}
    for name in PARAMS:
        f, g = first.factors[name], second.factors[name]
        for j in np.flatnonzero(alive[0]):
            u, v = np.asarray(f.U[j, :, 0]), np.asarray(f.V[j, 0])
            of: dict = {"U": [], "V": [], "UV": []}
            for k in np.flatnonzero(alive[1]):
                x, y = np.asarray(g.U[k, :, 0]), np.asarray(g.V[k, 0])
                of["U"].append(abs(u @ x) / np.linalg.norm(u) / np.linalg.norm(x))
                of["V"].append(abs(v @ y) / np.linalg.norm(v) / np.linalg.norm(y))
                P, Q = np.outer(u, v), np.outer(x, y)
                of["UV"].append((P * Q).sum() / np.linalg.norm(P) / np.linalg.norm(Q))
            for kind, values in of.items():
                best[kind].append(max(values))
    for kind, values in best.items():
        assert found[kind] == pytest.approx(np.mean(values), abs=1e-6), kind
    # The same pieces in another order, longer and with U and V both reversed, are the same.
    order = np.array([3, 0, 4, 1, 2])
    moved = jax.tree.map(lambda a: -2 * a[order], first)
    everything = (np.ones(5, bool), np.ones(5, bool))
    close(np.array([*matching.mean_max_cosine(first, moved, everything).values()]), np.ones(3))
    assert matching.mean_max_cosine(drawn(0), drawn(1), everything) == {}  # of rank 2
    assert matching.mean_max_cosine(first, second, (alive[0], np.zeros(4, bool))) == {}
