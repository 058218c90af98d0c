"""The masks against a stable numpy sort, and the gates on attributions that use them.

Exact counts, deterministic ties, traced k, no sort in the program.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_method, make_problem, seen
from jax.sharding import PartitionSpec

from apd_jax import attributions, masks
from apd_jax.errors import InputError
from apd_jax.gates.base import AlwaysOn, Gate, Rule
from apd_jax.gates.ranked import All, BatchTopK, Exact, LearnedThreshold, Threshold, TopK


def reference(scores, num):
    """The `num` largest of a flat array: a stable sort of the negated scores.

    Ties go to the lower position.
    """
    kept = np.zeros(scores.size, bool)
    kept[np.argsort(-scores.ravel(), kind="stable")[:num]] = True
    return kept.reshape(scores.shape)


rng = np.random.default_rng(0)
SCORES = {
    "distinct": rng.normal(size=(8, 6)),
    "positive": rng.uniform(size=(8, 6)),
    "tied": rng.integers(0, 3, size=(8, 6)),
    "mostly zero": np.where(rng.uniform(size=(8, 6)) < 0.8, 0.0, rng.uniform(size=(8, 6))),
    "all equal": np.full((8, 6), 0.25),
    "all zero": np.zeros((8, 6)),
    "negative": -rng.uniform(size=(8, 6)),
    "both zeros": np.where(rng.uniform(size=(8, 6)) < 0.5, 0.0, -0.0),
    "denormal and huge": rng.choice([1e-45, 1e-40, 1e-38, 1.0, 3e38, -3e38], size=(8, 6)),
    "neighbouring floats": 1 + rng.integers(0, 4, size=(8, 6)) * 2.0**-23,
    "infinite": rng.choice([np.inf, -np.inf, 0.0], size=(8, 6)),
}
SCORES = {name: scores.astype(np.float32) for name, scores in SCORES.items()}
each_scores = pytest.mark.parametrize("scores", list(SCORES.values()), ids=list(SCORES))


@each_scores
def test_batch_topk_is_a_stable_sort(scores):
    # A traced k: one program for all of them.
    program = jax.jit(masks.batch_topk)
    for k in (0.0, 0.1, 0.126, 1.0, 1.28, 2.5, 5.9, 6.0):
        num = int(np.floor(k * 8 + 1e-9))
        mask = program(jnp.asarray(scores), k)
        assert int(mask.sum()) == num
        np.testing.assert_array_equal(mask, reference(scores, num), err_msg=f"k = {k}")


@each_scores
def test_batch_largest_takes_any_count(scores):
    program = jax.jit(masks.batch_largest)
    for num in range(0, 49):
        np.testing.assert_array_equal(program(jnp.asarray(scores), num), reference(scores, num))


@each_scores
def test_topk_is_a_stable_sort_of_every_row(scores):
    program = jax.jit(masks.topk)
    for k in range(7):
        expected = np.stack([reference(row, k) for row in scores])
        np.testing.assert_array_equal(program(jnp.asarray(scores), k), expected)


@each_scores
def test_topk_with_a_count_per_row(scores):
    counts = np.array([0, 1, 2, 3, 6, 5, 1, 9])  # 9 is clipped to the 6 there are
    mask = jax.jit(masks.topk)(jnp.asarray(scores), jnp.asarray(counts))
    np.testing.assert_array_equal(
        mask, np.stack([reference(row, k) for row, k in zip(scores, counts, strict=True)])
    )
    assert mask.sum(1).tolist() == [0, 1, 2, 3, 6, 5, 1, 6]


@each_scores
def test_a_python_k_outside_jit(scores):
    np.testing.assert_array_equal(
        masks.batch_topk(jnp.asarray(scores), 1.28), reference(scores, 10)
    )
    np.testing.assert_array_equal(
        masks.topk(jnp.asarray(scores), 2), np.stack([reference(row, 2) for row in scores])
    )


@pytest.mark.parametrize(
    ("k", "batch_size", "expected"),
    # 0.29·100 is 28.999999999999996 in floating point and must not lose an example.
    # 1.28·256 = 327.68; 0.211·2048 = 432.128.
    [
        (0.29, 100, 29),
        (1.28, 256, 327),
        (0.211, 2048, 432),
        (1.0, 7, 7),
        (0.999, 100, 99),
        (0, 100, 0),
    ],
)
def test_number_kept(k, batch_size, expected):
    assert masks.num_kept(k, batch_size) == expected
    assert masks.num_kept(jnp.float32(k), batch_size) == expected


def test_k_out_of_range_is_refused():
    for k in (-0.1, 6.1):
        with pytest.raises(InputError, match=r"must lie in \[0, C = 6\]; got"):
            masks.batch_topk(jnp.zeros((8, 6)), k)


def test_vmaps_over_instances_and_k():
    scores = jnp.stack([SCORES["distinct"], SCORES["tied"]])
    k = jnp.array([0.5, 2.0])
    both = jax.vmap(masks.batch_topk)(scores, k)
    for i in range(2):
        np.testing.assert_array_equal(both[i], masks.batch_topk(scores[i], float(k[i])))


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_devices_agree_also_on_ties(devices):
    def per_device(scores, k):
        return masks.batch_topk(scores, k, axis_name="data")

    program = jax.pmap(
        per_device, axis_name="data", in_axes=(0, None), devices=jax.local_devices()[:devices]
    )
    for name, scores in SCORES.items():
        for k in (0.126, 1.28, 5.9):
            mask = np.asarray(program(scores.reshape(devices, 8 // devices, 6), k)).reshape(8, 6)
            np.testing.assert_array_equal(
                mask, reference(scores, int(np.floor(k * 8))), err_msg=f"{name}, k = {k}"
            )


def test_shard_map_agrees_with_pmap():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("data")
    program = jax.jit(
        jax.shard_map(
            lambda a: masks.batch_topk(a, 1.28, axis_name="data"),
            mesh=mesh,
            in_specs=spec,
            out_specs=spec,
        )
    )
    for scores in SCORES.values():
        np.testing.assert_array_equal(program(jnp.asarray(scores)), reference(scores, 10))


def test_no_sort_in_the_program():
    def program(scores, k):
        return masks.batch_topk(scores, k), masks.topk(scores, 2)

    jaxpr = str(jax.make_jaxpr(program)(jnp.zeros((8, 6)), 1.0))
    compiled = jax.jit(program).lower(jnp.zeros((8, 6)), 1.0).compile().as_text()
    for word in ("sort", "top_k", "topk"):
        assert word not in jaxpr
    assert " sort(" not in compiled and "TopK" not in compiled


def test_pentagon_keeps_each_features_own_component(pentagon):
    # One feature per example, k = 1: the mask is the identity, per example and over the batch.
    scores = attributions.gradient(
        pentagon.apply_fn, pentagon.params, pentagon.components, pentagon.x
    )
    np.testing.assert_array_equal(masks.topk(scores, 1), np.eye(5, dtype=bool))
    np.testing.assert_array_equal(masks.batch_topk(scores, 1), np.eye(5, dtype=bool))


# Gates


def test_learned_importances_by_hand():
    """A^8 / (A^8 + τ^8): a half at each component's threshold, constant in the attributions."""
    A, tau = rng.uniform(0.01, 1, size=(8, 6)), rng.uniform(0.1, 0.5, size=6)
    A[0, 0] = 0

    def importances(A, log_tau):
        return LearnedThreshold(log_tau)(seen(A)).values

    both = jnp.asarray(A, jnp.float32), jnp.log(jnp.asarray(tau, jnp.float32))
    np.testing.assert_allclose(importances(*both), A**8 / (A**8 + tau**8), rtol=1e-4, atol=1e-7)
    gradient = jax.grad(lambda a, t: importances(a, t).sum(), argnums=(0, 1))(*both)
    assert not gradient[0].any() and (gradient[1] <= 0).all() and np.isfinite(gradient[1]).all()


def test_what_a_learned_gate_says():
    A = jnp.array([[0.2, 0.1, 0.4], [0.05, 0.3, 0.0]])
    tau = jnp.array([0.1, 0.2, 0.4])
    found = LearnedThreshold(jnp.log(tau))(seen(A))
    # Active is what lies above the threshold; at the threshold itself g is a half.
    assert found.active.tolist() == [[True, False, False], [False, True, False]]
    assert not found.hard and found.values[0, 2] == pytest.approx(0.5, abs=1e-5)
    np.testing.assert_array_equal(found.priced, found.values)
    np.testing.assert_array_equal(found.scores, A)
    assert found.mean_active(seen(A)) == 1.0  # one of each example
    np.testing.assert_allclose(LearnedThreshold(jnp.log(tau)).rule().cuts, tau, rtol=1e-6)


def test_always_on_components_have_no_price_and_no_gradient():
    A, tau = jnp.array([[0.2, 0.1, 0.4]]), jnp.log(jnp.array([0.1, 0.2, 0.4]))
    found = AlwaysOn(LearnedThreshold(tau), 2)(seen(A))
    assert found.active.tolist() == [[True, True, False]]
    np.testing.assert_allclose(found.values, [[1.0, 1.0, 0.5]], atol=1e-5)
    np.testing.assert_allclose(found.priced, [[0.0, 0.0, 0.5]], atol=1e-5)
    np.testing.assert_array_equal(found.scores, A)
    slope = jax.grad(lambda t: AlwaysOn(LearnedThreshold(t), 2)(seen(A)).values.sum())(tau)
    assert slope[:2].tolist() == [0.0, 0.0] and slope[2] < 0  # finite, though hidden ones are -inf


def num_active(x):
    return x


EVERY_GATE = [
    (BatchTopK(1.5), "k = 1.5", Rule()),
    (TopK(2.0), "k = 2 of every input", Rule(top=2)),
    (Threshold(0.25), "threshold 0.25", Rule(cuts=0.25)),
    (Exact(num_active), "as many as features are active", Rule()),
    (All(), "all", Rule(everything=True)),
]


@pytest.mark.parametrize(("gate", "says", "rule"), EVERY_GATE, ids=lambda v: type(v).__name__)
def test_padding_keeps_nothing_at_any_gate(gate, says, rule):
    assert isinstance(gate, Gate)
    assert (gate.says, gate.rule()) == (says, rule)
    beside = AlwaysOn(gate, 1)
    assert beside.says == says + " beside 1 always on" and beside.rule().always_on == 1
    scores = jnp.asarray(rng.uniform(0.3, 1, size=(2, 4, 5)), jnp.float32)
    valid = jnp.array([[True, True, True, False], [True, False, False, False]])
    observed = seen(scores, jnp.array([2, 1]), valid=valid)
    for one in (gate, beside):
        found = one(observed)
        assert not found.active[~valid].any() and found.active[valid].any()
        # Mean over the 4 positions that count.
        np.testing.assert_allclose(found.mean_active(observed), found.active.sum() / 4, rtol=1e-6)
    assert beside(observed).active[valid][:, 0].all()
    if isinstance(gate, BatchTopK):  # ⌊1.5·4⌋ pairs at the 4 positions that count
        assert gate(observed).active.sum() == 6
    if isinstance(gate, Exact):  # 2 + 1, though padding has scores too
        assert gate(observed).active.sum() == 3


def test_a_gate_of_traced_numbers_says_so():
    said = []

    def mask(k):
        gate = BatchTopK(k)
        said.append(gate.says)
        return gate(seen(jnp.asarray(SCORES["distinct"]))).active

    assert jax.jit(mask)(1.5).sum() == 12
    assert said == ["k = traced"] and isinstance(BatchTopK(jnp.float32(2)), Gate)
    assert BatchTopK(jnp.float32(2)).says == "k = 2"


def test_a_method_makes_its_gate():
    problem = make_problem(lambda params, x: x, {}, lambda key, step: jnp.ones((2, 3)))
    thresholds = {"log_thresholds": jnp.zeros(3)}
    learned = make_method(mask="learned", threshold=0.1).gate(thresholds, problem)
    assert learned.log_thresholds is thresholds["log_thresholds"]
    assert make_method(mask="topk", topk=2.0).gate((), problem) == TopK(2.0)
    assert make_method(num_always_on=2).gate((), problem) == AlwaysOn(BatchTopK(1.0), 2)
