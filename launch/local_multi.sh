#!/usr/bin/env bash
# N processes of one run on this machine, each with its number before its lines.
#   bash launch/local_multi.sh [--dry-run] N PROGRAM [ARGUMENTS]
# The exit code is that of the first process that failed. SIGTERM and Ctrl-C are passed on to all.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ $# -ge 2 ] || fail "usage: bash launch/local_multi.sh [--dry-run] N PROGRAM [ARGUMENTS]"
N=$1 PORT=${PORT:-$((20000 + RANDOM % 20000))}
need N "a number of processes" count
need PORT "a number" port
shift
here=$(dirname "${BASH_SOURCE[0]}")

children=()
trap 'kill -TERM "${children[@]}" 2>/dev/null || true' TERM INT
for ((i = 0; i < N; i++)); do
  settings=("JAX_COORDINATOR_ADDRESS=localhost:$PORT" "JAX_NUM_PROCESSES=$N" "JAX_PROCESS_ID=$i")
  if [ "$DRY_RUN" = 1 ]; then
    run env "${settings[@]}" bash launch/run.sh "$@"
  else
    env "${settings[@]}" bash "$here/run.sh" "$@" > >(sed -u "s/^/[$i] /") 2>&1 &
    children+=($!)
  fi
done

failed=0
for child in "${children[@]}"; do
  code=0
  wait_for "$child" || code=$?
  if [ "$failed" = 0 ]; then
    failed=$code
  fi
done
exit "$failed"
