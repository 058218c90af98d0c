#!/usr/bin/env bash
# Runs one experiment on a Cloud TPU pod slice, one process per worker.
#
#   launch/tpu_pod.sh [--dry-run] NAME --config=... --workdir=gs://...
#
# Queues the slice NAME unless it is there, installs this commit on all workers, and runs the command on all of them. After a
# preemption, or a lost connection, give the same command again: the run goes on from its checkpoint. Settings, by environment:
# ZONE (us-west4-a), ACCELERATOR (v5litepod-16), RUNTIME (v2-alpha-tpuv5-lite), CREATE_OPTIONS (--spot),
# MODULE, what is run (apd_jax.main). Delete the slice with
#   gcloud compute tpus queued-resources delete NAME --zone=ZONE --force
set -euo pipefail

run() { "$@"; }
dry_run=false
if [[ ${1-} == --dry-run ]]; then
  shift
  dry_run=true
  run() { printf '%q ' "$@" && echo; }
fi
if (($# < 2)) || [[ $1 == -* ]]; then sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2; exit 2; fi
name=$1; shift
zone=${ZONE:-us-west4-a}
archive=apd_jax.tar.gz

state() {
  $dry_run && { echo ACTIVE; return; }
  gcloud compute tpus queued-resources describe "$name" --zone="$zone" --format='value(state.state)' 2>/dev/null || echo ABSENT
}
on_all_workers() { run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }

before=$(state)
case $before in SUSPENDED | FAILED) # a preempted slice does not come back
  run gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force --quiet
  before=ABSENT ;;
esac
if $dry_run || [[ $before == ABSENT ]]; then
  # shellcheck disable=SC2086 # the options are several words
  run gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
    --accelerator-type="${ACCELERATOR:-v5litepod-16}" --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}" ${CREATE_OPTIONS---spot}
fi
while now=$(state); [[ $now != ACTIVE ]]; do
  case $now in SUSPENDED | FAILED) echo "slice $name is $now; give the same command again." >&2; exit 1 ;; esac
  echo "slice $name is $now; waiting"
  sleep 30
done

folder=TEMPORARY_FOLDER
$dry_run || { folder=$(mktemp -d) && trap 'rm -r "$folder"' EXIT; }
run git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$folder/$archive" HEAD
run gcloud compute tpus tpu-vm scp "$folder/$archive" "$name:" --zone="$zone" --worker=all
# The images' own Python is too old: uv brings one. gcsfs opens the files of a gs:// workdir.
on_all_workers "mkdir -p apd_jax && tar xzf $archive -C apd_jax && cd apd_jax && python3 -m pip install --quiet uv \
&& { [ -d .venv ] || python3 -m uv venv --python 3.12 .venv; } && python3 -m uv pip install --quiet --python .venv/bin/python --editable '.[tpu]' gcsfs"
# The lock: a command whose connection was lost may still be running, and holds the TPU.
on_all_workers "cd apd_jax && APD_JAX_MULTIHOST=1 flock --nonblock --conflict-exit-code 75 .lock .venv/bin/python -m ${MODULE:-apd_jax.main}$(printf ' %q' "$@")"
