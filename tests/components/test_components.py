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


def test_drawn_together_is_as_drawn_alone():
    shapes = {"a": (3, 4), "b": (2, 6), "c": (5,), "d": (3, 4)}  # a, b and d in one loop
    keys = jax.random.split(jax.random.key(0), len(shapes))
    scales = (1.0, 3.0, 0.5, jnp.float32(0.1))
    asked = {
        name: (key, shapes[name], jnp.float32, scale)
        for name, key, scale in zip(shapes, keys, scales, strict=True)
    }
    found = lib.normals(asked)
    for name, (*one, scale) in asked.items():
        np.testing.assert_array_equal(found[name], scale * jax.random.normal(*one))


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
    for rank in (1, 2):  # by their factors, without the matrices
        few = init(rank=rank)
        for name, values in lib.singular_values(few).items():
            f = few.factors[name]
            expected = np.linalg.svd(np.asarray(f.U @ f.V, np.float64), compute_uv=False)
            close(values, expected[:, :rank], 1e-5)


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
