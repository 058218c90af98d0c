"""Weights per site, κ = β θ* + Σ_j w_j P_j, against weights that are formed and put in by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close
from draws import B, drawn_components
from draws import uniform as draw
from jax.sharding import PartitionSpec as P
from networks import NETWORKS

from apd_jax import components as components_lib
from apd_jax.components import layout
from apd_jax.errors import InputError
from apd_jax.forward import sparse
from apd_jax.forward.sparse import SiteWeights

C = 5
IDS = (range(1, 4), (4, 0, 4), None, range(2), (2,))  # of the first, second, ... site, in turn


@functools.cache
def setup(name):
    """A network whose sites hold different components."""
    fn, params, x = NETWORKS[name]()
    layouts = layout.infer(fn, params, x)
    names = components_lib.selected_paths(params, None, layouts)
    cs = drawn_components(
        params,
        2.0,
        num_components=C,
        rank=2,
        layouts=layouts,
        ids={name: IDS[i % 5] for i, name in enumerate(names) if isinstance(IDS[i % 5], range)},
    )

    def repeated(f, ids):  # one component with two pieces
        if not isinstance(ids, tuple):
            return f
        n = len(ids)
        return dataclasses.replace(f, U=f.U[:n], V=f.V[:n], ids=ids)

    ids = dict(zip(names, (IDS[i % 5] for i in range(len(names))), strict=True))
    slots = components_lib.named_leaves(cs.tree)
    new = [None if f is None else repeated(f, ids[name]) for name, f in slots.items()]
    tree = jax.tree.unflatten(jax.tree.structure(cs.tree, is_leaf=components_lib.is_slot), new)
    return fn, params, x, components_lib.Components(tree, C)


def weights_of(cs, shape=(B,), bools=False, with_target=True):
    """Random w and β of every site; of the last site no β."""
    found = {}
    for i, (name, f) in enumerate(cs.factors.items()):
        w = draw(i, *shape, f.num_pieces)
        target = draw(50 + i, *shape) if with_target and i < len(cs.factors) - 1 else None
        found[name] = SiteWeights(w > 0.2 if bools else w, target)
    return found


def oracle(fn, params, cs, weights, x):
    """Every example's own weights, formed."""
    leaves = components_lib.decomposed_leaves(cs, params)

    def one(own, x_b):
        formed = {}
        for name, (w, target) in own.items():
            total = jnp.tensordot(w.astype(jnp.float32), cs.factors[name].weights, axes=1)
            total = total + (0.0 if target is None else target * leaves[name])
            formed[name] = total.astype(leaves[name].dtype)
        replaced = components_lib.replace_leaves(params, formed)
        out = fn(replaced, jax.tree.map(lambda a: a[None], x_b))
        return jax.tree.map(lambda a: a[0], out)

    pairs = {name: (own.pieces, own.target) for name, own in weights.items()}
    return jax.vmap(one)(pairs, x)


USES = (
    "conv_strided_dilated",
    "attention_tied_embedding",
    "experts",
    "scanned_layers",
    "layers_by_index",
    "fused_and_reshaped",
    "recurrent",
    "normalised_weights",
    "half_precision",
    "graph",
)


@pytest.mark.parametrize("name", USES)
def test_routes_equal_formed_weights_in_value_and_every_derivative(name):
    fn, params, x, cs = setup(name)
    floats, bools = weights_of(cs), weights_of(cs, bools=True)

    def loss(run, cs, weights):
        return sum(jnp.mean(a**2) for a in jax.tree.leaves(run(cs, weights)))

    def route(name, **more):
        return lambda cs, w: sparse.run(fn, params, cs, w, x, route=name, **more)

    def by_hand(cs, w):
        return oracle(fn, params, cs, w, x)

    @jax.jit
    def everything(cs, floats, bools):
        derive = jax.value_and_grad(loss, argnums=(1, 2))
        both = jax.tree.map(lambda a, b: jnp.stack([a, b.astype(a.dtype)]), floats, bools)
        expected = jax.vmap(lambda w: derive(by_hand, cs, w))(both)
        found = [derive(route(name), cs, floats) for name in ("masked", "materialize")]
        dispatch = functools.partial(loss, route("dispatch", slots=2))
        return expected, found, jax.value_and_grad(dispatch)(cs, bools)

    def compare(found, expected, gradient):
        value, tolerance = expected[0], 0.06 if name == "half_precision" else 5e-5
        close(found[0], value, tolerance)
        scale = max(np.abs(a).max() for a in jax.tree.leaves(gradient))
        for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(a, b, atol=tolerance * scale)

    by_hands, by_route, by_dispatch = jax.tree.map(np.asarray, everything(cs, floats, bools))
    of_floats, of_bools = (jax.tree.map(lambda a, i=i: a[i], by_hands) for i in range(2))
    for found in by_route:
        compare(found, of_floats, of_floats[1])
    compare(by_dispatch, of_bools, of_bools[1][0])


@pytest.mark.parametrize("name", ["attention_tied_embedding", "scanned_layers", "half_precision"])
def test_the_targets_own_weight_is_exact(name):
    fn, params, x, cs = setup(name)
    nothing = {
        name: SiteWeights(jnp.zeros((B, f.num_pieces)), jnp.ones(B))
        for name, f in cs.factors.items()
    }
    first = dict([next(iter(nothing.items()))])
    found, expected = jax.jit(
        lambda: (
            {
                (route, len(w)): sparse.run(fn, params, cs, w, x, route=route)
                for route in ("auto", "masked", "materialize")
                for w in (nothing, first, {})
            },
            fn(params, x),
        )
    )()
    for (route, _), out in found.items():
        # A few units in the last place: sums are taken in another order, as the CPU has it.
        close(out, expected, 5e-3 if name == "half_precision" else 1e-6, err_msg=route)


def test_many_rows_that_share_weights_are_formed_once():
    """auto forms κ for a site with many rows, and does not for one with few."""
    params = {"w": draw(1, 80, 60), "v": draw(2, 60, 70)}
    fn = lambda p, x: jnp.mean(x @ p["w"], axis=1) @ p["v"]  # noqa: E731
    x = draw(3, 2, 200, 80)
    cs = drawn_components(params, 9.0, num_components=4)
    weights = {name: SiteWeights(draw(i, 2, 4), draw(9, 2)) for i, name in enumerate(cs.factors)}
    found = jax.jit(lambda w: sparse.run(fn, params, cs, w, x))(weights)
    close(found, jax.jit(lambda w: oracle(fn, params, cs, w, x))(weights), 2e-5)
    # [2, 80, 60] is every example's own weight of the first site; none of shape [2, 60, 70].
    text = str(jax.make_jaxpr(lambda w: sparse.run(fn, params, cs, w, x))(weights))
    assert "f32[2,80,60]" in text and "f32[2,60,70]" not in text


# Per position

T, V = 3, 5
PARAMS = {"e": draw(1, 7, 4), "w": draw(2, 4, 6), "v": draw(3, 6, V)}
TOKENS = jnp.asarray(np.random.default_rng(4).integers(7, size=(B, T)), jnp.int32)


def network(p, tokens):
    x = p["e"][tokens]
    x = x + jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return jax.nn.gelu(x @ p["w"]) @ p["v"]


def test_positions_have_their_own_share_of_the_target():
    some = {"e": range(2), "w": range(1, 4)}
    cs = drawn_components(PARAMS, 3.0, num_components=4, ids=some)
    weights = weights_of(cs, (B, T))

    def by_hand(cs, weights):
        def one(own, tokens):
            at = {
                n: jnp.tensordot(w, cs.factors[n].weights, axes=1)
                + (0.0 if target is None else target[:, None, None] * PARAMS[n][None])
                for n, (w, target) in own.items()
            }  # [T, d_in, d_out]
            x = jax.vmap(lambda e, t: e[t])(at["e"], tokens)
            x = x + jnp.pad(x[:-1], ((1, 0), (0, 0)))
            h = jax.nn.gelu(jnp.einsum("td,tde->te", x, at["w"]))
            return jnp.einsum("td,tde->te", h, at["v"])

        return jax.vmap(one)({n: (w.pieces, w.target) for n, w in weights.items()}, TOKENS)

    def loss(cs, weights, route):
        if route == "by hand":
            return jnp.sum(jnp.sin(by_hand(cs, weights)))
        return jnp.sum(jnp.sin(sparse.run(network, PARAMS, cs, weights, TOKENS, route=route)))

    found = jax.jit(
        lambda cs, w: {
            route: jax.value_and_grad(loss, argnums=(0, 1))(cs, w, route)
            for route in ("by hand", "masked", "materialize", "auto")
        }
    )(cs, weights)
    value, gradient = found.pop("by hand")
    for other, other_gradient in found.values():
        close(other, value, 2e-5)
        for a, b in zip(jax.tree.leaves(other_gradient), jax.tree.leaves(gradient), strict=True):
            close(a, b, 1e-4)


def test_some_sites_per_position_others_per_example():
    cs = drawn_components(PARAMS, 3.0, num_components=4)
    mask = draw(0, B, 4)
    spread = jnp.broadcast_to(mask[:, None], (B, T, 4))

    @jax.jit
    def both():
        return [
            sparse.run(
                network,
                PARAMS,
                cs,
                {n: SiteWeights(spread if n in per_position else mask) for n in PARAMS},
                TOKENS,
            )
            for per_position in (("e", "v"), ())
        ]

    found, expected = both()
    close(found, expected, 1e-5)


# Attributions' flavors with sites that hold some of the components


@pytest.mark.parametrize("flavor", ["gradient", "tangent"])
@pytest.mark.parametrize("per_position", [False, True])
def test_derivatives_by_components_whatever_the_sites_hold(flavor, per_position):
    cs = drawn_components(PARAMS, num_components=4, ids={"e": range(2), "w": range(1, 4)})
    twice = dataclasses.replace(
        cs.factors["v"], ids=(3, 0, 3), U=cs.factors["v"].U[:3], V=cs.factors["v"].V[:3]
    )
    cs = components_lib.Components(cs.tree | {"v": twice}, 4)
    s = jnp.zeros((T, 4) if per_position else 4)
    direction = draw(7, *s.shape)
    every = components_lib.materialize(cs)

    def moved(s, x_b):
        if not per_position:
            at = {n: PARAMS[n] + jnp.tensordot(s, every[n], axes=1) for n in PARAMS}
            return network(at, x_b[None])[0]
        return sparse.substituted(
            network,
            PARAMS,
            components_lib.aligned(cs),
            s,
            None,
            x_b,
            flavor=flavor,
        )

    def through(s, x_b):
        return sparse.substituted(network, PARAMS, cs, s, None, x_b, flavor=flavor)

    def derivative(fn):
        if flavor == "tangent":
            return jax.jvp(fn, (s,), (direction,))[1]
        return jax.vjp(fn, s)[1](jnp.ones((T, V)))[0]

    @jax.jit
    def both(x_b):
        return [derivative(functools.partial(f, x_b=x_b)) for f in (through, moved)]

    for x_b in TOKENS[:2]:
        found, expected = both(x_b)
        close(found, expected, 1e-5)


def test_activation_of_a_component_with_several_pieces_at_a_site():
    """‖x·(P_0 + P_1)‖² is not ‖x·P_0‖² + ‖x·P_1‖²."""
    params, x = {"w": draw(1, 4, 6)}, draw(2, B, 4)
    cs = drawn_components(params, 4.0, num_components=3)
    merged = components_lib.merge(cs, [0, 2])
    P = components_lib.materialize(merged)["w"]

    def one(x_b):
        f = lambda s: sparse.substituted(  # noqa: E731
            lambda p, x: x @ p["w"], params, merged, s, None, x_b, flavor="activation"
        )
        return jax.vjp(f, jnp.zeros(2))[1](jnp.ones(6))[0]

    expected = np.sum(np.einsum("bd,cde->bce", x, P) ** 2, axis=-1)
    close(jax.jit(jax.vmap(one))(x), expected, 1e-5)


# Components split over devices


@pytest.mark.parametrize("name", ["attention_tied_embedding", "normalised_weights", "recurrent"])
def test_the_target_is_added_once_where_components_are_split(name):
    fn, params, x = NETWORKS[name]()
    layouts = layout.infer(fn, params, x)
    cs = drawn_components(params, 3.0, num_components=4, rank=2, layouts=layouts)
    mask, target = draw(1, B, 4), draw(2, B)
    routes = ("auto", "materialize", "masked")

    def loss(cs, mask, target, axis, route):
        split = components_lib.split_over(cs, axis)
        weights = {name: SiteWeights(mask, target) for name in cs.factors}
        out = sparse.run(fn, params, split, weights, x, route=route)
        return jnp.mean(out**2), out

    def derive(cs, mask, target, axis=None):
        of = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
        return {route: of(cs, mask, target, axis, route) for route in routes}

    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:4]), ("component",))
    own = jax.tree.map(lambda _: P("component"), cs)
    specs = (own, P(None, "component"), P())
    split = jax.jit(
        jax.shard_map(
            lambda c, m, t: derive(c, m, t, "component"),
            mesh=mesh,
            in_specs=specs,
            out_specs=dict.fromkeys(routes, ((P(), P()), specs)),
            check_vma=False,
        )
    )
    by_route, expected = split(cs, mask, target), jax.jit(derive)(cs, mask, target)
    for route, ((_, found), split_gradient) in by_route.items():
        (_, out), gradient = expected[route]
        close(found, out, 2e-5, err_msg=route)
        for a, b in zip(jax.tree.leaves(split_gradient), jax.tree.leaves(gradient), strict=True):
            close(a, b, 1e-4, err_msg=route)


@pytest.mark.parametrize(
    ("weights", "route", "message"),
    [
        (
            {"u": SiteWeights(jnp.ones((B, 4)))},
            "auto",
            "weights for 'u', which is not a decomposed",
        ),
        ({"w": SiteWeights(jnp.ones((B, 3)))}, "auto", r"site 'w' have shape \(5, 3\)"),
        (
            {"w": SiteWeights(jnp.ones((B, 4)), jnp.ones(3))},
            "auto",
            r"the target's weight at site 'w' has shape \(3,\)",
        ),
        (
            {"e": SiteWeights(jnp.ones((B, 3, 4))), "w": SiteWeights(jnp.ones((B, 2, 4)))},
            "auto",
            r"for \[2, 3\] positions",
        ),
        ({"w": SiteWeights(jnp.ones((B, 4)))}, "dispatch", "cannot take a float32 mask"),
    ],
)
def test_refused(weights, route, message):
    cs = drawn_components(PARAMS, num_components=4)
    with pytest.raises(InputError, match=message):
        sparse.run(network, PARAMS, cs, weights, TOKENS, route=route, slots=2)
