"""The piece MLPs against a formula in float64, against an einsum, and in the size of arrays."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close
from jax.extend.core import jaxprs_in_params
from scipy import special

from apd_jax.gates import piece_mlp
from apd_jax.gates.piece_mlp import PieceMLP

# As in conftest: jax also builds this pytree node from stand-ins.
PieceMLP.__init__ = inspect.unwrap(PieceMLP.__init__)

FIELDS = ("w_in", "b_in", "w_out", "b_out")


def einsum(mlp, h):
    z = h[..., None] * mlp.w_in[None] + mlp.b_in[None]
    hidden = jax.nn.gelu(z, approximate=False)
    return jnp.einsum("...cd,cd->...c", hidden, mlp.w_out) + mlp.b_out[None]


def formula(mlp, h, g):
    """γ and its gradients for cotangent g, h [B, C], in float64, by the chain rule."""
    w_in, b_in, w_out, b_out = (np.float64(getattr(mlp, field)) for field in FIELDS)
    h, g = np.float64(h), np.float64(g)
    z = h[:, :, None] * w_in + b_in
    Phi, phi = special.ndtr(z), np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    value, slope = z * Phi, Phi + z * phi
    by_slope = g[:, :, None] * slope
    gradients = {
        "h": g * (w_in * w_out * slope).sum(2),
        "w_in": w_out * (by_slope * h[:, :, None]).sum(0),
        "b_in": w_out * by_slope.sum(0),
        "w_out": (g[:, :, None] * value).sum(0),
        "b_out": g.sum(0),
    }
    return (w_out * value).sum(2) + b_out, gradients


def draw(B, C, d, seed=0):
    """An MLP with all biases away from 0, h, and a cotangent."""
    keys = jax.random.split(jax.random.key(seed), 5)
    mlp = piece_mlp.init({"site": keys[0]}, {"site": C}, d)["site"]
    mlp = PieceMLP(
        w_in=mlp.w_in,
        b_in=jax.random.normal(keys[1], (C, d)),
        w_out=mlp.w_out,
        b_out=jax.random.normal(keys[2], (C,)),
    )
    return mlp, jax.random.normal(keys[3], (B, C)), jax.random.normal(keys[4], (B, C))


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(fn, mlp, h, g):
    value, vjp = jax.vjp(fn, mlp, h)
    mlp_bar, h_bar = vjp(g)
    return value, {"h": h_bar} | {field: getattr(mlp_bar, field) for field in FIELDS}


def test_one_unit():
    # z = 2·1 − 1 = 1, Φ(1) = .841345, φ(1) = .241971: gelu = .841345, gelu' = 1.083316.
    # γ = 3·.841345 + .5 = 3.024034
    # h̄ = 3·2·1.083316 = 6.499893,  w̄_in = b̄_in = 3·1.083316 = 3.249947,  w̄_out = .841345
    mlp = PieceMLP(
        jnp.full((1, 1), 2.0), -jnp.ones((1, 1)), jnp.full((1, 1), 3.0), jnp.full(1, 0.5)
    )
    one = jnp.ones(1)
    value, gradients = value_and_gradients(piece_mlp.apply, mlp, one, one)
    expected = {"h": 6.499893, "w_in": 3.249947, "b_in": 3.249947, "w_out": 0.841345, "b_out": 1.0}
    assert value.item() == pytest.approx(3.024034, rel=1e-6)
    assert {name: a.item() for name, a in gradients.items()} == pytest.approx(expected, rel=1e-6)


# Rows no multiple of 4; units odd and even; few components (rows put side by side) and many.
@pytest.mark.parametrize("B, C, d", [(37, 3, 1), (64, 5, 3), (48, 20, 16), (21, 130, 4), (1, 2, 2)])
def test_equals_the_formula(B, C, d):
    mlp, h, g = draw(B, C, d)
    value, gradients = value_and_gradients(piece_mlp.apply, mlp, h, g)
    expected, expected_gradients = formula(mlp, h, g)
    close(value, expected, 1e-6)
    for name, gradient in gradients.items():
        close(gradient, expected_gradients[name], 1e-6, name)


def test_equals_an_einsum_and_its_gradient():
    mlp, h, g = draw(40, 6, 5)
    value, gradients = value_and_gradients(piece_mlp.apply, mlp, h, g)
    expected, expected_gradients = value_and_gradients(einsum, mlp, h, g)
    close(value, expected, 1e-6)
    for name, gradient in gradients.items():
        close(gradient, expected_gradients[name], 3e-6, name)  # the einsum's own error


def test_gradient_by_finite_differences():
    mlp, h, g = draw(16, 3, 4)
    along, step = draw(16, 3, 4, seed=1)[:2], 1e-2

    @jax.jit
    def loss(t):
        moved = jax.tree.map(lambda a, b: a + t * b, (mlp, h), along)
        return jnp.vdot(g, piece_mlp.apply(*moved))

    slope = (loss(step) - loss(-step)) / (2 * step)
    assert jax.grad(loss)(0.0).item() == pytest.approx(slope.item(), rel=3e-3)


def test_leading_axes_and_none():
    mlp, h, _ = draw(24, 3, 2)
    apply = jax.jit(piece_mlp.apply)
    expected = apply(mlp, h)
    np.testing.assert_array_equal(apply(mlp, h.reshape(2, 3, 4, 3)), expected.reshape(2, 3, 4, 3))
    close(apply(mlp, h[7]), expected[7], 1e-6)
    assert apply(mlp, h[:0]).shape == (0, 3)


def test_instances_under_vmap():
    instances = [draw(8, 3, 5, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *instances)
    value, gradients = jax.vmap(functools.partial(value_and_gradients, piece_mlp.apply))(*stacked)
    for i, instance in enumerate(instances):
        expected, expected_gradients = value_and_gradients(piece_mlp.apply, *instance)
        close(value[i], expected, 1e-6)
        for name, gradient in gradients.items():
            close(gradient[i], expected_gradients[name], 1e-6, name)


def test_shared_input_under_vmap():
    mlps = jax.tree.map(lambda *a: jnp.stack(a), *(draw(8, 3, 4, seed)[0] for seed in range(2)))
    h = draw(8, 3, 4)[1]
    value = jax.jit(jax.vmap(piece_mlp.apply, in_axes=(0, None)))(mlps, h)
    second = jax.tree.map(lambda leaf: leaf[1], mlps)
    close(value[1], jax.jit(piece_mlp.apply)(second, h), 1e-6)


def test_half_precision_is_computed_in_float32():
    mlp, h, g = draw(8, 3, 5)
    half = h.astype(jnp.bfloat16)
    value, gradients = value_and_gradients(piece_mlp.apply, mlp, half, g)
    expected, expected_gradients = value_and_gradients(
        piece_mlp.apply, mlp, half.astype(jnp.float32), g
    )
    assert value.dtype == gradients["w_in"].dtype == jnp.float32
    assert gradients["h"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(gradients["w_in"], expected_gradients["w_in"])
    np.testing.assert_array_equal(gradients["h"], expected_gradients["h"].astype(jnp.bfloat16))


def test_gelu_and_its_slope_everywhere():
    # float32 resolves 6e-8 near 1 and 2.4e-7 near 8; Φ and φ are of order 1.
    z = np.linspace(-12, 12, 20001, dtype=np.float32)
    value, slope = jax.jit(piece_mlp._gelu)(z)
    exact = np.float64(z)
    Phi, phi = special.ndtr(exact), np.exp(-(exact**2) / 2) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(value, exact * Phi, rtol=1e-7, atol=1.5e-7)
    np.testing.assert_allclose(slope, Phi + exact * phi, rtol=0, atol=3e-7)


def test_gelu_at_the_ends():
    value, slope = jax.jit(piece_mlp._gelu)(jnp.array([0.0, 1e10, -1e10, jnp.inf, jnp.nan]))
    np.testing.assert_allclose(value[:4], [0, 1e10, 0, jnp.inf])
    np.testing.assert_allclose(slope[:3], [0.5, 1, 0], atol=1e-7)
    assert jnp.isnan(value[4]) and jnp.isnan(slope[4])


# Memory


def sizes(jaxpr):
    """The sizes of all arrays of a jaxpr and those within it."""
    for eqn in jaxpr.eqns:
        yield from (var.aval.size for var in eqn.outvars)
        for inner in jaxprs_in_params(eqn.params):
            yield from sizes(inner)


def test_no_array_of_rows_components_and_units():
    # An einsum has one of 512·8·16 = 65,536 entries; here the largest has 512·8 = 4096, like h.
    mlp, h, g = draw(512, 8, 16)
    largest = {
        fn: max(sizes(jax.make_jaxpr(value_and_gradients, static_argnums=0)(fn, mlp, h, g).jaxpr))
        for fn in (piece_mlp.apply, einsum)
    }
    assert largest == {piece_mlp.apply: h.size, einsum: h.size * 16}


def test_the_compiled_program_has_none_either():
    # In units of h, 512·8·4 = 16,384 bytes: the einsum takes over 16 (one [B, C, d]); here 7,
    # and 3 with the compiler's usual settings.
    mlp, h, g = draw(512, 8, 16)

    def temporary(fn):
        program = value_and_gradients.lower(fn, mlp, h, g).compile()
        return program.memory_analysis().temp_size_in_bytes / h.nbytes

    assert temporary(piece_mlp.apply) < 8
    assert temporary(einsum) > 16


def test_init():
    # 40,000 draws: the variance is known to 2 · √(2/40000) = 1.4 %.
    mlp = piece_mlp.init({"site": jax.random.key(0)}, {"site": 2000}, 20)["site"]
    assert [getattr(mlp, field).shape for field in FIELDS] == [(2000, 20)] * 3 + [(2000,)]
    assert jnp.var(mlp.w_in) == pytest.approx(2, rel=0.03)
    assert jnp.var(mlp.w_out) == pytest.approx(1 / 20, rel=0.03)
    assert not jnp.any(mlp.b_in) and not jnp.any(mlp.b_out)
