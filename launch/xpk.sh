#!/usr/bin/env bash
# A run on a GKE cluster with TPUs: by XPK, or as a JobSet manifest for kubectl.
#   bash launch/xpk.sh [--dry-run] create|manifest PROGRAM ARGUMENTS | logs | status | delete
#
# Environment: PROJECT, ZONE, CLUSTER, NAME (of the workload), TYPE (as XPK names it: v5litepod-16, v5p-128, v6e-64),
# SLICES (default 1), IMAGE (a container with this repository in /vau_jax and its packages), PORT by which the processes
# find each other (default 8476), RESTARTS (default 3): how often run.sh restarts a process that failed, and how often the
# JobSet starts all anew after a preemption, or after run.sh gave up.
# manifest prints YAML and needs also: TOPOLOGY (4x4), ACCELERATOR (tpu-v5-lite-podslice), HOSTS (4), CHIPS a host (4), and
# for workdirs, videos and weights, which all hosts see as /runs, either BUCKET (a Cloud Storage bucket with hierarchical
# namespace, that the Kubernetes service account ACCOUNT (default "default") may write to) or CLAIM (a
# PersistentVolumeClaim that many hosts may write to, such as Filestore's). For create attach either to the cluster:
#   xpk storage attach runs --type=gcsfuse --bucket=BUCKET --mount-point=/runs --readonly=false --auto-mount=true ...
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
need PORT "of the first host, open to the others" port

remote() { # what a host runs; by exec, as signals reach only a container's first process
  local settings="RUN_PYTHON=python RESTARTS=$RESTARTS PREEMPTED_CODE=$PREEMPTED JAX_COORDINATOR_PORT=$PORT"
  printf '%s\n' "cd /vau_jax && exec env $settings bash launch/run.sh $(quoted "$@")"
}

literal() { # its argument as Kubernetes leaves it: $(NAME) is a variable there, and $$ a dollar
  printf '%s' "${1//\$/\$\$}"
}

volume() { # what is mounted as /runs
  if [ -n "${BUCKET:-}" ]; then
    cat <<YAML
                - name: runs
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    volumeAttributes:
                      bucketName: $(yaml "$BUCKET")
                      mountOptions: "implicit-dirs"
YAML
  else
    cat <<YAML
                - name: runs
                  persistentVolumeClaim:
                    claimName: $(yaml "$CLAIM")
YAML
  fi
}

bucket_access() { # the sidecar that mounts a bucket; without its limits, as it keeps what is written until it is sent
  [ -n "${BUCKET:-}" ] || return 0
  cat <<YAML
            metadata:
              annotations:
                gke-gcsfuse/volumes: "true"
                gke-gcsfuse/cpu-limit: "0"
                gke-gcsfuse/memory-limit: "0"
                gke-gcsfuse/ephemeral-storage-limit: "0"
YAML
}

placement() { # each slice of several on a node pool of its own
  [ "$SLICES" -gt 1 ] || return 0
  cat <<YAML
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
YAML
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
    ACCOUNT=${ACCOUNT:-default}
    need ACCOUNT "a Kubernetes service account" name
    [ -z "${BUCKET:-}" ] || [ -z "${CLAIM:-}" ] || fail "BUCKET and CLAIM are both set: expected one of them, for /runs"
    if [ -n "${CLAIM:-}" ]; then
      need CLAIM "a PersistentVolumeClaim" name
    else
      need BUCKET "a bucket for workdirs, videos and weights (or CLAIM, a PersistentVolumeClaim)" bucket
    fi
    grep . <<YAML # a part that is left out would be an empty line
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(yaml "$NAME")
$(placement)
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
$(bucket_access)
            spec:
              serviceAccountName: $(yaml "$ACCOUNT")
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
                    - $(yaml "$(literal "$(remote "$@")")")
                  resources:
                    limits:
                      google.com/tpu: $CHIPS
                  volumeMounts:
                    - name: runs
                      mountPath: /runs
                    - name: shm
                      mountPath: /dev/shm
              volumes:
$(volume)
                - name: shm
                  emptyDir:
                    medium: Memory
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
