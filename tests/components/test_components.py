"""The component pytree: drawing, summing, selecting, and its numbers against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import close

from apd_jax import components as lib
from apd_jax.errors import InputError

PARAMS = {
    "conv": jnp.ones((2, 2, 3, 4)),
    "dense": {"bias": jnp.arange(5.0), "kernel": jnp.ones((4, 5))},
    "steps": jnp.zeros((2, 2), jnp.int32),
}


def init(**more):
    return lib.init(jax.random.key(0), PARAMS, **{"num_components": 3, **more})


def test_default_selection_is_every_floating_matrix():
    components = init()
    # A kernel with more axes is a matrix of its inputs x outputs: 2·2·3 = 12 by 4.
    shapes = {name: (f.U.shape, f.V.shape, f.shape) for name, f in components.factors.items()}
    assert shapes == {
        "conv": ((3, 12, 4), (3, 4, 4), (2, 2, 3, 4)),
        "dense.kernel": ((3, 4, 4), (3, 4, 5), (4, 5)),
    }
    assert components.num_components == 3
    assert components.num_params == 48 + 20


def test_selection_by_pattern_rank_and_uses():
    components = init(select=["dense.*"], rank=2, uses={"dense.kernel": 2})
    # A vector is one row.
    assert {n: (f.U.shape, f.V.shape) for n, f in components.factors.items()} == {
        "dense.bias": ((3, 1, 2), (3, 2, 5)),
        "dense.kernel": ((3, 4, 2), (3, 2, 5)),
    }
    assert components.num_params == 5 + 2 * 20
    assert init(select="dense.kernel", rank=9).factors["dense.kernel"].U.shape == (3, 4, 9)


def test_options_of_leaves():
    """A rank of its own, and only some components: the others are 0 there, and stay so."""
    components = init(
        select={"conv": {"components": [0, 2]}, "dense.*": {}, "dense.bias": {"rank": 1}}, rank=2
    )
    # The conv holds two pieces, of components 0 and 2.
    shapes = {name: f.U.shape for name, f in components.factors.items()}
    assert shapes == {"conv": (2, 12, 2), "dense.bias": (3, 1, 1), "dense.kernel": (3, 4, 2)}
    assert components.factors["conv"].ids == (0, 2) and components.num_components == 3

    def squares(c):
        leaves = jax.tree.leaves(lib.total(c, PARAMS))
        return sum(jnp.sum(leaf**2) for leaf in leaves if leaf.dtype == jnp.float32)

    optimizer = optax.adam(0.1)
    gradient = jax.grad(squares)(components)
    updates, _ = optimizer.update(gradient, optimizer.init(components), components)
    for trained in (optax.apply_updates(components, updates), lib.normalize_U(components)):
        for array in (trained.factors["conv"].U, trained.factors["conv"].V):
            assert array.all()
        weights = lib.materialize(trained)["conv"]
        assert not weights[1].any() and weights[0].all() and weights[2].all()
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(trained))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"select": {"conv": {"ranks": 2}}}, "unknown option 'ranks' for 'conv'"),
        ({"select": {"conv": {"components": [3]}}}, "gives 'conv' components outside 0 to 2"),
        ({"select": {"conv": {"components": []}}}, "components outside 0 to 2, or none"),
        ({"select": {"conv": {"rank": 0}}}, "rank must be at least 1; got 0 for 'conv'"),
        ({"select": {"conv": {"rank": [1, 2]}}}, "'conv' 2 ranks; give one .* its 3 components"),
        ({"select": {"conv": {"rank": [1, 0, 2]}}}, "'conv' 3 ranks; give one of at least 1"),
        ({"ids": {"conv": range(2, 4)}}, "components outside 0 to 2"),
        ({"num_components": 0}, "at least 1; got 0"),
        ({"rank": 0}, "at least 1"),
        ({"select": "kernel"}, "'kernel' matches no leaf of params; its leaves: conv, dense.bias"),
        ({"select": "steps"}, "'steps' of dtype int32; only floating"),
        ({"uses": {"dense.bias": 2}}, r"uses names \['dense.bias'\]"),
    ],
)
def test_refused(more, message):
    with pytest.raises(InputError, match=message):
        init(**more)
    with pytest.raises(InputError, match="no floating leaf"):
        lib.init(jax.random.key(0), {"b": jnp.zeros(3)}, num_components=2)


def test_initial_scale_counts_the_component_axis():
    # std = s·sqrt(2 / ((C + 1)·a·b)): for C = 7, a matrix 50 x 40 at s = 0.5 and m = 40.
    # U 0.5·sqrt(2 / 16000), V 0.5·sqrt(2 / 12800).
    components = lib.init(
        jax.random.key(1), {"w": jnp.zeros((50, 40))}, num_components=7, init_scale=0.5
    )
    factors = components.factors["w"]
    np.testing.assert_allclose(
        jnp.std(factors.U), 0.5 * np.sqrt(2 / 16_000), rtol=0.03
    )  # 14,000 draws
    np.testing.assert_allclose(jnp.std(factors.V), 0.5 * np.sqrt(2 / 12_800), rtol=0.03)
    again = lib.init(
        jax.random.key(1), {"w": jnp.zeros((50, 40))}, num_components=7, init_scale=0.5
    )
    assert jnp.array_equal(again.factors["w"].U, factors.U)


def test_leaves_draw_independently():
    factors = lib.init(
        jax.random.key(0), {"a": jnp.zeros((3, 3)), "b": jnp.zeros((3, 3))}, num_components=2
    ).factors
    assert not jnp.allclose(factors["a"].U, factors["b"].U)
    assert not jnp.allclose(factors["a"].U, factors["a"].V)


def test_total_is_the_sum_of_the_materialised():
    components = init(select=["conv", "*.kernel"])
    weights, total = lib.materialize(components), lib.total(components, PARAMS)
    assert weights["dense"]["bias"] is None and weights["steps"] is None
    assert weights["conv"].shape == (3, 2, 2, 3, 4)
    close(total["conv"], weights["conv"].sum(0))
    close(total["dense"]["kernel"], weights["dense"]["kernel"].sum(0))
    assert total["dense"]["bias"] is PARAMS["dense"]["bias"] and total["steps"] is PARAMS["steps"]


def test_weighted_sum():
    components = init()
    weights = lib.materialize(components)
    # 1·P_0 + 0·P_1 - 2·P_2
    summed = lib.weighted_sum(components, PARAMS, jnp.array([1.0, 0.0, -2.0]))
    close(summed["conv"], weights["conv"][0] - 2 * weights["conv"][2])
    assert summed["dense"]["bias"] is PARAMS["dense"]["bias"]


def test_from_materialized_is_the_inverse(pentagon):
    close(lib.materialize(pentagon.components)["W"], pentagon.weights["W"], 1e-6)
    close(lib.total(pentagon.components, pentagon.params)["W"], pentagon.params["W"], 1e-6)
    weights = lib.materialize(init())
    close(lib.materialize(lib.from_materialized(weights))["conv"], weights["conv"])
    # Rank one keeps the largest singular value. The pentagon's components are of rank one, so
    # nothing is lost.
    of_rank_one = lib.from_materialized(pentagon.weights, rank=1)
    close(lib.materialize(of_rank_one)["W"], pentagon.weights["W"], 1e-6)


def test_norms_and_ranks_against_numpy():
    components = init()
    P = {name: np.asarray(f.U @ f.V, np.float64) for name, f in components.factors.items()}
    for name, squares in lib.squared_norms(components).items():
        close(squares, (P[name] ** 2).sum((1, 2)))
    for name, values in lib.singular_values(components).items():
        close(values, np.linalg.svd(P[name], compute_uv=False))


def test_effective_rank_is_relative_to_the_leaf_over_all_components():
    # Singular values (5, 1, 0), (0.06, 0.04, 0), (0, 0, 0); 1 % of the leaf's largest is 0.05.
    P = jnp.stack(
        [jnp.diag(jnp.array(d)) for d in ([5.0, 1.0, 0.0], [0.06, 0.04, 0.0], [0.0, 0.0, 0.0])]
    )
    components = lib.from_materialized({"w": P})
    assert lib.effective_ranks(components)["w"].tolist() == [2, 1, 0]
    assert lib.effective_ranks(components, tolerance=0.5)["w"].tolist() == [1, 0, 0]


def test_pentagon_components_have_rank_and_norm_one(pentagon):
    close(lib.squared_norms(pentagon.components)["W"], np.ones(5), 1e-6)
    assert lib.effective_ranks(pentagon.components)["W"].tolist() == [1] * 5


def test_unit_norm_and_its_gradient_projection():
    components = lib.normalize_U(init())
    close(jnp.linalg.norm(components.factors["conv"].U, axis=1), np.ones((3, 4)), 1e-6)
    assert jnp.array_equal(components.factors["conv"].V, init().factors["conv"].V)
    gradient = jax.tree.map(jnp.ones_like, components)
    projected = lib.project_U_gradient(gradient, components)
    for name, f in components.factors.items():
        g = projected.factors[name]
        along = jnp.sum(g.U * f.U, axis=1)  # nothing is left along the column
        np.testing.assert_allclose(along, np.zeros_like(along), atol=1e-6)
        assert jnp.array_equal(g.V, gradient.factors[name].V)
    # By hand: u = (0.6, 0.8), g = (1, 1): g·u = 1.4, g - 1.4 u = (0.16, -0.12).
    one = lib.Components(
        {"w": lib.Factors(jnp.array([[[0.6], [0.8]]]), jnp.ones((1, 1, 1)), shape=(2, 1))}
    )
    np.testing.assert_allclose(
        lib.project_U_gradient(jax.tree.map(jnp.ones_like, one), one).factors["w"].U[0, :, 0],
        [0.16, -0.12],
        atol=1e-6,
    )


def test_is_a_pytree_for_jit_grad_vmap_and_optax():
    components = init()

    def loss(c):
        return sum(jnp.sum(n) for n in lib.squared_norms(c).values())

    gradient = jax.jit(jax.grad(loss))(components)
    optimizer = optax.sgd(0.1)
    updates, _ = optimizer.update(gradient, optimizer.init(components), components)
    moved = optax.apply_updates(components, updates)
    assert jax.tree.structure(moved) == jax.tree.structure(components)
    assert moved.factors["conv"].shape == (2, 2, 3, 4)
    assert loss(moved) < loss(components)
    several = jax.vmap(lambda key: lib.init(key, PARAMS, num_components=3))(
        jax.random.split(jax.random.key(0), 2)
    )
    assert several.factors["conv"].U.shape == (2, 3, 12, 4)
    assert several.num_components == 3
    assert jax.vmap(loss)(several).shape == (2,)


def test_other_structure_or_shape_is_refused():
    components = init()
    with pytest.raises(InputError, match="differ in structure: more"):
        lib.total(components, PARAMS | {"more": jnp.zeros(2)})
    with pytest.raises(
        InputError,
        match=r"'dense.kernel' has shape \(4, 6\), but the components were made for \(4, 5\)",
    ):
        lib.total(
            components, PARAMS | {"dense": {"bias": jnp.zeros(6), "kernel": jnp.zeros((4, 6))}}
        )


def test_from_raw_reads_a_checkpoints_plain_dicts():
    factors = init().factors["dense.kernel"]
    raw = lib.from_raw({"dense": {"kernel": {"U": factors.U, "V": factors.V}, "bias": None}})
    assert list(raw.factors) == ["dense.kernel"]
    assert raw.factors["dense.kernel"].shape == (4, 5)


# Sites that hold pieces of some components


def test_numbers_of_pieces():
    def ids(**more):
        found = init(**{"num_components": 6} | more)
        return {name: f.ids for name, f in found.factors.items()}

    # All numbers are None, consecutive ones a range, whatever was given.
    assert ids() == {"conv": None, "dense.kernel": None}
    assert ids(select={"conv": {"components": range(6)}, "dense.kernel": {}})["conv"] is None
    assert ids(select={"conv": {"components": [3, 2]}})["conv"] == range(2, 4)
    assert ids(select={"conv": {"components": (5, 0, 2)}})["conv"] == (0, 2, 5)
    # Of several matching patterns the last wins; `select` before `ids`.
    own = {"conv": range(0, 2), "dense.kernel": range(2, 6)}
    assert ids(ids=own) == own
    chosen = {"*n*": {"components": [1]}, "conv": {"components": [4]}}
    both = ids(select=chosen | {"dense.bias": {}}, ids=own)
    assert both["conv"] == range(4, 5) and both["dense.kernel"] == range(1, 2)


def test_ranks_of_pieces():
    """A list of ranks: as many pieces of rank one with a component's number as its rank."""
    found = init(select={"conv": {"rank": [2, 1, 3]}, "dense.kernel": {"rank": 2}})
    conv = found.factors["conv"]
    assert conv.ids == (0, 0, 1, 2, 2, 2) and conv.U.shape == (6, 12, 1)
    assert found.factors["dense.kernel"].ids is None
    ranks = jnp.linalg.matrix_rank(lib.materialize(found)["conv"].reshape(3, 12, 4))
    assert ranks.tolist() == [2, 1, 3]
    # Beside numbers of its own, one rank for each of those.
    some = init(select={"conv": {"rank": np.array([1, 2]), "components": [0, 2]}})
    assert some.factors["conv"].ids == (0, 2, 2) and some.num_components == 3


def test_like_the_target_the_sum_has_the_spread_of_the_leaf():
    params = {"w": 3 * jax.random.normal(jax.random.key(3), (60, 50))}
    for n, m in ((40, 1), (10, 4)):
        found = lib.init(
            jax.random.key(0), params, num_components=n, rank=m, like_target=True, init_scale=1.0
        )
        f = found.factors["w"]
        np.testing.assert_allclose(jnp.std(lib.leaf_total(f)), 3.0, rtol=0.1)
        np.testing.assert_allclose(jnp.std(f.U), 60**-0.5, rtol=0.05)
        # V ~ N(0, d_in·var(θ*)/(n·m)): 60·9/40.
        np.testing.assert_allclose(jnp.std(f.V), (60 * 9 / 40) ** 0.5, rtol=0.1)


STACKED = lib.Layout((0,), (1,), (2,))
IDS = {
    "a": (range(1, 3), {}),  # consecutive ones
    "b": ((4, 0, 2), {"uses": 2}),  # a list, in any order
    "c": ((3, 1, 3, 3), {"shape": (2, 3)}),  # several pieces of one component: its sum
    "d": (None, {"shape": (2, 3, 4), "layout": STACKED}),  # all of them, two matrices each
    "e": ((4, 4), {"shape": (2, 3, 4), "layout": STACKED}),
}


def some_pieces(C=5, **sites):
    """Random components whose sites hold pieces of these numbers."""
    rng, tree = np.random.default_rng(7), {}
    for name, (ids, more) in (sites or IDS).items():
        more = {"shape": (3, 4)} | more
        n, batch = C if ids is None else len(ids), more["shape"][:-2]
        d_in, d_out = more["shape"][-2:]
        U, V = rng.normal(size=(n, *batch, d_in, 2)), rng.normal(size=(n, *batch, 2, d_out))
        tree[name] = lib.Factors(jnp.float32(U), jnp.float32(V), ids=ids, **more)
    return lib.Components(tree, C)


def formed(components):
    """{site: P_c [C, *batch, d_in, d_out]} by numpy, piece after piece."""
    out = {}
    for name, f in components.factors.items():
        pieces = np.asarray(f.U, np.float64) @ np.asarray(f.V, np.float64)
        total = np.zeros((components.num_components, *pieces.shape[1:]))
        for j, c in enumerate(range(f.num_pieces) if f.ids is None else f.ids):
            total[c] += pieces[j]
        out[name] = total
    return out


def zeros_like(components):
    return {name: jnp.zeros(f.shape) for name, f in components.factors.items()}


def test_take_and_sums():
    values = jnp.arange(10.0).reshape(2, 5)
    factors = some_pieces().factors
    assert factors["d"].take(values) is values
    assert factors["a"].take(values).tolist() == [[1, 2], [6, 7]]
    assert factors["b"].take(values).tolist() == [[4, 0, 2], [9, 5, 7]]
    assert factors["c"].take(values).tolist() == [[3, 1, 3, 3], [8, 6, 8, 8]]
    assert factors["c"].take(values.T, axis=0).tolist() == [[3, 8], [1, 6], [3, 8], [3, 8]]
    pieces = jnp.array([1.0, 10.0, 100.0, 1000.0])
    assert factors["c"].sums(pieces, 5).tolist() == [0, 10, 0, 1101, 0]
    # The two are each other's transposes: Σ_j w_ids(j) v_j = Σ_c w_c (Σ_j v_j).
    c = factors["c"]
    assert c.take(values) @ pieces == pytest.approx(values @ c.sums(pieces, 5))


def test_sums_are_those_of_the_materialised():
    components = some_pieces()
    P, weights = formed(components), lib.materialize(components)
    assert components.num_components == 5
    assert components.num_params == 12 + 2 * 12 + 6 + 24 + 24
    params = {name: jnp.asarray(p.sum(0) + 0.1, jnp.float32) for name, p in P.items()}
    w = np.random.default_rng(8).normal(size=5)
    total = lib.total(components, params)
    scaled = lib.weighted_sum(components, params, jnp.float32(w))
    remainders = lib.remainders(components, params)
    for name, p in P.items():
        close(weights[name], p)
        close(total[name], p.sum(0))
        close(scaled[name], np.tensordot(w, p, 1))
        np.testing.assert_allclose(remainders[name], 0.1, atol=1e-5)
    # (0.1² per entry) / Σ‖θ*‖²
    whole = sum(float(jnp.sum(leaf**2)) for leaf in params.values())
    missing = 0.01 * sum(p[0].size for p in P.values())
    np.testing.assert_allclose(
        lib.relative_parameter_error(components, params), missing / whole, rtol=1e-4
    )


def test_norms_and_ranks_are_those_of_the_materialised():
    components = some_pieces()
    P = formed(components)
    squares, ranks = lib.squared_norms(components), lib.effective_ranks(components)
    for name, values in lib.singular_values(components).items():
        close(squares[name], (P[name].reshape(5, -1) ** 2).sum(1), err_msg=name)
        expected = np.linalg.svd(P[name], compute_uv=False).reshape(5, -1)
        m = min(values.shape[1], expected.shape[1])
        close(np.sort(values)[:, ::-1][:, :m], np.sort(expected)[:, ::-1][:, :m], 2e-5, name)
        by_size = np.abs(expected) > 1e-2 * expected.max()
        np.testing.assert_array_equal(ranks[name], by_size.sum(1), err_msg=name)
    close(lib.norms(components), np.sqrt(sum(np.asarray(s) for s in squares.values())))


def test_unit_columns_and_their_gradient_at_every_piece():
    components = lib.normalize_U(some_pieces())
    gradient = lib.project_U_gradient(jax.tree.map(jnp.ones_like, components), components)
    for name, f in components.factors.items():
        np.testing.assert_allclose(jnp.linalg.norm(f.U, axis=-2), 1.0, rtol=1e-6)
        along = jnp.sum(gradient.factors[name].U * f.U, axis=-2)
        np.testing.assert_allclose(along, 0.0, atol=1e-6)


def check_numbers(found, expected):
    """The same P_c at every site, and so the same sum."""
    for name, p in formed(found).items():
        np.testing.assert_allclose(p, expected[name], atol=1e-6, err_msg=name)


def test_aligned_has_all_numbers_at_every_site():
    components = some_pieces()
    aligned = lib.aligned(components)
    assert all(f.ids is None and f.num_pieces == 5 for f in aligned.factors.values())
    # Three pieces of rank two with one number: rank six.
    ranks = {name: f.rank for name, f in aligned.factors.items()}
    assert ranks == {"a": 2, "b": 2, "c": 6, "d": 2, "e": 4}
    check_numbers(aligned, formed(components))
    assert aligned.factors["b"].uses == 2 and aligned.factors["d"] is components.factors["d"]


def test_relabel_only_changes_which_pieces_belong_together():
    components = some_pieces()
    P = formed(components)
    swapped = lib.relabel(components, [0, 1, 4, 3, 2])
    assert swapped.factors["a"].ids == (1, 4) and swapped.factors["d"].ids == (0, 1, 4, 3, 2)
    check_numbers(swapped, {name: p[[0, 1, 4, 3, 2]] for name, p in P.items()})
    for name, f in swapped.factors.items():
        assert f.U is components.factors[name].U and f.V is components.factors[name].V
    # Joined, and numbered without gaps: 0 and 4 become 1, of 0 to 2.
    joined = lib.relabel(components, [70, 7, 7, 99, 70])
    assert joined.num_components == 3
    assert {name: f.ids for name, f in joined.factors.items()} == {
        "a": (0, 0),
        "b": (1, 1, 0),
        "c": (2, 0, 2, 2),
        "d": (1, 0, 0, 2, 1),
        "e": (1, 1),
    }
    groups = [[1, 2], [0, 4], [3]]
    check_numbers(joined, {name: np.stack([p[g].sum(0) for g in groups]) for name, p in P.items()})
    # Back to all numbers in order: None, and a range where they are consecutive.
    back = lib.relabel(swapped, [0, 1, 4, 3, 2])
    assert back.factors["d"].ids is None and back.factors["a"].ids == range(1, 3)
    with pytest.raises(InputError, match=r"relabel needs one number .* of 5 components; got 2"):
        lib.relabel(components, [0, 1])
    with pytest.raises(InputError, match="at least 0"):
        lib.relabel(components, [0, 1, 2, 3, -1])


def test_merge_and_split():
    components = some_pieces()
    P = formed(components)
    merged = lib.merge(components, [3, 1], [4, 2])
    # 0, {1, 3}, {2, 4}
    assert merged.num_components == 3
    groups = [[0], [1, 3], [2, 4]]
    expected = {name: np.stack([p[g].sum(0) for g in groups]) for name, p in P.items()}
    check_numbers(merged, expected)
    assert lib.merge(components).factors["b"].ids == (4, 0, 2)
    # {1, 3} has a piece of 1 in a, all four of c, two of d, and none in b and e: seven.
    apart = lib.split(merged, 1)
    assert apart.num_components == 3 + 6
    found = formed(apart)
    for name, p in expected.items():
        np.testing.assert_allclose(found[name][[0, 2]], p[[0, 2]], atol=1e-6)
        np.testing.assert_allclose(found[name].sum(0), p.sum(0), atol=1e-5)
    ids = {name: list(f.ids) for name, f in apart.factors.items()}
    assert (ids["a"], ids["c"], ids["d"]) == ([1, 2], [3, 4, 5, 6], [0, 7, 2, 8, 2])
    # A component of one piece stays what it is.
    alone = some_pieces(2, a=((0, 1), {}))
    assert lib.split(alone, 1).factors["a"].ids in (None, (0, 1))
    for group in ([0, 5], [-1], []):
        with pytest.raises(InputError, match="must be components from 0 to 4, none in two groups"):
            lib.merge(components, group)
    with pytest.raises(InputError, match="none in two groups"):
        lib.merge(components, [0, 1], [1, 2])
    with pytest.raises(InputError, match="split: component 5 does not exist; there are 5"):
        lib.split(components, 5)


def test_compact_is_the_best_approximation_of_a_rank():
    components = some_pieces()
    P = formed(components)
    ranks = {"a": 1, "b": 1, "c": 2, "d": 1, "e": 4}
    small = lib.compact(components, ranks)
    for name, p in P.items():
        f = small.factors[name]
        assert f.ids is None and f.rank == ranks[name]
        u, s, vt = np.linalg.svd(p, full_matrices=False)
        m = min(ranks[name], s.shape[-1])
        best = (u[..., :m] * s[..., None, :m]) @ vt[..., :m, :]
        np.testing.assert_allclose(formed(small)[name], best, atol=1e-5, err_msg=name)
    # The sums of squares lie balanced on both factors.
    f = small.factors["c"]
    close(jnp.sum(f.U**2, axis=1), np.asarray(jnp.sum(f.V**2, axis=2)), 1e-5)


def test_pieces_are_a_pytree_for_jit_grad_and_vmap():
    components = some_pieces()
    params = zeros_like(components)

    def loss(c):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(lib.total(c, params)))

    gradient = jax.jit(jax.grad(loss))(components)
    assert gradient.factors["c"].ids == (3, 1, 3, 3) and gradient.num_components == 5
    # d/dU_j of ‖Σ UV‖² is 2 (Σ UV) V_jᵀ.
    f = components.factors["c"]
    expected = 2 * formed(components)["c"].sum(0) @ np.swapaxes(np.asarray(f.V), 1, 2)
    close(gradient.factors["c"].U, expected, 1e-5)
    two = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), components)
    assert two.num_components == 5 and two.factors["b"].num_pieces == 3
    norms = jax.vmap(lib.norms)(two)
    close(norms[0], np.asarray(lib.norms(components)))
    close(norms[1], 4 * np.asarray(lib.norms(components)))
