# shellcheck shell=bash
# Sourced by demo.sh and test.sh: makes .venv in the repository with pinned packages, once, and enters the repository.
# PYTHON names another interpreter; VENV another folder. Usage: source launch/venv.sh [EXTRA], or bash to install alone.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.12 python3.11 python3 python}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or 3.12 is needed, tried: ${PYTHON:-python3.12 python3.11 python3 python}; set PYTHON=/path/to/it" >&2
  return 2
}

VENV="${VENV:-.venv}"
extra="${1:-}"
case $extra in
  "" | app | cuda12 | docs | gcs | test | tpu) ;;
  *)
    echo "error: EXTRA=$(printf '%q' "$extra") is unknown: expected app, cuda12, docs, gcs, test, tpu or nothing" >&2
    exit 2
    ;;
esac
if [ ! -x "$VENV/bin/python" ]; then
  interpreter="$(find_python)" || exit 2
  echo "setup: making $VENV with $interpreter"
  "$interpreter" -m venv "$VENV"
fi

install() { # packages whose files have the hashes that the file lists, and nothing that it does not list
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation "$@"
}

pins=launch/requirements
stamp="$VENV/installed-${extra:-run}-$(cat pyproject.toml $pins-*.txt | sha256sum | cut -c1-16)"
if [ ! -e "$stamp" ]; then
  echo "setup: installing pinned packages${extra:+ with the extra \"$extra\"} (a few minutes the first time)"
  # One after the other, each only when the one before is there: set -e is the caller's to set.
  install --require-hashes --requirement $pins-build.txt &&
    install --require-hashes --requirement $pins-run.txt ${extra:+--requirement "$pins-$extra.txt"} &&
    { [ "$extra" != test ] || "$VENV/bin/python" -m pip install --quiet --requirement $pins-torch.txt; } &&
    install --editable . &&
    touch "$stamp" || exit
fi
