"""A language model's run from the command line: harvested, reported."""

import dataclasses
import io
import json
import re
import shutil

import jax
import numpy as np
import pytest
from conftest import get_config, method_of
from etils import epath
from rich.console import Console

from apd_jax import targets
from apd_jax.commands import clusters, experiment, graph
from apd_jax.commands import harvest as commands
from apd_jax.commands import labels as label_commands
from apd_jax.commands.runs import Restored
from apd_jax.interpretation import labels
from apd_jax.interpretation.harvest import Harvest, fingerprint_of, load, save
from apd_jax.methods.optimizers import Trained
from apd_jax.train.state import init_state

WORDS = [f"w{i}" for i in range(22)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on 40 documents, without the training of either network."""
    folder, drawn = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(drawn.choice(WORDS, 30)))
    config = get_config("language", "prose,smoke,mlp")
    with config.unlocked():
        config.target.update(text=f"{folder}/*.txt", vocab_size=270, document_chars=1000)
        config.apd.update(num_components=3, num_steps=4)
    where, method = epath.Path(tmp_path_factory.mktemp("runs") / "prose"), method_of(config)
    target = targets.build(config.target, method.batch_size)
    target.keep_fn(where)
    params = target.init_fn(jax.random.key(0))
    problem = target.problem(params)
    state = init_state(jax.random.key(1), problem, method)
    trained = Trained(state.components, state.gate)
    return Restored(config, method, target, problem, 4, trained, [], where)


@pytest.fixture
def workdir(run, monkeypatch):
    for module in (clusters, commands, experiment, graph):
        monkeypatch.setattr(module, "restore", lambda *of: run)
    return run.folder


@pytest.fixture(scope="module")
def harvested(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "restore", lambda *of: run)
        commands.harvest(run.folder, Console(quiet=True), None, commands.Options(600))
    return run


def test_a_run_is_harvested(workdir, main_here):
    shutil.rmtree(workdir / "harvest", ignore_errors=True)  # another test may have been first
    done = main_here("--mode=harvest", f"--workdir={workdir}", "--num_tokens=600")
    assert done.returncode == 0, done.stderr
    assert "harvest: step" in done.stderr and str(workdir / "harvest") in done.stdout
    found, about = (
        load(workdir / "harvest"),
        json.loads((workdir / "harvest/harvest.json").read_text()),
    )
    assert 400 < found.num_tokens == about["num_tokens"] < 800
    assert found.num_components == 9 and found.vocab_size == 270
    again = main_here("--mode=harvest", f"--workdir={workdir}", "--num_tokens=600")
    assert again.returncode == 0 and "harvest: step" not in again.stderr
    other = main_here("--mode=harvest", f"--workdir={workdir}", "--num_tokens=100")
    assert other.returncode == 2 and "with other settings; remove it" in other.stderr


def test_its_report_shows_text(harvested, workdir, main_here):
    (workdir / "evaluation.json").write_text(json.dumps({"delta_ce_gates": 0.25, "seed": 0}))
    done = main_here("--mode=report", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    page = (workdir / "report.html").read_text()
    assert "+0.25" in page and f"python -m apd_jax.serve --workdir={workdir}" in page
    found = load(workdir / "harvest")
    row = {"component": 1, "label": "fires at “w1”"}
    about = {"method": "rules", "model": "", "harvest": found.fingerprint, "components": [row]}
    (workdir / "harvest" / "labels_rules.json").write_text(json.dumps(about))
    source = commands.page(harvested, workdir)
    assert source.labels == {1: "fires at “w1”"} and source.labelled_by == "rules"
    (workdir / "harvest" / "labels_rules.json").unlink()
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(data)["num_components"] == found.num_components


def test_its_page_has_partners_in_the_attention_of_its_model(harvested, workdir, monkeypatch):
    found = load(workdir / "harvest")
    assert commands.page(harvested, workdir).attention is None  # of MLPs alone
    asked = []
    monkeypatch.setattr(commands.text.qk, "partners", lambda *given: asked.append(given))
    commands.page(harvested, workdir)
    ((components, _, decoder, on),) = asked
    assert components.num_components == 9 and decoder is harvested.target.model.config
    assert on.tolist() == (found.firing_rate > 0).tolist()


def test_its_components_are_clustered(harvested, workdir, main_here):
    done = main_here("--mode=clusters", f"--workdir={workdir}", "--alpha=0.1", "--restarts=2")
    assert done.returncode == 0, done.stderr
    found = load(workdir / "harvest")
    path = workdir / "harvest" / "clusters.json"
    kept = json.loads(path.read_text())
    assert kept["alpha"] == 0.1 and kept["harvest"] == found.fingerprint
    said = dict(re.findall(r"│ (.*?) *│ *(.*?) *│", done.stdout))
    assert said["tokens"] == f"{found.num_tokens:,}" and str(path) in done.stdout
    assert said["components that are ever on"] == str((found.firing_rate > 0).sum())
    source = commands.page(harvested, workdir)
    assert source.groups.tolist() == kept["partition"]
    agree = f"alpha = 0.1, 2 restarts that agree on {kept['agreement']:.0%} of components"
    assert source.grouped_by == agree
    path.unlink()
    assert commands.page(harvested, workdir).groups is None
    refused = main_here("--mode=clusters", f"--workdir={workdir}", "--restarts=0")
    assert refused.returncode == 2 and "at least 1 restart" in refused.stderr


def test_a_harvest_of_what_the_run_was_before_is_not_shown(harvested, tmp_path):
    run = harvested
    found = load(run.folder / "harvest")
    said = Console(file=io.StringIO(), width=500)
    assert commands.kept(run, epath.Path(run.folder), said) and not said.file.getvalue()
    save(dataclasses.replace(found, fingerprint="another"), tmp_path / "harvest")
    assert not commands.kept(run, epath.Path(tmp_path), said)
    assert "is of another decomposition, so the page has no text; remove" in said.file.getvalue()


def test_its_components_are_labelled(workdir, run, main_here, monkeypatch):
    monkeypatch.setattr(label_commands, "restore", lambda *of: run)
    main_here("--mode=harvest", f"--workdir={workdir}", "--num_tokens=600")
    done = main_here("--mode=labels", f"--workdir={workdir}", "--num_labels=4")
    assert done.returncode == 0, done.stderr
    labels = json.loads((workdir / "harvest" / "labels_rules.json").read_text())
    harvest = load(workdir / "harvest")
    assert labels["harvest"] == harvest.fingerprint and len(labels["components"]) == 4
    assert "intruder" in done.stdout and "20%" in done.stdout
    kept = (workdir / "harvest" / "quiet.npz").read_bytes()
    asked = ["--endpoint=http://localhost:9/v1", "--model=any", "--only_cost"]
    done = main_here("--mode=labels", f"--workdir={workdir}", *asked)
    alive = int((harvest.firing_rate > 0).sum())
    assert done.returncode == 0 and f"any: {alive} components, " in done.stdout
    assert (workdir / "harvest" / "quiet.npz").read_bytes() == kept


def test_refusals(main_here, workdir):
    done = main_here("--mode=harvest", f"--workdir={workdir}", "--num_tokens=0")
    assert done.returncode == 2 and "--num_tokens must be at least 1; got 0." in done.stderr


def test_a_graph_of_a_prompt(workdir, main_here):
    done = main_here("--mode=graph", f"--workdir={workdir}", "--prompt=w1 w2", "--graph_steps=2")
    assert done.returncode == 0, done.stderr
    assert "with an adversary" in done.stdout and str(workdir / "graph.html") in done.stdout
    found = json.loads((workdir / "graph.json").read_text())
    kinds = [node["feature_type"] for node in found["nodes"]]
    assert kinds.count("logit") == 1 and kinds.count("embedding") > 2
    num_nodes = kinds.count("cross layer transcoder")
    assert num_nodes > 0
    assert (workdir / "graph.html").read_text().count("<circle") == num_nodes + 1


@pytest.mark.parametrize("prompt, said", [("", "--prompt is missing"), ("w1 " * 99, "tokens; the")])
def test_prompts_that_make_no_graph(prompt, said, workdir, main_here):
    done = main_here("--mode=graph", f"--workdir={workdir}", f"--prompt={prompt}")
    assert done.returncode == 2 and said in done.stderr


def test_nodes_are_called_by_their_labels(run, tmp_path, monkeypatch):
    folder, one = epath.Path(tmp_path), run.decomposition(0)
    assert graph._harvested(folder, one) == (None, {})
    (folder / "harvest").mkdir()
    (folder / "harvest" / "harvest.json").write_text("{}")
    found = object.__new__(Harvest)  # of which nothing else is read
    monkeypatch.setattr(graph.harvest_lib, "load", lambda path: found)
    vars(found).update(firing_rate=np.arange(9) / 10, fingerprint=fingerprint_of(one))
    alive, names = graph._harvested(folder, one)
    assert alive.tolist() == [False] + [True] * 8 and names == {}
    for model, label in (("", "by rule"), ("some/model", "by a model")):
        rows = [{"component": 0, "label": label}]
        about = {"method": "test", "model": model, "harvest": found.fingerprint}
        labels.save(about | {"components": rows}, folder / "harvest")
        assert graph._harvested(folder, one)[1] == {0: label}
    vars(found).update(fingerprint="of another run")
    assert graph._harvested(folder, one) == (None, {})
