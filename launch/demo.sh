#!/usr/bin/env bash
# The main job on videos it makes: sets up .venv, then makes videos and a model, SFT, RFT, evaluation, report.
#   bash launch/demo.sh [quick] [WORKDIR] [--config.key=value ...]
# A second call skips what is done; a killed call resumes where it stopped.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" ""
exec "$VENV/bin/python" -m vau_jax.launch.demo "$@"
