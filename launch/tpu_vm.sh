#!/usr/bin/env bash
# A TPU pod slice as plain VMs, by queued resources.
#   bash launch/tpu_vm.sh [--dry-run] create | setup | run PROGRAM ARGUMENTS | logs | status | delete
#
# Environment: PROJECT, ZONE, NAME (of the slice), TYPE (such as v5litepod-16, v5p-128, v6e-64), SPOT=1 for spot chips,
# BUCKET (a Cloud Storage bucket with hierarchical namespace for workdirs: it is mounted as ~/runs on every host; others
# cannot rename a folder at once), RESTARTS (default 3), PORT by which the processes find each other (default 8476).
#
# setup copies this checkout to all hosts and installs it; run starts one process a host, which find each other. Call
# `run` again after a preemption: the run resumes from its last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh
action=${1:-}
[ $# -gt 0 ] && shift
RESTARTS=${RESTARTS:-3} WORKER=${WORKER:-0} PORT=${PORT:-8476}
need PROJECT "the Google Cloud project" project
need ZONE "such as us-west4-a" name
need NAME "a name for the slice" name
need RESTARTS "a number" number
need PORT "of the first host, open to the others" count
need WORKER "a number, or all" 'all|[0-9]{1,6}'
place=(--project="$PROJECT" --zone="$ZONE")

runtime() { # the VM image that belongs to a type of slice
  case $TYPE in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "TYPE=$TYPE is unknown: expected v4-N, v5litepod-N, v5p-N or v6e-N" ;;
  esac
}

on_all() { # a command on every host
  run gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=all --command="$1"
}

case $action in
  create)
    need TYPE "such as v5litepod-16" name
    image=$(runtime)
    options=(--node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$image")
    if [ "${SPOT:-0}" = 1 ]; then
      options+=(--spot)
    fi
    run gcloud compute tpus queued-resources create "$NAME" "${place[@]}" "${options[@]}"
    ;;
  setup)
    need BUCKET "a bucket for workdirs" '[a-z0-9][-a-z0-9._]{1,220}[a-z0-9]'
    run git archive --format=tar.gz --output=/tmp/vau_jax.tar.gz HEAD
    run gcloud compute tpus tpu-vm scp /tmp/vau_jax.tar.gz "$NAME:" "${place[@]}" --worker=all
    on_all "mkdir -p vau_jax runs && tar -xzf vau_jax.tar.gz -C vau_jax"
    on_all "command -v gcsfuse || (sudo apt-get update -qq && sudo apt-get install -y -qq gcsfuse)"
    on_all "mountpoint -q runs || gcsfuse --implicit-dirs $BUCKET runs"
    on_all "cd vau_jax && bash -c 'source launch/venv.sh tpu'"
    ;;
  run)
    [ $# -gt 0 ] || fail "run what? Such as: run vau_jax.train --config=configs/vau_r1_sft.py --workdir=../runs/sft"
    settings="EXTRA=tpu RESTARTS=$RESTARTS JAX_COORDINATOR_PORT=$PORT"
    on_all "cd vau_jax && $settings nohup bash launch/run.sh $(quoted "$@") > run.log 2>&1 < /dev/null &"
    ;;
  logs)
    run gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker="$WORKER" \
      --command="tail -n 100 -f vau_jax/run.log"
    ;;
  status)
    run gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format="value(state.state)"
    ;;
  delete)
    run gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet
    ;;
  *)
    fail "usage: bash launch/tpu_vm.sh [--dry-run] create | setup | run PROGRAM ARGUMENTS | logs | status | delete"
    ;;
esac
