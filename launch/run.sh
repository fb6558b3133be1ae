#!/usr/bin/env bash
# One process of a run on this host: what every launcher starts, once a host (TPU) or once a GPU (SLURM).
#   bash launch/run.sh [--dry-run] PROGRAM [ARGUMENTS]        such as: bash launch/run.sh vau_jax.train --config=... --workdir=...
#
# Environment:
#   EXTRA       packages to set up the first time: tpu or cuda12 (default: neither)
#   RUN_PYTHON  an interpreter that has everything, instead of a .venv made here
#   RESTARTS    how often a run that failed is restarted; it resumes from its last checkpoint (default 0)
#   ALONE=1     this is the only process; else the others are found by the cluster, or by JAX_COORDINATOR_ADDRESS,
#               JAX_NUM_PROCESSES and JAX_PROCESS_ID
#   PREEMPTED_CODE  exit code of a run that was preempted (default 0), for what restarts it by its exit code; such as 75
#   CODE_FILE   a file in which this script says "running", and then its exit code, each with its process and a checksum of
#               the arguments
#
# Exit code 0: done, or preempted by SIGTERM (preempted.json is in the workdir then). 2: a mistake in the arguments.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh
if [ -n "${CODE_FILE:-}" ] && [ "$DRY_RUN" = 0 ]; then
  sum=$(checksum "$@")
  echo "running $$ $sum" >"$CODE_FILE"
  trap 'echo "$? $$ $sum" >"$CODE_FILE"' EXIT
fi
[ $# -gt 0 ] || fail "usage: bash launch/run.sh [--dry-run] PROGRAM [ARGUMENTS]"
PROGRAM=$1 RESTARTS=${RESTARTS:-0} PREEMPTED_CODE=${PREEMPTED_CODE:-0}
need PROGRAM "a module's name" '[a-zA-Z_][a-zA-Z0-9_.]*'
need RESTARTS "a number" number
need PREEMPTED_CODE "0 to 125" '[0-9]{1,2}|1[01][0-9]|12[0-5]'
if [ -n "${RUN_PYTHON:-}" ] || [ "$DRY_RUN" = 1 ]; then
  python=${RUN_PYTHON:-${VENV:-.venv}/bin/python}
else
  # shellcheck source=launch/venv.sh
  source launch/venv.sh "${EXTRA:-}"
  python=$VENV/bin/python
fi
shift
command=("$python" -m "$PROGRAM" "$@")
if [ "${ALONE:-0}" != 1 ]; then
  command+=(--distributed)
fi
if [ "$DRY_RUN" = 1 ]; then
  run "${command[@]}"
  exit
fi

child=
stop() { # SIGTERM is for the run, which ends after its step
  asked=1
  if [ -n "$child" ]; then
    kill -TERM "$child" 2>/dev/null || true
  fi
}
asked=0
trap stop TERM INT

workdir=
for argument in "$@"; do
  case $argument in
    --workdir=*) workdir=${argument#--workdir=} ;;
  esac
done
preempted() { # by a signal to this process, or to another of the run: then the first writes a note, which a new start removes
  [ "$asked" = 1 ] || { [ -n "$workdir" ] && [ -e "$workdir/preempted.json" ]; }
}

attempt=0
while true; do
  "${command[@]}" &
  child=$!
  code=0
  wait_for "$child" || code=$?
  if [ "$code" = 0 ] && preempted; then
    exit "$PREEMPTED_CODE"
  fi
  if [ "$code" = 0 ] || [ "$code" = 2 ] || [ "$asked" = 1 ] || [ "$attempt" -ge "$RESTARTS" ]; then
    exit "$code"
  fi
  attempt=$((attempt + 1))
  echo "run.sh: exit code $code; attempt $attempt of $RESTARTS to go on, in 10 s" >&2
  sleep 10
  [ "$asked" = 0 ] || exit "$PREEMPTED_CODE"
done
