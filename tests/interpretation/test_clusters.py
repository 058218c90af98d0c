"""Clustering by description length: against all partitions, planted groups and worked numbers."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close, make_problem

from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.interpretation import clusters
from apd_jax.interpretation.clusters import Firings, cluster, gains, hamming, length
from apd_jax.interpretation.harvest import Harvest
from apd_jax.methods.apd import APD
from apd_jax.methods.spd import SPD
from apd_jax.methods.whole import Whole
from apd_jax.storage import folder

T = 5
PARAMS = {"E": (7, 4), "W1": (4, 6), "W2": (6, 4)}


def partitions(n):
    """All partitions of n things, as the group of each: 52 of five."""
    if n == 0:
        yield ()
        return
    for rest in partitions(n - 1):
        for group in range(max(rest, default=-1) + 2):
            yield (*rest, group)


def drawn(seed, shape, share=0.4):
    return np.random.default_rng(seed).random(shape) < share


@pytest.mark.parametrize("seed", range(4))
def test_the_shortest_of_all_partitions_is_found(seed):
    # Two of the five often fire with the first, so that merging pays for some seeds and prices.
    fired = drawn(seed, (90, 5))
    fired[:, 1] = fired[:, 0] ^ drawn(seed + 10, 90, 0.05)
    fired[:, 4] = fired[:, 2] | drawn(seed + 20, 90, 0.1)
    firings = Firings.of(fired, [1, 2, 1, 1, 1])
    alpha = (0.0, 0.3, 1.0, 8.0)[seed]
    by_hand = {}
    for partition in partitions(5):
        k, total = max(partition) + 1, 0.0
        for group in range(k):
            members = np.array(partition) == group
            ranks = firings.ranks[members].sum()
            total += fired[:, members].any(1).sum() * (np.log2(k) + alpha * ranks)
        by_hand[partition] = total
        assert length(firings, np.array(partition), alpha) == pytest.approx(total)
    assert len(by_hand) == 52
    found = cluster(firings, alpha=alpha, restarts=60)
    assert found.length == pytest.approx(min(by_hand.values()))
    assert by_hand[tuple(found.partition.tolist())] == pytest.approx(found.length)
    assert found.single == pytest.approx(by_hand[(0, 1, 2, 3, 4)])
    assert found.lengths.min() == found.length and found.partitions.shape == (60, 5)


def test_a_merge_changes_the_length_by_its_gain():
    # Four of rank 1; 0 and 1 fire at 8 positions each, 6 of them shared; 2 and 3 at 4 others each.
    # S = 24, s_∪ = 10. ΔL = 24 (log2 3 - 2) - 6 log2 3 + α (10·2 - 8 - 8) = 18 log2 3 - 48 + 4 α
    fired = np.zeros((20, 4), bool)
    fired[:8, 0] = fired[2:10, 1] = fired[10:14, 2] = fired[14:18, 3] = True
    firings = Firings.of(fired, [1, 1, 1, 1])
    together, ranks = firings.together.astype(float), np.ones(4)
    assert firings.together[0].tolist() == [8, 6, 0, 0] and firings.counts.tolist() == [8, 8, 4, 4]
    for alpha in (0.0, 1.0, 5.0):
        gain = gains(together, ranks, alpha)
        assert gain[0, 1] == pytest.approx(18 * np.log2(3) - 48 + 4 * alpha)
        for i, j in itertools.combinations(range(4), 2):
            joined = np.where(np.arange(4) == j, i, np.arange(4))
            after, before = (length(firings, p, alpha) for p in (joined, np.arange(4)))
            assert gain[i, j] == gain[j, i] == pytest.approx(after - before)


def test_the_way_is_that_of_the_gains():
    # Every merge anew from firings alone, always the best pair: the first restart's.
    fired, ranks, alpha = drawn(3, (60, 9)), np.arange(1, 10), 0.2
    fired[:, 4] = fired[:, 2] | drawn(4, 60, 0.1)
    partition = np.arange(9)
    seen = [(length(Firings.of(fired, ranks), partition, alpha), partition)]
    while len(groups := np.unique(partition)) > 1:
        union = np.stack([fired[:, partition == g].any(1) for g in groups], axis=1).astype(int)
        summed = np.array([ranks[partition == g].sum() for g in groups])
        gain = gains((union.T @ union).astype(float), summed.astype(float), alpha)
        i, j = min(itertools.combinations(range(len(groups)), 2), key=lambda pair: gain[pair])
        partition = np.where(partition == groups[j], groups[i], partition)
        seen.append((length(Firings.of(fired, ranks), partition, alpha), partition))
    best, by_hand = min(seen, key=lambda one: one[0])
    assert 1 < len(np.unique(by_hand)) < 9
    found = cluster(Firings.of(fired, ranks), alpha=alpha, restarts=1)
    assert hamming(found.partition, by_hand) == 0 and found.length == pytest.approx(best)


def test_the_pair_of_a_rank():
    table = np.random.default_rng(0).normal(size=(7, 7))
    table += table.T
    np.fill_diagonal(table, np.inf)
    pairs = sorted(itertools.combinations(range(7), 2), key=lambda pair: table[pair])
    assert [tuple(sorted(clusters._ranked(table, n))) for n in range(21)] == pairs


def test_planted_groups_are_found():
    # 4 groups of 5 that fire together but for 2 %, among 2 that never fire.
    centres = drawn(0, (4000, 4), 0.05)
    fired = np.repeat(centres, 5, axis=1)
    fired &= ~drawn(1, fired.shape, 0.02)
    fired = np.concatenate([fired, np.zeros((4000, 2), bool)], axis=1)
    order = np.random.default_rng(2).permutation(22)
    found = cluster(Firings.of(fired[:, order], np.ones(22, int)), alpha=0.5, restarts=3)
    truth = np.array([*np.repeat(np.arange(4), 5), 4, 5])[order]
    assert hamming(found.partition, truth) == 0 and found.num_groups == 6
    assert found.length < found.single and found.lengths[0] == found.length
    fires = fired.any(axis=0)[order]
    pairs = itertools.combinations(found.partitions[:, fires], 2)
    assert found.distance == pytest.approx(np.mean([hamming(a, b) for a, b in pairs]))
    # Groups are numbered in the order of their first members.
    firsts = [found.partition.tolist().index(g) for g in range(6)]
    assert firsts == sorted(firsts)


def test_the_draw_of_a_rank():
    # P(J = j) is in proportion to e^{-γ j}, j < P: with γ = 1 and P = 3, 1 / (1 + e^-1 + e^-2).
    rng = np.random.default_rng(0)
    draws = np.bincount([clusters._draw(3, 1.0, rng) for _ in range(20_000)])
    weights = np.exp(-np.arange(3.0))
    close(draws / 20_000, weights / weights.sum(), 0.02)


def test_clusters_are_kept_beside_their_harvest(tmp_path):
    fired = drawn(0, (50, 4))
    harvest = object.__new__(Harvest)  # of which nothing else is read
    vars(harvest).update(fingerprint="one")
    for restarts, agreement in ((1, None), (2, 1.0)):
        found = cluster(Firings.of(fired, [1, 1, 1, 1]), alpha=9.0, restarts=restarts)
        clusters.save(found, tmp_path, harvest, alpha=9.0)
        kept = clusters.load(tmp_path, harvest)
        assert kept["partition"].tolist() == [0, 1, 2, 3] and kept["alpha"] == 9.0
        assert kept["length"] == found.length and kept["agreement"] == agreement
    vars(harvest).update(fingerprint="another")
    with pytest.raises(InputError, match="clusters of another decomposition"):
        clusters.load(tmp_path, harvest)
    (tmp_path / clusters.FILE).write_text("{")
    with pytest.raises(InputError, match="holds no clusters"):
        clusters.load(tmp_path, harvest)


def test_hamming_does_not_see_names():
    first = np.array([0, 0, 1, 1, 2])
    assert hamming(first, np.array([2, 2, 0, 0, 1])) == 0
    # Best naming: {0, 0} and {1} of three groups; the last joins the second: one of five differs.
    assert hamming(first, np.array([0, 0, 1, 1, 1])) == pytest.approx(0.2)
    with pytest.raises(InputError, match="of 5 and 2 components"):
        hamming(first, np.array([0, 0]))


# Decompositions


def network(params, tokens):
    x = jnp.take(params["E"], tokens, axis=0, mode="clip")
    return jnp.tanh(x @ params["W1"]) @ params["W2"] @ params["E"].T


def decomposition(method):
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in PARAMS.items()}
    problem = make_problem(
        network,
        params,
        lambda rng, step: jnp.asarray(TOKENS),
        select="W*",
        valid_fn=lambda tokens: tokens >= 0,
    )
    components = method.make_components(jax.random.key(1), problem)
    gate = method.make_gate(jax.random.key(2), problem, components)
    # Gates to begin with say nearly the same everywhere; larger ones differ.
    noise = np.random.default_rng(3)
    gate = jax.tree.map(lambda a: jnp.asarray(noise.normal(size=a.shape), a.dtype), gate)
    return Decomposition(problem, components, method, (), None, gate)


TOKENS = np.random.default_rng(5).integers(0, 7, (8, T))
TOKENS[2, 3:] = -1
SETTINGS = {"mask_per": "position", "minimality_loss": "kl", "batch_size": 8, "num_steps": 2}


@pytest.fixture(scope="module")
def found():
    return decomposition(SPD(num_components=4, **SETTINGS))


def test_firings_of_a_decomposition(found):
    firings = clusters.firings(found, [TOKENS[:4], TOKENS[4:]], threshold=0.5)
    values = np.asarray(found.activity(TOKENS).values)[TOKENS >= 0]
    fired = values > 0.5
    assert 0.1 < fired.mean() < 0.9 and firings.num_positions == 38 == len(fired)
    assert firings.counts.tolist() == fired.sum(0).tolist()
    assert np.array_equal(firings.together, fired.T.astype(int) @ fired)
    assert firings.ranks.tolist() == [1] * 8
    with pytest.raises(InputError, match="no position"):
        clusters.firings(found, [])


PARTITION = np.array([3, 1, 0, 1, 3, 0, 0, 2])  # 3 and 0 over both sites, 2 alone
GROUPS = [[2, 5, 6], [1, 3], [7], [0, 4]]


def test_a_merged_component_is_on_where_any_of_its_parts_is(found):
    joined = clusters.merged(found, PARTITION)
    assert joined.components.num_components == 4
    before, after = found.activity(TOKENS), joined.activity(TOKENS)
    for name in ("values", "active", "upper"):
        parts = np.asarray(getattr(before, name))
        any_of = np.stack([parts[..., g].max(-1) for g in GROUPS], axis=-1)
        assert np.array_equal(getattr(after, name), any_of), name
    mask = jnp.zeros((8, T, 8)).at[:, :, jnp.asarray(GROUPS[0])].set(1)
    close(
        joined.sparse_output(TOKENS, jnp.zeros((8, T, 4)).at[:, :, 0].set(1)),
        found.sparse_output(TOKENS, mask),
    )


def test_merging_twice_and_saving(found, tmp_path):
    once = clusters.merged(found, PARTITION)
    twice = clusters.merged(once, [1, 0, 0, 1])
    direct = clusters.merged(found, np.array([1, 0, 0, 1])[PARTITION])
    assert twice.method == direct.method
    assert np.array_equal(twice.activity(TOKENS).values, direct.activity(TOKENS).values)
    folder.save(once, tmp_path / "saved")
    again = folder.load(tmp_path / "saved", network, valid_fn=found.problem.valid_fn)
    assert again.method.clusters == once.method.clusters
    assert np.array_equal(again.activity(TOKENS).values, once.activity(TOKENS).values)


def test_the_settings_of_a_merged_decomposition_make_its_components(found):
    joined = clusters.merged(found, PARTITION)
    made = jax.eval_shape(
        lambda key: joined.method.make_components(key, found.problem), jax.random.key(0)
    )
    assert made.num_components == 4
    assert {n: f.ids for n, f in made.factors.items()} == {"W1": (3, 1, 0, 1), "W2": (3, 0, 0, 2)}
    assert {n: f.ids for n, f in joined.components.factors.items()} == {
        n: f.ids for n, f in made.factors.items()
    }


def test_components_that_are_at_every_site_already():
    whole = decomposition(Whole(num_components=4, gate_kind="pieces", **SETTINGS))
    joined = clusters.merged(whole, [0, 1, 1, 0])
    parts = np.asarray(whole.activity(TOKENS).values)
    assert 0 < (parts > 0).mean() < 1
    expected = np.stack([parts[..., [0, 3]].max(-1), parts[..., [1, 2]].max(-1)], axis=-1)
    assert np.array_equal(joined.activity(TOKENS).values, expected)


def test_what_cannot_be_clustered(found):
    with pytest.raises(InputError, match="no component fires"):
        cluster(Firings.of(np.zeros((9, 3), bool), [1, 1, 1]))
    with pytest.raises(InputError, match="restarts = 0"):
        cluster(Firings.of(np.ones((9, 3), bool), [1, 1, 1]), restarts=0)
    with pytest.raises(InputError, match="needs one number of at least 0 for each of 8"):
        clusters.merged(found, [0, 1])
    with pytest.raises(InputError, match="method 'apd'"):
        clusters.merged(dataclasses.replace(found, method=APD(num_components=8), gate=()), [0] * 8)
    moved = dataclasses.replace(found, components=clusters.components_lib.merge(found.components))
    assert clusters.merged(moved, PARTITION).components.num_components == 4
    fewer = dataclasses.replace(
        found, components=clusters.components_lib.merge(found.components, [0, 1])
    )
    with pytest.raises(InputError, match="renumbered after they were trained"):
        clusters.merged(fewer, [0] * 7)
