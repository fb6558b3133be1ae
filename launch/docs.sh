#!/usr/bin/env bash
# The reference of the Python interface, made of the docstrings by pdoc: open FOLDER/index.html.
#   bash launch/docs.sh [FOLDER]        default: runs/docs
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" "${EXTRA-docs}"
modules=(vau_jax '!vau_jax.app' '!vau_jax.web') # these two need the extra app, and have no interface in Python
for folder in configs data_prep launch; do
  modules+=("vau_jax.$folder")
done
JAX_PLATFORMS=cpu exec "$VENV/bin/python" -W error::UserWarning -m pdoc --output-directory "${1:-runs/docs}" "${modules[@]}"
