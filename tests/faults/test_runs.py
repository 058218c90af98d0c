"""Runs are neither lost nor mixed up: whose workdir it is, full disks, paths, older files."""

import errno
import inspect
import json
import os
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import ROOT, get_config
from ml_collections import ConfigDict
from small import PARAMS, SETTINGS, B, decompose, linear, rows
from tensorboardX import event_file_writer

import apd_jax
from apd_jax.commands import configs
from apd_jax.components import as_select
from apd_jax.errors import InputError
from apd_jax.methods import registry
from apd_jax.methods.apd import APD
from apd_jax.network import problem
from apd_jax.paths import quoted, user_path
from apd_jax.train import progress, workdir
from apd_jax.train.checkpoint import open_manager
from apd_jax.train.fingerprint import _checksum

# Whose a workdir is

TWO = {"w": PARAMS["w"], "v": jnp.eye(3)}


def two_layers(params, x):
    return x @ params["w"] @ params["v"]


OTHERS = {
    "params": ({"params": {**TWO, "w": 2 * PARAMS["w"]}}, "params w"),
    "two entries in each other's place": (
        {"params": {**TWO, "v": jnp.eye(3)[jnp.array([1, 0, 2])]}},
        "params v",
    ),
    "selection": ({"select": ["v"]}, "select"),
    "rank": ({"select": {"w": {"rank": 2}}}, "select"),
    "uses": ({"uses": {"w": 2}}, "uses"),
    "data": ({"data": lambda rng, step: 3 * rows(rng, step)}, "data, outputs"),
    "function": ({"apply_fn": lambda p, x: 2 * two_layers(p, x)}, "outputs"),
    "settings": ({"settings": {"topk": 0.5}}, "topk is 1.0 there and 0.5 here"),
}


@pytest.fixture(scope="module")
def owned(tmp_path_factory):
    """What is asked of a workdir that is in use, and what it answers."""
    workdir = tmp_path_factory.mktemp("owned")
    asked = {"apply_fn": two_layers, "params": TWO, "select": ["w"], "workdir": workdir}
    first = decompose(**asked)
    yield asked
    again = decompose(**asked)  # whoever was refused in between
    np.testing.assert_array_equal(*(d.components.factors["w"].U for d in (first, again)))


@pytest.mark.parametrize(("changes", "named"), OTHERS.values(), ids=OTHERS)
def test_a_workdir_belongs_to_one_network(owned, changes, named):
    with pytest.raises(InputError, match=rf"belongs to another .*{named}"):
        decompose(**owned | changes)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16", "float32", "int8", "bool"])
def test_checksums_of_every_type(dtype):
    a = jnp.asarray([1, 0, 1, 1]).astype(dtype)
    sums = {int(_checksum(b)) for b in (a, a[::-1], a.at[1].set(a[0]))}
    assert len(sums) == 3


def test_what_differs_by_rounding_is_the_same_network(tmp_path):
    """A sampler on another device."""
    decompose(workdir=tmp_path)
    decompose(data=lambda rng, step: (1 + 1e-6) * rows(rng, step), workdir=tmp_path)


def test_a_workdir_of_an_older_version_goes_on(tmp_path):
    """One that says nothing of its network, and does not know a setting that came later."""
    decompose(workdir=tmp_path)
    (tmp_path / "network.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    del config["gradient_clip"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    decompose(workdir=tmp_path)
    with pytest.raises(InputError, match=r"gradient_clip is None there and 0\.5 here"):
        decompose(settings={"gradient_clip": 0.5}, workdir=tmp_path)


def test_of_many_settings_that_differ_few_are_named(tmp_path):
    """And of another method only that it is another. Its commands can be pasted into a shell."""
    there = tmp_path / "my runs" / "ä"
    workdir.claim(there, registry.settings("apd"))
    with pytest.raises(InputError, match="belongs to another config: method is 'apd' there and 's"):
        workdir.claim(there, registry.settings("spd"))
    fields = ("rank", "topk", "seed", "num_always_on", "threshold", "num_probes", "schatten_p")
    with pytest.raises(InputError, match=r"; rank is None there and 7 here.* and 1 more\. Use"):
        workdir.claim(there, registry.settings(APD(**dict.fromkeys(fields, 7))))
    assert shlex.split(f"--workdir={quoted(there)}") == [f"--workdir={there}"]


def test_a_field_that_a_saved_config_lacks_is_named(tmp_path, main_here):
    done = main_here(  # what is refused once its folder is made
        f"--config={ROOT}/configs/tms.py:5-2,smoke",
        f"--workdir={tmp_path / 'run'}",
        "--config.target.weights_path=nowhere.npz",
    )
    assert done.returncode == 2
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    del config["target"]["name"], config["apd"]["gradient_clip"]
    file.write_text(json.dumps(config))
    done = main_here("--mode=report", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2
    sentence = "apd_jax: the config has no field 'name'."
    assert done.stderr.splitlines()[-1].startswith(sentence)


def test_a_saved_experiment_is_read_with_the_defaults_of_what_came_later(tmp_path):
    """One that was saved before `target.shuffled`; others lack fields of data or recipe."""
    file = tmp_path / "config.json"
    given = get_config("language", "prose")
    workdir.claim(tmp_path, given)
    saved = json.loads(file.read_text())
    assert configs.completed(ConfigDict(saved)).to_dict() == saved
    del saved["target"]["shuffled"], saved["target"]["layers"], saved["evaluation"]["num_batches"]
    file.write_text(json.dumps(saved))
    read = configs.completed(workdir.load_config(tmp_path))
    assert read.target.shuffled is False and read.target.layers == []
    assert read.evaluation.num_batches == given.evaluation.num_batches
    workdir.claim(tmp_path, given, older=configs.later)
    given.target.shuffled = True
    with pytest.raises(InputError, match="shuffled is False there and True here"):
        workdir.claim(tmp_path, given, older=configs.later)
    mine = get_config("recipe", "tms,5-2,untied")
    mine = ConfigDict(mine.to_dict())
    del mine.recipe.refine["num_steps"], mine.target.data["value"]
    assert set(configs.later(mine)) == {"recipe.refine.num_steps", "target.data.value"}
    before = ConfigDict(get_config("resid_mlp", "1layer,smoke").to_dict())
    del before.target["signed"]
    assert configs.later(before) == {"target.signed": True}


# Disks


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


LONG = {"num_steps": 6, "steps_per_call": 1, "log_every_steps": 1, "checkpoint_every_steps": 2}


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    real, calls = ocp.StandardCheckpointHandler.finalize, []

    def finalize(self, directory):
        calls.append(directory)
        return full() if len(calls) > 1 else real(self, directory)

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "finalize", finalize)
    with pytest.raises(InputError, match=r"No space left on device\); step 2 is kept; make room"):
        decompose(settings=LONG, workdir=tmp_path)
    monkeypatch.undo()
    whole = decompose(settings=LONG)
    again = decompose(settings=LONG, workdir=tmp_path)
    np.testing.assert_array_equal(*(d.components.factors["w"].U for d in (whole, again)))


def test_losses_that_cannot_be_written_stop_nothing(tmp_path, monkeypatch, caplog):
    """Nor do they block: TensorBoard's own writer waits for ever for a thread that has ended."""
    real, calls = event_file_writer.RecordWriter.write, []

    def write(self, data):
        calls.append(data)
        return full() if len(calls) > 3 else real(self, data)

    monkeypatch.setattr(event_file_writer.RecordWriter, "write", write)
    run = decompose(settings=LONG, workdir=tmp_path)
    assert len(run.history) == 6
    assert sum("losses cannot be written" in m for m in caplog.messages) == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


def test_rows_that_could_not_be_written_come_later(tmp_path, monkeypatch):
    log = progress.MetricsLog(tmp_path)
    log.append({"step": 1, "total": 1.0})
    with monkeypatch.context() as disk:
        disk.setattr(type(user_path(tmp_path)), "open", full)
        disk.setattr(type(user_path(tmp_path)), "write_text", full)
        log.append({"step": 2, "total": 2.0})
    log.append({"step": 3, "total": 3.0})
    log.close()
    found = progress.read_rows(user_path(tmp_path) / "metrics.jsonl")
    assert [row["step"] for row in found] == [1, 2, 3]


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    decompose(workdir=tmp_path)

    def refuse(self, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    kind = type(user_path(tmp_path))
    monkeypatch.setattr(kind, "mkdir", refuse)
    monkeypatch.setattr(kind, "write_text", refuse)
    with pytest.raises(InputError, match=r"cannot be written \(Read-only file system\)"):
        decompose(workdir=tmp_path)


# Paths


@pytest.mark.parametrize("name", ["run[lr=1e-3]", "what?", "all*"])
def test_names_that_orbax_takes_for_patterns_are_refused(tmp_path, name):
    for begin in (
        lambda: decompose(workdir=tmp_path / name),
        lambda: open_manager(tmp_path / name / "checkpoints"),
        lambda: workdir.claim(tmp_path / name, apd_jax.default_config()),
    ):
        with pytest.raises(InputError, match="which checkpoints cannot have in their path"):
            begin()
    assert not list(tmp_path.iterdir())


def test_other_names_are_fine(tmp_path):
    for name in ("a b", "läuft", "x=1,y={2}", "-dash"):
        run = decompose(workdir=tmp_path / name)
        again = decompose(workdir=tmp_path / name)
        np.testing.assert_array_equal(*(d.components.factors["w"].U for d in (run, again)))


def test_the_home_folder_has_a_short_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    run = decompose(workdir="~/runs/t")
    run.save("~/saved")
    run.report("~/page.html", jnp.ones((B, 4)))
    found = apd_jax.Decomposition.load("~/saved", linear)
    np.testing.assert_array_equal(found.components.factors["w"].U, run.components.factors["w"].U)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home"]
    assert sorted(p.name for p in (tmp_path / "home").iterdir()) == ["page.html", "runs", "saved"]


# Names


def test_two_leaves_of_one_name_are_refused():
    params = {"a": {"b": PARAMS["w"]}, "a.b": PARAMS["w"]}
    with pytest.raises(InputError, match=r"two leaves of the dotted path 'a\.b'; rename a key"):
        decompose(lambda p, x: x @ p["a"]["b"] + x @ p["a.b"], params)


def chosen(apply_fn, params, select):
    """The sites that a run would begin with, as shapes."""
    whole = problem.Problem(apply_fn, params, rows, select=select)
    begin = jax.eval_shape(lambda key: SETTINGS.make_components(key, whole), jax.random.key(0))
    return begin.factors


def test_an_exact_name_means_no_other():
    params = {"w[0]": PARAMS["w"], "w0": PARAMS["w"]}
    fn = lambda p, x: x @ p["w[0]"] + x @ p["w0"]  # noqa: E731
    for select in (["w[0]"], {"w[0]": {"rank": 2}}, "w[0]"):
        assert list(factors := chosen(fn, params, select)) == ["w[0]"]
    assert factors["w[0]"].rank == 1
    assert list(decompose(fn, params, select=["w[01]"]).components.factors) == ["w0"]


def test_whole_numbers_as_keys():
    params = {0: PARAMS["w"], 1: jnp.eye(3)}
    run = decompose(lambda p, x: x @ p[0] @ p[1], params, select={"0": {"rank": 2}})
    assert list(run.components.factors) == ["0"] and run.components.factors["0"].rank == 2


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        (lambda name, leaf: leaf.shape == (4, 3), ["w"]),
        (lambda name, leaf: {"rank": 2} if name == "v" else None, ["v"]),
        (("w", "v"), ["v", "w"]),
    ],
)
def test_ways_to_select(select, expected):
    assert sorted(chosen(two_layers, TWO, select)) == expected


@pytest.mark.parametrize(
    ("select", "sentence"),
    [
        ([], "select chooses no leaf"),
        ({}, "select chooses no leaf"),
        (lambda name, leaf: False, "select chooses no leaf"),
        (7, "select must be glob patterns"),
        ([7], "select must be glob patterns"),
        ({"w": 2}, "give a dict of options"),
        ({"w": {"rank": "two"}}, "give a whole number"),
        ({"w": {"rank": 1.5}}, "give a whole number"),
        ({"w": {"components": 2}}, "give a list of their numbers"),
        ({"w": {"components": [7]}}, "components outside 0 to 2"),
        ("nothing*", "matches no leaf"),
    ],
)
def test_ways_not_to_select(select, sentence):
    with pytest.raises(InputError, match=sentence):  # without the types that tests check
        decompose(two_layers, TWO, select=inspect.unwrap(as_select)(select, TWO))


@pytest.mark.parametrize("uses", [{"w": 1.5}, {"w": 0}, {"w": "two"}, {"u": 1}])
def test_uses_are_whole_numbers_of_leaves(uses):
    with pytest.raises(InputError, match=r"^uses"):
        decompose(uses=inspect.unwrap(problem.whole_numbers)(uses))
