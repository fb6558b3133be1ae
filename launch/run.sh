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
#
# Exit code 0: done, or preempted by SIGTERM (preempted.json is in the workdir then). 2: a mistake in the arguments.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ $# -gt 0 ] || fail "usage: bash launch/run.sh [--dry-run] PROGRAM [ARGUMENTS]"
PROGRAM=$1 RESTARTS=${RESTARTS:-0}
need PROGRAM "a module's name" '[a-zA-Z_][a-zA-Z0-9_.]*'
need RESTARTS "a number" number
if [ -n "${RUN_PYTHON:-}" ] || [ "$DRY_RUN" = 1 ]; then
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  python=${RUN_PYTHON:-${VENV:-.venv}/bin/python}
else
  # shellcheck source=launch/venv.sh
  source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" "${EXTRA:-}"
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

attempt=0
while true; do
  "${command[@]}" &
  child=$!
  code=0
  wait_for "$child" || code=$?
  if [ "$code" = 0 ] || [ "$code" = 2 ] || [ "$asked" = 1 ] || [ "$attempt" -ge "$RESTARTS" ]; then
    exit "$code"
  fi
  attempt=$((attempt + 1))
  echo "run.sh: exit code $code; attempt $attempt of $RESTARTS to go on, in 10 s" >&2
  sleep 10
done
