"""Only real positions count, whatever stands at the others and however they are said."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import B, T, decompose, first_three, linear, sequences

from apd_jax import losses
from apd_jax.errors import InputError
from apd_jax.forward import positions


def test_numbers_count_where_they_are_above_0():
    """Those of segments, or of an attention mask."""

    def numbers(kind):
        return lambda x: jnp.tile(jnp.array([1, 2, 3, 0], kind), (x.shape[0], 1))

    plain, whole = (
        decompose(data=sequences, settings={"mask_per": "position"}, valid_fn=fn)
        for fn in (first_three, numbers(jnp.int32))
    )
    x = jnp.ones((B, T, 4))
    mask = plain.mask(x)
    assert not mask[:, 3].any() and mask[:, 1].any()
    assert whole.history[0]["minimality"] == plain.history[0]["minimality"]
    np.testing.assert_array_equal(whole.mask(x), mask)
    fractions = dataclasses.replace(plain.problem, valid_fn=numbers(jnp.float32))
    np.testing.assert_array_equal(fractions.valid(x), plain.problem.valid(x))


@pytest.mark.parametrize("loss", ["mse", "kl"])
@pytest.mark.parametrize("per", ["example", "position"])
def test_what_stands_at_padding_may_be_nan(per, loss):
    def spoilt(params, x):
        return jnp.where(first_three(x)[..., None], linear(params, x), jnp.nan)

    settings = {"mask_per": per, "minimality_loss": loss, "num_steps": 2}
    settings |= {"attribution_metric": loss}
    whole, nans = (
        decompose(fn, data=sequences, settings=settings, valid_fn=first_three)
        for fn in (linear, spoilt)
    )
    assert nans.history[-1]["minimality"] == whole.history[-1]["minimality"]
    factors = [run.components.factors["w"].U for run in (whole, nans)]
    np.testing.assert_array_equal(*factors)
    assert np.isfinite(factors[1]).all()


def heads(params, x):
    """Hidden activations [b, heads, positions, k], and a pattern [b, heads, positions, positions].

    As many heads as positions.
    """
    h = jnp.einsum("btd,dhk->bhtk", x, params["w"])
    pattern = jax.nn.softmax(jnp.einsum("bhtk,bhsk->bhts", h, h))
    out = jnp.einsum("bhts,bhsk,hkd->btd", pattern, h, params["v"])
    return out, {"h": h, "pattern": pattern, "pooled": x.mean(axis=(1, 2))}


def test_hidden_activations_are_weighted_along_their_positions():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(4, T, 2)), "v": rng.normal(size=(T, 2, 4))}
    x, valid = rng.normal(size=(B, T, 4)), np.asarray(first_three(np.zeros((B, T))))
    weights = jnp.asarray(valid / valid.mean(), jnp.float32)
    params, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, x))
    found = positions.hidden_weights(heads, params, x, weights)
    assert found is not None and found["pooled"] is None
    _, hidden = heads(params, x)
    other = {name: h + 1.0 for name, h in hidden.items()}
    spoilt = {
        "h": other["h"].at[:, :, 3].set(1e6),
        "pattern": other["pattern"].at[:, :, 3].set(1e6).at[:, :, :, 3].set(1e6),
        "pooled": other["pooled"],
    }
    # Every entry that counts is off by 1, so the mean is too: padding counts nowhere, heads all do.
    value = losses.hidden_reconstruction(spoilt, hidden, found)
    assert np.isfinite(value)
    # h: B·T·T·2 entries of mean weight 1; pattern: B·T heads of 3 x 3 entries of weight (4/3)².
    by_hand = (B * T * T * 2 + B * T * 9 * 16 / 9 + B) / (B * T * T * 2 + B * T**3 + B)
    np.testing.assert_allclose(value, by_hand, rtol=1e-5)


def test_a_run_with_hidden_activations_of_heads():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(4, T, 2)), "v": rng.normal(size=(T, 2, 4))}
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    run = decompose(
        heads,
        params,
        sequences,
        settings={"hidden_reconstruction_coeff": 1.0},
        valid_fn=first_three,
    )
    assert np.isfinite(run.history[0]["hidden_reconstruction"])


def test_an_axis_that_cannot_be_followed_is_refused():
    def fn(params, x):  # sorted: which position is which is lost
        out = linear(params, x)
        return out, {"h": jnp.sort(out, axis=1)}

    with pytest.raises(InputError, match=r"activation 'h' of shape \(8, 4, 3\) has an axis of 4"):
        x = jnp.ones((B, T, 4))
        positions.hidden_weights(fn, {"w": jnp.ones((4, 3))}, x, jnp.ones((B, T)))


@pytest.mark.parametrize(
    ("valid_fn", "sentence"),
    [
        (lambda x: x[:, :2, 0] > 0, r"valid_fn gives \(8, 2\), but the outputs have \(8, 4, 3\)"),
        (lambda x: {"text": x}["mask"], "valid_fn fails on a batch: there is no 'mask'"),
    ],
)
def test_what_does_not_fit_is_refused(valid_fn, sentence):
    with pytest.raises(InputError, match=sentence):
        decompose(data=sequences, valid_fn=valid_fn)


def test_masks_of_examples_are_not_weighted_by_positions():
    """As many components as positions: [B, C] has the shape of [B, T]."""
    g = jnp.asarray(np.random.default_rng(0).uniform(size=(B, T)), jnp.float32)
    weights = jnp.asarray(np.tile([4 / 3, 4 / 3, 4 / 3, 0.0], (B, 1)), jnp.float32)
    np.testing.assert_allclose(losses.importance(g, 1.0, weights), g.mean(axis=0), rtol=1e-6)
