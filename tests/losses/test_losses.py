"""The losses against numpy: worked numbers, an SVD, and what they leave out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close

from apd_jax import attributions, components, losses, masks
from apd_jax.components import Components, Factors
from apd_jax.errors import InputError


def make(**weights):
    """Components in the balanced SVD form of given P_c [C, d_in, d_out]."""
    return components.from_materialized(
        {name: jnp.asarray(w, jnp.float32) for name, w in weights.items()}
    )


def test_faithfulness_by_hand():
    # W = (1, 2; 3, 4); P_0 + P_1 = (1, 0; 0, 3): differences (0, 2; 3, 1).
    # Squares 0 + 4 + 9 + 1 = 14, over 4 entries 3.5.
    params = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    P = np.array([[[1, 0], [0, 0]], [[0, 0], [0, 3]]])
    np.testing.assert_allclose(losses.faithfulness(make(w=P), params), 3.5, rtol=1e-6)
    # A second leaf v = (1, 1, 1) as a matrix 3 x 1, with components summing to 0, used twice:
    # (14 + 2·3) / (4 + 2·3) = 2.
    both = components.from_materialized(
        {"v": jnp.zeros((2, 3, 1)), "w": jnp.asarray(P, jnp.float32)}, uses={"v": 2}
    )
    params |= {"v": jnp.ones((3, 1))}
    np.testing.assert_allclose(losses.faithfulness(both, params), 2.0, rtol=1e-6)
    # Relative to every site's own size, each once: w 14 / (1 + 4 + 9 + 16), v 3 / 3.
    np.testing.assert_allclose(
        losses.relative_faithfulness(both, params), (14 / 30 + 1) / 2, rtol=1e-6
    )


def test_relative_faithfulness_of_a_leaf_of_zeros_is_finite():
    zeros = {"w": jnp.zeros((2, 2))}
    value, gradient = jax.value_and_grad(losses.relative_faithfulness)(
        make(w=np.zeros((1, 2, 2))), zeros
    )
    assert value == 0 and all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_pentagon_is_faithful(pentagon):
    assert losses.faithfulness(pentagon.components, pentagon.params) < 1e-12


def test_minimality():
    # Squares 1, 4, 0, 9 over 2 examples x 2 outputs: 14 / 4.
    np.testing.assert_allclose(
        losses.minimality(jnp.array([[1.0, 2.0], [3.0, 0.0]]), jnp.array([[0.0, 0.0], [3.0, 3.0]])),
        3.5,
    )
    # Target (3/4, 1/4), sparse (1/2, 1/2): 3/4·ln(3/2) + 1/4·ln(1/2) = 0.13081 nats.
    # The other row agrees, so half of it.
    target, sparse = jnp.log(jnp.array([[3.0, 1.0], [1.0, 1.0]])), jnp.zeros((2, 2))
    np.testing.assert_allclose(losses.minimality(sparse, target, "kl"), 0.13081 / 2, rtol=1e-4)
    np.testing.assert_allclose(
        losses.minimality(target + 5.0, target, "kl"), 0.0, atol=1e-6
    )  # logits, up to a constant
    with pytest.raises(InputError, match="unknown minimality_loss 'mae'"):
        losses.minimality(sparse, target, "mae")


def test_hidden_reconstruction():
    # Sums of squares: a 2·3·1² = 6 over 6 entries, b 2·1·3² = 18 over 2 entries.
    # (6 + 18) / (6 + 2) = 3.
    target = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((2, 1))}
    np.testing.assert_allclose(
        losses.hidden_reconstruction({"a": jnp.ones((2, 3)), "b": jnp.full((2, 1), 3.0)}, target),
        3.0,
    )
    for sparse, of_target in (({"a": jnp.zeros((2, 3))}, target), ({}, {})):
        with pytest.raises(InputError, match="alike in both passes"):
            losses.hidden_reconstruction(sparse, of_target)


def test_kl_with_impossible_outputs():
    """A logit of -inf is an output of probability 0: on the target's side its term is 0."""
    inf = jnp.inf
    # Sparse (1/2, 1/2, 0), target (e, 1, 0)/(e + 1) = (0.73106, 0.26894, 0):
    # 0.73106·ln(0.73106/0.5) + 0.26894·ln(0.26894/0.5) = 0.11094. The other way round 0.12011.
    even, uneven = jnp.array([[0.0, 0.0, -inf]]), jnp.array([[1.0, 0.0, -inf]])
    found, gradient = jax.value_and_grad(losses.minimality)(even, uneven, "kl")
    np.testing.assert_allclose(found, 0.11094, rtol=1e-4)
    # By the sparse logits: q - p, and 0 where both are impossible.
    np.testing.assert_allclose(gradient, [[0.5 - 0.73106, 0.5 - 0.26894, 0.0]], atol=1e-5)
    np.testing.assert_allclose(losses.minimality(uneven, even, "kl"), 0.12011, rtol=1e-4)
    # Impossible for the target alone: sparse (e, 1, e²)/11.107; p·ln(p/q) over the first two only.
    sparse = jnp.array([[1.0, 0.0, 2.0]])
    expected = np.log((np.e + 1 + np.e**2) / (np.e + 1))  # q = p (e + 1)/(e + 1 + e²)
    np.testing.assert_allclose(losses.minimality(sparse, uneven, "kl"), expected, rtol=1e-5)
    # Impossible for the sparse pass alone: infinitely far.
    assert losses.minimality(uneven, sparse, "kl") == inf


def test_weights_of_positions():
    # Squares 1, 4, 9 and an infinity at the position that is padding: (1 + 4 + 9) / 3 of those that
    # count. Weights have mean 1 over the four.
    target, weights = jnp.zeros((2, 2, 1)), jnp.array([[4 / 3, 4 / 3], [4 / 3, 0.0]])
    sparse = jnp.array([[[1.0], [2.0]], [[3.0], [jnp.inf]]])
    np.testing.assert_allclose(losses.minimality(sparse, target, "mse", weights), 14 / 3, rtol=1e-6)
    hidden = {"a": sparse, "b": jnp.full((2, 5), 2.0)}  # b has no axis of positions
    zeros = {"a": target, "b": jnp.zeros((2, 5))}
    own = {"a": jnp.broadcast_to(weights[..., None], sparse.shape), "b": None}
    found = losses.hidden_reconstruction(hidden, zeros, own)
    np.testing.assert_allclose(found, (14 * 4 / 3 + 10 * 4) / (4 + 10), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_summed_in_single(dtype):
    # 131,072 squares of 0.05: summed in float16 they would stop growing near 2048·0.0025.
    small = jnp.full((1024, 128), 0.05, dtype)
    square = float(jnp.float32(small[0, 0])) ** 2  # of 0.05 as it is rounded: about 0.0025
    zeros = jnp.zeros_like(small)
    found = losses.hidden_reconstruction({"h": small}, {"h": zeros})
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, square, rtol=1e-5)
    np.testing.assert_allclose(losses.minimality(small, zeros), square, rtol=1e-5)
    assert abs(found - 0.0025) < 1e-5
    # KL of half logits: the numbers of single ones.
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(64, 200)), dtype)
    other = jnp.asarray(np.random.default_rng(1).normal(size=(64, 200)), dtype)
    single = losses.minimality(logits.astype(jnp.float32), other.astype(jnp.float32), "kl")
    np.testing.assert_allclose(losses.minimality(logits, other, "kl"), single, rtol=1e-6)
    # A target in half precision, components in single: Σ ‖θ* - 0‖² over as many entries.
    comps = Components({"w": Factors(jnp.zeros((1, 1024, 1)), jnp.zeros((1, 1, 128)), (1024, 128))})
    np.testing.assert_allclose(losses.faithfulness(comps, {"w": small}), square, rtol=1e-5)
    np.testing.assert_allclose(losses.relative_faithfulness(comps, {"w": small}), 1.0, rtol=1e-5)


@pytest.mark.parametrize("p", [0.5, 0.9, 1.0, 2.0])
def test_simplicity_is_the_schatten_norm_at_the_balanced_svd(p):
    rng = np.random.default_rng(0)
    P = {"a": rng.normal(size=(4, 5, 3)), "b": rng.normal(size=(4, 2, 6))}
    mask = rng.uniform(size=(7, 4)) < 0.4
    # Σ_l Σ_b Σ_c s_bc Σ_j σ_j(P_c,l)^p / (N·B), with N = 15 + 12.
    each = sum((np.linalg.svd(w, compute_uv=False) ** p).sum(1) for w in P.values())
    expected = (mask @ each).sum() / (27 * 7)
    np.testing.assert_allclose(
        losses.simplicity(make(**P), jnp.asarray(mask), p), expected, rtol=1e-5
    )


def test_simplicity_bounds_the_schatten_norm_from_above():
    # Any other factorisation of the same P costs more, for p < 2.
    # Here the rank-one parts are mixed by an invertible matrix.
    rng = np.random.default_rng(1)
    U, V, mix = rng.normal(size=(3, 5, 2)), rng.normal(size=(3, 2, 4)), rng.normal(size=(2, 2))
    balanced = make(w=U @ V)
    mixed = Components(
        {
            "w": Factors(
                jnp.asarray(U @ mix, jnp.float32),
                jnp.asarray(np.linalg.solve(mix, V), jnp.float32),
                shape=(5, 4),
            )
        }
    )
    close(components.materialize(mixed)["w"], components.materialize(balanced)["w"], 1e-4)
    on = jnp.ones((1, 3), bool)
    assert losses.simplicity(mixed, on, 0.9) > losses.simplicity(balanced, on, 0.9)


def test_simplicity_by_hand_with_weights_and_uses():
    # One component, U = (3; 4), V = (2), so ‖U‖²‖V‖² = 25·4 = 100; p = 1: sqrt(100·s).
    # Weights s = 1 and 0.25 give 10 and 5.
    # Used twice, N = 2·2, B = 2: 2·(10 + 5) / (4·2) = 3.75.
    comps = Components(
        {"w": Factors(jnp.array([[[3.0], [4.0]]]), jnp.array([[[2.0]]]), shape=(2, 1), uses=2)}
    )
    np.testing.assert_allclose(
        losses.simplicity(comps, jnp.array([[1.0], [0.25]]), 1.0), 3.75, rtol=1e-6
    )
    # A bool mask that is off everywhere costs exactly nothing; one that is on once gives 2·10 / 8.
    assert losses.simplicity(comps, jnp.zeros((2, 1), bool), 0.5) == 0.0
    np.testing.assert_allclose(
        losses.simplicity(comps, jnp.array([[True], [False]]), 1.0), 2.5, rtol=1e-6
    )


def test_simplicity_of_pieces_is_by_their_components_numbers():
    # Site a holds a piece of component 2 (size 10), site b two pieces of 0 (1 and 2) and one of 1.
    a = Factors(jnp.array([[[3.0], [4.0]]]), jnp.array([[[2.0]]]), (2, 1), ids=range(2, 3))
    b = Factors(jnp.array([[[1.0]], [[2.0]], [[5.0]]]), jnp.ones((3, 1, 1)), (1, 1), ids=(0, 0, 1))
    comps = Components({"a": a, "b": b}, 3)
    # First example 0 and 2: 1 + 2 + 10; second 1: 5. N = 3, B = 2: 18 / 6.
    mask = jnp.array([[True, False, True], [False, True, False]])
    np.testing.assert_allclose(losses.simplicity(comps, mask, 1.0), 3.0, rtol=1e-6)
    degrees = mask.astype(jnp.float32)
    np.testing.assert_allclose(losses.simplicity(comps, degrees, 1.0), 3.0, rtol=1e-5)


def test_simplicity_at_sizes_beyond_a_32_bit_integer():
    # N = 2¹⁶·2¹⁶ = 2³² entries, and times 4 rows 2³⁴. U = V = 1 everywhere, rank one, p = 2:
    # ‖U‖²‖V‖² = 2³², on in 3 of 4 rows: 3·2³² / (2³²·4) = 0.75. No P_c is formed.
    ones = jnp.ones((1, 2**16, 1)), jnp.ones((1, 1, 2**16))
    comps = Components({"w": Factors(*ones, shape=(2**16, 2**16))})
    assert comps.num_params * 4 == 2**34
    mask = jnp.array([[True], [True], [False], [True]])
    for one in (mask, mask.astype(jnp.float32)):
        found = jax.jit(losses.simplicity)(comps, one, 2.0)
        np.testing.assert_allclose(found, 0.75, rtol=1e-5)


def test_gradients_are_finite_for_dead_components():
    comps = components.init(jax.random.key(0), {"w": jnp.zeros((4, 3))}, num_components=2)
    dead = jax.tree.map(lambda a: a.at[0].set(0.0), comps)
    for mask in (jnp.ones((5, 2), bool), jnp.ones((5, 2)), jnp.zeros((5, 2))):
        gradient = jax.grad(losses.simplicity)(dead, mask, 0.5)
        assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert jnp.isfinite(
        jax.grad(lambda a: losses.attribution_lp(a, 0.5).sum())(jnp.zeros((2, 3)))
    ).all()


def test_attribution_lp(pentagon):
    # |A|^p of A² = 4 at p = 0.5 is sqrt(2); at A = 0 it is (1e-16)^0.25 = 1e-4.
    np.testing.assert_allclose(
        losses.attribution_lp(jnp.array([[4.0, 0.0]]), 0.5), [[np.sqrt(2), 1e-4]], rtol=1e-5
    )


def test_importance():
    # g of two examples and two components, p = 2: means of (1, 0.25) and (0, 0.36).
    g = jnp.array([[1.0, 0.0], [0.5, 0.6]])
    np.testing.assert_allclose(losses.importance(g, 2.0), [0.625, 0.18], rtol=1e-5)
    # p = 0.5: sqrt(1), sqrt(0.5); 0 counts as (1e-12)^0.5 = 1e-6, so that its slope is finite.
    found, slope = losses.importance(g, 0.5), jax.grad(lambda g: losses.importance(g, 0.5)[1])(g)
    np.testing.assert_allclose(found, [(1 + 0.5**0.5) / 2, (1e-6 + 0.6**0.5) / 2], rtol=1e-5)
    np.testing.assert_allclose(slope[0, 1], 0.5 * 0.5e6, rtol=1e-4)
    # Per position with padding: 3 of 4 count, g = 1, 0.5, 0 there: 1.5 / 3.
    at = jnp.array([[[1.0], [0.5]], [[0.0], [7.0]]])
    weights = jnp.array([[4 / 3, 4 / 3], [4 / 3, 0.0]])
    np.testing.assert_allclose(losses.importance(at, 1.0, weights), [0.5], rtol=1e-5)


def test_smooth_l0():
    # γ = 0.5: (1 + 0.25) g² / (g² + 0.25): 1 at g = 1, 0.625 at 0.5, 0 at 0.
    g = jnp.array([[1.0, 0.0], [0.5, 0.0]])
    np.testing.assert_allclose(losses.smooth_l0(g, 0.5), [0.8125, 0.0], rtol=1e-6)
    # As γ falls it counts: [g > 0].
    np.testing.assert_allclose(losses.smooth_l0(g, 1e-3), [1.0, 0.0], atol=1e-5)
    # Its slope is largest at g = γ/sqrt(3), where it is 0.65 (1 + γ²)/γ.
    slope = jax.vmap(jax.grad(lambda g: losses.smooth_l0(g[None, None], 0.1)[0]))(
        jnp.linspace(0, 1, 1001)
    )
    np.testing.assert_allclose(slope.max(), 0.6495 * 1.01 / 0.1, rtol=1e-3)
    at, weights = jnp.array([[[1.0], [0.5]]]), jnp.array([[2.0, 0.0]])
    np.testing.assert_allclose(losses.smooth_l0(at, 0.5, weights), [1.0], rtol=1e-6)


def test_frequency():
    # Rates 0.5 and 0.25. N = 6: 0.5·log₂(1 + 3) + 0.25·log₂(1 + 1.5).
    rates = jnp.array([0.5, 0.25])
    expected = 0.5 * 2 + 0.25 * np.log2(2.5)
    np.testing.assert_allclose(losses.frequency(rates, 6.0), expected, rtol=1e-6)
    # N = 4, in VPD's own form (1/N) Σ s log₂(1 + s) with s = N f = 2 and 1.
    np.testing.assert_allclose(losses.frequency(rates, 4.0), (2 * np.log2(3) + 1) / 4, rtol=1e-6)
    # Each device has rates of its own examples: the mean is what counts, and its gradient comes
    # once to each device, as if the mean were its own.
    ours = jnp.array([[1.0, 0.25], [0.0, 0.25]])
    each = jax.vmap(
        jax.value_and_grad(lambda r: losses.frequency(r, 6.0, "data")), axis_name="data"
    )
    values, slopes = each(ours)
    np.testing.assert_allclose(values, [expected, expected], rtol=1e-6)
    whole = jax.grad(losses.frequency)(rates, 6.0)
    np.testing.assert_allclose(slopes, [whole, whole], rtol=1e-6)


def test_trim():
    # Pieces U = (3; 4), V = (2), size 10, and U = (1; 0), V = (2), size 2, of components 1 and 0,
    # which fire at rates 0.1 and 0.5; p = 1: 0.105·10 + 0.505·2 = 2.06, twice where used twice.
    U, V = jnp.array([[[3.0], [4.0]], [[1.0], [0.0]]]), jnp.full((2, 1, 1), 2.0)
    rates = jnp.array([0.5, 0.1])
    comps = Components({"w": Factors(U, V, shape=(2, 1), ids=(1, 0))}, 2)
    np.testing.assert_allclose(losses.trim(comps, rates, 1.0), 2.06, rtol=1e-5)
    twice = Components({"w": Factors(U, V, shape=(2, 1), uses=2, ids=(1, 0))}, 2)
    np.testing.assert_allclose(losses.trim(twice, rates, 1.0), 4.12, rtol=1e-5)
    # A piece of zeros costs (1e-8)^(1/4) = 0.01 per rank at p = 0.5, and its gradient is finite.
    dead = Components({"w": Factors(0 * U, 0 * V, shape=(2, 1), ids=(1, 0))}, 2)
    value, slope = jax.value_and_grad(losses.trim)(dead, rates)
    np.testing.assert_allclose(value, 0.01 * (0.105 + 0.505), rtol=1e-4)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(slope))


@pytest.mark.parametrize("p", [0.9, 1.0])
def test_pentagon_simplicity(pentagon, p):
    # One active component per example, a unit row: σ = 1, so 1^p twice (tied) over N = 2·10:
    # 2·5 / (20·5) = 0.1 for every p.
    scores = attributions.gradient(
        pentagon.apply_fn, pentagon.params, pentagon.components, pentagon.x
    )
    mask = masks.batch_topk(scores, 1)
    np.testing.assert_allclose(losses.simplicity(pentagon.components, mask, p), 0.1, rtol=1e-4)
