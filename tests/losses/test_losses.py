"""The losses against numpy: worked numbers, an SVD, and what they leave out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close

from apd_jax import attributions, components, losses
from apd_jax.components import Components, Factors
from apd_jax.errors import InputError
from apd_jax.gates import selection as masks


def make(**weights):
    """Components in the balanced SVD form of given P_c [C, d_in, d_out]."""
    return components.from_materialized(
        {name: jnp.asarray(w, jnp.float32) for name, w in weights.items()}
    )


def test_faithfulness_by_hand():
    # W = (1, 2; 3, 4); P_0 + P_1 = (1, 0; 0, 3): differences (0, 2; 3, 1), squares 0 + 4 + 9 + 1 = 14, over 4 entries 3.5.
    params = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    P = np.array([[[1, 0], [0, 0]], [[0, 0], [0, 3]]])
    np.testing.assert_allclose(losses.faithfulness(make(w=P), params), 3.5, rtol=1e-6)
    # A second leaf v = (1, 1, 1) as a matrix 3 x 1, with components summing to 0, used twice: (14 + 2·3) / (4 + 2·3) = 2.
    both = components.from_materialized(
        {"v": jnp.zeros((2, 3, 1)), "w": jnp.asarray(P, jnp.float32)}, uses={"v": 2}
    )
    np.testing.assert_allclose(
        losses.faithfulness(both, {"v": jnp.ones((3, 1))} | params), 2.0, rtol=1e-6
    )


def test_pentagon_is_faithful(pentagon):
    assert losses.faithfulness(pentagon.components, pentagon.params) < 1e-12


def test_minimality():
    # Squares 1, 4, 0, 9 over 2 examples x 2 outputs: 14 / 4.
    np.testing.assert_allclose(
        losses.minimality(jnp.array([[1.0, 2.0], [3.0, 0.0]]), jnp.array([[0.0, 0.0], [3.0, 3.0]])),
        3.5,
    )
    # Target (3/4, 1/4), sparse (1/2, 1/2): 3/4·ln(3/2) + 1/4·ln(1/2) = 0.13081 nats; the other row agrees, so half of it.
    target, sparse = jnp.log(jnp.array([[3.0, 1.0], [1.0, 1.0]])), jnp.zeros((2, 2))
    np.testing.assert_allclose(losses.minimality(sparse, target, "kl"), 0.13081 / 2, rtol=1e-4)
    np.testing.assert_allclose(
        losses.minimality(target + 5.0, target, "kl"), 0.0, atol=1e-6
    )  # logits, up to a constant
    with pytest.raises(InputError, match="unknown minimality loss 'mae'"):
        losses.minimality(sparse, target, "mae")


def test_hidden_reconstruction():
    # Sums of squares: a 2·3·1² = 6 over 6 entries, b 2·1·3² = 18 over 2 entries: (6 + 18) / (6 + 2) = 3.
    target = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((2, 1))}
    np.testing.assert_allclose(
        losses.hidden_reconstruction({"a": jnp.ones((2, 3)), "b": jnp.full((2, 1), 3.0)}, target),
        3.0,
    )
    for sparse, of_target in (({"a": jnp.zeros((2, 3))}, target), ({}, {})):
        with pytest.raises(InputError, match="alike in both passes"):
            losses.hidden_reconstruction(sparse, of_target)


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
    # Any other factorisation of the same P costs more, for p < 2: mix the rank-one parts by an invertible matrix.
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
    # One component, U = (3; 4), V = (2), so ‖U‖²‖V‖² = 25·4 = 100; p = 1: sqrt(100·s). Weights s = 1 and 0.25 give 10 and 5.
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


@pytest.mark.parametrize("p", [0.9, 1.0])
def test_pentagon_simplicity(pentagon, p):
    # One active component per example, a unit row: σ = 1, so 1^p twice (tied) over N = 2·10: 2·5 / (20·5) = 0.1 for every p.
    scores = attributions.gradient(
        pentagon.apply_fn, pentagon.params, pentagon.components, pentagon.x
    )
    mask = masks.batch_topk(scores, 1)
    np.testing.assert_allclose(losses.simplicity(pentagon.components, mask, p), 0.1, rtol=1e-4)
