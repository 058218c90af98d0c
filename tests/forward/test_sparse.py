"""The sparse forward pass: every route against the plain definition, in value and gradient.

The oracle is written out here: for every example, sum its kept components into weights and call the
network with them.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close
from draws import drawn_components
from flax import nnx

from apd_jax import components as components_lib
from apd_jax.errors import InputError
from apd_jax.forward import dispatch, sparse

B, C = 9, 4
ROUTES = [
    ("materialize", None),
    ("masked", None),
    ("dispatch", 3),
]
MORE_SLOTS = [("dispatch", 1), ("dispatch", 100)]  # of one network, and of one with several rows


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.gelu(nn.Dense(5)(x)))


class DenseNNX(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def linen():
    model = Dense()
    return model.apply, jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 4)))


def flax_nnx():
    graph, state = nnx.split(DenseNNX(nnx.Rngs(0)))
    return lambda params, x: nnx.merge(graph, params)(x), nnx.to_pure_dict(state)


def draw(**shapes):
    rng = np.random.default_rng(2)
    return {
        name: jnp.asarray(rng.standard_normal(shape, np.float32), jnp.float32)
        for name, shape in shapes.items()
    }


X = draw(x=(B, 4))["x"]


def plain(fn, **shapes):
    return lambda: (fn, draw(**shapes))


def dense(p, x):  # a bias, an undecomposed embedding of two axes and hidden activations
    h = nn.relu(x @ p["embed"] @ p["w"] + p["b"][None, :])
    return h @ p["v"], {"h": h}


def tied(p, x):
    return nn.relu(x @ p["w"] @ p["w"].T + p["b"][None, :])


def transposed(p, x):
    return jnp.einsum("oi,bi->bo", p["w"], x), {"other": jnp.einsum("io,bi->bo", p["v"], x)}


def einsum_heads(p, x):  # attention over 2 positions: several rows per example
    x = x.reshape(-1, 2, 2)
    q, k = jnp.einsum("bti,ij->btj", x, p["w"]), jnp.einsum("bti,ij->btj", x, p["v"])
    return jnp.einsum("bst,btj->bsj", nn.softmax(q @ jnp.swapaxes(k, 1, 2)), q).reshape(
        x.shape[0], -1
    )


def inner_jit_and_custom_jvp(p, x):
    @jax.custom_jvp
    def cube(a):
        return a**3

    cube.defjvp(lambda primals, tangents: (primals[0] ** 3, 3 * primals[0] ** 2 * tangents[0]))
    return jax.jit(lambda w, x: cube(jax.nn.gelu(x @ w)))(p["w"], x) @ p["v"]


def recurrent(p, x):
    def cell(h, x_t):
        h = jnp.tanh(h @ p["w"] + x_t[:, None] * p["v"][:1])
        return h, None

    return jax.lax.scan(cell, jnp.zeros((x.shape[0], 4)), x.T)[0]


def convolution(p, x):
    x = x.reshape(-1, 2, 2, 1)
    return jax.lax.conv_general_dilated(
        x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).reshape(x.shape[0], -1)


def elementwise(p, x):  # not a product at all: the leaf itself, its square, a slice
    return x * p["w"][0][None, :] + jnp.sum(p["w"] ** 2)


def lookup(p, x):
    return jnp.take(p["w"], jnp.int32(jnp.abs(x[:, 0])) % 4, axis=0)


NETWORKS = {
    "linen": (linen, None),
    "nnx": (flax_nnx, None),
    "dense and a bias": (plain(dense, embed=(4, 6), w=(6, 5), b=(5,), v=(5, 3)), ["w", "v", "b"]),
    "tied": (plain(tied, w=(4, 3), b=(4,)), None),
    "transposed": (plain(transposed, w=(3, 4), v=(4, 2)), None),
    "attention": (plain(einsum_heads, w=(2, 3), v=(2, 3)), None),
    "inner jit, custom_jvp": (plain(inner_jit_and_custom_jvp, w=(4, 5), v=(5, 3)), None),
    "scan": (plain(recurrent, w=(4, 4), v=(2, 4)), None),
    "convolution": (plain(convolution, kernel=(2, 2, 1, 3)), None),
    "elementwise": (plain(elementwise, w=(2, 4)), None),
    "lookup": (plain(lookup, w=(4, 4)), None),
}


def oracle(apply_fn, params, components, mask, x):
    def one(mask_b, x_b):
        kappa = components_lib.weighted_sum(components, params, jnp.asarray(mask_b, jnp.float32))
        return jax.tree.map(lambda a: a[0], apply_fn(kappa, x_b[None]))

    return jax.vmap(one)(mask, x)


def compare(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        close(a, b, 2e-5)


@pytest.fixture(params=list(NETWORKS))
def network(request):
    """(apply_fn, params, components)"""
    build, select = NETWORKS[request.param]
    apply_fn, params = build()
    components = drawn_components(params, 2.0, num_components=C, rank=2, select=select)
    return apply_fn, params, components


# One component on everywhere, one nowhere, one example with none and one with all.
MASK = np.random.default_rng(0).uniform(size=(B, C)) < 0.4
MASK[:, 1], MASK[:, 2] = True, False
MASK[0], MASK[1] = False, True
MASK = jnp.asarray(MASK)
WEIGHTS = jnp.where(
    MASK, jnp.asarray(np.random.default_rng(1).uniform(size=(B, C)), jnp.float32), 0.0
)


def test_every_route_equals_the_definition_in_value_and_gradient(network, request):
    apply_fn, params, components = network
    more = MORE_SLOTS if request.node.callspec.id in ("dense and a bias", "attention") else []

    def with_gradient(run, mask):
        def loss(components):
            result = run(components, mask)
            # All terms are positive: a sum that cancels is no number to compare in float32.
            return sum(jnp.sum(2 + jnp.sin(a)) for a in jax.tree.leaves(result)), result

        return jax.value_and_grad(loss, has_aux=True)(components)

    def route(name, slots):
        return lambda components, mask: sparse.apply(
            apply_fn, params, components, mask, X, route=name, slots=slots
        )

    @jax.jit
    def all_of_them():
        masks = jnp.stack([MASK.astype(jnp.float32), WEIGHTS])
        by_hand = lambda c, m: oracle(apply_fn, params, c, m, X)  # noqa: E731
        return (
            jax.vmap(lambda mask: with_gradient(by_hand, mask))(masks),
            [with_gradient(route(*r), MASK) for r in [*ROUTES, *more]],
            with_gradient(route("masked", None), WEIGHTS),
        )

    expected, by_route, weighted = jax.tree.map(np.asarray, all_of_them())
    of_mask, of_weights = (jax.tree.map(lambda a, i=i: a[i], expected) for i in range(2))
    for actual in by_route:
        compare(actual, of_mask)
    compare(weighted, of_weights)


def test_under_an_outer_vmap_over_instances():
    apply_fn, params = plain(dense, embed=(4, 6), w=(6, 5), b=(5,), v=(5, 3))()
    x, masks = jnp.stack([X, -X]), jnp.stack([MASK, ~MASK])
    one = drawn_components(params, num_components=C, select=["w", "v"])
    several = jax.tree.map(lambda a: jnp.stack([a, 1 - a]), one)

    def all_routes(components, mask, x):
        def loss(components, route, slots):
            out, hidden = sparse.apply(
                apply_fn, params, components, mask, x, route=route, slots=slots
            )
            return jnp.sum(jnp.sin(out)) + jnp.sum(hidden["h"] ** 2)

        return [jax.value_and_grad(loss)(components, *r) for r in [*ROUTES, *MORE_SLOTS]]

    together, alone = jax.jit(jax.vmap(all_routes))(several, masks, x), jax.jit(all_routes)
    together = jax.tree.map(np.asarray, together)
    for i, own in enumerate((one, jax.tree.map(lambda a: 1 - a, one))):
        compare(jax.tree.map(lambda a, i=i: a[i], together), alone(own, masks[i], x[i]))


@pytest.mark.parametrize("network", ["tied", "dense and a bias"], indirect=True)
def test_auto_is_exact_and_all_kept_is_the_component_sum(network):
    apply_fn, params, components = network

    @jax.jit
    def pairs(c):
        def run(mask):
            found = sparse.apply(apply_fn, params, c, mask, X, slots=4)
            return found, oracle(apply_fn, params, c, mask, X)

        kept = sparse.apply(
            apply_fn, params, c, jnp.ones((B, C), bool), X, route="dispatch", slots=2
        )
        return run(MASK), run(WEIGHTS), (kept, apply_fn(components_lib.total(c, params), X))

    for actual, expected in pairs(components):
        compare(actual, expected)


def test_inputs_may_be_a_pytree():
    apply_fn = lambda p, x: x["a"] @ p["w"] + x["b"] @ p["w"]  # noqa: E731
    params = draw(w=(4, 3))
    components = drawn_components(params, num_components=C)
    x = {"a": jnp.ones((B, 4)), "b": jnp.arange(4.0 * B).reshape(B, 4)}

    @jax.jit
    def both(c):
        found = sparse.apply(apply_fn, params, c, MASK, x, route="dispatch", slots=2)
        return found, oracle(lambda p, x: x @ p["w"], params, c, MASK, x["a"] + x["b"])

    compare(*both(components))


def test_slots():
    # k·B/C = 1.28·256/130 = 2.52; 2.52 + 6·sqrt(2.52) + 2 = 14.04, to 8 rows: 16. Never more than
    # the batch.
    assert dispatch.slots_for(1.28, 256, 130) == 16
    assert dispatch.slots_for(4.0, 10, 4) == 10


@pytest.mark.parametrize(
    ("mask", "more", "message"),
    [
        (MASK, {"route": "densely"}, "route 'densely'"),
        (MASK, {"route": "dispatch"}, "slots = None"),
        (WEIGHTS, {"route": "dispatch", "slots": 2}, "float32 mask"),
        (MASK[:, :3], {}, r"mask has shape \(9, 3\), but examples and components ask for \(9, 4\)"),
        (MASK[:5], {}, r"mask has shape \(5, 4\)"),
    ],
)
def test_refused(mask, more, message):
    params = draw(w=(4, 3))
    components = drawn_components(params, num_components=C)
    with pytest.raises(InputError, match=message):
        sparse.apply(lambda p, x: x @ p["w"], params, components, mask, jnp.zeros((B, 4)), **more)
