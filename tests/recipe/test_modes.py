"""Modes, on directions and networks whose mechanisms are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apd_jax import components
from apd_jax.errors import InputError
from apd_jax.forward import sparse
from apd_jax.network.problem import Problem
from apd_jax.recipe import held, modes
from apd_jax.recipe.modes import Modes

W = np.array([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0], [1.0, 1.0, 0.0], [0.5, -1.0, 1.0]], np.float32)


@pytest.fixture(autouse=True, scope="module")
def fewer_examples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modes, "NUM_EXAMPLES", 4096)
        yield


def mixtures(key, step, num_features=4, batch=512):
    """Every feature is on with probability 0.08, then uniform in [0, 1]."""
    on, size = jax.random.split(jax.random.fold_in(key, step))
    return jax.random.uniform(size, (batch, num_features)) * jax.random.bernoulli(
        on, 0.08, (batch, num_features)
    )


def fresh(params, C, rank, **options):
    return components.init(jax.random.key(1), params, num_components=C, rank=rank, **options)


def rows_of(ins):
    """Which standard direction each mode reads, and how well."""
    cosine = np.abs(ins)
    return cosine.argmax(-1).tolist(), cosine.max(-1)


@pytest.fixture(scope="module")
def two_layers():
    """x W W2 with W2 of 3 x 4: four features read W apart, and share three hidden dimensions."""
    params = {"first": jnp.asarray(W), "second": jnp.asarray(W.T * 0.5)}
    return Problem(lambda p, x: jnp.tanh(x @ p["first"] @ p["second"]), params, mixtures)


@pytest.fixture(scope="module")
def found(two_layers):
    return modes.find(two_layers, 512, jax.random.key(0))


def test_modes_are_the_single_features(found):
    which, cosine = rows_of(found.ins["first"][:, 0])
    assert sorted(which) == [0, 1, 2, 3] and cosine.min() > 0.99
    assert (np.diff(found.density) <= 0).all()


def test_components_sum_to_the_target_and_each_does_its_own_mode(two_layers, found):
    """Component i is W's row i and no other, up to how pure examples are.

    The second leaf has rank 3 for 4 modes: gain 3/4.
    """
    C, gains = held.components(two_layers, found, fresh(two_layers.params, 6, 2)), found.gains
    for name, leaf in two_layers.params.items():
        np.testing.assert_allclose(components.total(C, two_layers.params)[name], leaf, atol=1e-5)
    assert gains["first"] == pytest.approx(1) and gains["second"] == pytest.approx(0.75)
    which, P = rows_of(found.ins["first"][:, 0])[0], np.asarray(C.factors["first"].weights)
    np.testing.assert_allclose(P[:4], np.eye(4)[which][:, :, None] * W[None], atol=1e-3)
    assert (np.linalg.matrix_rank(P[:4], tol=1e-4) == 1).all()


def test_what_no_mode_reads_goes_to_the_other_components():
    """Feature 3 is never on: its row, of rank 1, is held by a component without a mode."""
    problem = Problem(
        lambda p, x: x @ p["W"], {"W": jnp.asarray(W)}, lambda k, s: mixtures(k, s).at[:, 3].set(0)
    )
    m = modes.find(problem, 512, jax.random.key(0))
    assert len(m) == 3 and m.unexplained < 1e-6
    C = held.components(problem, m, fresh(problem.params, 5, 1))
    P = np.asarray(C.factors["W"].weights)
    np.testing.assert_allclose(P[3], np.eye(4)[:, 3:] * W[3], atol=1e-4)
    assert not P[4].any()
    alone = np.asarray(
        components.weighted_sum(C, problem.params, jnp.array([1.0, 1, 1, 0, 0]))["W"]
    )
    np.testing.assert_allclose(alone, np.diag([1.0, 1, 1, 0]) @ W, atol=1e-4)


@pytest.mark.parametrize("noise, active", [(0.0, 1), (0.03, 8)])
def test_modes_that_nearly_agree_are_told_apart_only_where_they_repeat(noise, active):
    """Eight directions at cosines of 0.9996, so that all but one singular value is small."""
    drawn = np.random.default_rng(0)
    e = np.concatenate([np.eye(8) * 0.02, np.ones((8, 1))], axis=1)
    x = np.repeat(e, 50, axis=0) + noise * drawn.normal(size=(400, 9))
    e, x = ((a / np.linalg.norm(a, axis=1, keepdims=True))[:, None] for a in (e, x))
    m = modes.described({"W": x}, np.ones(400), np.arange(400), {"W": e}, np.ones(8))
    assert m.active == pytest.approx(active, abs=0.1)
    assert m.gains["W"] == pytest.approx(1 if noise == 0 else 1 / 8)


def test_a_leaf_that_modes_share_is_held_by_what_is_always_on():
    """x W H with H of 3 x 3 for six features: its gain is 3/6."""
    tall = np.concatenate([W, [[2.0, -1, 0], [0, 0, -1.5]]]).astype(np.float32)
    params = {"W": jnp.asarray(tall), "hidden": jnp.eye(3)}
    problem = Problem(lambda p, x: x @ p["W"] @ p["hidden"], params, lambda k, s: mixtures(k, s, 6))
    m = modes.find(problem, 512, jax.random.key(0))
    assert len(m) == 6
    C = held.components(problem, m, fresh(params, 8, 3), num_always_on=1)
    assert m.gains == {"hidden": pytest.approx(0.5), "W": pytest.approx(1)}
    P = components.materialize(C)
    np.testing.assert_allclose(P["hidden"][0], np.eye(3), atol=1e-6)
    assert not np.any(P["hidden"][1:]) and not np.any(P["W"][0])
    assert [held.num_to_hold(problem, "hidden", fresh(params, 8, m)) for m in (1, 2, 3)] == [
        3,
        2,
        1,
    ]
    split = held.components(problem, m, fresh(params, 8, 3), num_always_on=1, whole=())
    assert np.abs(components.materialize(split)["hidden"][1:7]).max((1, 2)).min() > 0.1
    two = held.components(problem, m, fresh(params, 8, 2), num_always_on=2)  # rank 2 each
    np.testing.assert_allclose(components.materialize(two)["hidden"].sum(0), np.eye(3), atol=1e-6)
    with pytest.raises(InputError, match="num_always_on to at least 2, or the rank to at least 3"):
        held.components(problem, m, fresh(params, 8, 2), num_always_on=1)


def test_a_component_does_its_part_whatever_else_is_on_or_ablated():
    """A layer that reads what another has written, in superposition.

    That is no sum of what it reads of single features. With W_out apart, and what the second layer
    makes of that always on, features that are not there can be ablated in any combination, and no
    output changes.
    """
    F, D, M = 5, 16, 3
    keys = jax.random.split(jax.random.key(3), 5)
    shapes = {"in_0": (D, M), "out_0": (M, D), "in_1": (D, M), "out_1": (M, D)}
    params = {
        name: jax.random.normal(k, shape) / 2
        for k, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    embed = jax.random.normal(keys[4], (F, D)) / 4

    def fn(p, x):
        r = x @ embed
        for i in range(2):
            r += jax.nn.relu(r @ p[f"in_{i}"]) @ p[f"out_{i}"]
        return r

    problem = Problem(fn, params, lambda k, s: mixtures(k, s, F), select=("in_*",))
    m = modes.find(problem, 512, jax.random.key(0))
    assert len(m) == F
    C = held.components(problem, m, fresh(params, F + 3, 2, select=problem.select), num_always_on=2)
    assert m.gains == {"in_0": pytest.approx(1), "in_1": pytest.approx(1)}
    which = rows_of(m.ins["in_0"][:, 0] @ np.linalg.pinv(embed))[0]
    x = jnp.zeros((64, F)).at[:, which[:2]].set(jax.random.uniform(jax.random.key(5), (64, 2)))
    # Always on, always on, the two that are there.
    factors = jax.random.uniform(jax.random.key(6), (64, F + 3)).at[:, :4].set(1.0)
    expected = fn(params, x)

    def error(C):
        off = jnp.abs(sparse.apply(fn, params, C, factors, x) - expected).max()
        return off / jnp.abs(expected).max()

    assert error(C) < 0.01
    duals = modes.Modes(
        m.ins,
        {name: np.linalg.pinv(e[:, 0].T)[:, None] for name, e in m.ins.items()},
        m.seen,
        m.density,
    )
    worse = held.components(
        problem, duals, fresh(params, F + 3, 2, select=problem.select), num_always_on=2
    )
    assert error(worse) > 5 * error(C)


def test_stacked_weights_and_selected_components():
    """Two matrices under one name, chosen by a scan; the second leaf has components 0, 1 only."""
    params = {"stack": jnp.asarray(np.stack([np.eye(3), 2 * np.eye(3)])), "out": jnp.eye(3)}

    def fn(p, x):
        return jax.lax.scan(lambda h, w: (h @ w, None), x, p["stack"])[0] @ p["out"]

    problem = Problem(
        fn,
        params,
        lambda k, s: mixtures(k, s, 3),
        select={"stack": {}, "out": {"components": [0, 1]}},
    )
    m = modes.find(problem, 512, jax.random.key(0))
    C = held.components(
        problem, m, fresh(params, 4, 1, select=problem.select, layouts=problem.layouts)
    )
    P = components.materialize(C)
    np.testing.assert_allclose(P["stack"].sum(0), params["stack"], atol=1e-5)
    which, _ = rows_of(m.ins["stack"][:, 0])
    for c, row in enumerate(which):
        np.testing.assert_allclose(
            P["stack"][c], np.diag(np.eye(3)[row]) * np.array([1, 2])[:, None, None], atol=0.05
        )
    assert not np.any(P["out"][2:]) and C.factors["out"].U.shape[0] == 2
    # What the two of them do there is theirs; the third mode's part belongs to nobody.
    which = rows_of(m.ins["out"][:, 0])[0][:2]
    np.testing.assert_allclose(P["out"].sum(0), np.eye(3)[which].T @ np.eye(3)[which], atol=0.05)


def test_a_site_with_several_pieces_of_one_number_is_filled_piece_by_piece():
    """Ranks 2, 1, 1 and 2: components 0 and 3 have two pieces of rank 1. Rows 0 to 2 of W are read,
    and one by one held by modes; what W makes of feature 3, of rank 1, goes to the last."""
    ranks = {"W": {"rank": [2, 1, 1, 2]}}
    problem = Problem(
        lambda p, x: x @ p["W"],
        {"W": jnp.asarray(W)},
        lambda k, s: mixtures(k, s).at[:, 3].set(0),
        select=ranks,
    )
    m = modes.find(problem, 512, jax.random.key(0))
    C = held.components(problem, m, fresh(problem.params, 4, None, select=ranks))
    assert C.factors["W"].ids == (0, 0, 1, 2, 3, 3) and len(m) == 3
    P = components.materialize(C)["W"]
    np.testing.assert_allclose(P[3], np.eye(4)[:, 3:] * W[3], atol=1e-4)
    np.testing.assert_allclose(P.sum(0), W, atol=1e-5)
    assert not np.any(C.factors["W"].V[1]) and np.any(C.factors["W"].U[1])  # so its rank can grow


def test_batches_from_the_host_are_looked_at_as_a_samplers():
    """As many as are needed, not the first alone, of one pass."""
    params, key = {"w": jnp.asarray(W)}, jax.random.key(0)
    rows = [np.asarray(mixtures(key, step, batch=64)) for step in range(40)]
    of_list = Problem(lambda p, x: x @ p["w"], params, rows)
    of_sampler = Problem(of_list.apply_fn, params, lambda rng, step: mixtures(rng, step, batch=64))
    (ins, effect), (expected, same) = (
        modes.examples(problem, problem.looks(key, 40)) for problem in (of_list, of_sampler)
    )
    np.testing.assert_allclose(ins["w"], expected["w"], atol=1e-6)
    np.testing.assert_allclose(effect, same, rtol=1e-6)
    found = modes.find(of_list, 64, key)  # asks for 64 batches of the 40
    assert len(found) == 4 and rows_of(found.ins["w"][:, 0])[1].min() > 0.99


def test_scattered_examples_have_no_modes():
    """300 directions in 200 dimensions: none has another one near."""
    e = np.random.default_rng(0).normal(size=(300, 1, 200)).astype(np.float32)
    e /= np.linalg.norm(e, axis=-1, keepdims=True)
    assert (
        len(
            modes.densest(
                {"W": e}, np.ones(300, np.float32), {"W": np.eye(200, dtype=np.float32)[None]}
            )
        )
        == 0
    )


def test_a_mode_far_below_the_usual_density_is_none():
    """40 examples each of three directions, 10 of a fourth (below 0.35 · 40), 20 of a fifth."""
    e = np.repeat(np.eye(5, dtype=np.float32), [40, 40, 40, 10, 20], axis=0)[:, None]
    m = modes.densest(
        {"W": e}, np.ones(len(e), np.float32), {"W": np.eye(5, dtype=np.float32)[None]}
    )
    assert m.unexplained == pytest.approx(10 / 150, rel=1e-4) and m.active == pytest.approx(
        140 / 150
    )
    assert (
        m.density.tolist() == [40, 40, 40, 20]
        and isinstance(m.first(2), Modes)
        and len(m.first(2)) == 2
    )
    # The first 40 hardly move the outputs.
    weak = np.where(np.arange(len(e)) < 40, 0.01, 1.0).astype(np.float32)
    without = modes.densest({"W": e}, weak, {"W": np.eye(5, dtype=np.float32)[None]})
    assert len(without) == 3 and without.active == pytest.approx(100 / 150)  # no mode is theirs


def test_one_leaf_can_tell_apart_what_all_together_do_not():
    """Four mechanisms, which all read nearly the same of a second leaf, of greater effect."""
    first = np.repeat(np.eye(4, dtype=np.float32), 30, axis=0)[:, None]
    second = np.ones((120, 1, 3), np.float32) + 0.1 * first[..., :3]
    second /= np.linalg.norm(second, axis=-1, keepdims=True)
    ins = {"second": second, "first": first}
    wide, narrow = np.eye(4, dtype=np.float32)[None], np.ones((1, 3, 1), np.float32)
    weights, effect = {"second": narrow, "first": wide}, np.ones(120, np.float32)
    assert len(modes.densest(ins, effect, weights)) == 1
    assert modes.by_richness(ins | {"same": first}, effect) == ["first", "second"]
    found = modes.densest(ins, effect, weights, by="first")
    assert found.density.tolist() == [30] * 4 and set(found.ins) == {"first", "second"}
    np.testing.assert_allclose(np.abs(found.ins["first"][:, 0] @ wide[0]).max(1), 1, atol=1e-5)
