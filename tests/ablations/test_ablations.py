"""What the others are worth in a pass: m = g + (1 - g) r, and where the sources r come from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close
from jax.sharding import PartitionSpec as P

from apd_jax.ablations import Drop, Keep, Sources, Uniform, masked, site_weights, subset_of_sites
from apd_jax.ablations.base import Shape
from apd_jax.ablations.stochastic import draws
from apd_jax.components import Components, Factors
from apd_jax.gates.base import Activity, hard
from apd_jax.methods.observe import example_keys

B, T, C, L = 6, 3, 4, 2
KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, B)


def shape(positions=(), **more):
    return Shape(size=B, positions=positions, num_components=C, num_sites=L, **more)


def components(**ids):
    def site(own):
        n = C if own is None else len(own)
        return Factors(jnp.ones((n, 2, 1)), jnp.ones((n, 1, 3)), (2, 3), ids=own)

    return Components({name: site(own) for name, own in ids.items()}, C)


# m = g + (1 - g) r


def test_masked_by_hand():
    g = jnp.array([[1.0, 0.5, 0.0]])
    # 1 whatever r is; 0.5 + 0.5·0.4; r itself where g is 0.
    np.testing.assert_allclose(masked(g, jnp.array([[0.3, 0.4, 0.2]])), [[1.0, 0.7, 0.2]])
    kept = jnp.array([[True, False, False]])
    found = masked(kept, jnp.array([[0.3, 0.4, 0.2]]))
    np.testing.assert_allclose(found, [[1.0, 0.4, 0.2]])
    assert found.dtype == jnp.float32
    # Without sources g itself: bool stays bool, which the dispatch route can use.
    assert masked(kept, None) is kept and masked(g, None) is g
    # Sources that all examples share.
    shared = masked(jnp.zeros((B, C), bool), jnp.arange(4.0)[None] / 4)
    np.testing.assert_allclose(shared, jnp.tile(jnp.arange(4.0) / 4, (B, 1)))


def test_masked_lets_gradients_through_to_gates_and_sources():
    # dm/dg = 1 - r, dm/dr = 1 - g.
    g, r = jnp.array([[1.0, 0.5, 0.0]]), jnp.array([[0.3, 0.4, 0.2]])
    by_g, by_r = jax.grad(lambda g, r: masked(g, r).sum(), argnums=(0, 1))(g, r)
    np.testing.assert_allclose(by_g, 1 - r)
    np.testing.assert_allclose(by_r, 1 - g)


# Sources


def test_inactive_components_in_part():
    """1 where kept; elsewhere uniform, drawn for every example and component apart.

    The same for a share of the components as for all.
    """
    keys = jax.random.split(KEY, 500)
    mask = jnp.tile(jnp.array([True, False, False, False]), (500, 1))

    def partly(mask, component_axis=None):
        return masked(mask, draws(keys, (), mask.shape[-1], component_axis))

    kept = partly(mask)
    assert (kept[:, 0] == 1).all() and kept.min() >= 0 and kept[:, 1:].max() < 1
    np.testing.assert_allclose(np.cov(kept[:, 1:].T), np.eye(3) / 12, atol=0.012)
    np.testing.assert_allclose(kept[:, 1:].mean(0), 0.5, atol=0.05)
    halves = jax.vmap(
        lambda part: partly(part, "component"), axis_name="component", in_axes=1, out_axes=1
    )
    np.testing.assert_array_equal(halves(mask.reshape(500, 2, 2)).reshape(500, 4), kept)


def test_positions_draw_apart():
    r = draws(jax.random.split(KEY, 200), (3,), 4)
    assert r.shape == (200, 3, 4)
    np.testing.assert_allclose(np.cov(r.reshape(200, -1).T), np.eye(12) / 12, atol=0.03)


@pytest.mark.parametrize("positions", [(), (T,)], ids=str)
@pytest.mark.parametrize("mesh", [(1, 2), (2, 1), (2, 2)], ids=str)
def test_draws_are_the_same_on_one_and_several_devices(mesh, positions):
    x, D, M = jnp.zeros((B, 1)), *mesh
    names = ["a", "b", "c"]

    def all_kinds(x, data=None, component=None):
        keys = example_keys(KEY, x, data)
        own = Shape(B // D, positions, C // (M if component else 1), L, data, component, True)
        routes = subset_of_sites(keys, positions, names)
        found = Uniform().draw((), keys, own)
        return found.components, found.delta, jnp.stack(list(routes.values()), -1)

    devices = np.asarray(jax.devices()[: D * M]).reshape(D, M)
    rest = [None] * len(positions)
    split = jax.shard_map(
        lambda x: all_kinds(x, "data", "component"),
        mesh=jax.sharding.Mesh(devices, ("data", "component")),
        in_specs=P("data"),
        out_specs=(P("data", *rest, "component"), P("data"), P("data")),
        check_vma=False,
    )
    for found, expected in zip(jax.jit(split)(x), jax.jit(all_kinds)(x), strict=True):
        assert expected.shape[:-1] == (B, *positions)
        np.testing.assert_array_equal(found, expected)


def test_drop_keep_and_uniform():
    assert Drop().draw((), KEYS, shape(with_delta=True)) is None  # r = 0: the mask itself
    for positions in ((), (T,)):
        kept = Keep().draw((), KEYS, shape(positions, with_delta=True))
        assert kept.components.shape == (1, *[1 for _ in positions], C)
        assert kept.delta.shape == (1, *[1 for _ in positions], L)
        assert (kept.components == 1).all() and (kept.delta == 1).all()
        uniform = Uniform().draw((), KEYS, shape(positions, with_delta=True))
        assert uniform.components.shape == (B, *positions, C)
        assert uniform.delta.shape == (B, *positions, L)
        # Δ has draws of its own.
        assert not np.isin(np.asarray(uniform.delta), np.asarray(uniform.components)).any()
    assert Uniform().draw((), KEYS, shape()).delta is None
    assert Keep().draw((), KEYS, shape()).delta is None
    for ablation in (Drop(), Keep(), Uniform()):
        assert ablation.init(KEY, shape()) == () and not ablation.ascends


def test_a_subset_of_sites_at_every_position():
    """k ~ U{1..L} of the L sites, chosen at random."""
    names = ["a", "b", "c"]
    routes = subset_of_sites(jax.random.split(KEY, 3000), (2,), names)
    assert list(routes) == names and all(r.shape == (3000, 2) for r in routes.values())
    chosen = np.stack([np.asarray(routes[name]) for name in names], -1).reshape(-1, 3)
    # Never none; 1, 2 and 3 equally often: 6000 draws, a standard error of 0.006.
    counts = np.bincount(chosen.sum(1), minlength=4) / len(chosen)
    np.testing.assert_allclose(counts, [0, 1 / 3, 1 / 3, 1 / 3], atol=0.03)
    # Every site alike: E k / L = 2/3. Two sites both: (0 + 1/3 + 1) / 3 = 4/9.
    np.testing.assert_allclose(chosen.mean(0), 2 / 3, atol=0.03)
    both = chosen.T.astype(float) @ chosen / len(chosen)
    np.testing.assert_allclose(both[~np.eye(3, dtype=bool)], 4 / 9, atol=0.03)
    # The two positions of an example choose apart: E k² / L² = (1 + 4 + 9)/27 were they one.
    first, second = (np.asarray(routes["a"])[:, t].astype(float) for t in (0, 1))
    assert abs(np.cov(first, second)[0, 1]) < 0.02
    # One site alone is always masked.
    assert subset_of_sites(KEYS, (), ["a"])["a"].all()


# The weights of sites


MASK = jnp.asarray(np.random.default_rng(0).uniform(size=(B, C)) < 0.5)
ON = hard(MASK, MASK.astype(jnp.float32))


def test_without_delta_a_site_takes_its_pieces_share():
    found = site_weights(components(a=None, b=(3, 0), c=range(1, 3)), ON, None)
    assert found["a"].pieces is MASK and found["a"].target is None
    np.testing.assert_array_equal(found["b"].pieces, MASK[:, [3, 0]])
    np.testing.assert_array_equal(found["c"].pieces, MASK[:, 1:3])
    assert found["c"].pieces.dtype == bool and list(found) == ["a", "b", "c"]


@pytest.mark.parametrize("delta", ["none", "masked", "on"])
def test_delta_by_hand(delta):
    """κ = Σ_c m_c P_c + m_Δ (θ* - Σ_c P_c), for numbers P and θ* in the place of matrices."""
    rng = np.random.default_rng(1)
    numbers, theta = jnp.asarray(rng.normal(size=C), jnp.float32), 3.0
    sources = Uniform().draw((), KEYS, shape(with_delta=delta == "masked"))
    found = site_weights(components(a=None, b=None), ON, sources, delta=delta)
    m = masked(MASK, sources.components)
    for i, name in enumerate(("a", "b")):
        share = {"none": 0.0, "on": 1.0}.get(delta)
        share = sources.delta[:, i] if share is None else share
        expected = m @ numbers + share * (theta - numbers.sum())
        w = found[name]
        beta = 0.0 if w.target is None else w.target
        close(beta * theta + w.pieces @ numbers, expected)
    # Where everything is kept and Δ too, the weight is θ* itself.
    if delta != "none":
        whole = Keep().draw((), KEYS, shape(with_delta=delta == "masked"))
        w = site_weights(components(a=None), ON, whole, delta=delta)["a"]
        close(w.target * theta + w.pieces @ numbers, np.full(B, theta))


def test_dropping_drops_delta_too():
    found = site_weights(components(a=None), ON, None, delta="masked")["a"]
    np.testing.assert_array_equal(found.pieces, MASK.astype(jnp.float32))
    np.testing.assert_array_equal(found.target, jnp.zeros(B))


def test_routed_sites_and_only():
    sites = components(a=None, b=(3, 0))
    here = jnp.arange(B) % 2 == 0
    routed = {"a": here, "b": ~here}
    found = site_weights(sites, ON, None, routed=routed)
    # Where a site is not masked it keeps the target's weight: w = 0, β = 1.
    for name, own in (("a", MASK), ("b", MASK[:, [3, 0]])):
        np.testing.assert_array_equal(found[name].target, 1.0 - routed[name])
        np.testing.assert_array_equal(found[name].pieces, jnp.where(routed[name][:, None], own, 0))
    # With Δ: there its source's share, elsewhere 1.
    sources = Sources(jnp.zeros((B, C)), jnp.full((B, L), 0.25))
    found = site_weights(sites, ON, sources, delta="masked", routed=routed)
    np.testing.assert_array_equal(found["a"].target, jnp.where(here, 0.25, 1.0))
    np.testing.assert_array_equal(found["a"].pieces, jnp.where(here[:, None], MASK - 0.25, 0.0))
    assert list(site_weights(sites, ON, None, only=["b"])) == ["b"]


def test_degrees_and_positions():
    g = jnp.asarray(np.random.default_rng(2).uniform(size=(B, T, C)), jnp.float32)
    sources = Uniform().draw((), KEYS, shape((T,), with_delta=True))
    found = site_weights(
        components(a=None, b=(3, 0)), Activity(g, g > 0, g), sources, delta="masked"
    )
    m = g + (1 - g) * sources.components
    assert found["b"].pieces.shape == (B, T, 2) and found["b"].target.shape == (B, T)
    close(found["b"].pieces, m[..., [3, 0]] - sources.delta[..., 1:])
    np.testing.assert_array_equal(found["a"].target, sources.delta[..., 0])
