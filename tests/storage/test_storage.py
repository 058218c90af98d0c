"""A decomposition saved and loaded is the same decomposition.

Whatever does not fit is refused in one sentence.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import close, make_method
from etils import epath
from flax import nnx
from untrained import begun, decomposition, leaf, nested, side_by_side

import apd_jax
from apd_jax import components as components_lib
from apd_jax.components.layout import Layout
from apd_jax.errors import InputError
from apd_jax.storage import folder as storage


def assert_same(one, other):
    """The same pytrees, bit for bit, and the same settings."""
    for a, b in ((one.trained, other.trained), (one.problem.params, other.problem.params)):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert (x.dtype, x.shape, np.asarray(x).tobytes()) == (
                y.dtype,
                y.shape,
                np.asarray(y).tobytes(),
            )
    assert one.method == other.method
    assert list(one.history) == list(other.history)


X = leaf(3, 16, 4)


@pytest.mark.parametrize("container", ["dict", "list and tuple", "named tuple"])
def test_round_trip(tmp_path, container):
    params, apply_fn = nested(container)
    before = decomposition(params, apply_fn, attributions_at="components")
    storage.save(before, tmp_path / "saved")
    # A named tuple cannot be made from the file; shapes are enough to say what it is.
    like = jax.eval_shape(lambda: params) if container == "named tuple" else None
    after = storage.load(tmp_path / "saved", apply_fn, like)
    assert_same(before, after)
    np.testing.assert_array_equal(before.attributions(X), after.attributions(X))
    np.testing.assert_array_equal(before.sparse_output(X), after.sparse_output(X))
    np.testing.assert_array_equal(before.ablate([1], X), after.ablate([1], X))
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == [
        "README.md",
        "components.safetensors",
        "decomposition.json",
        "params.safetensors",
    ]


def test_files_are_what_any_reader_of_safetensors_expects(tmp_path):
    params, apply_fn = nested("dict")
    before = decomposition(params, apply_fn, select=("in.*", "*.v"), uses={"in.w": 2})
    storage.save(before, tmp_path)
    arrays = safetensors.numpy.load_file(tmp_path / "params.safetensors")
    assert set(arrays) == {"in.w", "out.v", "out.b"}
    np.testing.assert_array_equal(arrays["in.w"], params["in"]["w"])
    factors = safetensors.numpy.load_file(tmp_path / "components.safetensors")
    assert {name: a.shape for name, a in factors.items()} == {
        "in.w.U": (5, 4, 2),
        "in.w.V": (5, 2, 6),
        "out.v.U": (5, 6, 2),
        "out.v.V": (5, 2, 3),
    }
    close(
        factors["in.w.U"] @ factors["in.w.V"],
        components_lib.materialize(before.components)["in"]["w"],
    )
    about = json.loads((tmp_path / "decomposition.json").read_text())
    assert (
        about["num_components"] == 5
        and about["config"]["rank"] == 2
        and about["select"] == ["in.*", "*.v"]
    )
    assert about["leaves"]["in.w"]["shape"] == [4, 6] and about["leaves"]["in.w"]["uses"] == 2
    after = storage.load(tmp_path, apply_fn)
    assert_same(before, after)
    assert after.problem.uses == {"in.w": 2}


def test_every_static_field_comes_back(tmp_path):
    """Here a weight laid out as outputs x inputs, and one that is a matrix for every output."""
    params = {"w": leaf(0, 6, 4), "kernel": leaf(1, 6, 2, 3)}
    layouts = {"w": Layout((), (1,), (0,)), "kernel": Layout((0,), (1,), (2,))}
    one = decomposition(params, lambda p, x: x @ p["w"].T, select="w", layouts={"w": layouts["w"]})
    both = decomposition(
        params, lambda p, x: jnp.einsum("bi,oi,oxy->by", x, p["w"], p["kernel"]), layouts=layouts
    )
    for i, before in enumerate((one, both)):
        storage.save(before, tmp_path / str(i))
        after = storage.load(tmp_path / str(i), before.problem.apply_fn)
        assert_same(before, after)
        assert {name: f.layout for name, f in after.components.factors.items()} == {
            n: layouts[n] for n in before.components.factors
        }


def test_thresholds_of_a_learned_mask(tmp_path):
    params, apply_fn = nested("dict")
    before = decomposition(params, apply_fn, mask="learned", threshold=0.1)
    with pytest.raises(InputError, match="needs a gate with thresholds"):
        before.mask(X)
    thresholds = jnp.linspace(0.01, 0.3, 5)
    before = dataclasses.replace(before, gate={"log_thresholds": jnp.log(thresholds)})
    np.testing.assert_array_equal(
        before.mask(X), before.attributions(X) > jnp.exp(jnp.log(thresholds))[None]
    )
    assert 0 < before.mask(X).mean() < 1
    storage.save(before, tmp_path)
    after = storage.load(tmp_path, apply_fn)
    assert_same(before, after)
    np.testing.assert_array_equal(before.mask(X), after.mask(X))
    # A gate of an earlier save does not stay behind.
    storage.save(decomposition(params, lambda p, x: x), tmp_path)
    assert not (tmp_path / "gate.safetensors").exists()
    assert storage.load(tmp_path, apply_fn).gate == ()


def test_a_folder_of_the_first_format_is_still_read(tmp_path):
    """It had the log thresholds among the components, no method's name, and no numbers of sites."""
    params, apply_fn = nested("dict")
    before = decomposition(params, apply_fn, mask="learned", threshold=0.1)
    before = dataclasses.replace(before, gate={"log_thresholds": jnp.linspace(-3.0, -1.0, 5)})
    storage.save(before, tmp_path)
    (tmp_path / "gate.safetensors").unlink()
    file = tmp_path / "components.safetensors"
    factors = safetensors.numpy.load_file(file)
    thresholds = {"log_thresholds": np.asarray(before.gate["log_thresholds"])}
    safetensors.numpy.save_file(factors | thresholds, file)
    about = json.loads((tmp_path / "decomposition.json").read_text())
    for told in about["leaves"].values():
        del told["ids"]
    del about["config"]["method"], about["config"]["gradient_clip"]
    (tmp_path / "decomposition.json").write_text(json.dumps(about | {"format": 1}))
    after = storage.load(tmp_path, apply_fn)
    assert_same(before, after)
    np.testing.assert_array_equal(before.mask(X), after.mask(X))


SMALL = {"gate_d_model": 8, "gate_heads": 2, "gate_blocks": 1, "faithfulness_warmup_steps": 0}
METHODS = {
    "spd": apd_jax.SPD(num_components=3, gate_width=2),
    "vpd": apd_jax.VPD(num_components=2, **SMALL),
    "whole": apd_jax.Whole(num_components=4, **SMALL),
    "learned": make_method(num_components=4, mask="learned", threshold=0.1),
}


@pytest.mark.parametrize("method", METHODS)
def test_gates_and_numbers_of_sites(tmp_path, method):
    """Of every method, one or two side by side: the gate's arrays, and which numbers sites hold."""
    params, apply_fn = nested("dict")
    one = begun(params, apply_fn, METHODS[method].replace(batch_size=16), X)
    assert jax.tree.leaves(one.gate)
    two = side_by_side(one, jax.tree.map(lambda a: 0.5 * a, one.trained))
    for before in (one, two):
        storage.save(before, tmp_path)
        after = storage.load(tmp_path, apply_fn)
        assert_same(before, after)
        last = before.method.num_instances - 1
        ours, theirs = (d.instance(last).activity(X) for d in (before, after))
        np.testing.assert_array_equal(ours.values, theirs.values)
        assert f"method `{before.method.name}`" in (tmp_path / "README.md").read_text()


def test_numbers_in_any_order(tmp_path):
    params, apply_fn = nested("dict")
    one = decomposition(params, apply_fn, select={"in.*": {"components": [3, 1]}, "*.v": {}})
    two = decomposition(params, apply_fn, select={"in.*": {"rank": [1, 2, 1, 1, 1]}})
    for before in (one, two):
        storage.save(before, tmp_path)
        assert_same(before, storage.load(tmp_path, apply_fn))
    assert one.components.factors["in.w"].ids == (1, 3)
    assert two.components.factors["in.w"].ids == (0, 1, 1, 2, 3, 4)


def test_instances(tmp_path):
    params, apply_fn = nested("dict")
    method = make_method(num_components=3, num_instances=2, num_steps=2, batch_size=16)
    before = apd_jax.decompose(apply_fn, params, [np.asarray(X)], method)
    storage.save(before, tmp_path)
    after = storage.load(tmp_path, apply_fn)
    assert_same(before, after)
    np.testing.assert_array_equal(
        before.instance(1).attributions(X), after.instance(1).attributions(X)
    )


def test_other_precisions_survive(tmp_path):
    params = {
        "w": leaf(0, 4, 3, dtype=jnp.bfloat16),
        "half": leaf(1, 3, dtype=jnp.float16),
        "table": jnp.arange(5),
        "on": jnp.array([True, False]),
    }
    before = decomposition(params, lambda p, x: x.astype(jnp.bfloat16) @ p["w"], select="w")
    storage.save(before, tmp_path)
    after = storage.load(tmp_path, before.problem.apply_fn)
    assert after.problem.params["w"].dtype == jnp.bfloat16
    assert after.components.factors["w"].U.dtype == jnp.float32  # at least single
    assert_same(before, after)
    np.testing.assert_array_equal(before.sparse_output(X), after.sparse_output(X))


def test_arrays_that_do_not_lie_in_order_in_memory(tmp_path):
    params = {"w": np.arange(12, dtype=np.float32).reshape(3, 4).T}
    before = decomposition(params, lambda p, x: x @ p["w"])
    storage.save(before, tmp_path)
    np.testing.assert_array_equal(
        storage.load(tmp_path, before.problem.apply_fn).problem.params["w"], params["w"]
    )


def test_nnx(tmp_path):
    graph, params = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    before = decomposition(params, lambda params, x: nnx.merge(graph, params)(x))
    storage.save(before, tmp_path)
    # Another network's state of the same shapes gives the structure; the values are the saved ones.
    other = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(1)))[1]
    after = storage.load(tmp_path, before.problem.apply_fn, other)
    assert_same(before, after)
    np.testing.assert_array_equal(before.sparse_output(X), after.sparse_output(X))
    with pytest.raises(
        InputError, match="the params were held in a Param, which the file cannot make; give params"
    ):
        storage.load(tmp_path, before.problem.apply_fn)


def test_saving_over_an_old_one(tmp_path):
    params, apply_fn = nested("dict")
    storage.save(decomposition(params, lambda p, x: x), tmp_path)
    twice = jax.tree.map(lambda a: 2 * a, params)
    storage.save(decomposition(twice, apply_fn), tmp_path)
    np.testing.assert_array_equal(
        storage.load(tmp_path, apply_fn).problem.params["in"]["w"], twice["in"]["w"]
    )


def test_a_save_that_was_cut_short_is_noticed(tmp_path, monkeypatch):
    params, apply_fn = nested("dict")
    storage.save(decomposition(params, lambda p, x: x), tmp_path)

    # Over an old one, between the two files of arrays: the new params must not be taken with the
    # old components. Made before the patch: jax's cache of programs writes such files too.
    twice = decomposition(jax.tree.map(lambda a: 2 * a, params), apply_fn)
    kind = type(epath.Path(tmp_path))
    write = kind.write_bytes

    def write_and_die(path, content):
        write(path, content)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kind, "write_bytes", write_and_die)
        with pytest.raises(KeyboardInterrupt):
            storage.save(twice, tmp_path)
    assert np.array_equal(
        safetensors.numpy.load_file(tmp_path / "params.safetensors")["out.b"],
        2 * params["out"]["b"],
    )
    with pytest.raises(
        InputError,
        match=r"holds no decomposition\.json: .* its saving was cut short; save it again",
    ):
        storage.load(tmp_path, apply_fn)


@pytest.mark.parametrize(
    "file", ["params.safetensors", "components.safetensors", "decomposition.json"]
)
@pytest.mark.parametrize("keep", [None, 0, 7, 150])
def test_missing_and_torn_files_are_refused(tmp_path, file, keep):
    params, apply_fn = nested("dict")
    storage.save(decomposition(params, lambda p, x: x), tmp_path)
    if keep is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:keep])
    with pytest.raises(
        InputError, match=rf"{file}( is missing| is damaged| cannot be read|: it is not a saved)"
    ) as error:
        storage.load(tmp_path, apply_fn)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_function_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"apply_fn must be the function .* got a dict"):
        apd_jax.load(tmp_path, {"w": np.ones(3)})


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"nowhere does not exist; give the folder of a saved decomposition"
    ):
        storage.load(tmp_path / "nowhere", lambda p, x: x)


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    params, apply_fn = nested("dict")
    with pytest.raises(InputError, match=r"file/saved cannot be written .*; choose another folder"):
        storage.save(decomposition(params, apply_fn), tmp_path / "file" / "saved")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p | {"more": leaf(0, 2)},
            r"params do not belong to .*: only params has a leaf 'more'",
        ),
        (lambda p: {"in": p["in"]}, r"only .* has a leaf 'out.b'"),
        (
            lambda p: p | {"in": {"w": leaf(0, 6, 4)}},
            r"'in.w' has shape \(6, 4\) here and \(4, 6\) there",
        ),
    ],
)
def test_params_of_another_network_are_refused(tmp_path, change, message):
    params, apply_fn = nested("dict")
    storage.save(decomposition(params, lambda p, x: x), tmp_path)
    with pytest.raises(InputError, match=message):
        storage.load(tmp_path, apply_fn, change(params))


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_newer_versions_are_refused(tmp_path):
    params, apply_fn = nested("dict")
    storage.save(decomposition(params, lambda p, x: x), tmp_path)
    about = json.loads((tmp_path / "decomposition.json").read_text())
    edit(tmp_path / "decomposition.json", config=about["config"] | {"novelty": 1})
    with pytest.raises(InputError, match=r"unknown setting of method 'apd' 'novelty'.*; update it"):
        storage.load(tmp_path, apply_fn)
    edit(tmp_path / "decomposition.json", format=storage.FORMAT + 1, apd_jax="9.0")
    with pytest.raises(
        InputError,
        match=f"was written in format {storage.FORMAT + 1} by apd_jax 9.0; this one reads up to",
    ):
        storage.load(tmp_path, apply_fn)


def test_components_that_lack_a_leaf_are_refused(tmp_path):
    params, apply_fn = nested("dict")
    storage.save(decomposition(params, lambda p, x: x), tmp_path)
    file = tmp_path / "components.safetensors"
    arrays = safetensors.numpy.load_file(file)
    arrays.pop("in.w.V")
    safetensors.numpy.save_file(arrays, file)
    with pytest.raises(
        InputError, match=r"components.safetensors lacks 'in.w.V'; it holds in.w.U, "
    ):
        storage.load(tmp_path, apply_fn)


def test_random_keys_and_whole_numbers_as_names_come_back(tmp_path):
    params = {0: leaf(0, 2, 2), 1: {7: leaf(1, 2, 2), 8: jax.random.key(5)}}
    storage.save(decomposition(params, lambda p, x: x), tmp_path)
    for given in (None, params):
        found = storage.load(tmp_path, lambda p, x: x, given).problem.params
        assert jax.tree.structure(found) == jax.tree.structure(params)
        np.testing.assert_array_equal(*(jax.random.key_data(p[1][8]) for p in (found, params)))
        np.testing.assert_array_equal(found[1][7], params[1][7])


def test_what_a_file_cannot_hold_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"two leaves of the dotted path 'a.b'; rename a key that holds a dot"
    ):
        storage.save(
            decomposition({"a": {"b": leaf(0, 2, 2)}, "a.b": leaf(1, 2, 2)}, lambda p, x: x),
            tmp_path,
        )
    with pytest.raises(
        InputError, match=r"params leaf 'tiny' has dtype float8_e4m3fn, which a file cannot hold"
    ):
        storage.save(
            decomposition(
                {"w": leaf(0, 2, 2), "tiny": jnp.zeros(2, jnp.float8_e4m3fn)}, lambda p, x: x
            ),
            tmp_path,
        )
    assert not list(tmp_path.iterdir())
