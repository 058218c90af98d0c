"""What trains again, and the command on a workdir, from its own process."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PRETRAIN, TMS, make_method
from ml_collections import ConfigDict
from rich.console import Console

from apd_jax import targets
from apd_jax.commands import experiment, runs
from apd_jax.commands.evidence import write
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.evidence import retrain
from apd_jax.evidence.check import Case
from apd_jax.evidence.matching import agreement
from apd_jax.evidence.subject import Setting, make
from apd_jax.methods import registry
from apd_jax.train import loop

TARGET = TMS | {"feature_probability": 0.05}
APD = {
    "num_components": 5,
    "rank": 2,
    "topk": 0.35,
    "batch_size": 64,
    "num_steps": 6,
    "steps_per_call": 2,
    "log_every_steps": 1,
}


@pytest.fixture(scope="module")
def trained(pentagon):
    target = targets.build(ConfigDict(TARGET | {"pretrain": PRETRAIN}), 64)
    problem, method = target.problem(pentagon.params), make_method(**APD)
    found, history = loop.fit(problem, method)
    found = jax.tree.map(jnp.asarray, found)
    x = target.sample_fn(jax.random.key(0), 0)
    subject = make(Setting(problem, method), pentagon.params, found, x)
    decomposition = Decomposition(problem, found.components, method, history)
    return Case(subject, decomposition, jax.random.key(1), lambda i: x, 1, target=target, full=True)


def test_again_is_the_same_run_but_for_what_is_changed(trained):
    (same,) = retrain.again(trained)
    ours = trained.subject.components
    for name, f in same.components.factors.items():
        np.testing.assert_array_equal(f.U, ours.factors[name].U)
    assert agreement(ours, same.components).mean_cosine == pytest.approx(1, abs=1e-6)
    pair = [one.components for one in retrain.again(trained, num_instances=2, num_components=7)]
    assert [c.num_components for c in pair] == [7, 7] and agreement(*pair).mean_cosine < 0.999


def test_checks_that_train_again(trained, monkeypatch):
    monkeypatch.setattr(retrain, "NUM_SEEDS", 3)
    found = [check(trained) for check in (retrain.capacity, retrain.seeds)]
    assert (
        set(found[0].values) == {"alive_at_5", "alive_at_10", "alive_at_20"}
        and found[0].passed is not None
    )
    # After six steps no feature has a component of its own: three failures are three of three.
    assert (found[1].values["num_seeds"], found[1].values["num_recovered"], found[1].passed) == (
        3,
        0,
        False,
    )


def test_other_data(trained, monkeypatch):
    given = []
    monkeypatch.setattr(
        retrain,
        "again",
        lambda case, sample_fn: given.append(sample_fn) or [case.subject.trained],
    )
    check = retrain.data(trained)
    assert check.passed is None
    shares = [check.values[f"{name}_share"] for name in ("permuted", "halved", "shifted")]
    assert shares == [1, 1, 1]  # with itself
    rng, sample = jax.random.key(3), trained.decomposition.problem.sample_fn
    permuted, halved, shifted = given
    # Of six steps the last comes first; halved, the fifth batch is the second again.
    np.testing.assert_array_equal(permuted(rng, 0), sample(rng, 5))
    np.testing.assert_array_equal(halved(rng, 4), sample(rng, 1))
    np.testing.assert_allclose(shifted(rng, 2), 0.8 * sample(rng, 2), rtol=1e-6)


def test_recovered_is_one_component_per_feature(trained, pentagon):
    assert retrain.recovered(trained, pentagon.components)
    assert not retrain.recovered(trained, trained.subject.components)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Two instances, checkpoints at steps 4 and 6 of 6."""
    config = ConfigDict(
        {
            "target": TARGET | {"pretrain": PRETRAIN},
            "evaluation": {"seed": 0, "num_batches": 2, "batch_size": 64},
        }
    )
    method = make_method(**APD, num_instances=2, checkpoint_every_steps=4)
    config.apd = registry.settings(method)
    folder = tmp_path_factory.mktemp("runs") / "tms"
    experiment.run(config, folder, Console(quiet=True))
    return folder


def test_the_command(workdir, cli):
    options = ("--instance=1", f"--other={workdir}", "--num_examples=64")
    done = cli(f"--workdir={workdir}", *options, module="apd_jax.evidence")
    assert done.returncode == 0, done.stderr
    assert (
        "Traceback" not in done.stderr
        and "Worst-case partial ablation" in done.stdout
        and "bars are met" in done.stdout
    )
    written = json.loads((workdir / "evidence.json").read_text())
    assert (
        written["provenance"]["step"] == 6
        and f"--workdir={workdir}" in written["provenance"]["command"]
    )
    assert [check["number"] for check in written["checks"]] == list(range(1, 20))
    checks = {check["name"]: check for check in written["checks"]}
    # Both instances of six steps are compared with each other, and instance 1 with the other run's
    # first.
    first, second = (one.components for one in runs.restore(workdir).instances)
    expected = agreement(second, first)
    assert checks["seeds"]["values"]["num_seeds"] == 2
    assert checks["seeds"]["values"]["other_mean_cosine"] == pytest.approx(
        expected.mean_cosine, abs=1e-5
    )
    assert (
        "gradient_forward_at_4" in checks["attribution_fidelity"]["values"]
    )  # of the earlier checkpoint
    card = (workdir / "evidence.md").read_text()
    assert all(check["title"] in card and check["text"] in card for check in written["checks"])
    with np.load(workdir / "evidence_1.npz") as arrays:
        assert arrays["worst_shared"].shape == (81,)
    figures = {path.name for path in (workdir / "figures" / "instance_1").glob("evidence_*.png")}
    assert {
        "evidence_worst.png",
        "evidence_trajectories.png",
        "evidence_audit.png",
        "evidence_length_bits.png",
    } <= figures


def test_a_users_mistake_is_one_sentence(workdir, tmp_path, cli):
    done = cli(f"--workdir={tmp_path / 'nothing'}", module="apd_jax.evidence")
    assert (
        done.returncode == 2
        and "holds no config.json" in done.stderr
        and "Traceback" not in done.stderr
    )
    with pytest.raises(InputError, match="instance 2 does not exist"):
        write(workdir, Console(quiet=True), instance=2)
