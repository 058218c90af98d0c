"""Bad values end in one sentence that names them: NaN, indices, seeds, masks, top-k of little."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import get_config
from etils import epath
from small import PARAMS, SETTINGS, B, decompose, first_three, linear, rows, sequences

import apd_jax
from apd_jax import losses
from apd_jax.commands import experiment
from apd_jax.errors import InputError
from apd_jax.methods.apd import APD


@pytest.fixture(scope="module")
def found():
    return decompose()


def test_impossible_logits_add_nothing():
    """p = (1/2, 1/2, 0) against q = (.731, .269, 0), in nats."""
    target, sparse = jnp.array([[0.0, 0.0, -jnp.inf]]), jnp.array([[1.0, 0.0, -jnp.inf]])
    value, gradient = jax.value_and_grad(losses.minimality)(sparse, target, "kl")
    p, q = np.array([0.5, 0.5]), np.exp([1.0, 0.0]) / (np.e + 1)
    np.testing.assert_allclose(value, np.sum(p * np.log(p / q)), rtol=1e-5)
    np.testing.assert_allclose(gradient[0], [q[0] - 0.5, q[1] - 0.5, 0.0], atol=1e-6)


def test_a_network_with_impossible_logits_trains():
    def fn(params, x):
        return jnp.concatenate([linear(params, x), jnp.full((len(x), 1), -jnp.inf)], axis=-1)

    run = decompose(fn, settings={"minimality_loss": "kl", "attribution_metric": "kl"})
    assert np.isfinite(run.history[0]["total"]) and run.history[0]["minimality"] > 0
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(run.components))


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_weights_that_are_not_finite_are_named(value):
    params = {"w": PARAMS["w"].at[0, 0].set(value)}
    with pytest.raises(InputError, match="params leaf 'w' holds NaN or an infinity"):
        decompose(params=params)


def test_a_constant_of_the_network_may_be_infinite():
    """Only what is decomposed is looked at."""
    params = {**PARAMS, "mask": jnp.array([0.0, 0.0, -jnp.inf])}
    fn = lambda p, x: jax.nn.softmax(linear(p, x) + p["mask"][None, :])  # noqa: E731
    assert np.isfinite(decompose(fn, params).history[0]["total"])


@pytest.mark.parametrize(
    ("data", "apply_fn", "sentence"),
    [
        (lambda r, s: rows(r, s).at[0].set(jnp.nan), linear, "a batch of sample_fn holds NaN"),
        (rows, lambda p, x: linear(p, x) / 0.0, "outputs are not finite on 100% of their entries"),
    ],
)
def test_outputs_that_are_not_finite_are_blamed_on_their_cause(data, apply_fn, sentence):
    with pytest.raises(InputError, match=sentence):
        decompose(apply_fn, data=data)


@pytest.mark.parametrize("field", ["threshold", "topk", "learning_rate", "simplicity_coeff"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_settings_that_are_not_numbers(field, value):
    mask = "threshold" if field == "threshold" else "batch_topk"
    with pytest.raises(InputError, match=rf"^{field} must"):
        decompose(settings={"mask": mask, field: value})


def test_components_that_do_not_exist(found):
    x, message = jnp.ones((B, 4)), "component {} does not exist; there are 3, counted from 0 to 2"
    for wrong in (3, -1):
        with pytest.raises(InputError, match=message.format(wrong)):
            found.ablate([wrong], x)
        with pytest.raises(InputError, match=message.format(wrong)):
            found.component(wrong)
    for wrong, sentence in (
        (np.array([0.5]), "chosen by whole numbers"),
        (np.ones(4, bool), "shape \\(3,\\)"),
    ):
        with pytest.raises(InputError, match=sentence):
            found.ablate(wrong, x)


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (np.ones((2, 5)), r"the network fails on x, float32\[2, 5\]: "),
        (np.ones(4), r"x must be a batch as in training.* of which the network makes \(3,\)"),
        ([[1.0] * 4] * 2, "these are nested lists: give arrays"),
        ("text", "x must hold arrays of numbers"),
        (np.full((2, 4), np.nan), "the gate's scores are NaN on x"),
    ],
)
def test_inputs_that_the_network_does_not_take(found, x, sentence):
    with pytest.raises(InputError, match=sentence):
        found.mask(x)


def test_an_edit_is_a_scale_for_a_component(found):
    with pytest.raises(InputError, match=r"edit takes \{component: scale\}; got a list"):
        found.edit([1])
    with pytest.raises(InputError, match="the scale of component 1 must be a number"):
        found.edit({1: "half"})


def test_a_mask_is_a_mask(found):
    x = jnp.ones((B, 4))
    only_1 = linear({"w": found.component(1)["w"]}, x)
    for off in (np.array([True, False, True]), [True, False, True], [0, 2], np.int8([2, 0])):
        np.testing.assert_allclose(found.ablate(off, x), only_1, rtol=1e-5)
    lists = [[True, False, True]] * B
    np.testing.assert_array_equal(
        found.sparse_output(x, lists), found.sparse_output(x, np.asarray(lists))
    )


@pytest.mark.parametrize("shape", [(B, 4), (B - 1, 3)])
def test_a_mask_of_something_else(found, shape):
    with pytest.raises(InputError, match="examples and components ask for"):
        found.sparse_output(jnp.ones((B, 4)), np.ones(shape, bool))


@pytest.mark.parametrize("seed", [2**32 + 1, 2**63 - 1, 2**64, -1])
def test_seeds_that_no_key_can_hold(seed, tmp_path):
    with pytest.raises(InputError, match=rf"^seed must lie in \[0, 2\*\*32\); got {seed}"):
        decompose(settings={"seed": seed})
    for name in ("target", "evaluation"):
        config = get_config("tms", "5-2,smoke").unlock().copy_and_resolve_references()
        config[name].seed = seed
        with pytest.raises(InputError, match=rf"^{name}.seed must lie in"):
            experiment.prepare(config, epath.Path(tmp_path))
    assert not list(tmp_path.iterdir())


def test_top_k_of_little_says_what_to_do_instead():
    with pytest.raises(InputError, match=r"topk = 0\.1 keeps 0\.8 pairs of a batch of 8, so none"):
        decompose(settings={"topk": 0.1})
    run = decompose(settings={"topk": 0.5, "num_steps": 3})
    with pytest.raises(InputError, match="judge inputs alone by mask"):
        run.mask(jnp.ones((1, 4)))
    many = rows(jax.random.key(0), 0)
    cut, whole = run.cut(many), run.mask(many)
    assert int(whole.sum()) == B // 2
    alone = jnp.concatenate([run.mask(many[i : i + 1], cut=cut) for i in range(B)])
    np.testing.assert_array_equal(alone, whole)


def test_a_cut_counts_no_component_that_is_always_on():
    run = decompose(settings={"topk": 0.5, "num_always_on": 1})
    many = rows(jax.random.key(0), 0)
    mask = run.mask(many, cut=run.cut(many))
    np.testing.assert_array_equal(mask, run.mask(many))
    assert mask[:, 0].all()
    scores = np.asarray(run.attributions(many))
    assert run.cut(many) == np.sort(scores[:, 1:], axis=None)[-4]


def test_a_cut_keeps_nothing_at_padding():
    run = decompose(
        data=sequences,
        settings={"mask_per": "position", "topk": 1.0, "num_always_on": 1},
        valid_fn=first_three,
    )
    many = sequences(jax.random.key(0), 0)
    mask = run.mask(many, cut=run.cut(many))
    np.testing.assert_array_equal(mask, run.mask(many))
    assert not mask[:, 3].any() and mask[:, :3, 0].all()


def test_gates_that_judge_by_something_else_have_no_cut():
    run = apd_jax.decompose(
        linear, PARAMS, rows, apd_jax.SPD(num_components=2, batch_size=B, num_steps=1)
    )
    with pytest.raises(InputError, match="judges every example by itself"):
        run.cut(jnp.ones((B, 4)))


def test_numbers_of_any_library_are_numbers(tmp_path):
    settings = dataclasses.replace(
        SETTINGS, rank=np.int64(2), topk=jnp.float32(1.0), learning_rate=np.float32(1e-3)
    )
    run = apd_jax.decompose(
        linear,
        PARAMS,
        rows,
        settings,
        select={"w": {"rank": np.int64(2)}},
        uses={"w": np.int32(1)},
        workdir=tmp_path / "run",
    )
    run.save(tmp_path / "saved")
    again = apd_jax.Decomposition.load(tmp_path / "saved", linear)
    assert again.components.factors["w"].U.shape == (3, 4, 2)
    assert type(run.method.topk) is float and type(run.method.rank) is int
    assert isinstance(run.method, APD)


WRONG = ("all", 2.5, {"a": 1}, [[1, 2], [3]], object())
CALLS = {  # what of a wrong kind is given to
    "x of mask": lambda d, wrong: d.mask(wrong),
    "cut": lambda d, wrong: d.mask(X, cut="a" if wrong == 2.5 else wrong),
    "mask": lambda d, wrong: d.sparse_output(X, wrong),
    "components": lambda d, wrong: d.ablate(wrong, X),
    "i": lambda d, wrong: d.component(wrong),
    "scale": lambda d, wrong: d.edit({0: "2" if wrong == 2.5 else wrong}),
    "scales": lambda d, wrong: d.edit(wrong),
    "instance": lambda d, wrong: d.instance(wrong),
    "steps": lambda d, wrong: d.train(wrong),
    "data": lambda d, wrong: d.train(1, [1.0, 2.0] if wrong == "all" else wrong),
    "x of report": lambda d, wrong: d.report("never.html", wrong),
    "tokens": lambda d, wrong: d.report("never.html", X, wrong),
    "harvest": lambda d, wrong: d.report("never.html", X, harvest=wrong),
    "x of evidence": lambda d, wrong: d.evidence(x=wrong),
    "checks": lambda d, wrong: d.evidence(checks=wrong),
    "budget": lambda d, wrong: d.evidence(budget=-1 if wrong == 2.5 else wrong),
    "num_examples": lambda d, wrong: d.evidence(num_examples=wrong),
    "seeds": lambda d, wrong: d.evidence(seeds=wrong),
    "other": lambda d, wrong: d.evidence(other=wrong),
    "earlier": lambda d, wrong: d.evidence(earlier=wrong),
    "provenance": lambda d, wrong: d.evidence(provenance=wrong),
    "target": lambda d, wrong: d.evidence(target=wrong),
    "path": lambda d, wrong: apd_jax.load("nowhere" if wrong == "all" else wrong, linear),
    "ragged": lambda d, wrong: decompose(ragged=wrong),
    "method": lambda d, wrong: apd_jax.suggest(linear, PARAMS, rows, wrong),
    "elsewhere": lambda d, wrong: decompose(elsewhere=len),
}
X = np.ones((B, 4), np.float32)
RIGHT = {"provenance": [{"a": 1}]}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_of_a_wrong_kind_is_said(found, name):
    for wrong in WRONG:
        if wrong not in RIGHT.get(name, []):
            with pytest.raises(InputError):
                CALLS[name](found, wrong)


def test_no_examples_and_pairs_with_labels(found):
    for asked in (found.mask, found.attributions, lambda x: found.report("never.html", x)):
        with pytest.raises(InputError, match=r"x holds no examples: it is float32\[0, 4\]"):
            asked(X[:0])
    with pytest.raises(InputError, match=r"of \(inputs, labels\) give the inputs alone"):
        decompose(data=(X, X[:, :2]))
