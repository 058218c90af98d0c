"""The digits target: its data, its forward pass against plain numpy, its scores, its training.

Scores are of a decomposition that is known.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import get_config, make_method
from ml_collections import ConfigDict
from scipy.stats import spearmanr

from apd_jax import SPD, attributions, targets
from apd_jax import components as components_lib
from apd_jax.decomposition import Decomposition
from apd_jax.targets import digits, scoring
from apd_jax.targets.pretrain import pretrain

PRETRAIN = {
    "num_steps": 200,
    "batch_size": 64,
    "learning_rate": 1e-2,
    "schedule": "cosine",
    "warmup_fraction": 0.0,
    "weight_decay": 0.01,
}


def make_config(**changes):
    return ConfigDict(
        {"name": "digits", "seed": 0, "split_seed": 0, "channels": (8, 16), "pretrain": PRETRAIN}
        | changes
    )


@pytest.fixture(scope="module")
def trained():
    config = make_config()
    target = targets.build(config, 64)
    return target, pretrain(target, config)[0]


def test_split_holds_every_image_once():
    from sklearn.datasets import load_digits

    training, test = digits.load(3)
    assert training["image"].shape == (1437, 8, 8, 1) and test["image"].shape == (360, 8, 8, 1)
    both = np.concatenate([training["image"], test["image"]]).reshape(-1, 64) * 16
    labels = np.concatenate([training["label"], test["label"]])
    pixels, truth = load_digits(return_X_y=True)
    ours = sorted((*row.tolist(), int(k)) for row, k in zip(both, labels, strict=True))
    assert ours == sorted((*row.tolist(), int(k)) for row, k in zip(pixels, truth, strict=True))
    assert not np.array_equal(test["image"], digits.load(4)[1]["image"])


def test_samples_are_pure_training_images_with_their_labels():
    target, (training, _) = targets.build(make_config(), 32), digits.load(0)
    batch = target.pretrain_sample_fn(jax.random.key(0), 5)
    known = {
        image.tobytes(): label
        for image, label in zip(training["image"], training["label"], strict=True)
    }
    assert [known[np.asarray(image).tobytes()] for image in batch["image"]] == batch[
        "label"
    ].tolist()
    x = target.sample_fn(jax.random.key(0), 5)
    assert x.shape == (32, 8, 8, 1) and np.array_equal(x, target.sample_fn(jax.random.key(0), 5))
    assert not np.array_equal(x, target.sample_fn(jax.random.key(0), 6))


def test_forward_and_loss_are_plain_numpy():
    target = targets.build(make_config(channels=(3,)), 4)
    params = jax.jit(target.init_fn)(jax.random.key(0))
    params["conv_0"]["bias"] = jnp.array([0.1, -0.2, 0.3])
    x = np.asarray(target.sample_fn(jax.random.key(1), 0))
    kernel, padded = (
        np.asarray(params["conv_0"]["kernel"]),
        np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))),
    )
    h = np.zeros((4, 8, 8, 3))
    for i, j in np.ndindex(8, 8):
        h[:, i, j] = np.einsum("bijc,ijco->bo", padded[:, i : i + 3, j : j + 3], kernel)
    h = (
        np.maximum(h + np.asarray(params["conv_0"]["bias"]), 0)
        .reshape(4, 4, 2, 4, 2, 3)
        .max(axis=(2, 4))
    )
    logits = h.reshape(4, -1) @ np.asarray(params["dense"]["kernel"]) + np.asarray(
        params["dense"]["bias"]
    )
    np.testing.assert_allclose(
        target.apply_fn(params, jnp.asarray(x))[0], logits, rtol=1e-4, atol=1e-5
    )
    labels = np.array([3, 0, 9, 3])
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    loss = target.loss_fn(params, {"image": jnp.asarray(x), "label": jnp.asarray(labels)})
    np.testing.assert_allclose(loss, -log_p[np.arange(4), labels].mean(), rtol=1e-4)


def by_output(params):
    """Columns 0 to 4 of the last matrix with all convolutions, and columns 5 to 9."""
    first = np.float32(np.arange(10) < 5)

    def split(path, leaf):
        if path[-1].key != "kernel":
            return None
        share = (
            np.stack([first, 1 - first])[:, None]
            if path[0].key == "dense"
            else np.array([1.0, 0.0], np.float32).reshape(2, *[1] * leaf.ndim)
        )
        return jax.device_put(share * np.asarray(leaf)[None])

    return components_lib.from_materialized(jax.tree_util.tree_map_with_path(split, params))


def decomposition_of(target, params, components, **fields):
    method = make_method(num_components=components.num_components, **fields)
    return Decomposition(target.problem(params), components, method)


def test_score_of_a_known_decomposition(trained):
    target, params = trained
    decomposition = decomposition_of(target, params, by_output(params), topk=2.0)
    score = target.score_fn(decomposition, jax.random.key(0), np.array([True, True]))
    m, test = score.metrics, digits.load(0)[1]
    images = jax.device_put(test["image"])
    assert m["target_accuracy"] >= 0.97
    assert (
        m["all_accuracy"] == m["sparse_accuracy"] == m["target_accuracy"]
    )  # k = C: both kept everywhere
    # Without the second component the logits of 5 to 9 are their biases; by class, against numpy.
    ablated = {
        **params,
        "dense": {
            **params["dense"],
            "kernel": params["dense"]["kernel"] * np.float32(np.arange(10) < 5)[None],
        },
    }
    apply = jax.jit(target.apply_fn)
    right = np.argmax(np.asarray(apply(ablated, images)[0]), axis=1) == test["label"]
    whole = np.argmax(np.asarray(apply(params, images)[0]), axis=1) == test["label"]
    damage = [
        max(whole[test["label"] == k].mean() - right[test["label"] == k].mean(), 0)
        for k in range(10)
    ]
    panel = score.panels["damage_by_class"]
    np.testing.assert_allclose(panel.matrix[:, panel.columns.index("1")], damage, atol=1e-6)
    assert m["components_of_one_class"] == 0.0  # five digits each
    assert score.panels["firing_by_class"].matrix.min() > 0.9
    assert score.panels["filters"].matrix.shape == (3 * 4, 8 * 4)
    np.testing.assert_allclose(
        score.panels["filters"].matrix[:3, :3], params["conv_0"]["kernel"][:, :, 0, 0], atol=1e-6
    )
    assert set(score.labels) <= set(m)


@pytest.mark.parametrize("at", ["target", "components"])
def test_rank_correlations_of_any_method(at, trained):
    """Spearman's; of the same components the same numbers, whatever the gate reads.

    Gradients are at the target's weights; at the components' sum if the method takes them there.
    """
    target, params = trained
    components = jax.tree.map(lambda a: 0.9 * a, by_output(params))  # their sum is not the target
    x, alive = target.sample_fn(jax.random.key(2), 0), np.array([True, True])
    apd = decomposition_of(target, params, components, topk=2.0, attributions_at=at)
    found = scoring.rank_correlations(apd, x, alive)
    if at == "target":
        spd = Decomposition(apd.problem, components, SPD(num_components=2))
        assert scoring.rank_correlations(spd, x, alive) == pytest.approx(found)
    weights = params if at == "target" else components_lib.total(components, params)
    args = (target.apply_fn, weights, components, x)
    given = jax.jit(attributions.gradient, static_argnums=0)(*args)
    args = (target.apply_fn, params, components, x)
    truth = jax.jit(attributions.ablation, static_argnums=0)(*args)
    assert found["attribution_rank_correlation_gradient"] == pytest.approx(
        spearmanr(np.ravel(given), np.ravel(truth)).statistic, abs=1e-3
    )
    none = scoring.rank_correlations(apd, x, np.array([False, False]))
    assert set(none) == set(found) == set(digits.CORRELATION_LABELS) and set(none.values()) == {0.0}


def test_what_is_never_kept_or_next_to_nothing_is_dead():
    firing_rates, norms = np.array([0.0, 1e-6, 0.5, 0.5]), np.array([3.0, 2.0, 0.029, 0.031])
    # The cut is 1 % of 3.
    assert scoring.alive_components(firing_rates, norms).tolist() == [False, True, False, True]
    assert scoring.large_components(norms).tolist() == [True, True, False, True]


def test_seed_decides_everything():
    config = make_config(channels=(2,), pretrain={**PRETRAIN, "num_steps": 5})
    target = targets.build(config, 8)
    first, again = pretrain(target, config)[0], pretrain(target, config)[0]
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True)
    )
    config.seed = 1
    assert not np.array_equal(
        first["dense"]["kernel"], pretrain(target, config)[0]["dense"]["kernel"]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": ()}, "one to three convolutions"),
        ({"channels": (4, 4, 4, 4)}, "one to three convolutions"),
        ({"channels": (4, 0)}, r"channels\[1\] must be at least 1; got 0"),
        ({"pretrain": {"batch_size": 0}}, "batch_size must be at least 1; got 0"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        targets.build(make_config(**change), 8)


@pytest.mark.parametrize("arg", ["", "smoke"])
def test_config_builds(arg):
    config = get_config("digits", arg)
    assert config.is_locked
    target = targets.build(config.target, config.apd.batch_size)
    assert jax.eval_shape(target.sample_fn, jax.random.key(0), 0).shape == (
        config.apd.batch_size,
        8,
        8,
        1,
    )


def test_unknown_variant_is_refused():
    with pytest.raises(
        ValueError, match=r"unknown digits variant 'smok'; known: smoke. Did you mean 'smoke'"
    ):
        get_config("digits", "smok")
