"""Sites that hold pieces of some components: sums, ranks and operations on numbers, by numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close

from apd_jax import components as lib
from apd_jax.errors import InputError

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
