#!/usr/bin/env bash
# A run on a GKE cluster with TPUs: by XPK, or as a JobSet manifest for kubectl.
#   bash launch/xpk.sh [--dry-run] create PROGRAM ARGUMENTS | manifest PROGRAM ARGUMENTS | logs | status | delete
#
# Environment: PROJECT, ZONE, CLUSTER, NAME (of the workload), TYPE (as XPK names it: v5litepod-16, v5p-128, v6e-64),
# SLICES (default 1), IMAGE (a container with this repository in /vau_jax and its packages), PORT by which the processes
# find each other (default 8476), RESTARTS (default 3): how often run.sh restarts a process that failed, and how often the
# JobSet starts all anew after a preemption, or after run.sh gave up.
# manifest prints YAML and needs also: TOPOLOGY (4x4), ACCELERATOR (tpu-v5-lite-podslice), HOSTS (4), CHIPS a host (4).
# Workdirs must be on storage that all hosts see, such as a mounted Filestore.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh
action=${1:-}
[ $# -gt 0 ] && shift
RESTARTS=${RESTARTS:-3} SLICES=${SLICES:-1} PORT=${PORT:-8476}
PREEMPTED=75 GRACE=300 # exit code of a preempted run, which is not complete; seconds for its last step and checkpoint
need NAME "a name for the workload" name
need RESTARTS "a number" number
need SLICES "a number" count
need PORT "of the first host, open to the others" count

remote() { # what a host runs; by exec, as signals reach only a container's first process
  local settings="RUN_PYTHON=python RESTARTS=$RESTARTS PREEMPTED_CODE=$PREEMPTED JAX_COORDINATOR_PORT=$PORT"
  printf '%s\n' "cd /vau_jax && exec env $settings bash launch/run.sh $(quoted "$@")"
}

in_cluster() {
  need PROJECT "the Google Cloud project" project
  need ZONE "such as us-west4-a" name
  need CLUSTER "the GKE cluster" name
  place=(--project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER")
}

case $action in
  create)
    [ $# -gt 0 ] || fail "create what? Such as: create vau_jax.train --config=configs/vau_r1_sft.py --workdir=/runs/sft"
    in_cluster
    need TYPE "such as v5litepod-16" name
    need IMAGE "a container image with this repository" image
    [[ $* != *$'\n'* ]] || fail "XPK writes the command into YAML as it is: no line breaks in arguments; use manifest"
    run xpk workload create "${place[@]}" --workload="$NAME" --tpu-type="$TYPE" --num-slices="$SLICES" \
      --max-restarts="$RESTARTS" --restart-on-exit-codes="$PREEMPTED" --termination-grace-period-seconds="$GRACE" \
      --docker-image="$IMAGE" --command="$(remote "$@")"
    ;;
  manifest)
    [ $# -gt 0 ] || fail "manifest of what? PROGRAM and its ARGUMENTS"
    need IMAGE "a container image with this repository" image
    need TOPOLOGY "such as 4x4" '[0-9]{1,4}(x[0-9]{1,4}){1,2}'
    need ACCELERATOR "such as tpu-v5-lite-podslice" name
    need HOSTS "hosts of a slice" count
    need CHIPS "chips of a host" count
    cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(yaml "$NAME")
spec:
  failurePolicy:
    maxRestarts: $RESTARTS
  replicatedJobs:
    - name: slice
      replicas: $SLICES
      template:
        spec:
          parallelism: $HOSTS
          completions: $HOSTS
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: $GRACE
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $(yaml "$ACCELERATOR")
                cloud.google.com/gke-tpu-topology: $(yaml "$TOPOLOGY")
              containers:
                - name: run
                  image: $(yaml "$IMAGE")
                  command: ["bash", "-c"]
                  args:
                    - $(yaml "$(remote "$@")")
                  resources:
                    limits:
                      google.com/tpu: $CHIPS
YAML
    ;;
  logs)
    run kubectl logs --follow --tail=100 --selector="jobset.sigs.k8s.io/jobset-name=$NAME"
    ;;
  status)
    in_cluster
    run xpk workload list "${place[@]}" --filter-by-job="$NAME"
    ;;
  delete)
    in_cluster
    run xpk workload delete "${place[@]}" --workload="$NAME"
    ;;
  *)
    fail "usage: bash launch/xpk.sh [--dry-run] create|manifest PROGRAM ARGUMENTS | logs | status | delete"
    ;;
esac
