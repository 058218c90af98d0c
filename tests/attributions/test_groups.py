"""Sites that hold pieces of only some components: the same attributions as of all, aligned."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close
from draws import drawn_components

from apd_jax import attributions, components
from apd_jax.attributions import groups, tangents
from apd_jax.components import Components

B, T = 3, 2
LEAVES = {"first": (4, 5), "mixed": (5, 5), "last": (5, 3)}
PARAMS = {
    name: jnp.asarray(np.random.default_rng(i).normal(size=shape) / 2, jnp.float32)
    for i, (name, shape) in enumerate(LEAVES.items())
}
X = jax.random.normal(jax.random.key(0), (B, T, 4))


def network(p, x):
    """Positions are mixed between the first and the second site."""
    h = jnp.tanh(x @ p["first"])
    h = jnp.tanh((h + h[:, ::-1]) @ p["mixed"])
    return h @ p["last"]


# {site: its numbers}, of 6.
NUMBERS = {
    "own numbers": {"first": range(0, 2), "mixed": range(2, 3), "last": range(3, 6)},
    "out of order": {"first": (4, 1), "mixed": (0, 5), "last": (3, 2)},
    "two sites share": {"first": (0, 5), "mixed": range(1, 3), "last": (5, 3, 4)},
    "two pieces of one number": {"first": (1, 0, 1), "mixed": (2,), "last": (3, 4, 3)},
    "one site has all": {"first": None, "mixed": (2, 3), "last": range(4, 6)},
}


def some(numbers):
    """Components of rank 1 with these numbers. Number 5 has no piece at all in one of the cases."""
    tree = {}
    for i, (name, ids) in enumerate(numbers.items()):
        n = 6 if ids is None else len(ids)
        one = drawn_components({name: PARAMS[name]}, 3.0, i, num_components=n, rank=1)
        tree[name] = dataclasses.replace(one.factors[name], ids=ids)
    return Components(tree, 6)


WAYS = {
    "forward": ("gradient", {"mode": "forward"}),
    "reverse": ("gradient", {"mode": "reverse"}),
    "auto": ("gradient", {}),
    "probe": ("gradient", {"mode": "probe", "rng": jax.random.key(1), "num_probes": 3}),
    "per position": ("gradient", {"per_position": True}),
    "kl": ("gradient", {"mode": "forward", "metric": "kl"}),
    "integrated, forward": ("integrated_gradient", {"mode": "forward"}),
    "integrated, reverse": ("integrated_gradient", {"mode": "reverse"}),
    "ablation": ("ablation", {}),
    "activation": ("activation", {}),
    "activation, per position": ("activation", {"per_position": True}),
}


# The other ways are these with other weights of outputs, or along a path: with two cases.
BARE = ("forward", "reverse", "auto")


@pytest.mark.parametrize("numbers", NUMBERS)
def test_as_the_same_components_aligned(numbers, monkeypatch):
    cs = some(NUMBERS[numbers])
    ways = WAYS if numbers in ("own numbers", "two pieces of one number") else BARE

    @jax.jit
    def of_every_way(cs):
        return {
            way: attributions.squared(WAYS[way][0], network, PARAMS, cs, X, **WAYS[way][1])
            for way in ways
        }

    found, expected = of_every_way(cs), of_every_way(components.aligned(cs))
    for way, wanted in expected.items():
        close(found[way], wanted, err_msg=way)
        assert found[way].shape[-1] == 6 and np.asarray(wanted).any()
    # Of low rank through their factors; these leaves are too small for it to pay by itself.
    monkeypatch.setattr(tangents, "_TWO_PRODUCTS", 0)
    factored = jax.jit(lambda: attributions.squared("gradient", network, PARAMS, cs, X))()
    close(factored, expected["auto"])


def test_a_site_of_its_own_is_taken_alone():
    """Forward and ablation go through n_l components at site l, not through C at all sites."""
    own = groups.groups(some(NUMBERS["own numbers"]))
    held = {name: (g.components.factors, g.numbers) for g in own for name in g.components.factors}
    assert len(own) == len(held) == 3 and all(len(sites) == 1 for sites, _ in held.values())
    for name, numbers in NUMBERS["own numbers"].items():
        sites, found = held[name]
        assert found.tolist() == list(numbers) and sites[name].num_pieces == len(numbers)


def test_sites_that_share_numbers_are_taken_together():
    apart, shared = sorted(
        groups.groups(some(NUMBERS["two sites share"])), key=lambda g: len(g.numbers)
    )
    assert (list(shared.components.factors), shared.numbers.tolist()) == (
        ["first", "last"],
        [0, 3, 4, 5],
    )
    assert all(f.ids is None and f.num_pieces == 4 for f in shared.components.factors.values())
    assert list(apart.components.factors) == ["mixed"]


def test_components_with_all_numbers_everywhere_are_left_as_they_are():
    cs = drawn_components(PARAMS, num_components=3)
    (group,) = groups.groups(cs)
    assert group.components is cs and group.numbers is None


# Which mode auto takes


@jax.custom_vjp
def twice(a):
    return 2 * a


twice.defvjp(lambda a: (2 * a, None), lambda _, g: (2 * g,))


def test_functions_without_tangents_are_taken_in_reverse():
    """Those with a custom_vjp, in inner functions too."""
    cs = drawn_components(PARAMS, num_components=3, scale=3.0)

    def other(p, x):
        return jax.jit(lambda p, x: twice(network(p, x)))(p, x)

    gradient = jax.jit(attributions.gradient, static_argnums=0)
    expected = np.asarray(gradient(network, PARAMS, cs, X))
    close(gradient(other, PARAMS, cs, X), 2 * expected)
    with pytest.raises(TypeError, match="custom_vjp"):
        attributions.gradient(other, PARAMS, cs, X, mode="forward")


def test_errors_of_the_network_are_not_taken_for_missing_tangents():
    """Also where their text would say so."""
    cs, calls = drawn_components(PARAMS, num_components=3), []

    def broken(p, x):
        calls.append(x)
        raise TypeError("custom_vjp")

    with pytest.raises(TypeError, match="custom_vjp"):
        attributions.gradient(broken, PARAMS, cs, X)
    assert len(calls) == 1


def test_probes_of_integrated_gradients_are_in_the_metric_of_the_weights_themselves():
    """kl: p is that of the outputs at θ, not of their average over the path. 3 outputs at T = 2
    positions: with each of the 2⁶ signs once the mean is exact; 4,000 draws come near it."""
    cs = drawn_components(PARAMS, num_components=3, scale=3.0)

    def of(**options):
        return attributions.squared(
            "integrated_gradient", network, PARAMS, cs, X, metric="kl", **options
        )

    exact = jax.jit(lambda: of(mode="reverse"))()
    drawn = jax.jit(lambda: of(mode="probe", rng=jax.random.key(0), num_probes=4000))()
    np.testing.assert_allclose(drawn, exact, rtol=0.1)
