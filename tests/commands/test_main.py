"""The command line: the smoke variants end to end.

And every bad input in one sentence with exit code 2.
"""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, Finished, load_golden

from apd_jax.targets import weights

TMS = "--config=configs/tms.py:5-2,smoke"
RESID = "--config=configs/resid_mlp.py:1layer,smoke"
RUNS = {
    "tms": (
        TMS,
        {"columns", "losses", "responses", "attributions", "per_feature_loss"},
        {
            "mmcs",
            "ml2r",
            "mmcs_one_to_one",
            "ml2r_one_to_one",
            "num_features",
            "num_features_owned",
        },
    ),
    "resid_mlp": (
        RESID,
        {
            "columns",
            "losses",
            "responses",
            "attributions",
            "per_feature_loss",
            "neuron_contributions",
            "scrub",
        },
        {"scrub_topk", "scrub_scrubbed", "scrub_antiscrubbed", "scrub_monosemantic"},
    ),
}


def refused(result: Finished, *needles: str) -> None:
    """Exit code 2, and one line on stderr that holds all of these."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("apd_jax: ")
    for needle in needles:
        assert needle in lines[0]


# The smoke variants


@pytest.fixture(scope="module", params=list(RUNS))
def run(request, tmp_path_factory, cli):
    """(workdir, what it printed, its command, figures, metrics) of one run from start to end."""
    command, figures, metrics = RUNS[request.param]
    workdir = tmp_path_factory.mktemp("runs") / request.param
    result = cli(command, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    return workdir, result, command, figures, metrics


ONE = pytest.mark.parametrize("run", ["tms"], indirect=True)  # nothing of it is the target's own


def test_a_run_from_start_to_end(run):
    workdir, result, _, figures, metrics = run
    assert "Traceback" not in result.stderr
    config = json.loads((workdir / "config.json").read_text())
    assert (
        set(config) == {"seed", "target", "apd", "evaluation"} and config["apd"]["num_steps"] == 40
    )
    with np.load(workdir / "target" / "params.npz") as params:
        assert all(np.isfinite(params[name]).all() for name in params)
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [30, 40]
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert {
        "total",
        "faithfulness",
        "minimality",
        "simplicity",
        "mean_active",
        "seconds_per_step",
    } <= set(rows[0])
    assert list((workdir / "tensorboard").glob("events.*"))
    page = (workdir / "report.html").read_bytes()
    assert len(page) < 5e6 and b"Not checked yet" in page and b'id="panel"' in page
    assert f"Report: {workdir / 'report.html'}" in result.stdout.replace("\n", "")
    drawn = {path.stem for path in (workdir / "figures").glob("*.png")}
    assert drawn == figures
    for name in drawn:
        assert (workdir / "figures" / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    assert metrics <= set(evaluation)
    assert all(isinstance(value, (int, float, str)) for value in evaluation.values())  # flat
    assert (evaluation["step"], evaluation["seed"], evaluation["num_devices"]) == (40, 0, 1)
    assert (
        f"Figures: {workdir / 'figures'}" in result.stdout
        and "faithfulness" in result.stdout.lower()
    )


def test_inspect_reads_the_checkpoints(run, main_here):
    workdir = run[0]
    result = main_here("--mode=inspect", f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    assert f"{workdir / 'checkpoints'}: steps 30 (" in result.stdout and "40 (" in result.stdout
    config = json.loads((workdir / "config.json").read_text())
    with np.load(workdir / "target" / "params.npz") as params:
        leaf = "W" if "W" in params else "mlp_in_0"
        shape = params[leaf].shape
    # The pytree with its shapes: U is C x d_in x m.
    assert f"{config['apd']['num_components']}x{shape[0]}x" in result.stdout
    for word in (f"components.tree.{leaf}.U", "opt_state.0.mu", "firing rate", "feature", "norm"):
        assert word in result.stdout


@ONE
@pytest.mark.parametrize("again", [TMS, "--mode=evaluate"])
def test_evaluated_again_it_gives_the_same_numbers(run, again, cli):
    """By the same command, which finds everything trained, and by the mode for it."""
    workdir = run[0]
    before = json.loads((workdir / "evaluation.json").read_text())
    trained = [workdir / "metrics.jsonl", workdir / "target" / "params.npz"]
    contents = [file.read_bytes() for file in trained]
    (workdir / "figures" / "losses.png").unlink()
    (workdir / "evaluation.json").unlink()
    result = cli(again, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    assert "target: step" not in result.stderr and "decomposition: step" not in result.stderr
    after = json.loads((workdir / "evaluation.json").read_text())
    assert {k: v for k, v in after.items() if k != "peak_rss_gib"} == {
        k: v for k, v in before.items() if k != "peak_rss_gib"
    }
    assert (workdir / "figures" / "losses.png").exists()
    assert contents == [file.read_bytes() for file in trained]


@ONE
def test_the_report_again_with_evidence(run, main_here):
    workdir = run[0]
    (workdir / "report.html").unlink()
    (workdir / "evidence.json").write_text(
        json.dumps({"provenance": {}, "verdict": "It was <checked>.", "checks": []})
    )
    try:
        result = main_here("--mode=report", f"--workdir={workdir}")
    finally:
        (workdir / "evidence.json").unlink()
    assert result.returncode == 0, result.stderr
    assert "It was &lt;checked&gt;." in (workdir / "report.html").read_text()


def test_a_run_compared_with_itself(run, main_here):
    workdir = run[0]
    result = main_here("--mode=compare", f"--workdir={workdir}", f"--other={workdir}")
    assert result.returncode == 0, result.stderr
    assert (
        "All settings are the same." in result.stdout
        and "the median cosine is 1.000" in result.stdout.replace("\n", " ")
    )
    assert "None: all settings are the same." in (workdir / "compare.html").read_text()


def test_another_config_is_refused_with_the_fields(run, main_here):
    workdir, _, command, *_ = run
    before = (workdir / "config.json").read_text()
    result = main_here(
        command, "--config.apd.topk=0.5", "--config.target.seed=3", f"--workdir={workdir}"
    )
    topk = json.loads(before)["apd"]["topk"]
    refused(
        result,
        "belongs to another config",
        f"apd.topk is {topk} there and 0.5 here",
        "target.seed is 0 there and 3 here",
    )
    assert (workdir / "config.json").read_text() == before


# Bad input


@pytest.mark.parametrize(
    ("args", "needles"),
    [
        ((TMS, "--config.apd.topkk=1"), ("'topkk'", "Did you mean 'topk'?")),
        ((TMS, "--config.apd.learnig_rate=1"), ("'learnig_rate'", "Did you mean 'learning_rate'?")),
        ((TMS, "--config.apdd.topk=1"), ("'apdd'", "Did you mean 'apd'?")),
        (
            ("--config=configs/tms.py:5-2,smokee",),
            ("unknown TMS variant", "'smokee'", "Did you mean 'smoke'?"),
        ),
        (
            ("--config=configs/resid_mlp.py:4layer",),
            ("unknown ResidMLP variant", "'4layer'", "1layer, 2layer, 3layer"),
        ),
        (("--config=configs/tmss.py",), ("configs/tmss.py",)),
    ],
)
def test_config_errors(args, needles, tmp_path, main_here):
    refused(main_here(*args, f"--workdir={tmp_path / 'run'}"), *needles)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "args",
    [
        (TMS, "--config.apd.topkk=1"),
        ("--config=configs/tms.py:5-2,smokee",),
    ],
    ids=str,
)
def test_config_errors_in_a_process_of_their_own(args, tmp_path, cli):
    refused(cli(*args, f"--workdir={tmp_path}"))


def test_a_process_that_nothing_was_imported_for(tmp_path):
    command = [sys.executable, "-m", "apd_jax.main", TMS, "--config.apd.topk=many"]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path}"], cwd=ROOT, capture_output=True, text=True
    )
    refused(Finished(done.returncode, done.stdout, done.stderr))


@pytest.mark.parametrize(
    ("args", "needles"),
    [
        ((TMS, "--config.apd.topk=0.0"), ("topk must be above 0", "got 0.0")),
        ((TMS, "--config.apd.topk=-2.0"), ("topk must be above 0", "got -2.0")),
        ((TMS, "--config.apd.topk=5.5"), ("at most 5", "got 5.5")),
        ((TMS, "--config.apd.batch_size=126"), ("batch_size = 126", "4 devices", "multiple of 4")),
        ((TMS, "--config.apd.schedule=cosin"), ("schedule", "Did you mean 'cosine'?")),
        ((TMS, "--config.target.feature_probability=2.0"), ("feature_probability", "2.0")),
        ((TMS, "--config.target.name=tmz"), ("target.name", "Did you mean 'tms'?")),
        ((RESID, "--config.target.d_mlp=0"), ("d_mlp must be at least 1; got 0",)),
        ((TMS, "--config.target.weights_path=nowhere.npz"), ("nowhere.npz", "cannot be read")),
        ((TMS, "leftover"), ("unexpected argument 'leftover'",)),
        ((TMS, "--wrokdir=x"), ("wrokdir", "workdir")),
        ((TMS, "--mode=train_it"), ("mode",)),
        ((), ("--config is missing",)),
    ],
)
def test_values_out_of_range(args, needles, tmp_path, main_here):
    refused(main_here(*args, f"--workdir={tmp_path / 'run'}"), *needles)


def test_missing_workdir(main_here):
    refused(main_here(TMS), "--workdir is missing")


@pytest.mark.parametrize("mode", ["evaluate", "inspect", "report"])
def test_nothing_to_read(mode, tmp_path, main_here):
    refused(main_here(f"--mode={mode}", f"--workdir={tmp_path}"), str(tmp_path), "config.json")
    refused(main_here(f"--mode={mode}", f"--workdir={tmp_path / 'nowhere'}"), "nowhere")
    (tmp_path / "config.json").write_text('{"apd": ')
    refused(main_here(f"--mode={mode}", f"--workdir={tmp_path}"), "config.json is damaged")


def test_nothing_to_compare(run, tmp_path, main_here):
    refused(main_here("--mode=compare", f"--workdir={run[0]}"), "--other is missing")
    refused(
        main_here("--mode=compare", f"--workdir={run[0]}", f"--other={tmp_path}"),
        str(tmp_path),
        "config.json",
    )


def test_a_report_needs_an_evaluation(run, tmp_path, main_here):
    for name in ("config.json", "target", "checkpoints"):
        (tmp_path / name).symlink_to(run[0] / name)
    refused(
        main_here("--mode=report", f"--workdir={tmp_path}"),
        "has not been evaluated yet",
        "--mode=evaluate",
    )


@pytest.mark.parametrize("mode", ["evaluate", "inspect", "report"])
def test_a_run_without_a_checkpoint(mode, tmp_path, main_here):
    # A run that was stopped while its target trained: config.json is all there is.
    (tmp_path / "config.json").write_text(json.dumps(_config(main_here, tmp_path)))
    refused(main_here(f"--mode={mode}", f"--workdir={tmp_path}"), str(tmp_path))


def _config(main_here, tmp_path):
    """What config.json would hold, from a run that is refused once its folder is made."""
    refused(
        main_here(
            TMS, "--config.target.weights_path=nowhere.npz", f"--workdir={tmp_path / 'other'}"
        )
    )
    return json.loads((tmp_path / "other" / "config.json").read_text())


def test_weights_of_another_shape(tmp_path, main_here):
    path = tmp_path / "weights.npz"
    weights.save(path, load_golden("tms_small").params)  # 6-3, not 5-2
    result = main_here(TMS, f"--config.target.weights_path={path}", f"--workdir={tmp_path / 'run'}")
    refused(result, str(path), "'W'", "(6, 3)", "(5, 2)")


def test_given_weights_are_taken_and_a_placeholder_may_be_none(tmp_path, main_here):
    path = tmp_path / "weights.npz"
    golden = load_golden("tms_5_2")
    weights.save(path, golden.params)
    result = main_here(
        TMS,
        f"--config.target.weights_path={path}",
        "--config.apd.num_steps=4",
        "--config.apd.rank=None",
        f"--workdir={tmp_path / 'run'}",
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["apd"]["rank"] is None
    like = jax.tree.map(jax.typeof, golden.params)
    there = weights.load(tmp_path / "run" / "target" / "params.npz", like)
    np.testing.assert_array_equal(there["W"], golden.params["W"])
    # Four steps on the 4 devices of this process.
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["num_devices"] == 4


def test_unwritable_workdir(tmp_path, main_here):
    (tmp_path / "file").write_text("")
    refused(
        main_here(TMS, f"--workdir={tmp_path / 'file' / 'run'}"),
        str(tmp_path / "file" / "run"),
        "cannot be written",
    )


def test_not_finite_in_training(tmp_path, main_here):
    # Plain gradient descent at a rate that grows by warm-up until it diverges: some steps are good,
    # and their checkpoint is kept.
    args = (
        "--config.apd.optimizer=sgd",
        "--config.apd.learning_rate=1e9",
        "--config.apd.warmup_fraction=0.9",
        "--config.apd.steps_per_call=1",
    )
    result = main_here(TMS, *args, "--config.apd.checkpoint_every_steps=1", f"--workdir={tmp_path}")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("apd_jax: training stopped at step ") and ": not finite: " in last
    kept = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert last.endswith(f"The checkpoint of step {kept} is kept.")
    assert int(last.split("step ")[1].split(":")[0]) == kept + 1


def test_not_finite_in_pretraining(tmp_path, main_here):
    result = main_here(TMS, "--config.target.pretrain.learning_rate=1e38", f"--workdir={tmp_path}")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert "target pretraining" in last and "step" in last
    assert not (tmp_path / "target" / "params.npz").exists()


def check_two_instances(tmp_path, evaluation):
    assert len(evaluation["instances"]) == 2
    np.testing.assert_allclose(
        evaluation["mmcs"], np.mean([one["mmcs"] for one in evaluation["instances"]])
    )
    assert all((tmp_path / "figures" / f"instance_{i}" / "columns.png").exists() for i in range(2))
    for name, here, there in (
        ("report.html", 0, "report_1.html"),
        ("report_1.html", 1, "report.html"),
    ):
        page = (tmp_path / name).read_text()
        assert (
            f'<strong aria-current="page">{here}</strong>' in page
            and f'<a href="{there}">{1 - here}</a>' in page
        )


def test_a_method_with_a_learned_gate_and_numbers_of_sites(tmp_path, main_here):
    """SPD: every site has components of its own, which the checkpoint alone does not say."""
    command = ["--config=configs/spd.py:tms,5-2,smoke", "--config.apd.num_components=3"]
    result = main_here(*command, "--config.apd.num_instances=2", f"--workdir={tmp_path}")
    assert result.returncode == 0, result.stderr
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["num_components"] == 6  # three of W and of W_out
    assert {"minimality_stochastic", "minimality_gates"} <= set(evaluation)
    assert (tmp_path / "report.html").exists()
    check_two_instances(tmp_path, evaluation)
    looked = main_here("--mode=inspect", f"--workdir={tmp_path}")
    assert looked.returncode == 0, looked.stderr
    for word in ("components.tree.W.U", "gate.", "firing rate"):
        assert word in looked.stdout
    refused(main_here(*command, "--config.apd.topk=1", f"--workdir={tmp_path / 'other'}"), "'topk'")
