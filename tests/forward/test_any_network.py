"""The engine on networks of every kind: layouts, routes, attributions.

Against materialised weights and `jax.jacrev`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import B, drawn_components
from networks import NETWORKS

from apd_jax import attributions, components, decompose, default_config
from apd_jax.attributions import tangents
from apd_jax.components import layout
from apd_jax.components.layout import Layout
from apd_jax.forward import kappa, sparse
from apd_jax.network.outputs import outputs

C = 3


@functools.cache
def setup(name):
    fn, params, x = NETWORKS[name]()
    layouts = layout.infer(fn, params, x)
    return fn, params, x, drawn_components(params, 4.0, num_components=C, layouts=layouts)


def loose(name):
    return 0.05 if name == "half_precision" else 2e-5


def jacobian_and_parts(fn, params, cs, x):
    """Of the network at its weights, and every P_c: of a leaf each, where it is decomposed."""
    jacobian = jax.jacrev(lambda p: outputs(fn(p, x)))(params)
    slots = (
        jax.tree.leaves(tree, is_leaf=components.is_slot)
        for tree in (jacobian, components.materialize(cs))
    )
    return [pair for pair in zip(*slots, strict=True) if pair[1] is not None]


def contracted(pairs):
    """The definition of attributions: sqrt(mean_o (J P_c)²), in float64."""
    total = np.zeros(())
    for J, P in pairs:
        flat = np.asarray(J, np.float64).reshape(len(J), -1, P[0].size)
        total = total + np.einsum("bop,cp->boc", flat, np.asarray(P, np.float64).reshape(C, -1))
    return np.sqrt((total**2).mean(axis=1))


LOOPS = (
    "scanned_layers",
    "layers_by_index",
    "recurrent",
    "nnx_sequences",
    "fused_and_reshaped",
)  # where auto has more to choose


@pytest.mark.parametrize(
    "name", ["scanned_layers", "recurrent", "linen_vision", "half_precision", "normalised_weights"]
)
def test_forward_attributions_through_the_factors(name, monkeypatch):
    """Loops, convolutions, mixed precision, and a leaf that must be formed."""
    monkeypatch.setattr(tangents, "_TWO_PRODUCTS", 0)
    fn, params, x, cs = setup(name)

    @jax.jit
    def both(cs):
        found = attributions.gradient(fn, params, cs, x, mode="forward")
        return found, jacobian_and_parts(fn, params, cs, x)

    found, pairs = both(cs)
    A = contracted(pairs)
    np.testing.assert_allclose(found, A, atol=loose(name) * A.max())


# Some components of every example, the first of all; one example with all.
MASK = np.random.default_rng(0).uniform(size=(B, C)) < 0.4
MASK[:, 0] = MASK[1] = True


@pytest.mark.parametrize("name", NETWORKS)
def test_routes_and_attributions_agree(name, monkeypatch):
    monkeypatch.setattr(
        sparse, "_TINY_LEAF", 0
    )  # or auto would form these small weights whatever the network does
    fn, params, x, cs = setup(name)
    routes = ("materialize", "dispatch", *["auto"] * (name in LOOPS))

    def loss(cs, route):
        mask = jnp.asarray(MASK)
        return jnp.mean(sparse.apply(fn, params, cs, mask, x, route=route, slots=2) ** 2)

    @jax.jit
    def everything(cs):
        found = attributions.gradient(fn, params, cs, x)
        by_route = {r: jax.value_and_grad(loss)(cs, r) for r in routes}
        return found, jacobian_and_parts(fn, params, cs, x), by_route

    found, pairs, by_route = everything(cs)
    A = contracted(pairs)
    np.testing.assert_allclose(found, A, atol=loose(name) * A.max())
    value, gradient = by_route["materialize"]
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    for route in routes[1:]:
        other, other_gradient = by_route[route]
        np.testing.assert_allclose(other, value, rtol=loose(name), err_msg=route)
        for a, b in zip(jax.tree.leaves(other_gradient), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(a, b, atol=loose(name) * largest, err_msg=route)


# The leaves that have to be formed for every example: no product or lookup of a plain view.
FORMED = {
    "conv_channels_first_depthwise": {"depthwise"},
    "normalised_weights": {"w"},
    "custom_vjp_on_weights_and_in_a_scan": {"w", "layers"},
    "weights_in_a_carry_and_in_branches": {"w", "u", "v", "stack"},
    "experts_by_top_k": {"up", "down"},
    "state_space_and_fourier": {"decay", "drive", "filter"},
    "fast_weights": {"w"},
    "linen_vision": {"params.Conv_1.kernel"},
    "nnx_sequences": {f"attention.{name}.bias.value" for name in ("query", "key", "value")},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_only_leaves_without_a_product_are_formed(name, monkeypatch):
    fn, params, x, cs = setup(name)
    formed, materialise = set(), kappa.Kappa.materialise
    monkeypatch.setattr(
        kappa.Kappa, "materialise", lambda self: formed.add(self.name) or materialise(self)
    )
    mask = jnp.ones((B, C), jnp.bool_)
    whole, expected = jax.jit(
        lambda cs: (
            sparse.apply(fn, params, cs, mask, x, route="masked"),
            fn(components.total(cs, params), x),
        )
    )(cs)
    assert formed == FORMED.get(name, set())
    np.testing.assert_allclose(whole, expected, atol=loose(name) * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("conv_strided_dilated", {"k1": Layout((), (0, 1, 2), (3,)), "w": Layout((), (0,), (1,))}),
        ("conv_channels_first_depthwise", {"k1": Layout((), (1, 2, 3), (0,))}),
        (
            "attention_tied_embedding",
            {
                "e": Layout((), (0,), (1,)),
                "q": Layout((), (0,), (1, 2)),
                "o": Layout((), (0, 1), (2,)),
            },
        ),
        ("experts", {"w1": Layout((), (1,), (0, 2)), "w2": Layout((0,), (1,), (2,))}),
        ("scanned_layers", {"w": Layout((0,), (1,), (2,)), "b": Layout((0,), (), (1,))}),
        ("layers_by_index", {"w": Layout((0,), (1,), (2,)), "u": Layout((0,), (2,), (1,))}),
        ("fused_and_reshaped", {"qkv": Layout((), (0,), (1,)), "heads": Layout((), (0,), (1,))}),
        ("several_axes", {"w": Layout((), (0, 1), (2, 3)), "o": Layout((), (0, 1), (2,))}),
        (
            "weights_in_a_carry_and_in_branches",
            {"w": Layout((), (0,), (1,)), "u": Layout((), (0,), (1,))},
        ),
        (
            "custom_vjp_on_weights_and_in_a_scan",
            {"v": Layout((), (0,), (1,)), "layers": Layout((0,), (1,), (2,))},
        ),
        ("experts_by_top_k", {"up": Layout((0,), (1,), (2,)), "gate": Layout((), (0,), (1,))}),
        ("normalised_weights", {"v": Layout((), (0,), (1,))}),
    ],
)
def test_layouts_are_read_off_the_network(name, expected):
    found = layout.infer(*NETWORKS[name]())
    assert {key: found[key] for key in expected} == expected
    assert (
        "w" not in found or name != "normalised_weights"
    )  # divided by its norm: no view of itself


def test_weights_of_a_loop_that_slices_nothing_are_matrices():
    params = {"w": jnp.ones((4, 4))}
    fn = lambda p, x: jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"]), x)  # noqa: E731
    assert layout.infer(fn, params, jnp.ones((2, 4))) == {"w": Layout((), (0,), (1,))}


def test_a_weight_that_a_loop_repeats_is_formed_once_where_that_is_cheaper():
    w, s, x = jnp.ones((4, 4)), jnp.array([1.0, 0.0, 1.0]), jnp.arange(4.0)[None]
    cs = drawn_components({"w": w}, num_components=3)
    f = cs.factors["w"]
    once = kappa.kappa(f, s, None, like=w, name="w", flavor="cheaper", num_examples=1)
    # Multiplications of one row by the factors: 3·4·(4 + 4) = 96; by a formed weight 16, and
    # 3·3·4·4 = 144 to form it, over 4 steps 36.
    rows, factors = x[None], once.matrices("i")
    repeated = once.before_loop(4)
    assert (once._cheaper(rows, *factors), repeated._cheaper(rows, *factors)) == ("kept", "dense")
    expected = x @ jnp.einsum("c,cde->de", s, f.weights)
    for value in (once, repeated, repeated.transposed((1, 0))):
        np.testing.assert_allclose(value.product(x, "i", x.dtype), expected, rtol=1e-5)


def test_half_precision_weights_have_components_in_single():
    params = {"w": jnp.ones((4, 6), jnp.float16), "v": jnp.ones((6, 3), jnp.float16)}
    fn = lambda p, x: (jax.nn.relu(x.astype(jnp.float16) @ p["w"]) @ p["v"]).astype(jnp.float32)  # noqa: E731
    config = default_config()
    config.update(
        num_components=C, batch_size=4, num_steps=2, steps_per_call=2, sparse_route="masked"
    )
    found = decompose(fn, params, lambda rng, step: jax.random.normal(rng, (4, 4)), config)
    assert {f.U.dtype for f in found.components.factors.values()} == {jnp.dtype("float32")}
    assert components.total(found.components, params)["w"].dtype == jnp.float16
    assert np.isfinite(found.history[-1]["total"])


def test_stacked_vectors_are_not_decomposed_unless_asked():
    fn, params, x = NETWORKS["scanned_layers"]()
    layouts = layout.infer(fn, params, x)
    assert components.selected_paths(params, None, layouts) == ["o", "w"]
    assert components.selected_paths(params, "*", layouts) == ["b", "o", "w"]


@pytest.mark.parametrize(
    ("old", "new"),
    [((2, 3, 4), (6, 4)), ((6, 4), (2, 3, 4)), ((2, 6), (4, 3)), ((1, 4), (4,)), ((), (1, 1))],
)
def test_regroup_is_what_reshape_does(old, new):
    groups = layout.regroup(old, new)
    assert [i for group, _ in groups for i in group] == list(range(len(old)))
    assert [i for _, group in groups for i in group] == list(range(len(new)))
    for left, right in groups:
        assert np.prod([old[i] for i in left]) == np.prod([new[i] for i in right])


def test_fold_and_unfold():
    for axes in (Layout((), (1, 2), (0,)), Layout((2,), (0,), (1,)), Layout((1,), (), (0, 2))):
        leaf = jnp.arange(24.0).reshape(2, 3, 4)
        matrices = layout.unfold(leaf, axes)
        assert matrices.shape[-2:] == layout.matrix_shape(leaf.shape, axes)
        np.testing.assert_array_equal(layout.fold(matrices, leaf.shape, axes), leaf)
        np.testing.assert_array_equal(
            layout.fold(jnp.stack([matrices] * 2), leaf.shape, axes)[1], leaf
        )
