"""A decomposition saved and loaded is the same decomposition; whatever does not fit is refused in one sentence."""

import dataclasses
import json
import re
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import close, make_config
from etils import epath
from flax import nnx

import apd_jax
from apd_jax import components as components_lib
from apd_jax.components.layout import Layout
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.network.problem import Problem
from apd_jax.storage import folder as storage


def leaf(i, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(i).normal(size=shape), dtype)


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


def nested(x_to_y):
    """(params, apply_fn) of one two-layer network, in a container of every kind."""
    w, v, b = leaf(0, 4, 6), leaf(1, 6, 3), leaf(2, 3)

    def network(w, v, b, x):
        return jnp.tanh(x @ w) @ v + b[None]

    return {
        "dict": (
            {"in": {"w": w}, "out": {"v": v, "b": b}},
            lambda p, x: network(p["in"]["w"], p["out"]["v"], p["out"]["b"], x),
        ),
        "list and tuple": (
            [(w,), {"v": v, "none": None, "b": [b]}],
            lambda p, x: network(p[0][0], p[1]["v"], p[1]["b"][0], x),
        ),
        "named tuple": (
            Pair(w, {"v": v, "b": b}),
            lambda p, x: network(p.first, p.second["v"], p.second["b"], x),
        ),
    }[x_to_y]


def decomposition(params, apply_fn, select=None, uses=None, layouts=None, **fields):
    """An untrained one."""
    config = make_config(num_components=5, topk=2.0, batch_size=16, rank=2, **fields)
    components = components_lib.init(
        jax.random.key(0),
        params,
        num_components=5,
        rank=2,
        select=select,
        uses=uses,
        init_scale=3.0,
        layouts=layouts,
    )
    rows = [{"step": 10, "total": 0.1, "faithfulness": [1e-7, 2.0]}]
    return Decomposition(
        Problem(apply_fn, params, None, select=select, uses=uses), components, config, rows
    )


def assert_same(one, other):
    """The same pytrees, bit for bit, and the same settings."""
    for a, b in ((one.components, other.components), (one.problem.params, other.problem.params)):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert (x.dtype, x.shape, np.asarray(x).tobytes()) == (
                y.dtype,
                y.shape,
                np.asarray(y).tobytes(),
            )
    assert one.config.to_json() == other.config.to_json()
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
    with pytest.raises(InputError, match="needs components with thresholds"):
        before.mask(X)
    thresholds = jnp.linspace(0.01, 0.3, 5)
    before = dataclasses.replace(
        before,
        components=dataclasses.replace(before.components, log_thresholds=jnp.log(thresholds)),
    )
    np.testing.assert_array_equal(
        before.mask(X), before.attributions(X) > before.components.thresholds[None]
    )
    assert 0 < before.mask(X).mean() < 1
    storage.save(before, tmp_path)
    after = storage.load(tmp_path, apply_fn)
    assert_same(before, after)
    np.testing.assert_array_equal(before.mask(X), after.mask(X))


def test_instances(tmp_path):
    params, apply_fn = nested("dict")
    config = make_config(num_components=3, num_instances=2, num_steps=2, batch_size=16)
    before = apd_jax.decompose(apply_fn, params, [np.asarray(X)], config)
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
    assert (
        after.problem.params["w"].dtype == jnp.bfloat16
        and after.components.factors["w"].U.dtype == jnp.float32
    )  # at least single
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
    storage.save(decomposition(params, apply_fn), tmp_path)
    twice = jax.tree.map(lambda a: 2 * a, params)
    storage.save(decomposition(twice, apply_fn), tmp_path)
    np.testing.assert_array_equal(
        storage.load(tmp_path, apply_fn).problem.params["in"]["w"], twice["in"]["w"]
    )


def test_a_save_that_was_cut_short_is_noticed(tmp_path, monkeypatch):
    params, apply_fn = nested("dict")
    storage.save(decomposition(params, apply_fn), tmp_path)

    # Over an old one, between the two files of arrays: the new params must not be taken with the old components.
    twice = decomposition(
        jax.tree.map(lambda a: 2 * a, params), apply_fn
    )  # now: jax's cache of programs writes such files too
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
    storage.save(decomposition(params, apply_fn), tmp_path)
    if keep is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:keep])
    with pytest.raises(
        InputError, match=rf"{file}( is missing| is damaged| cannot be read|: it is not a saved)"
    ) as error:
        storage.load(tmp_path, apply_fn)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


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
    storage.save(decomposition(params, apply_fn), tmp_path)
    with pytest.raises(InputError, match=message):
        storage.load(tmp_path, apply_fn, change(params))


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_newer_versions_are_refused(tmp_path):
    params, apply_fn = nested("dict")
    storage.save(decomposition(params, apply_fn), tmp_path)
    about = json.loads((tmp_path / "decomposition.json").read_text())
    edit(tmp_path / "decomposition.json", config=about["config"] | {"novelty": 1})
    with pytest.raises(InputError, match="with a setting 'novelty' that this one lacks; update it"):
        storage.load(tmp_path, apply_fn)
    edit(tmp_path / "decomposition.json", format=storage.FORMAT + 1, apd_jax="9.0")
    with pytest.raises(
        InputError,
        match=f"was written in format {storage.FORMAT + 1} by apd_jax 9.0; this one reads up to",
    ):
        storage.load(tmp_path, apply_fn)


def test_components_that_lack_a_leaf_are_refused(tmp_path):
    params, apply_fn = nested("dict")
    storage.save(decomposition(params, apply_fn), tmp_path)
    file = tmp_path / "components.safetensors"
    arrays = safetensors.numpy.load_file(file)
    arrays.pop("in.w.V")
    safetensors.numpy.save_file(arrays, file)
    with pytest.raises(
        InputError, match=r"components.safetensors lacks 'in.w.V'; it holds in.w.U, "
    ):
        storage.load(tmp_path, apply_fn)


def test_what_a_file_cannot_hold_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"two leaves of the dotted path 'a.b'; rename a key that holds a dot"
    ):
        storage.save(
            decomposition({"a": {"b": leaf(0, 2, 2)}, "a.b": leaf(1, 2, 2)}, lambda p, x: x),
            tmp_path,
        )
    with pytest.raises(
        InputError, match=r"params leaf 'key' has dtype key<fry>, which a file cannot hold"
    ):
        storage.save(
            decomposition({"w": leaf(0, 2, 2), "key": jax.random.key(0)}, lambda p, x: x), tmp_path
        )
    assert not list(tmp_path.iterdir())


# The card


def test_the_card_says_what_it_is_and_how_to_load_it(tmp_path):
    params, apply_fn = nested("dict")
    check = {
        "number": 1,
        "title": "Faith | fulness",
        "passed": False,
        "bar": "≤ 1e-3",
        "text": "Not <so>.",
        "why": "",
    }
    evidence = {"verdict": "Needed up to this budget.", "checks": [check]}
    decomposition(params, apply_fn).save(
        tmp_path / "mine", metrics={"mmcs": 0.9981, "device": "cpu"}, evidence=evidence
    )
    text = (tmp_path / "mine" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert front.splitlines() == [
        "library_name: apd_jax",
        "tags:",
        "- parameter-decomposition",
        "- interpretability",
        "- jax",
    ]
    assert (
        "# mine\n" in body
        and "5 components" in body
        and "| `in.w` | 4×6 | 2 |" in body
        and "| mmcs | 0.9981 |" in body
    )
    assert "cpu" not in body  # not a number
    assert (
        "| 1 | Faith \\| fulness | **failed** | ≤ 1e-3 | Not &lt;so>. |" in body
        and "Needed up to this budget." in body
    )


def test_without_metrics_the_card_has_the_last_losses(tmp_path):
    decomposition(*nested("dict")).save(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| total | 0.1 |" in text and "Evidence" not in text


def test_the_cards_code_needs_no_training_code(tmp_path):
    params, apply_fn = nested("dict")
    given = decomposition(params, apply_fn)
    given.save(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    code = code.replace(
        "apply_fn = ...",
        "apply_fn = lambda p, x: jnp.tanh(x @ p['in']['w']) @ p['out']['v'] + p['out']['b'][None] ",
    )
    code = code.replace("path/of/this/folder", str(tmp_path))
    last = "import sys; print(mask.sum()); assert not any(name.startswith(('apd_jax.targets', 'apd_jax.commands')) for name in sys.modules)"
    code = f"import jax.numpy as jnp\nx = jnp.ones((16, 4))\n{code.replace('decomposition.mask(x)', 'mask = decomposition.mask(x)')}\n{last}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == int(given.mask(jnp.ones((16, 4))).sum())
