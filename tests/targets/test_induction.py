"""The induction target: its data, its scores against numpy and by hand, a small one trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import get_config, make_method, method_of
from ml_collections import ConfigDict

from apd_jax import components as components_lib
from apd_jax import targets
from apd_jax.components import Components
from apd_jax.decomposition import Decomposition
from apd_jax.targets import induction
from apd_jax.targets.pretrain import pretrain

PRETRAIN = {
    "num_steps": 5,
    "batch_size": 16,
    "learning_rate": 3e-3,
    "schedule": "constant",
    "warmup_fraction": 0.0,
    "weight_decay": 0.01,
}


def make_config(**changes):
    config = {
        "name": "induction",
        "seed": 0,
        "num_symbols": 8,
        "min_block": 3,
        "max_block": 4,
        "repeat_probability": 0.5,
    }
    config |= {"d_model": 8, "num_heads": 2, "d_head": 4, "pretrain": PRETRAIN}
    return ConfigDict(config | changes)


def test_samples_repeat_or_hold_distinct_symbols():
    tokens = np.asarray(targets.build(make_config(), 2000).sample_fn(jax.random.key(0), 3))
    assert (
        tokens.shape == (2000, 9)
        and (tokens[:, 0] == 8).all()
        and tokens[:, 1:].min() == 0
        and tokens[:, 1:].max() == 7
    )
    lengths = []
    for row in tokens[:, 1:]:
        n = next((n for n in (3, 4) if row[n] == row[0]), 8)  # the period, or no repetition
        assert len(set(row[:n])) == n and np.array_equal(row, np.resize(row[:n], 8))
        lengths.append(n)
    # Half repeat, and half of these have blocks of 3: standard deviations 0.011 and 0.016.
    np.testing.assert_allclose(np.mean(np.array(lengths) < 8), 0.5, atol=0.05)
    np.testing.assert_allclose(
        np.mean(np.array(lengths)[np.array(lengths) < 8] == 3), 0.5, atol=0.07
    )


def test_samples_are_pure():
    sample = targets.build(make_config(), 16).sample_fn
    assert np.array_equal(sample(jax.random.key(0), 3), sample(jax.random.key(0), 3))
    assert not np.array_equal(sample(jax.random.key(0), 3), sample(jax.random.key(0), 4))


# start a b c a b c: block of 3. start a b c d e f: no repetition.
TOKENS = jnp.array([[9, 0, 1, 2, 0, 1, 2], [9, 0, 1, 2, 3, 4, 5]])


def test_determined_and_where_to_look_by_hand():
    assert np.array_equal(induction.determined(TOKENS), [[0, 0, 0, 0, 1, 1, 1], [0] * 7])
    # The second a (position 4) looks at the first b (position 2), the second b at the first c, the
    # second c at the second a (position 4).
    found = induction.follows_same(TOKENS)
    assert np.argwhere(found).tolist() == [[0, 4, 2], [0, 5, 3], [0, 6, 4]]


def test_attention_scores_of_perfect_and_idle_heads():
    T = TOKENS.shape[1]
    previous = np.eye(T, k=-1)
    look = np.zeros((T, T))
    look[[4, 5, 6], [2, 3, 4]] = 1.0
    attention = jnp.asarray(
        np.stack([previous, look, np.eye(T)])[None].repeat(2, 0), jnp.float32
    )  # three heads, alike on both sequences
    # Only the block that repeats counts: b and c of the first sequence.
    np.testing.assert_allclose(induction.previous_token_scores(attention, TOKENS), [1.0, 0.0, 0.0])
    np.testing.assert_allclose(induction.induction_scores(attention, TOKENS), [0.0, 1.0, 0.0])


def test_loss_and_accuracy_are_plain_numpy():
    logits = np.random.default_rng(0).normal(size=(2, 7, 6)).astype(np.float32)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = 0.0
    for b, t in np.ndindex(2, 6):
        total -= log_p[b, t, TOKENS[b, t + 1]] if (b, t) in ((0, 4), (0, 5)) else log_p[b, t].mean()
    np.testing.assert_allclose(
        induction.cross_entropy(jnp.asarray(logits), TOKENS), total / 12, rtol=1e-5
    )
    logits[0, 4, 1] = 9.0  # right: after the second a comes b
    logits[0, 5, 3] = 9.0  # wrong: after the second b comes c, which is 2
    np.testing.assert_allclose(induction.accuracy(jnp.asarray(logits), TOKENS), 0.5)


def test_rotation_is_by_distance():
    # Scores between rotated vectors depend on t - s only, and lengths are kept.
    rng = np.random.default_rng(0)
    q, k = (
        induction.rotate(jnp.asarray(np.tile(rng.normal(size=4), (1, 6, 1, 1)), jnp.float32))[
            0, :, 0
        ]
        for _ in range(2)
    )
    scores = np.asarray(q @ k.T)
    np.testing.assert_allclose(scores[1:, 1:], scores[:-1, :-1], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(q, axis=1), np.linalg.norm(q[0]), rtol=1e-5)


def test_attention_is_causal_and_sums_to_one():
    target = targets.build(make_config(), 4)
    params = jax.jit(target.init_fn)(jax.random.key(0))
    tokens = target.sample_fn(jax.random.key(1), 0)
    logits, attention = target.apply_fn(params, tokens)
    assert logits.shape == (4, 9, 8) and set(attention) == {"attention_0", "attention_1"}
    for pattern in attention.values():
        assert pattern.shape == (4, 2, 9, 9) and not np.triu(pattern, 1).any()
        np.testing.assert_allclose(pattern.sum(-1), 1.0, rtol=1e-5)
    names = components_lib.selected_paths(params, target.select)
    assert names == sorted(
        f"{kind}_{i}.kernel" for kind in ("query", "key", "value", "output") for i in (0, 1)
    )


def decomposed(target, params, shares, **fields):
    """Components that hold the given shares [C] of every weight of the target."""
    weights = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            jnp.stack([s * leaf for s in shares])
            if path[0].key.split("_")[0] in ("query", "key", "value", "output")
            else None
        ),
        params,
    )
    method = make_method(num_components=len(shares), batch_size=64, **fields)
    components = components_lib.from_materialized(weights)
    return Decomposition(target.problem(params), components, method)


def test_pretraining_learns_and_the_scores_know_the_whole_from_nothing():
    settings = {
        **PRETRAIN,
        "num_steps": 400,
        "batch_size": 64,
        "learning_rate": 1e-2,
        "schedule": "cosine",
    }
    config = make_config(seed=1, d_model=32, num_heads=1, d_head=32, pretrain=settings)
    target = targets.build(config, 64)
    params, _ = pretrain(target, config)
    # One component is the target, the other is 0: k = 1 keeps the first everywhere.
    score = target.score_fn(
        decomposed(target, params, (1.0, 0.0), topk=1.0), jax.random.key(5), np.array([True, False])
    )
    m = score.metrics
    assert (
        m["target_accuracy"] >= 0.9
    )  # this small one; the shipped setting is measured in docs/networks.md
    for name in induction.MEASURED:
        assert m[f"sparse_{name}"] == pytest.approx(m[f"target_{name}"], abs=1e-3)
    assert m["num_accuracy_components"] == m["num_induction_components"] == 1
    assert m["spans_layers"] == 1.0  # of one alive component
    # What is lost without it, against the network with its weights set to 0: attention then is
    # uniform over 1..t+1 positions.
    tokens = target.sample_fn(jax.random.key(5), 0)
    look = (
        np.asarray(induction.follows_same(tokens))
        / np.arange(1, tokens.shape[1] + 1)[None, :, None]
    )
    uniform = look.sum() / np.asarray(induction.determined(tokens)).sum()
    order = score.panels["mechanisms"].columns.index("0")
    np.testing.assert_allclose(
        score.panels["mechanisms"].matrix[2, order],
        m["target_induction_score"] - uniform,
        atol=1e-3,
    )
    assert set(score.labels) <= set(m)


def test_seed_decides_everything():
    config = make_config()
    target = targets.build(config, 8)
    first, again = pretrain(target, config)[0], pretrain(target, config)[0]
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True)
    )
    config.seed = 1
    assert not np.array_equal(
        first["unembed"]["kernel"], pretrain(target, config)[0]["unembed"]["kernel"]
    )


def test_kept_by_kind_by_hand():
    # Sequence 0: positions 0 to 3 are its first block (with the start), 4 to 6 determined.
    # Sequence 1 has no repetition.
    mask = np.zeros((2, 7, 3), bool)
    mask[0, :2, 0], mask[0, 4:, 1], mask[1, 0, 1], mask[0, 0, 2] = True, True, True, True
    np.testing.assert_allclose(
        induction.kept_by_kind(jnp.asarray(mask), TOKENS),
        [[2 / 4, 0, 1 / 4], [0, 1, 0], [0, 1 / 7, 0]],
    )
    per_example = jnp.array([[True, False, True], [False, False, True]])  # counts at all positions
    np.testing.assert_allclose(
        induction.kept_by_kind(per_example, TOKENS), [[1, 0, 1], [1, 0, 1], [0, 0, 1]]
    )


def test_layer_shares_by_hand():
    # Norms 3 in layer 0 and 4 in layer 1: 3/5 and 4/5. A component of 0 has 0 in both.
    def leaf(value):
        return components_lib.from_materialized({"w": jnp.array([[[value]], [[0.0]]])}).tree["w"]

    parts = Components({"query_0": {"kernel": leaf(3.0)}, "output_1": {"kernel": leaf(4.0)}})
    np.testing.assert_allclose(induction.layer_shares(parts), [[0.6, 0.8], [0.0, 0.0]], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 0}, "d_model must be at least 1; got 0"),
        ({"d_head": 3}, "d_head must be even"),
        ({"min_block": 1}, "2 <= min_block <= max_block"),
        ({"max_block": 5}, "got 3, 5 and 8 symbols"),
        ({"repeat_probability": 0.0}, r"repeat_probability must lie in \(0, 1\]; got 0.0"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        targets.build(make_config(**change), 8)


@pytest.mark.parametrize("arg", ["", "position", "position,smoke"])
def test_config_builds(arg):
    config = get_config("induction", arg)
    assert config.is_locked
    method_of(config).check()
    target = targets.build(config.target, config.apd.batch_size)
    x = jax.eval_shape(target.sample_fn, jax.random.key(0), 0)
    assert x.shape == (config.apd.batch_size, 1 + 2 * config.target.max_block)


def test_unknown_variant_is_refused():
    with pytest.raises(
        ValueError, match=r"unknown induction variant 'smok'; known: .*smoke. Did you mean 'smoke'"
    ):
        get_config("induction", "smok")
