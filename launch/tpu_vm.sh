#!/usr/bin/env bash
# A TPU pod slice as plain VMs, by queued resources.
#   bash launch/tpu_vm.sh [--dry-run] create | setup | run|keep PROGRAM ARGUMENTS | logs | status | delete
#
# Environment: PROJECT, ZONE, NAME (of the slice), TYPE (such as v5litepod-16, v5p-128, v6e-64), SPOT=1 for spot chips,
# BUCKET (a Cloud Storage bucket with hierarchical namespace for workdirs: it is mounted as ~/runs on every host; others
# cannot rename a folder at once), RESTARTS (default 3), PORT by which the processes find each other (default 8476).
#
# setup copies this checkout's commit (or REVISION) to all hosts and installs it; run starts one process a host, which find
# each other. The same run again resumes from its last checkpoint.
#
# keep does all of it until the run is done, from a machine that stays on: it looks every POLL seconds (default 60), and
# after a preemption creates the slice anew, at most RESTARTS times, and waits at most WAIT seconds for it (default 86400).
# Called again, it finds its run where it is. Exit code 0: the run is done, and the slice is still there; 2: a mistake in
# the arguments; 1: the run failed, or there were too many preemptions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh
action=${1:-}
[ $# -gt 0 ] && shift
RESTARTS=${RESTARTS:-3} WORKER=${WORKER:-0} PORT=${PORT:-8476} REVISION=${REVISION:-HEAD} PREEMPTED=75
need PROJECT "the Google Cloud project" project
need ZONE "such as us-west4-a" name
need NAME "a name for the slice" name
need RESTARTS "a number" number
need PORT "of the first host, open to the others" port
need REVISION "a commit" '[A-Za-z0-9][-A-Za-z0-9._/]*'
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

state_of() { # the queued resource's state, NONE without one, UNKNOWN where that cannot be asked
  local state log
  log=$(mktemp)
  if state=$(bash launch/tpu_vm.sh status 2>"$log"); then
    echo "${state:-UNKNOWN}"
  elif grep -qi "not.found" "$log"; then
    echo NONE
  else
    cat "$log" >&2
    echo UNKNOWN
  fi
  rm -f "$log"
}

run_code() { # "CODE PROCESS CHECKSUM" of the first host's run; CODE is none without one, lost where its process is gone
  # shellcheck disable=SC2016 # the host expands it
  local ask='code=none pid=- sum=-; { read -r code pid sum < vau_jax/run.code; } 2>/dev/null; if [ "$code" = running ]'
  # shellcheck disable=SC2016
  ask+=' && ! grep -qs run.sh "/proc/$pid/cmdline"; then code=lost; fi; echo "$code $pid $sum"'
  run gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=0 --ssh-flag=-oConnectTimeout=30 \
    --ssh-flag=-oServerAliveInterval=15 --command="$ask"
}

say() { echo "keep: $*" >&2; }

give_up() {
  echo "error: keep: $*; the same command goes on from the last checkpoint" >&2
  exit 1
}

again() { # counts an attempt to go on
  attempts=$((attempts + 1))
  [ "$attempts" -le "$RESTARTS" ] || give_up "$1, and RESTARTS=$RESTARTS attempts are used up"
  say "$1; attempt $attempts of $RESTARTS to go on"
}

begin() {
  if bash launch/tpu_vm.sh setup && bash launch/tpu_vm.sh run "$@"; then
    begun=1
    trouble="the run left no trace"
  else
    trouble="the run could not be set up or started"
  fi
}

keep() {
  local sum state before="" code whose since=$SECONDS silent=0 created=0 begun=0 attempts=0 trouble=""
  sum=$(checksum "$@")
  while true; do
    state=$(state_of)
    [ "$state" = "$before" ] || say "$NAME is $state"
    before=$state
    if [ "$state" != ACTIVE ] && [ $((SECONDS - since)) -gt "$WAIT" ]; then
      give_up "$NAME was not ACTIVE for WAIT=$WAIT seconds"
    fi
    case $state in
      NONE | FAILED | SUSPENDED | PREEMPTED)
        [ "$state$created" = NONE0 ] || again "$NAME is $state"
        if [ "$state" != NONE ]; then # a name can be used again once its resource is deleted
          bash launch/tpu_vm.sh delete || say "$NAME was not deleted"
        fi
        bash launch/tpu_vm.sh create || say "$NAME was not created"
        created=1 since=$SECONDS silent=0 trouble=""
        ;;
      ACTIVE)
        since=$SECONDS code="" whose=""
        read -r code _ whose < <(run_code | grep -E '^[a-z0-9]+ [-0-9]+ [-0-9]+$') || true # gcloud may say more
        if [ -n "$code" ] && [ "$whose" != "$sum" ]; then
          [ "$code" != running ] || fail "keep: another run is on $NAME: let it end, or take another NAME"
          code=none
        fi
        [ -z "$code" ] || silent=0
        case $begun$code in # a failure from before this call: the cause may be gone
          0[1-9] | 0[1-9][0-9]) [ "$code" = "$PREEMPTED" ] || code=none ;;
        esac
        case $code in
          running) begun=1 trouble="" ;;
          0)
            say "done; $NAME is still there: bash launch/tpu_vm.sh delete"
            return
            ;;
          2) fail "keep: the run's arguments are a mistake, see: bash launch/tpu_vm.sh logs" ;;
          none)
            [ -z "$trouble" ] || again "$trouble"
            begin "$@"
            ;;
          "$PREEMPTED" | lost | 129 | 13? | 14?)
            if [ -z "$trouble" ]; then
              trouble="the run was preempted" # and the slice goes, too, or is still there when this is seen once more
            else
              again "$trouble"
              begin "$@"
            fi
            ;;
          "")
            silent=$((silent + 1))
            if [ "$silent" -ge 10 ]; then
              again "the first host does not answer"
              bash launch/tpu_vm.sh delete || say "$NAME was not deleted"
              silent=0 created=0
            fi
            ;;
          *) give_up "the run failed with exit code $code, see: bash launch/tpu_vm.sh logs" ;;
        esac
        ;;
    esac
    sleep "$POLL"
  done
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
    need BUCKET "a bucket for workdirs" bucket
    run git archive --format=tar.gz --output=/tmp/vau_jax.tar.gz "$REVISION"
    run gcloud compute tpus tpu-vm scp /tmp/vau_jax.tar.gz "$NAME:" "${place[@]}" --worker=all
    on_all "mkdir -p vau_jax runs && tar -xzf vau_jax.tar.gz -C vau_jax"
    on_all "command -v gcsfuse || (sudo apt-get update -qq && sudo apt-get install -y -qq gcsfuse)"
    on_all "mountpoint -q runs || gcsfuse --implicit-dirs $BUCKET runs"
    on_all "cd vau_jax && bash -c 'source launch/venv.sh tpu'"
    ;;
  run)
    [ $# -gt 0 ] || fail "run what? Such as: run vau_jax.train --config=configs/vau_r1_sft.py --workdir=../runs/sft"
    settings="EXTRA=tpu RESTARTS=$RESTARTS JAX_COORDINATOR_PORT=$PORT CODE_FILE=run.code PREEMPTED_CODE=$PREEMPTED"
    on_all "cd vau_jax && $settings nohup bash launch/run.sh $(quoted "$@") > run.log 2>&1 < /dev/null &"
    ;;
  keep)
    [ $# -gt 0 ] || fail "keep what? Such as: keep vau_jax.train --config=configs/vau_r1_sft.py --workdir=../runs/sft"
    POLL=${POLL:-60} WAIT=${WAIT:-86400}
    need POLL "seconds" count
    need WAIT "seconds" count
    need TYPE "such as v5litepod-16" name
    runtime >/dev/null
    need BUCKET "a bucket for workdirs" bucket
    if [ "$DRY_RUN" = 1 ]; then
      for step in status create setup "run $(quoted "$@")"; do
        echo "bash launch/tpu_vm.sh $step"
      done
      run_code
      exit
    fi
    REVISION=$(git rev-parse "$REVISION") # what is committed in the meantime is not for this run
    export REVISION
    keep "$@"
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
    fail "usage: bash launch/tpu_vm.sh [--dry-run] create | setup | run|keep PROGRAM ARGUMENTS | logs | status | delete"
    ;;
esac
