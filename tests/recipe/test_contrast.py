"""Components of what sites read at chosen positions: against numpy, by what they leave and take."""

import jax.numpy as jnp
import numpy as np
import pytest

import apd_jax
from apd_jax import components as components_lib
from apd_jax.errors import InputError

B, T, D, H = 8, 6, 5, 7


def network(params, x):
    """One leaf as [in, out], one as [out, in]."""
    return jnp.maximum(x @ params["first"], 0) @ params["second"].T


@pytest.fixture(scope="module")
def data():
    """(params, batches, where): a direction of the input that is long at chosen positions."""
    rng = np.random.default_rng(0)
    params = {
        "first": rng.normal(size=(D, H)).astype(np.float32),
        "second": rng.normal(size=(3, H)).astype(np.float32),
    }
    batches, marked = [], rng.normal(size=D)
    for _ in range(3):
        on = rng.random((B, T)) < 0.3
        x = rng.normal(size=(B, T, D)) + 4 * on[..., None] * marked
        batches.append(np.concatenate([x, on[..., None]], -1).astype(np.float32))
    return params, batches


def apply(params, x):
    return network(params, x[..., :D])


def where(x):
    return x[..., D] > 0.5


def read_by(params, batches):
    """{site: [N, d]} and the chosen positions, in numpy."""
    x = np.concatenate([b.reshape(-1, D + 1) for b in batches])
    hidden = np.maximum(x[:, :D] @ params["first"], 0)
    return {"first": x[:, :D], "second": hidden}, x[:, D] > 0.5


@pytest.mark.parametrize("n", [1, 2])
def test_it_is_the_ratio_of_quadratic_forms_in_numpy(data, n):
    params, batches = data
    found = apd_jax.contrast(apply, params, batches, where, num_components=n, ridge=0.01)
    assert [tuple(f.ids) for f in found.factors.values()] == [
        tuple(range(n)),
        tuple(range(n, 2 * n)),
    ]
    inputs, chosen = read_by(params, batches)
    for name, a in inputs.items():
        S = a[chosen].T @ a[chosen] / chosen.sum()
        R = a[~chosen].T @ a[~chosen] / (~chosen).sum()
        R += 0.01 * np.trace(R) / len(R) * np.eye(len(R))
        values, vectors = np.linalg.eig(np.linalg.solve(R, S))
        U = vectors[:, np.argsort(-values.real)[:n]].real
        # Of least error in a ≈ D Uᵀ a, as a regression of what is read on what is kept of it.
        kept = a[chosen] @ U
        W = params["first"] if name == "first" else params["second"].T
        expected = U @ np.linalg.lstsq(kept, a[chosen], rcond=None)[0] @ W
        total = np.asarray(components_lib.leaf_total(found.factors[name]))
        total = total if name == "first" else total.T
        np.testing.assert_allclose(total, expected, atol=2e-4 * np.abs(expected).max())


def test_without_them_little_is_left_where_it_was_chosen_and_nearly_all_elsewhere(data):
    params, batches = data
    found = apd_jax.contrast(apply, params, batches, where, select="first")
    left = components_lib.without(found, params)
    assert left["second"] is params["second"]
    inputs, chosen = read_by(params, batches)
    before, after = (inputs["first"] @ np.asarray(p["first"]) for p in (params, left))
    share = (after**2).sum(1) / (before**2).sum(1)
    assert np.median(share[chosen]) < 0.2
    changed = ((after - before) ** 2).sum(1) / (before**2).sum(1)
    assert np.median(changed[~chosen]) < 0.2 < np.median(changed[chosen])


def test_padding_and_the_choice_of_examples(data):
    params, batches = data
    valid = [np.arange(T) < 4] * B
    cut = apd_jax.contrast(
        apply, params, batches, where, select="first", valid_fn=lambda x: np.stack(valid)
    )
    same = apd_jax.contrast(apply, params, [b[:, :4] for b in batches], where, select="first")
    np.testing.assert_allclose(cut.factors["first"].V, same.factors["first"].V, rtol=1e-4)
    rows = [b.reshape(-1, D + 1) for b in batches]
    by_row = apd_jax.contrast(apply, params, rows, where, select="first")
    every = apd_jax.contrast(apply, params, batches, where, select="first")
    np.testing.assert_allclose(by_row.factors["first"].V, every.factors["first"].V, rtol=1e-4)


def test_what_cannot_be_told_apart_is_refused(data):
    params, batches = data
    for chosen, word in (
        (lambda x: where(x) & False, "chosen"),
        (lambda x: x[..., 0] < 99, "left"),
    ):
        with pytest.raises(InputError, match=f"no position is {word}"):
            apd_jax.contrast(apply, params, batches, chosen)
    with pytest.raises(InputError, match="reads 5 directions at chosen positions"):
        apd_jax.contrast(apply, params, batches, where, select="first", num_components=6)
    with pytest.raises(InputError, match="at least 1 component and a ridge above 0"):
        apd_jax.contrast(apply, params, batches, where, ridge=0.0)

    def looked_up(params, x):
        return params["table"][x] @ params["first"]

    table = {"table": np.ones((4, D), np.float32), "first": params["first"]}
    tokens = [np.array([[0, 1, 2, 3]])]
    with pytest.raises(InputError, match="'table' is looked up by whole numbers"):
        apd_jax.contrast(looked_up, table, tokens, lambda x: x == 1, select="*")


def test_targeted_begins_there(data):
    params, batches = data
    found = apd_jax.contrast(apply, params, batches, where)
    settings = apd_jax.Targeted(num_components=1, num_steps=1, batch_size=B, steps_per_call=1)
    trained = apd_jax.decompose(
        *(apply, params, batches, settings), elsewhere=batches, init=found, select=list(params)
    )
    for name, f in trained.components.factors.items():
        begun = found.factors[name]
        assert f.ids == begun.ids
        np.testing.assert_allclose(f.weights, begun.weights, atol=2e-3)
