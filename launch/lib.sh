# shellcheck shell=bash
# Sourced by the launchers: --dry-run, required settings, words that survive a remote shell, waiting.

DRY_RUN=0
if [ "${1:-}" = --dry-run ]; then # sourced without arguments, these are the launcher's own
  DRY_RUN=1
  shift
fi

run() { # runs a command, or with --dry-run prints it as it would be typed
  if [ "$DRY_RUN" = 1 ]; then
    printf '%q ' "$@" | sed 's/ $//'
    echo
  else
    "$@"
  fi
}

fail() { # a user's mistake: one line, exit code 2
  echo "error: $*" >&2
  exit 2
}

need() { # need NAME "what it is": the variable must be set
  if [ -z "${!1:-}" ]; then
    fail "$1 is not set: $2"
  fi
}

quoted() { # its arguments as words for another shell
  local word text=""
  for word in "$@"; do
    text+="$(printf '%q' "$word") "
  done
  echo "${text% }"
}

wait_for() { # wait_for PID: returns its exit code, however many signals cut the wait short
  local code=0
  wait "$1" || code=$?
  while kill -0 "$1" 2>/dev/null; do
    code=0
    wait "$1" || code=$?
  done
  return "$code"
}
