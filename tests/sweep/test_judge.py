"""Criteria and truth of many runs, on the TMS pentagon, whose decomposition is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PRETRAIN, TMS, close, make_method
from ml_collections import ConfigDict

from apd_jax import attributions, losses, targets
from apd_jax import components as components_lib
from apd_jax.components import Components
from apd_jax.evaluation.general import STREAM
from apd_jax.gates import selection
from apd_jax.methods.optimizers import Trained
from apd_jax.sweep import judge

FIELDS = {
    "num_components": 5,
    "topk": 1.0,
    "batch_size": 64,
    "simplicity_coeff": 0.3,
    "faithfulness_coeff": 2.0,
    "unit_norm_U": False,
}


def drawn(key, pentagon) -> Components:
    return components_lib.init(
        key, pentagon.params, num_components=5, init_scale=3.0, uses={"W": 2}
    )


@pytest.fixture(scope="module")
def judged(pentagon):
    """The true components, random ones, and ones that are not finite."""
    target = targets.build(ConfigDict(TMS | {"pretrain": PRETRAIN}), 64)
    method = make_method(**FIELDS)
    random = drawn(jax.random.key(3), pentagon)
    lost = jax.tree.map(lambda a: a * jnp.nan, random)
    runs = [pentagon.components, random, lost]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *runs)
    problem = target.problem(pentagon.params)
    x = target.sample_fn(jax.random.fold_in(jax.random.key(7), STREAM), 0)
    criteria = judge.criteria(problem, method, Trained(stacked), 7)
    return target, method, runs, criteria, judge.truth(target, pentagon.params, stacked), x


def test_the_truth_is_told_from_the_rest(judged):
    *_, criteria, truth, _ = judged
    assert truth["success"].tolist() == [1, 0, 0] and truth["num_features_owned"][0] == 5
    assert (
        truth["mmcs"][0] == pytest.approx(1)
        and truth["ml2r"][0] == pytest.approx(1)
        and np.isnan(truth["mmcs"][2])
    )
    assert set(criteria) == set(judge.CRITERIA) and set(truth) == set(judge.TRUTH)
    for values in criteria.values():
        # Random components never come within the error bar: they also have infinite bits.
        assert values[0] < values[1] and np.isinf(values[2])


def test_criteria_by_hand(judged, pentagon):
    target, method, runs, criteria, _, x = judged
    assert method.minimality_coeff == 1.0
    for i, components in enumerate(runs[:2]):
        A = attributions.gradient(target.apply_fn, pentagon.params, components, x)
        mask = selection.batch_topk(A, 1.0)
        kept = jnp.einsum(
            "bc,cfd->bfd", mask.astype(jnp.float32), components_lib.materialize(components)["W"]
        )
        out = jax.vmap(lambda W, x: pentagon.apply_fn(pentagon.params | {"W": W}, x[None])[0])(
            kept, x
        )
        target_out = pentagon.apply_fn(pentagon.params, x)
        error = np.mean((np.asarray(out) - np.asarray(target_out)) ** 2)
        faithfulness = losses.faithfulness(components, pentagon.params)
        simplicity = losses.simplicity(components, mask, method.schatten_p)
        close(criteria["reference_loss"][i], 2 * faithfulness + error + 0.3 * simplicity, 1e-4)
        # Without any component W is 0 and the output relu(b) = 0: its error is mean y². The best
        # constant output's is y's variance.
        y = np.asarray(target_out)
        scale = min(np.mean(y**2), np.mean((y - y.mean(axis=0, keepdims=True)) ** 2))
        assert criteria["sparse_error"][i] == pytest.approx(error / scale, rel=1e-4, abs=1e-9)
        # Ablation does at least the damage of one corner: all inactive components on.
        everything = components_lib.total(components, pentagon.params)
        unmasked = np.mean((np.asarray(pentagon.apply_fn(everything, x)) - y) ** 2) / scale
        assert (
            criteria["worst_error"][i]
            >= (1 - 1e-4) * max(criteria["sparse_error"][i], unmasked) - 1e-9
        )


def test_bits_of_the_truth(judged):
    # A component has rank 1, so it takes log2 5 + 1 = 3.32 bits. With a fifth of five features
    # active about one is needed for each input.
    *_, criteria, _, x = judged
    active = float(jnp.mean(jnp.sum(x != 0, axis=1)))
    assert 0.3 * active < criteria["bits"][0] / (np.log2(5) + 1) < 1.3 * active
