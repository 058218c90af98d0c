"""The evaluation of language models against what a network of one matrix gives by hand.

f(x) = E[x] W with W = Σ_c P_c + Δ; its one site has three components, and the gate says g of them
whatever it sees. A pass with weights m is then E[x] Σ_c m_c P_c, which numpy computes directly.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_problem

from apd_jax import components as components_lib
from apd_jax.decomposition import Decomposition
from apd_jax.evaluation import language, masks
from apd_jax.gates.base import INPUTS, Activity
from apd_jax.language.tokens import PAD, predicting
from apd_jax.methods.apd import APD

V, D, T = 7, 4, 6
G = np.array([1.0, 0.3, 0.0])
rng = np.random.default_rng(0)
E = rng.normal(size=(V, D)).astype(np.float32)
PIECES = rng.normal(size=(3, D, V)).astype(np.float32)
PIECES *= (np.arange(D) != 3)[None, :, None]  # of rank 3
DELTA = 0.5 * rng.normal(size=(D, V)).astype(np.float32)
TOKENS = rng.integers(0, V, (6, T))
TOKENS[1, 4:], TOKENS[3, 1:], TOKENS[5] = PAD, PAD, PAD
CORNERS = list(itertools.product((0.0, 1.0), repeat=4))  # of the sources, Δ's last


@dataclasses.dataclass(frozen=True)
class Constant:
    """Says `values` of every position."""

    values: tuple
    reads = frozenset({INPUTS})
    says = "constant"

    def rule(self):
        return None

    def __call__(self, seen):
        g = jnp.broadcast_to(jnp.asarray(self.values), (*seen.x.shape, 3))
        return Activity(g, g > 0, g.astype(jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Says(APD):
    values: tuple = tuple(G.tolist())

    def gate(self, arrays, problem):
        return Constant(self.values)


def network(params, tokens):
    return jnp.take(params["E"], tokens, axis=0, mode="clip") @ params["W"]


def decomposition(**settings):
    params = {"E": jnp.asarray(E), "W": jnp.asarray(PIECES.sum(0) + DELTA)}
    problem = make_problem(network, params, None, select="W", valid_fn=predicting)
    cs = components_lib.from_materialized({"E": None, "W": jnp.asarray(PIECES)}, rank=3)
    method = Says(num_components=3, mask_per="position", minimality_loss="kl", **settings)
    return Decomposition(problem, cs, method)


def by_hand(m, delta=0.0):
    """(CE, KL, how many) of a pass, over the pairs of a token and the next in its row."""
    ce, kl = by_token(m, delta)
    return ce.mean(), kl.mean(), len(kl)


def by_token(m, delta=0.0):
    """(CE, KL) of a pass at each of these pairs."""
    pairs = [(a, b) for row in TOKENS for a, b in itertools.pairwise(row) if b != PAD]
    here, after = np.array(pairs).T

    def log_softmax(W):
        z = E[here].astype(np.float64) @ W
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    p = log_softmax(PIECES.sum(0) + DELTA)
    q = log_softmax(np.tensordot(m, PIECES, 1) + delta * DELTA)
    return -q[np.arange(len(here)), after], (np.exp(p) * (p - q)).sum(-1)


@pytest.fixture(scope="module")
def steps():
    """The steps that displays of progress have shown."""
    return []


@pytest.fixture(scope="module")
def found(steps):
    batches = [TOKENS[:2], TOKENS[2:4], TOKENS[4:]]
    options = {"num_adversary_batches": 3, "thorough": True, "num_batches": 3}
    with pytest.MonkeyPatch.context() as patch:
        update = language.ProgressDisplay.update

        def shown(self, step, values):
            steps.append((step, self._total))
            update(self, step, values)

        patch.setattr(language.ProgressDisplay, "update", shown)
        return language.evaluate(decomposition(), iter(batches), **options)


def test_progress_is_shown_by_what_takes_long(found, steps):
    # Of each batch the passes, 16 times 20 ascents, and the free adversary.
    assert steps == [(i, 3 * 18) for i in range(1, 3 * 18 + 1)]


def test_every_pass_is_what_it_says(found):
    passes = {"unmasked": [1, 1, 1], "gates": G, "zero": [0, 0, 0]}
    passes |= {"rounded_0": [1, 1, 0], "rounded_0.1": [1, 1, 0], "rounded_0.5": [1, 0, 0]}
    target = by_hand([1, 1, 1], delta=1.0)[0]
    assert found["ce_target"] == pytest.approx(target, abs=1e-5)
    zero = by_hand([0, 0, 0])[0]
    assert zero == pytest.approx(np.log(V))
    for name, m in passes.items():
        ce, kl, _ = by_hand(m)
        assert found[f"ce_{name}"] == pytest.approx(ce, abs=1e-5), name
        assert found[f"kl_{name}"] == pytest.approx(kl, abs=1e-5), name
        assert found[f"delta_ce_{name}"] == pytest.approx(ce - target, abs=1e-5)
        recovered = (zero - ce) / (zero - target)
        assert found.get(f"ce_recovered_{name}", recovered) == pytest.approx(recovered, abs=1e-4)
    assert ("ce_recovered_gates" in found) == (zero > target)


def test_what_is_active_is_counted_where_it_counts(found):
    # Of 30 places in five rows 2 + 5 are padding; the last of a row, or before padding, predicts
    # nothing.
    assert found["num_predicted_tokens"] == by_hand(G)[2] == 5 * 5 - 2 - 5
    assert found["num_adversary_tokens"] == found["num_predicted_tokens"]
    assert found["l0_components_0"] == found["l0_components_0.1"] == 2
    assert found["l0_components_0.5"] == 1
    assert found["l0_pieces_0"] == found["l0_pieces_at_W"] == 2 * 3
    assert (found["num_alive_components"], found["num_components"]) == (2, 3)
    assert found["alive_at_W"] == 2


def test_the_adversary_is_near_the_worst_corner(found):
    # KL is convex in the sources, so its largest value is at a corner of r in [0, 1]^3, Δ included.
    # Each batch has sources of its own: at least the worst for all batches together.
    each = np.array([by_token(G + (1 - G) * np.array(r[:3]), r[3])[1] for r in CORNERS])
    assert found["kl_adversary"] > max(found["kl_stochastic"], 0.9 * each.mean(1).max())
    # With sources of their own all positions have their own worst corner, which nothing exceeds.
    assert 0.9 * each.max(0).mean() < found["kl_adversary_free"] < each.max(0).mean() + 1e-5
    assert found["kl_adversary_free"] > found["kl_adversary_320"]


def test_the_ladder_only_goes_up(found):
    rungs = [found["kl_adversary"], *(found[f"kl_adversary_{n}"] for n in language.LADDER)]
    assert rungs == sorted(rungs)
    gap = found["ce_adversary_320"] - found["delta_ce_adversary_320"]
    assert gap == pytest.approx(found["ce_target"], abs=1e-5)  # all batches are attacked
    rows = {row[0] for row in language.grid(found).rows}
    assert {
        "the same gone on with, worst until 320",
        "adversary, 20 x 0.1, free at every position",
    } <= rows


def test_gates_that_are_on_or_off(found):
    hard = language.evaluate(decomposition(values=(True, True, False)), [TOKENS])
    assert "kl_adversary_40" not in hard and "kl_adversary_free" not in hard
    assert "ce_rounded_0" not in hard and hard["l0_components_0"] == 2
    assert hard["ce_gates"] == pytest.approx(found["ce_rounded_0"], abs=1e-5)
    rows = {row[0]: row[1:] for row in language.grid(hard).rows}
    assert rows["gates as they are"][-2:] == ("2.0", "6.0")
    assert "gates rounded at 0" not in rows and rows["target"][1:] == ("", "", "", "", "")
    assert {row[0] for row in language.grid(found).rows} > set(rows)


def test_controls_have_as_many_on_in_other_places():
    """Of others: the rows of positions that count, in another order. At random: as many a site."""
    rng = np.random.default_rng(0)
    mask = jnp.asarray(rng.random((3, 8, 9)) < 0.3)
    counts = jnp.asarray(rng.random((3, 8)) < 0.7)
    others = np.asarray(masks.of_others(mask, counts, jax.random.key(0)))
    on, kept = np.asarray(mask), np.asarray(counts)
    assert sorted(map(tuple, others[kept])) == sorted(map(tuple, on[kept]))
    assert (others != on).any() and sorted(map(tuple, others[~kept])) == sorted(
        map(tuple, on[~kept])
    )
    params = {name: jnp.ones((2, 2)) for name in "abc"}
    sites = {"a": range(4), "b": range(4, 8), "c": range(8, 9)}  # a and b are drawn in one loop
    apart = components_lib.init(jax.random.key(1), params, num_components=9, ids=sites, rank=1)
    random = np.asarray(masks.at_random(mask, apart, jax.random.key(2)))
    for i, ids in enumerate(sites.values()):
        here = on[..., ids.start : ids.stop]
        drawn = jax.random.uniform(jax.random.fold_in(jax.random.key(2), i), here.shape)
        first = np.argsort(np.argsort(drawn, axis=-1), axis=-1) < here.sum(-1, keepdims=True)
        np.testing.assert_array_equal(random[..., ids.start : ids.stop], first)
    assert (random != on).any()
    whole = components_lib.init(jax.random.key(1), params, num_components=9, rank=1)
    random = np.asarray(masks.at_random(mask, whole, jax.random.key(2)))
    assert (random.sum(-1) == on.sum(-1)).all()
    assert (random[..., :4].sum(-1) != on[..., :4].sum(-1)).any()


def test_controls_are_in_the_table(found):
    """With one gate for all positions the others' is their own; at random, two of the three."""
    assert found["ce_others"] == pytest.approx(found["ce_rounded_0"], abs=1e-6)
    two = np.array([by_token(m)[1] for m in ([1, 1, 0], [1, 0, 1], [0, 1, 1])])
    assert two.min(0).mean() < found["kl_random"] < two.max(0).mean()
    assert found["kl_random"] != pytest.approx(found["kl_rounded_0"], abs=1e-6)
    assert {"control: those of another position", "control: as many at random"} <= {
        row[0] for row in language.grid(found).rows
    }


def test_batches_of_a_sampler():
    def sample(rng, step):
        return jax.random.randint(jax.random.fold_in(rng, step), (2, T), 0, V)

    batches = list(language.drawn(sample, 2, seed=0))
    assert len(batches) == 2 and not np.array_equal(batches[0], batches[1])
