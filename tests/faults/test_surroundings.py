"""Networks, data and environments that should work, or are refused in one sentence."""

import asyncio
import dataclasses
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from small import PARAMS, SETTINGS, B, decompose, linear, rows

import apd_jax
from apd_jax.errors import InputError


def test_params_that_are_split_over_devices():
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    split = {"w": jax.device_put(PARAMS["w"], NamedSharding(mesh, P("x", None)))}
    run, whole = decompose(params=split), decompose()
    assert run.history[0]["total"] == whole.history[0]["total"]
    assert len(run.problem.params["w"].sharding.device_set) == 1


AXES = ("data", "instance")  # names that the library's own axes have, or had


def test_partitioning_of_linen():
    model = nn.Dense(
        3, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), AXES), use_bias=False
    )
    variables = model.init(jax.random.key(0), jnp.ones((1, 4)))
    run = decompose(model.apply, variables)
    assert list(run.components.factors) == ["params.kernel"]
    np.testing.assert_allclose(run.sparse_output(jnp.ones((B, 4))).shape, (B, 3))


class Constrained(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.with_logical_constraint(nn.Dense(3)(x), AXES)


def test_logical_constraints_of_linen():
    model = Constrained()
    variables = model.init(jax.random.key(0), jnp.ones((1, 4)))
    for rules in ((), (("data", "data"), ("instance", None))):
        with nn.logical_axis_rules(rules):
            assert np.isfinite(decompose(model.apply, variables).history[0]["total"])


class Dropping(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.dropout = nnx.Linear(4, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.linear(x), deterministic=True)


def test_an_nnx_state_with_keys_is_saved(tmp_path):
    graph, state = nnx.split(Dropping(nnx.Rngs(0)))
    fn = lambda params, x: nnx.merge(graph, params)(x)  # noqa: E731
    run = decompose(fn, state, select="linear.kernel*")
    run.save(tmp_path)
    again = apd_jax.Decomposition.load(tmp_path, fn, state)
    x = jnp.ones((B, 4))
    np.testing.assert_array_equal(run.sparse_output(x), again.sparse_output(x))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Output:
    logits: jax.Array


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        (lambda y: (y,), "it returns a tuple of 1"),
        (lambda y: (y, {}, y), "it returns a tuple of 3"),
        (Output, "must return a floating array"),
        (lambda y: {"logits": y}, "must return a floating array"),
        (lambda y: y.astype(int), "must return a floating array"),
        (lambda y: (y, [y]), "its second value is a list"),
        (lambda y: y.sum(), "must keep the batch as first axis"),
        (lambda y: None, "must return a floating array"),
    ],
)
def test_results_that_are_no_array(result, sentence):
    with pytest.raises(InputError, match=sentence):
        decompose(lambda p, x: result(linear(p, x)))


@pytest.mark.parametrize("cut", [lambda y: y[:, :1], lambda y: y.sum(axis=1)])
def test_one_logit_has_no_distribution(cut):
    with pytest.raises(InputError, match="there are fewer than two: use mse"):
        decompose(lambda p, x: cut(linear(p, x)), settings={"minimality_loss": "kl"})


@pytest.mark.parametrize("method", ["apd", "spd", "vpd"])
def test_strict_promotion_of_types(method):
    settings = {
        "apd": SETTINGS,
        "spd": apd_jax.SPD(num_components=2, batch_size=B, num_steps=1),
        "vpd": apd_jax.VPD(
            num_components=2, batch_size=B, num_steps=1, gate_d_model=4, gate_heads=1, gate_blocks=1
        ),
    }[method]
    with jax.numpy_dtype_promotion("strict"):
        run = apd_jax.decompose(linear, PARAMS, rows, settings)
        x = jnp.ones((B, 4))
        assert run.mask(x).shape[0] == B and run.sparse_output(x).shape == (B, 3)
        assert run.ablate([0], x).shape == (B, 3)


# Data


def batches():
    for i in range(3):
        yield np.full((B, 4), float(i + 1), np.float32)


def test_a_generator_function_is_begun_again():
    run = decompose(data=batches, settings={"num_steps": 7})
    listed = decompose(data=list(batches()), settings={"num_steps": 7})
    assert run.history[-1]["total"] == listed.history[-1]["total"]


class OfAnotherLibrary:
    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


def test_arrays_of_another_library():
    run = decompose(data=[OfAnotherLibrary(batch) for batch in batches()])
    x = next(batches())
    for fn in (run.mask, run.attributions, run.sparse_output, lambda x: run.ablate([0], x)):
        np.testing.assert_array_equal(fn(OfAnotherLibrary(x)), fn(x))


ROWS = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (lambda rng, step: ROWS[step : step + B], "take slices by jax.lax.dynamic_slice"),
        (lambda rng, step: ROWS[: int(step)], "must work on a key and a step that jax traces"),
        (lambda rng: rows(rng, 0), "must be a function"),
        (lambda rng, step: 1 / 0, "sample_fn fails on a key and a step: division by zero"),
        (lambda rng, step: jnp.ones(()), "holds a single number"),
        (lambda rng, step: {}, "gives no array"),
        (lambda rng, step: jnp.ones((B + 8, 4)), "batch_size is 8"),
        (lambda rng, step: jnp.ones((B, 5)), "apply_fn fails on params and a batch"),
        ([], "has no batch at all"),
        ([(ROWS[:B], ROWS[:B, 0])], r"of \(inputs, labels\) give the inputs alone"),
        (np.asarray(ROWS[:B]).tolist(), "these are nested lists: give arrays"),
        ([np.array(["a"] * B)], "give arrays of numbers"),
    ],
)
def test_data_that_does_not_fit(data, sentence):
    with pytest.raises(InputError, match=sentence):
        decompose(data=data, settings={"num_steps": 4})


def test_a_generator_that_runs_once_is_no_data_for_a_recipe():
    pulled = []

    def once():
        for batch in batches():
            pulled.append(1)
            yield batch

    settings = SETTINGS.replace(num_steps=10_000, schedule="cosine")
    with pytest.raises(InputError, match="a recipe goes through the data several times"):
        apd_jax.decompose(linear, PARAMS, once(), settings, recipe=apd_jax.default_recipe())
    assert not pulled


# Environments


def test_several_threads_at_once():
    found, errors = {}, []

    def work(i):
        try:
            found[i] = decompose(settings={"seed": 7}).history[0]["total"]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(set(found.values())) == 1


@pytest.mark.parametrize("change", ["jax_debug_nans", "jax_enable_x64", "jax_check_tracer_leaks"])
def test_switches_of_jax(change):
    before = getattr(jax.config, change)
    jax.config.update(change, True)
    try:
        assert np.isfinite(decompose().history[0]["total"])
    finally:
        jax.config.update(change, before)


def test_another_generator_of_random_numbers():
    with jax.default_prng_impl("rbg"):
        assert np.isfinite(decompose().history[0]["total"])


def test_inside_an_event_loop(tmp_path):
    """As in a notebook; orbax has loops of its own."""

    async def work():
        return decompose(workdir=tmp_path), decompose(workdir=tmp_path)

    first, again = asyncio.run(work())
    np.testing.assert_array_equal(*(d.components.factors["w"].U for d in (first, again)))


def test_stray_files_among_checkpoints(tmp_path):
    first = decompose(workdir=tmp_path)
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    (tmp_path / "checkpoints" / "7").mkdir()
    again = decompose(workdir=tmp_path)
    np.testing.assert_array_equal(*(d.components.factors["w"].U for d in (first, again)))
