"""The command line on networks of one's own: workdirs of `decompose`, and saved decompositions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_method
from rich.console import Console
from test_main import refused

import apd_jax
from apd_jax import evidence as evidence_lib
from apd_jax.commands import evidence, given, runs
from apd_jax.errors import InputError

SOURCE = """
import jax, jax.numpy as jnp

def forward(params, x):
    return jnp.tanh(x @ params["in"]["w"]) @ params["out"][0]

def sample(key, step):
    return jax.random.normal(jax.random.fold_in(key, step), (16, 4))

def batches():
    yield from jax.random.normal(jax.random.key(1), (3, 16, 4))

def other(params, x):
    return x @ params["wrong"]
"""
PARAMS = {
    "in": {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)},
    "out": [jnp.asarray(np.random.default_rng(1).normal(size=(3, 2)), jnp.float32)],
}
SMALL = {"num_components": 3, "num_steps": 4, "batch_size": 16, "steps_per_call": 4}
SMALL |= {"log_every_steps": 2, "loss_units": "absolute"}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with the network's module, two workdirs, one of them saved too, and inputs."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "nets.py").write_text(SOURCE)
    nets = given.named(f"{folder / 'nets.py'}:forward", "--apply").__globals__
    method = make_method(**SMALL)
    for name, seed in (("a", 0), ("b", 1)):
        found = apd_jax.decompose(
            nets["forward"],
            PARAMS,
            nets["sample"],
            method.replace(seed=seed),
            workdir=folder / name,
        )
        if name == "a":
            found.save(folder / "saved")
    np.save(folder / "inputs.npy", np.asarray(nets["sample"](jax.random.key(3), 0)))
    return folder


@pytest.fixture
def here(own, main_here):
    def run(mode, name, *flags):
        return main_here(f"--mode={mode}", f"--workdir={own / name}", *flags)

    return run


def test_a_workdir_is_loaded_as_what_it_holds(own):
    loaded, saved = (apd_jax.load(own / name, lambda p, x: x) for name in ("a", "saved"))
    assert jax.tree.structure(loaded.trained) == jax.tree.structure(saved.trained)
    for a, b in zip(*(jax.tree.leaves(d.trained) for d in (loaded, saved)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert loaded.method == saved.method and list(loaded.history) == list(saved.history)


@pytest.mark.parametrize("name", ["a", "saved"])
def test_every_mode_reads_both_kinds_of_folder(own, here, name):
    looked = here("inspect", name)
    assert looked.returncode == 0, looked.stderr
    assert "in.w" in looked.stdout and "3 components" in looked.stdout
    apply = f"--apply={own / 'nets.py'}:forward"
    for mode, inputs in (
        ("evaluate", f"{own / 'inputs.npy'}"),
        ("report", f"{own / 'nets.py'}:batches"),
    ):
        done = here(mode, name, apply, f"--data={inputs}")
        assert done.returncode == 0, done.stderr
    assert json.loads((own / name / "evaluation.json").read_text())["step"] == 4
    assert (own / name / "report.html").stat().st_size > 10_000
    compared = here("compare", name, f"--other={own / 'b'}")
    assert compared.returncode == 0, compared.stderr
    assert "seed" in compared.stdout and "matched one to one" in compared.stdout


def test_evidence_of_a_workdir(own, monkeypatch):
    monkeypatch.setattr(evidence_lib, "CHECKS", evidence_lib.CHECKS[:1])
    nets = f"{own / 'nets.py'}"
    flags = given.Given(apply=f"{nets}:forward", data=f"{nets}:sample")
    console = Console(quiet=True)
    evidence.write(own / "b", console, other=own / "a", given=flags)
    written = json.loads((own / "b" / "evidence.json").read_text())
    assert written["checks"][0]["number"] == 1 and "--apply=" in written["provenance"]["command"]


@pytest.mark.parametrize(
    ("flags", "needles"),
    [
        ([], ("its function and inputs", "--apply=module:function", "--data=FILE.npy")),
        (["--apply=NETS:forward"], ("inputs are not stored", "--data=")),
        (["--apply=NETS:forwrad", "--data=X"], ("no 'forwrad'", "Did you mean 'forward'?")),
        (["--apply=NETS:SOURCE.x", "--data=X"], ("has no 'SOURCE.x'",)),
        (["--apply=nowhere_to_be_found:f", "--data=X"], ("there is no such module",)),
        (["--apply=forward", "--data=X"], ("must be module:name",)),
        (["--apply=NETS:other", "--data=X"], ("apply_fn fails on params and a batch",)),
        (["--apply=NETS:forward", "--data=no.npy"], ("no.npy cannot be read",)),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(own, here, flags, needles):
    flags = [
        f.replace("NETS", str(own / "nets.py")).replace("=X", f"={own}/inputs.npy") for f in flags
    ]
    refused(here("report", "b", *flags), *needles)


def test_flags_of_own_networks_are_not_for_known_targets(tmp_path):
    (tmp_path / "config.json").write_text('{"target": {"name": "tms"}}')
    with pytest.raises(InputError, match="whose function and data are known"):
        runs.restore(tmp_path, given.Given(apply="nets:forward"))
