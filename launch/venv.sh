# shellcheck shell=bash
# Sourced by demo.sh and test.sh: makes .venv in the repository with pinned packages, once, and enters the repository.
# PYTHON names another interpreter; VENV another folder; PACKAGES_ONLY=1 leaves the project itself out. Usage: source
# launch/venv.sh [EXTRA], or bash to install alone.
# Where no Python 3.11 or 3.12 is on PATH (TPU VMs ship 3.10), uv fetches one into the user's own folder, once.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

find_python() {
  local candidate candidates=${PYTHON:-python3.12 python3.11 python3 python} needed="Python 3.11 or 3.12 is needed" log
  for candidate in $candidates; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  if [ -n "${PYTHON:-}" ]; then
    echo "error: $needed, tried: $PYTHON; set PYTHON=/path/to/it" >&2
    return 2
  fi
  echo "setup: $needed, and not on PATH: uv fetches it" >&2
  log=$(mktemp)
  if ! fetch_python 2>"$log"; then
    echo "error: $needed, none of $candidates is it, and uv cannot fetch it ($(grep . "$log" | tail -n 1 | sed 's/^ *//')); install" \
      "it and set PYTHON=/path/to/it, or without the internet name mirrors: PIP_INDEX_URL and UV_PYTHON_INSTALL_MIRROR" >&2
    rm -f "$log"
    return 2
  fi
  rm -f "$log"
}

fetch_python() { # prints the path of a Python that uv fetches, by the checksum that it has for it, or has fetched before
  local uv=uv tools="" code=0
  if ! command -v uv >/dev/null; then
    tools=$(mktemp -d)
    uv=$tools/bin/uv
    python3 -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --target "$tools" \
      --requirement launch/requirements-uv.txt >&2 || code=$?
  fi
  if [ "$code" = 0 ]; then # settings instead of options: every version of uv reads these, or ignores them
    UV_NO_PROGRESS=1 UV_PYTHON_INSTALL_BIN=0 "$uv" python install 3.11 >&2 &&
      UV_PYTHON_PREFERENCE=only-managed "$uv" python find --system 3.11 || code=$?
  fi
  [ -z "$tools" ] || rm -rf "$tools"
  return "$code"
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
  "$interpreter" -m venv "$VENV" || exit 2
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
    { [ "${PACKAGES_ONLY:-0}" = 1 ] || { install --editable . && touch "$stamp"; }; } || exit
fi
