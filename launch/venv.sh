# shellcheck shell=bash
# Sourced by demo.sh and test.sh: makes .venv in the repository with pinned packages, once, and enters the repository.
# PYTHON names another interpreter; VENV another folder. Usage: source launch/venv.sh [EXTRA]
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
if [ ! -x "$VENV/bin/python" ]; then
  interpreter="$(find_python)" || exit 2
  echo "setup: making $VENV with $interpreter"
  "$interpreter" -m venv "$VENV"
fi
stamp="$VENV/installed-${extra:-run}-$(cat pyproject.toml launch/constraints.txt | sha256sum | cut -c1-16)"
if [ ! -e "$stamp" ]; then
  echo "setup: installing pinned packages${extra:+ with the extra \"$extra\"} (a few minutes the first time)"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --constraint launch/constraints.txt --editable ".${extra:+[$extra]}"
  touch "$stamp"
fi
