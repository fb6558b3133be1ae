# shellcheck shell=bash
# Sourced by the launchers: --dry-run, required settings, words that survive a remote shell, waiting.

DRY_RUN=0
if [ "${1:-}" = --dry-run ]; then # sourced without arguments, these are the launcher's own
  DRY_RUN=1
  shift
fi

run() { # runs a command, or with --dry-run prints it as it would be typed
  if [ "$DRY_RUN" = 1 ]; then
    quoted "$@"
  else
    "$@"
  fi
}

fail() { # a user's mistake: one line, exit code 2
  echo "error: $*" >&2
  exit 2
}

# need NAME "what it is" KIND: the variable must be set, and be of the kind (below, or a pattern) from end to end. It goes
# into commands, YAML and other machines' shells: nothing else may be in it.
need() {
  local LC_ALL=C value=${!1:-} pattern=$3
  [ -n "$value" ] || fail "$1 is not set: $2"
  case $3 in
    name) pattern='[a-z]([-a-z0-9]{0,37}[a-z0-9])?' ;; # RFC 1035, and short enough for what GKE makes of it
    project) pattern='[a-z0-9][-a-z0-9.:]{0,99}' ;;
    bucket) pattern='[a-z0-9][-a-z0-9._]{1,220}[a-z0-9]' ;;
    image) pattern='[a-zA-Z0-9][-a-zA-Z0-9._/:@]{0,254}' ;;
    port) pattern='[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]' ;;
    count) pattern='[1-9][0-9]{0,5}' ;;
    number) pattern='0|[1-9][0-9]{0,5}' ;;
  esac
  [[ $value =~ ^($pattern)$ ]] || fail "$1=$(printf '%q' "$value") cannot be used: expected $2 ($pattern)"
}

quoted() { # its arguments as words for any shell: $'..' is bash's own, a line break in single quotes is everybody's
  local LC_ALL=C word words=()
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      word="'${word//\'/\'\\\'\'}'"
    fi
    words+=("$word")
  done
  printf '%s\n' "${words[*]}"
}

checksum() { # a number for a program and its arguments
  quoted "$@" | cksum | cut -d ' ' -f 1
}

yaml() { # its argument as a YAML string, in ASCII
  local LC_ALL=C.UTF-8 text=$1 out="" char i
  for ((i = 0; i < ${#text}; i++)); do
    char=${text:i:1}
    case $char in
      [\"\\]) char="\\$char" ;;
      [!\ -~]) printf -v char '\\U%08X' "'$char" ;;
    esac
    out+=$char
  done
  printf '"%s"\n' "$out"
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
