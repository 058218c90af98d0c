"""Scrubbing masks and losses against the released implementation's."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apd_jax.components import Components, Factors
from apd_jax.evaluation import scrub
from apd_jax.forward import sparse

GOLDEN = Path(__file__).parents[1] / "golden" / "resid1_small.npz"
NEURONS = 8


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def apply_fn(params, x):
    r = x @ params["W_E"]
    return (r + jax.nn.relu(r @ params["mlp_in_0"]) @ params["mlp_out_0"]) @ params["W_U"]


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["batch_topk", "scrubbed", "antiscrubbed", "random"])
def test_losses_match_the_reference(golden, name):
    params = {
        leaf: jnp.asarray(golden[f"target/{leaf}"])
        for leaf in ("W_E", "W_U", "mlp_in_0", "mlp_out_0")
    }

    def factors(leaf):
        U, V = (jnp.asarray(golden[f"components/{leaf}/{part}"]) for part in "UV")
        return Factors(U, V, shape=params[leaf].shape)

    components = Components(
        {leaf: factors(leaf) if leaf.startswith("mlp") else None for leaf in params}
    )
    x, mask = jnp.asarray(golden["scrub/x"]), jnp.asarray(golden[f"scrub/mask/{name}"])
    out = sparse.apply(apply_fn, params, components, mask, x)
    close(out, golden[f"scrub/out/{name}"])
    close(scrub.per_example_loss(out, apply_fn(params, x)), golden[f"scrub/loss/{name}"])


def test_baselines_match_the_reference(golden):
    def monosemantic_fn(x):
        return jnp.where(jnp.arange(x.shape[1])[None, :] < NEURONS, x + jax.nn.relu(x), x)

    losses = scrub.baselines(
        jnp.asarray(golden["scrub/x"]), jnp.asarray(golden["scrub/target_out"]), monosemantic_fn
    )
    for name, loss in losses.items():
        close(loss, golden[f"scrub/loss/{name}"])


def test_reference_masks_hold_what_is_needed(golden):
    # The released code's masks are already forced: forcing again changes nothing, and forcing the
    # other way does.
    needed = scrub.needed(
        jnp.asarray(golden["scrub/x"]), jnp.asarray(golden["scrub/feature_to_component"]), 12
    )
    scrubbed, antiscrubbed = golden["scrub/mask/scrubbed"], golden["scrub/mask/antiscrubbed"]
    np.testing.assert_array_equal(scrub.scrub(jnp.asarray(scrubbed), needed), scrubbed)
    np.testing.assert_array_equal(scrub.antiscrub(jnp.asarray(antiscrubbed), needed), antiscrubbed)
    assert (scrub.antiscrub(jnp.asarray(scrubbed), needed) != scrubbed).sum() == needed.sum()


def test_needed_by_hand():
    # Features 0 and 2 share component 1, feature 1 has component 3; negative inputs are active too.
    x = jnp.array([[0.0, 0.0, 0.0], [0.5, 0.0, -0.5], [0.0, -0.1, 0.2]])
    expected = [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 1]]
    np.testing.assert_array_equal(
        scrub.needed(x, jnp.array([1, 3, 1]), 4), np.array(expected, bool)
    )


def test_drawn_masks():
    needed = jnp.zeros((400, 6), bool).at[:, 2].set(True)
    masks = {
        name: np.asarray(mask) for name, mask in scrub.draw_masks(jax.random.key(0), needed).items()
    }
    assert masks["scrubbed"][:, 2].all() and not masks["antiscrubbed"][:, 2].any()
    free = np.stack([mask[:, [0, 1, 3, 4, 5]] for mask in masks.values()])
    # Each free entry is on with probability 1/2, and any two masks agree with probability 1/2.
    # Over 2000 draws the standard deviation is 0.011.
    assert abs(free.mean(axis=(1, 2)) - 0.5).max() < 0.05
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs((free[one] == free[other]).mean() - 0.5) < 0.05
