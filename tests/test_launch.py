"""The launchers: what their dry runs promise.

And what they do with the tools of a cluster, which small scripts play.
"""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT

ARGS = ["--config=configs/tms.py:5-2", "--workdir=gs://bucket/a run", "--config.apd.topk=0.3"]


def run(*command, env=None):
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=30,
    )


def dry_run(*command):
    """The commands that a script would run, as lists of words."""
    done = run(*command)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]


@pytest.fixture
def played(tmp_path):
    """Puts commands on the PATH that note their arguments in a log, then do as told.

    Gives (environment, log).
    """

    def play(**commands):
        for name, body in commands.items():
            path = tmp_path / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(
                f'#!/usr/bin/env bash\necho "{name} ${{*@Q}}" >>{tmp_path}/log\n{body}\n'
            )
            path.chmod(0o755)
        return {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}, tmp_path / "log"

    return play


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "launch").glob("*.sh")))
def test_scripts_parse_and_refuse_an_empty_command(script):
    assert run("bash", "-n", f"launch/{script}").stderr == ""
    refused = run(f"launch/{script}", env={"SLURM_JOB_ID": ""})
    assert refused.returncode == 2 and f"launch/{script}" in refused.stderr


def test_local_gives_every_process_the_same_command():
    commands = dry_run("launch/local.sh", "--dry-run", "3", "2", *ARGS)
    assert len(commands) == 3
    for i, command in enumerate(commands):
        assert command[-6:] == ["python", "-m", "apd_jax.main", *ARGS]
        settings = dict(word.split("=", 1) for word in command[1:-6])
        assert (settings["JAX_PROCESS_ID"], settings["JAX_NUM_PROCESSES"]) == (str(i), "3")
        assert settings["XLA_FLAGS"].endswith("--xla_force_host_platform_device_count=2")
        assert settings["JAX_COORDINATOR_ADDRESS"] == "127.0.0.1:FREE_PORT"


def test_local_stops_the_others_when_one_fails(played, tmp_path):
    all_started = f"(($(grep -c apd_jax {tmp_path}/log) == 3))"
    wait = f"until {all_started}; do sleep 0.05; done"
    fail_last = f"((JAX_PROCESS_ID != 1)) || {{ {wait}; exit 3; }}"
    env, log = played(python=f"[[ $1 == -c ]] && exec echo 12345; {fail_last}; exec sleep 60")
    done = run("launch/local.sh", "3", *ARGS, env=env)  # `run` waits 30 s at most
    assert done.returncode == 3
    assert (
        sum(
            shlex.join(ARGS) in shlex.join(shlex.split(line))
            for line in log.read_text().splitlines()
        )
        == 3
    )


def test_slurm_runs_one_command_on_every_task():
    assert dry_run("launch/slurm.sh", "--dry-run", *ARGS) == [
        ["srun", "--kill-on-bad-exit=1", ".venv/bin/python", "-m", "apd_jax.main", *ARGS]
    ]
    text = run("launch/slurm.sh", "--dry-run", *ARGS).stdout
    options = dict(
        line.removeprefix("#SBATCH --").split("=")
        for line in text.splitlines()
        if line.startswith("#SBATCH") and "=" in line
    )
    assert (
        options["gpus-per-node"] == options["ntasks-per-node"]
    )  # JAX gives each task one GPU of its node


def test_slurm_queues_a_job_again_that_ran_out_of_time(played, tmp_path):
    save = f"sleep 0.2; echo saved >>{tmp_path}/log; kill $job; exit 143"
    env, log = played(
        srun=f"sleep 60 & job=$!; trap '{save}' TERM; touch {tmp_path}/started; wait", scontrol=""
    )
    with subprocess.Popen(
        ["launch/slurm.sh", *ARGS], cwd=ROOT, env={**os.environ, **env, "SLURM_JOB_ID": "7"}
    ) as job:
        for _ in range(200):
            if (tmp_path / "started").exists():
                break
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=20) == 143
    assert [shlex.split(line) for line in log.read_text().splitlines()[-2:]] == [
        ["saved"],
        ["scontrol", "requeue", "7"],
    ]


def test_slurm_does_not_queue_a_finished_job_again(played):
    env, log = played(srun="exit 0", scontrol="")
    assert run("launch/slurm.sh", *ARGS, env=env | {"SLURM_JOB_ID": "7"}).returncode == 0
    assert "scontrol" not in log.read_text()


def remote_words(command):
    """The words of what `gcloud ... ssh` runs on the workers."""
    assert "--worker=all" in command
    (remote,) = [
        word.removeprefix("--command=") for word in command if word.startswith("--command=")
    ]
    return shlex.split(remote)


def test_tpu_pod_creates_installs_and_runs_on_all_workers():
    create, archive, copy, install, train = dry_run("launch/tpu_pod.sh", "--dry-run", "pod", *ARGS)
    assert (
        create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "pod"]
        and "--spot" in create
    )
    assert archive[0] == "git" and "--worker=all" in copy
    assert remote_words(install)[-2:] == [".[tpu]", "gcsfs"]
    words = remote_words(train)
    assert (
        words[-6:] == [".venv/bin/python", "-m", "apd_jax.main", *ARGS]
        and "APD_JAX_MULTIHOST=1" in words
    )


def test_tpu_pod_replaces_a_preempted_slice(played, tmp_path):
    gcloud = f"""case "$*" in
*describe*) [[ -e {tmp_path}/new ]] && echo ACTIVE || echo SUSPENDED ;;
*create*) touch {tmp_path}/new ;;
esac"""
    env, log = played(gcloud=gcloud)
    done = run("launch/tpu_pod.sh", "pod", *ARGS, env=env)
    assert done.returncode == 0, done.stderr
    verbs = [shlex.split(line)[4] for line in log.read_text().splitlines()]
    assert verbs == ["describe", "delete", "create", "describe", "scp", "ssh", "ssh"]
    env, log = played()  # the slice is there: nothing is created
    log.unlink()
    run("launch/tpu_pod.sh", "pod", *ARGS, env=env)
    assert [shlex.split(line)[4] for line in log.read_text().splitlines()] == [
        "describe",
        "describe",
        "scp",
        "ssh",
        "ssh",
    ]


def test_jobset_gives_every_pod_the_same_command():
    options = ["--name=apd", "--image=registry/apd:1", "--processes=4", "--gpus=2", "--dry-run"]
    done = run(sys.executable, "launch/jobset.py", *options, "--", *ARGS)
    assert done.returncode == 0, done.stderr
    jobset = yaml.safe_load(done.stdout)
    assert jobset["metadata"]["name"] == "apd"
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4 and job["completionMode"] == "Indexed"
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] + container["args"] == ["python", "-m", "apd_jax.main", *ARGS]
    assert (
        container["image"] == "registry/apd:1"
        and container["resources"]["limits"]["nvidia.com/gpu"] == 2
    )
    env = {variable["name"]: variable.get("value") for variable in container["env"]}
    # Pod 0 of job 0 of `workers`, in the subdomain that a JobSet gives its pods: its own name.
    assert env == {
        "JAX_COORDINATOR_ADDRESS": "apd-workers-0-0.apd:8476",
        "JAX_NUM_PROCESSES": "4",
        "JAX_PROCESS_ID": None,
    }


@pytest.mark.parametrize("module", ["apd_jax.sweep", "apd_jax.evidence"])
def test_launchers_start_any_module(module):
    env = {"MODULE": module}
    of_scripts = [
        run("launch/local.sh", "--dry-run", "2", *ARGS, env=env).stdout.splitlines()[0],
        run("launch/slurm.sh", "--dry-run", *ARGS, env=env).stdout.splitlines()[-1],
    ]
    words = [shlex.split(line) for line in of_scripts]
    words.append(
        remote_words(
            shlex.split(
                run("launch/tpu_pod.sh", "--dry-run", "pod", *ARGS, env=env).stdout.splitlines()[-1]
            )
        )
    )
    assert [line[-5:] for line in words] == [["-m", module, *ARGS]] * 3
    options = ["--name=apd", "--image=i", "--processes=2", f"--module={module}", "--dry-run"]
    jobset = yaml.safe_load(run(sys.executable, "launch/jobset.py", *options, "--", *ARGS).stdout)
    (workers,) = jobset["spec"]["replicatedJobs"]
    (container,) = workers["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", module]


def test_jobset_goes_to_kubectl(played, tmp_path):
    env, log = played(kubectl=f"cat >{tmp_path}/applied")
    done = run(
        sys.executable,
        "launch/jobset.py",
        "--name=apd",
        "--image=i",
        "--processes=2",
        "--",
        *ARGS,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "apply" in log.read_text()
        and yaml.safe_load((tmp_path / "applied").read_text())["kind"] == "JobSet"
    )
