# shellcheck shell=bash
# Sourced by the launchers: --dry-run, required settings, and words that survive a remote shell.

DRY_RUN=0

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
