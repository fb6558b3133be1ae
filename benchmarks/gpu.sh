#!/usr/bin/env bash
# All that a GPU can tell and a CPU cannot, in one command and under nine minutes: see gpu.py beside this file.
#   [OUT=./gpu_results] [WHEELS=./wheels] bash benchmarks/gpu.sh [--tiny] [--only=3b-lora ...]
#   PYTHON   the interpreter (default: python3)
#   WHEELS   folder of wheels for what it lacks, where there is no internet: all, by
#              pip wheel --no-deps --require-hashes --wheel-dir wheels \
#                -r launch/requirements-run.txt -r launch/requirements-cuda12.txt
#            or those alone that an image with JAX for GPUs lacks, such as grain, av and ml-collections
# An interpreter that has all packages is taken as it is; else the folder's wheels come before its own packages; else
# launch/venv.sh installs everything from PyPI. Nothing of the machine's own is changed.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="${OUT:-./gpu_results}" wheels="${WHEELS:-./wheels}" python="${PYTHON:-python3}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

complete() { # whether an interpreter has the packages; what it lacks is in the log
  "$1" "$root/benchmarks/gpu.py" --help >"$scratch/log" 2>&1
}

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if ! complete "$python" && [ -d "$wheels" ]; then
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --target "$scratch/packages" \
    "$wheels"/*.whl
  PYTHONPATH="$scratch/packages:$PYTHONPATH"
fi
if ! complete "$python"; then
  echo "setup: packages are missing ($(tail -n 1 "$scratch/log")): launch/venv.sh installs them from PyPI" >&2
  PYTHONPATH="$root"
  cd "$root"
  bash launch/venv.sh cuda12 >&2
  python="${VENV:-.venv}/bin/python"
fi
"$python" "$root/benchmarks/gpu.py" --out="$out" "$@"
