"""Adversaries: ascents by hand and by optax, what is kept between steps, one device as several."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import close
from jax.sharding import PartitionSpec as P

from apd_jax.ablations import Adversary, PersistentAdversary, Pool, Sources
from apd_jax.ablations.base import Shape
from apd_jax.errors import InputError
from apd_jax.methods.observe import example_keys

B, T, C, L = 4, 3, 5, 2
KEY = jax.random.key(0)
SHAPE = Shape(size=B, positions=(T,), num_components=C, num_sites=L, with_delta=True)
# Distances that are linear in the sources: the gradient is the same wherever it is taken.
SLOPE = Sources(
    jnp.asarray(np.random.default_rng(0).normal(size=(B, T, C)), jnp.float32),
    jnp.asarray(np.random.default_rng(1).normal(size=(B, T, L)), jnp.float32),
)
LEADS = {"batch": (1, 1), "example": (B, 1), "position": (B, T)}
each_sharing = pytest.mark.parametrize("shared", LEADS)


def summed(slope, shared):
    """The gradient by sources that several examples or positions share: the sum of theirs."""
    lead = LEADS[shared]

    def one(a):
        axes = tuple(i for i, n in enumerate(lead) if n == 1)
        return jnp.sum(a, axis=axes, keepdims=True)

    return jax.tree.map(one, slope)


def keys():
    return example_keys(KEY, jnp.zeros((B, 1)))


@each_sharing
def test_a_fresh_one_ascends_by_sign(shared):
    slope = summed(SLOPE, shared)
    start = Adversary(shared=shared).draw((), keys(), SHAPE)
    assert start.components.shape == (*LEADS[shared], C)
    assert start.delta.shape == (*LEADS[shared], L)
    assert start.components.min() > 0 and start.components.max() < 1
    for steps in (1, 3, 20):
        adversary = Adversary(steps=steps, step_size=0.1, shared=shared)
        kept, found = adversary.ascend((), start, lambda r: slope)
        # steps · 0.1 along the sign, within [0, 1]: after 20 of them at a corner.
        jax.tree.map(
            lambda r, s, g, n=steps: close(r, np.clip(s + 0.1 * n * np.sign(g), 0, 1)),
            found,
            start,
            slope,
        )
        assert kept == ()
    np.testing.assert_array_equal(found.components, slope.components > 0)


def test_positions_draw_apart_and_delta_has_draws_of_its_own():
    start = Adversary(shared="position").draw((), keys(), SHAPE)
    drawn = [*np.asarray(start.components).ravel(), *np.asarray(start.delta).ravel()]
    assert len(set(drawn)) == B * T * (C + L)


@each_sharing
def test_a_persistent_one_is_adam_within_0_and_1(shared):
    adversary = PersistentAdversary(ascents=2, learning_rate=0.3, shared=shared)
    state = adversary.init(KEY, SHAPE)
    sources = adversary.draw(state, keys(), SHAPE)
    assert sources.components.shape == (*LEADS[shared], C)
    jax.tree.map(np.testing.assert_array_equal, sources, state.sources)
    optimizer = optax.adam(0.3, b1=0.5, b2=0.99, eps=1e-8)
    expected, moments = sources, optimizer.init(sources)
    slope = summed(SLOPE, shared)

    def gradient(r):  # of a distance that curves
        return jax.tree.map(lambda g, r: g * (1 + r), slope, r)

    for ascents in (2, 1, 2):  # before a pass, that of the pass itself, before the next
        if ascents == 2:
            state, sources = adversary.ascend(state, sources, gradient)
        else:
            state = adversary.finish(state, sources, gradient(sources))
            sources = adversary.draw(state, keys(), SHAPE)
        for _ in range(ascents):
            down = jax.tree.map(lambda g: -g, gradient(expected))
            updates, moments = optimizer.update(down, moments)
            moved = optax.apply_updates(expected, updates)
            expected = jax.tree.map(lambda r: jnp.clip(r, 0, 1), moved)
        jax.tree.map(close, sources, expected)
    assert state.count == 5
    assert {0.0, 1.0} <= set(np.asarray(sources.components).ravel().tolist())


@pytest.mark.parametrize("kind", [Adversary, PersistentAdversary, Pool])
@each_sharing
def test_two_devices_do_what_one_does(kind, shared):
    """Each has the gradient of the mean over its own examples; both keep the same."""
    options = {"steps": 3} if kind is Adversary else {"ascents": 2}
    state = kind(shared=shared, **options).init(KEY, SHAPE)

    def step(state, slope, axis=None):
        adversary = kind(shared=shared, axis_name=axis, **options)
        size = slope.components.shape[0]
        own = dataclasses.replace(SHAPE, size=size, axis_name=axis)
        drawn = adversary.draw(state, example_keys(KEY, slope.components, axis), own)
        own_mean = jax.tree.map(lambda g: g / size, summed(slope, shared))
        after, sources = adversary.ascend(state, drawn, lambda r: own_mean)
        after = adversary.finish(after, sources, own_mean)
        # Sources of the whole batch come out of each device alike, the others are put in a row.
        return after, drawn, sources

    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("data",))
    by_example = P() if shared == "batch" else P("data")
    split = jax.shard_map(
        lambda state, slope: step(state, slope, "data"),
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=(P(), by_example, by_example),
        check_vma=False,
    )
    found, expected = jax.jit(split)(state, SLOPE), jax.jit(step)(state, SLOPE)
    assert len(jax.tree.leaves(expected[1:])) == 4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_a_pool_moves_the_particle_that_was_drawn_and_no_other():
    pool = Pool(particles=3, ascents=2, learning_rate=0.1)
    state = pool.init(KEY, SHAPE)
    slope, moved = summed(SLOPE, "example"), set()
    assert state[0].sources.components.shape == (3, B, 1, C)
    starts = np.asarray(state[0].sources.components)
    assert len(np.unique(starts)) == starts.size  # every particle starts elsewhere
    for turn in range(8):
        kept, count = state
        assert count == turn
        drawn = pool.draw(state, keys(), SHAPE)
        which = [i for i in range(3) if (kept.sources.components[i] == drawn.components).all()]
        assert len(which) == 1
        moved |= set(which)
        after, sources = pool.ascend(state, drawn, lambda r: slope)
        after = pool.finish(after, sources, slope)
        changed = jax.tree.map(lambda a, b: a != b, after[0].sources, kept.sources).components
        assert [i for i in range(3) if changed[i].any()] == which
        assert after[0].count.tolist() == [kept.count[i] + 3 * (i in which) for i in range(3)]
        state = after
    assert moved == {0, 1, 2}


def test_an_unknown_sharing_is_refused():
    with pytest.raises(InputError, match="unknown adversary_shared 'all'; known: batch, example"):
        PersistentAdversary(shared="all").init(KEY, SHAPE)
