"""What each component does, against numpy on the pentagon: components are single rows of W."""

import jax.numpy as jnp
import numpy as np
from conftest import close, make_method, make_problem

from apd_jax import components as components_lib
from apd_jax.decomposition import Decomposition
from apd_jax.evaluation import components_view


def decomposed(pentagon, **fields):
    method = make_method(num_components=5, topk=1.0, batch_size=5, **fields)
    problem = make_problem(pentagon.apply_fn, pentagon.params, None, uses={"W": 2})
    return Decomposition(problem, pentagon.components, method)


def by_hand(params, x, without=None):
    W = np.array(params["W"], np.float64)
    if without is not None:
        W[without] = 0
    return np.maximum(np.asarray(x) @ W @ W.T + np.asarray(params["b"]), 0)


def test_behaviour_of_the_pentagon(pentagon):
    x = jnp.concatenate([pentagon.x, 0.8 * pentagon.x[2:3], jnp.zeros((1, 5))])
    found = components_view.behaviour(decomposed(pentagon), x, num_examples=2)
    whole = by_hand(pentagon.params, x)
    for c in range(5):
        change = whole - by_hand(pentagon.params, x, without=c)
        close(found.damage[c], np.mean(change**2))
        assert found.examples[c][0] == c  # the feature alone at 1 needs it most ...
        close(found.change[c], change[found.examples[c]].mean(axis=0))
        assert found.change[c].argmax() == c
    assert found.examples[2].tolist() == [2, 5]  # ... and then the same feature at 0.8
    # Batch top-k keeps 7 of 7 · 5 pairs: the five features, the sixth input's, and one more.
    assert found.mask.sum() == 7 and found.mask[range(6), [0, 1, 2, 3, 4, 2]].all()
    close(found.cut, found.attributions[found.mask].min())
    of_each = np.where(found.mask & (found.attributions > 0), found.attributions, np.inf)
    close(found.cuts, of_each.min(axis=0))
    close(found.firing_rates, found.mask.mean(axis=0))


def test_nothing_is_kept_where_nothing_is_attributed(pentagon):
    found = components_view.behaviour(decomposed(pentagon), jnp.zeros((4, 5)))
    assert found.cut == np.inf and found.firing_rates.max() == 0 and found.damage.max() == 0


def test_what_is_always_on_does_not_lower_the_cut(pentagon):
    # Component 0 is on everywhere, also where its attribution is next to nothing; of the others
    # batch top-k keeps the five with the largest.
    found = components_view.behaviour(decomposed(pentagon, num_always_on=1), pentagon.x)
    others = found.attributions[:, 1:]
    assert found.mask[:, 0].all() and found.mask[:, 1:].sum() == 5
    close(found.cut, np.sort(others.ravel())[-5])
    assert 0 < found.attributions[1, 0] < found.cut


def test_damage_in_nats(pentagon):
    found = components_view.behaviour(decomposed(pentagon, minimality_loss="kl"), pentagon.x)
    p, q = (
        np.exp(out) / np.exp(out).sum(axis=1, keepdims=True)
        for out in (by_hand(pentagon.params, np.eye(5), c) for c in (None, 3))
    )
    close(found.damage[3], np.mean(np.sum(p * np.log(p / q), axis=1)), 1e-4)


def test_matrices_as_they_are(pentagon):
    (matrix,) = components_view.matrices(decomposed(pentagon), side=8)
    assert (matrix.name, matrix.shape) == ("W", (5, 2))
    close(matrix.values, pentagon.weights["W"])
    close(matrix.target, pentagon.params["W"])
    close(matrix.total, pentagon.params["W"])
    close(matrix.row_norms, np.eye(5), 1e-6)  # rows of unit length
    close(matrix.column_norms, np.abs(pentagon.params["W"]))


def test_of_large_matrices_the_strongest_part():
    # Component 0 has its weight in row 6 and column 1, component 1 in row 0.
    # The target's largest rows are 0 and 6.
    weights = np.zeros((2, 7, 3), np.float32)
    weights[0, 6], weights[1, 0] = (1.0, 5.0, 2.0), (3.0, 0.1, 0.0)
    components = components_lib.from_materialized({"w": jnp.asarray(weights)})
    params = {"w": jnp.asarray(weights.sum(0))}
    problem = make_problem(lambda params, x: x @ params["w"], params, None)
    decomposition = Decomposition(problem, components, make_method(num_components=2))
    (matrix,) = components_view.matrices(decomposition, side=2)
    assert 6 in matrix.rows[0] and 0 in matrix.rows[1]
    assert matrix.columns.tolist() == [[1, 2], [0, 1]]
    close(matrix.values[0][matrix.rows[0].tolist().index(6)], np.array([5.0, 2.0]))
    assert (matrix.target_rows.tolist(), matrix.target_columns.tolist()) == ([0, 6], [0, 1])
    close(matrix.target, np.array([[3.0, 0.1], [1.0, 5.0]]))
    close(matrix.row_norms[0].max(), np.sqrt(30.0))


def test_stacked_matrices_stand_one_by_one():
    # C = 2, three matrices.
    weights = jnp.arange(2 * 3 * 2 * 2, dtype=jnp.float32).reshape(2, 3, 2, 2)
    layout = components_lib.Layout(batch=(0,), ins=(1,), outs=(2,))
    components = components_lib.from_materialized({"w": weights}, layouts={"w": layout})
    problem = make_problem(lambda params, x: x, {"w": weights.sum(0)}, None)
    decomposition = Decomposition(problem, components, make_method(num_components=2))
    found = components_view.matrices(decomposition, side=4)
    assert [matrix.name for matrix in found] == ["w[0]", "w[1]", "w[2]"]
    for k, matrix in enumerate(found):
        close(matrix.values, weights[:, k], 1e-4)
