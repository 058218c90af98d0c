"""Gradient attributions against the materialised Jacobian and finite differences in float64.

In every mode. And that ablation is the real change.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close

from apd_jax import attributions, components
from apd_jax.attributions import chunks, tangents
from apd_jax.components import Components
from apd_jax.errors import InputError
from apd_jax.network.outputs import outputs


def mlp(params, x):
    h = jax.nn.gelu(x @ params["w1"] + params["b1"][None, :])
    return h @ params["w2"] + params["b2"][None, :]


def tied(params, x):
    return jax.nn.relu(
        jnp.einsum("bi,ij->bj", x, params["w"]) @ params["w"].T + params["b"][None, :]
    )


def images(params, x):
    """Outputs with two axes, a kernel of four axes, and hidden activations."""
    h = jnp.tanh(
        jax.lax.conv_general_dilated(
            x, params["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    )
    return h.mean(2), {"h": h}


def scalar(params, x):
    return jnp.tanh(x @ params["w"])


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


NETWORKS = {
    "mlp": (
        mlp,
        {"w1": normal(1, 4, 5), "b1": normal(2, 5), "w2": normal(3, 5, 3), "b2": normal(4, 3)},
        normal(5, 6, 4),
    ),
    "tied": (tied, {"w": normal(6, 5, 3), "b": normal(7, 5)}, normal(8, 6, 5)),
    "convolution": (images, {"kernel": normal(9, 2, 2, 1, 2)}, normal(10, 6, 4, 4, 1)),
    "one output": (scalar, {"w": normal(11, 4, 1)}, normal(12, 6, 4)),
}


@pytest.fixture(params=list(NETWORKS))
def network(request):
    """(apply_fn, params, components, x) with C = 6."""
    apply_fn, params, x = NETWORKS[request.param]
    params, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, x))
    return (
        apply_fn,
        params,
        components.init(jax.random.key(0), params, num_components=6, rank=2, init_scale=3.0),
        x,
    )


def by_jacobian(apply_fn, params, comps, x):
    """sqrt(mean_o (∂f_o/∂θ · P_c)²) from `jax.jacrev` and every P_c."""
    out = lambda p: outputs(apply_fn(p, x)).reshape(x.shape[0], -1)  # noqa: E731
    jacobian, weights = jax.jacrev(out)(params), components.materialize(comps)
    dot = sum(
        jnp.einsum(
            "boi,ci->cbo", jacobian[name].reshape(*out(params).shape, -1), P.reshape(P.shape[0], -1)
        )
        for name, P in weights.items()
        if P is not None
    )
    return jnp.sqrt(jnp.mean(dot**2, axis=2)).T


def test_against_the_jacobian(network, monkeypatch):
    apply_fn, params, comps, x = network

    def every_way():
        results = {}
        # All at once; one component or example at a time; a few, the rest shorter where none
        # divides.
        for chunk_bytes in (2**20, 1, 600):
            monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", chunk_bytes)
            for mode in ("auto", "forward", "reverse"):
                results[f"{mode}, {chunk_bytes}"] = attributions.gradient(
                    apply_fn, params, comps, x, mode=mode
                )
        return results

    expected = jax.jit(lambda: by_jacobian(apply_fn, params, comps, x))()
    for way, measured in jax.jit(every_way)().items():
        close(measured, expected, err_msg=way)


def test_through_the_factors_against_the_jacobian(network, monkeypatch):
    """What components of low rank take; the networks here are too small for it to pay."""
    apply_fn, params, comps, x = network
    monkeypatch.setattr(tangents, "_TWO_PRODUCTS", 0)
    measured, expected = jax.jit(
        lambda: (
            attributions.gradient(apply_fn, params, comps, x, mode="forward"),
            by_jacobian(apply_fn, params, comps, x),
        )
    )()
    close(measured, expected)


def test_when_attributions_pass_the_factors():
    """Rank 2 of 40 x 50: 2·90·4 = 720 < 2000; rank 6: 2160."""
    params = {"w": jnp.zeros((40, 50))}
    assert [
        tangents.is_low_rank(components.init(jax.random.key(0), params, num_components=3, rank=m))
        for m in (2, 6)
    ] == [True, False]


def test_against_finite_differences_in_float64(network):
    apply_fn, params, comps, x = network
    with jax.enable_x64(True):
        params, comps, x = jax.tree.map(
            lambda a: jnp.asarray(np.asarray(a, np.float64)), (params, comps, x)
        )
        measured = jax.jit(lambda: attributions.gradient(apply_fn, params, comps, x))()
        assert measured.dtype == jnp.float64
        weights, h = components.materialize(comps), 1e-6

        def at(scale, c):
            moved = {
                n: params[n] if P is None else params[n] + scale * P[c] for n, P in weights.items()
            }
            return outputs(apply_fn(moved, x)).reshape(x.shape[0], -1)

        slopes = jax.jit(
            lambda: jnp.stack([(at(h, c) - at(-h, c)) / (2 * h) for c in range(6)], axis=1)
        )()
    close(measured, np.sqrt((np.asarray(slopes) ** 2).mean(2)), 1e-8)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_squared_has_finite_gradients_where_it_is_zero(mode):
    apply_fn, params, x = NETWORKS["mlp"]
    params, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, x))
    comps = components.init(jax.random.key(0), params, num_components=3)
    dead = jax.tree.map(lambda a: a.at[1].set(0.0), comps)

    def loss(comps: Components):
        return jnp.sum(attributions.squared("gradient", apply_fn, params, comps, x, mode=mode))

    value, gradient = jax.jit(jax.value_and_grad(loss))(dead)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradient))
    # The directional derivative along the components themselves: along U -> tU, V -> tV the A² grow
    # with the fourth power of t.
    along = sum(
        jnp.sum(g * c)
        for g, c in zip(jax.tree.leaves(gradient), jax.tree.leaves(dead), strict=True)
    )
    np.testing.assert_allclose(along, 4 * value, rtol=1e-4)


def test_ablation_is_the_real_change(network):
    apply_fn, params, comps, x = network
    out = lambda p: outputs(apply_fn(p, x)).reshape(x.shape[0], -1)  # noqa: E731

    @jax.jit
    def both():
        whole = out(components.total(comps, params))
        without = [
            out(components.weighted_sum(comps, params, jnp.ones(6).at[c].set(0.0)))
            for c in range(6)
        ]
        expected = jnp.stack(
            [jnp.sqrt(jnp.mean((whole - part) ** 2, axis=1)) for part in without], axis=1
        )
        return attributions.ablation(apply_fn, params, comps, x), expected

    close(*both())


def test_pentagon_by_hand(pentagon):
    # Feature f alone, in relu(W Wᵀ x + b). Moving W_f by P_f = W_f moves output f by 2·|W_f|² = 2
    # (both uses), and those of its two neighbours, which are just on at 0.009, by cos 72° (first
    # use). A neighbour's own P moves that neighbour's output by cos 72° (second use). All other
    # outputs are off. The square root of the mean over 5 outputs:
    cos = np.cos(2 * np.pi / 5)
    own, neighbour = np.sqrt((2**2 + 2 * cos**2) / 5), np.sqrt(cos**2 / 5)
    ring = np.roll(np.eye(5), 1, 0) + np.roll(np.eye(5), -1, 0)
    measured = attributions.gradient(
        pentagon.apply_fn, pentagon.params, pentagon.components, pentagon.x
    )
    np.testing.assert_allclose(measured, own * np.eye(5) + neighbour * ring, atol=1e-5)


def test_vmaps_over_instances(network):
    apply_fn, params, comps, x = network
    several = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), comps)
    one = lambda c: attributions.gradient(apply_fn, params, c, x)  # noqa: E731
    both = jax.jit(jax.vmap(one))(several)
    close(both[0], jax.jit(one)(comps))
    close(both[1], 4 * both[0])  # twice U and twice V


def test_refused(network):
    apply_fn, params, comps, x = network
    with pytest.raises(InputError, match="unknown attribution_mode 'sideways'"):
        attributions.gradient(apply_fn, params, comps, x, mode="sideways")
    with pytest.raises(InputError, match="differ in structure"):
        attributions.gradient(apply_fn, params | {"more": x}, comps, x)
