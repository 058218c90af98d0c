#!/usr/bin/env bash
# Runs one experiment as several processes on the CPU of this machine, as if on several machines.
#
#   launch/local.sh [--dry-run] PROCESSES [DEVICES_PER_PROCESS] --config=... --workdir=...
#
# When one process fails the others are stopped. Ctrl-C and SIGTERM reach all of them: they save one checkpoint, and the same
# command goes on from there. PYTHON names the interpreter (default: python), MODULE what is run (default: apd_jax.main).
set -euo pipefail

dry_run=false
if [[ ${1-} == --dry-run ]]; then dry_run=true; shift; fi
if [[ ! ${1-} =~ ^[1-9][0-9]*$ ]]; then sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
processes=$1; shift
devices=1
if [[ ${1-} =~ ^[1-9][0-9]*$ ]]; then devices=$1; shift; fi

python=${PYTHON:-python}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
port=FREE_PORT
$dry_run || port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
shared=(
  "PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}"
  JAX_PLATFORMS=cpu
  "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
  "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port"
  "JAX_NUM_PROCESSES=$processes"
)

set -m # each process in a group of its own: Ctrl-C comes to it through this script, once
running=() # by process id
for ((i = 0; i < processes; i++)); do
  command=(env "${shared[@]}" "JAX_PROCESS_ID=$i" "$python" -m "${MODULE:-apd_jax.main}" "$@")
  if $dry_run; then
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}" &
    running[$!]=1
  fi
done

tell() { ((!${#running[@]})) || kill "-$1" "${!running[@]}" 2>/dev/null || true; }
trap 'tell INT' INT
trap 'tell TERM' TERM HUP
trap 'tell KILL' EXIT

status=0
while ((${#running[@]})); do
  for pid in "${!running[@]}"; do
    ! kill -0 "$pid" 2>/dev/null || continue
    code=0
    wait "$pid" || code=$?
    unset "running[$pid]"
    ((status)) || status=$code
    case $code in
      0 | 130 | 143) ;; # asked to stop: they all do, after the same step
      *) tell KILL ;;   # the others would wait for it
    esac
  done
  sleep 0.2 &
  wait $! || true # a signal ends this wait at once
done
exit "$status"
