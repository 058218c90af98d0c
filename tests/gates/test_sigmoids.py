"""The leaky hard sigmoids, entry by entry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apd_jax.gates.sigmoids import lower_leaky, upper_leaky

X = jnp.array([-1.0, 0.0, 0.25, 1.0, 3.0])


def test_values():
    # Both clamp to [0, 1]; above 1 the upper one goes on at slope .01: 1 + .01·(3 − 1) = 1.02.
    np.testing.assert_allclose(lower_leaky(X), [0, 0, 0.25, 1, 1])
    np.testing.assert_allclose(upper_leaky(X), [0, 0, 0.25, 1, 1.02])


def test_gradients():
    # Lower: 1 on (0, 1], 0 above, and at x <= 0 .01 of a negative gradient, 0 of a positive one.
    # Upper: 0 below 0, 1 on [0, 1] with both ends (as torch.clamp), .01 above.
    ones = jnp.ones(5)
    _, lower_vjp = jax.vjp(lower_leaky, X)
    _, upper_vjp = jax.vjp(upper_leaky, X)
    np.testing.assert_allclose(lower_vjp(ones)[0], [0, 0, 1, 1, 0])
    np.testing.assert_allclose(lower_vjp(-ones)[0], [-0.01, -0.01, -1, -1, 0])
    np.testing.assert_allclose(upper_vjp(ones)[0], [0, 1, 1, 1, 0.01])
    np.testing.assert_allclose(upper_vjp(-ones)[0], [0, -1, -1, -1, -0.01])


def test_descent_revives_what_is_needed_and_leaves_what_is_not():
    # Loss (g − t)² at x = −1: g = 0, ḡ = 2·(0 − t). t = 1: ḡ = −2, x̄ = −.02, descent raises x.
    # Loss g: ḡ = 1 would lower x further and does not.
    x = jnp.array(-1.0)
    assert jax.grad(lambda x: (lower_leaky(x) - 1) ** 2)(x).item() == pytest.approx(-0.02)
    assert jax.grad(lower_leaky)(x) == 0


def test_upper_gradient_by_finite_differences():
    x = jnp.array([-0.7, 0.3, 0.9, 1.4, 5.0])  # no kink within 1e-3
    rise = (upper_leaky(x + 1e-3) - upper_leaky(x - 1e-3)) / 2e-3
    np.testing.assert_allclose(jax.vmap(jax.grad(upper_leaky))(x), rise, atol=1e-3)


@pytest.mark.parametrize("sigmoid", [lower_leaky, upper_leaky])
def test_batched_in_half_precision(sigmoid):
    x = X.astype(jnp.bfloat16)
    value, gradient = jax.jit(jax.vmap(jax.value_and_grad(sigmoid)))(x)
    assert value.dtype == gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(value), sigmoid(X), atol=0.01)
