#!/usr/bin/env bash
# The papers' experiments in full on stand-ins for the real files: sets up .venv, then makes videos and a small random
# model, and runs every row of the tables by the commands that the real files take.
#   bash launch/rehearse.sh [DIR] [--scale=20]
# A second call skips what is done; a killed call resumes where it stopped.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" ""
exec "$VENV/bin/python" -m vau_jax.launch.rehearse "$@"
