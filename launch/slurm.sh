#!/usr/bin/env bash
# Runs one experiment on all GPUs of several Slurm nodes, one process per GPU. Submit it from the repository's folder:
#
#   sbatch [--nodes=4 --gpus-per-node=8 --ntasks-per-node=8 --time=... ...] launch/slurm.sh --config=... --workdir=...
#   launch/slurm.sh --dry-run --config=... --workdir=...       # prints what a job would do
#
# Before its time limit, and when it is preempted, a job saves a checkpoint, is queued again, and goes on.
# The tasks of a node must equal its GPUs and see all of them: JAX picks one for each. PYTHON names the interpreter (.venv/bin/python),
# MODULE what is run (apd_jax.main).
#SBATCH --job-name=apd_jax
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -euo pipefail

dry_run=false
if [[ ${1-} == --dry-run ]]; then
  shift
  dry_run=true
elif [[ -z ${SLURM_JOB_ID-} ]]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi

# A failed process ends the step at once: the others would wait for it.
command=(srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" -m "${MODULE:-apd_jax.main}" "$@")
if $dry_run; then
  grep '^#SBATCH' "$0"
  printf '%q ' "${command[@]}"
  echo
  exit
fi
"${command[@]}" &
step=$!
time_is_up=false
trap 'time_is_up=true; kill -TERM "$step"' USR1 # srun passes it on to every process

status=0
wait "$step" || status=$?
if $time_is_up; then # it was the signal that ended this wait
  status=0
  wait "$step" || status=$?
  ((!status)) || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
