# shellcheck shell=bash
# Functions that the scripts share.

# rustup installs Cargo here.
PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin

# die WORDS…: ends the script with an error message.
die() {
  echo "${0##*/}: $*" >&2
  exit 1
}

# Prints the time in milliseconds, for differences.
now_ms() {
  echo $((${EPOCHREALTIME/[.,]/} / 1000))
}

# seconds MILLISECONDS: prints seconds with two decimals, 1234 as 1.23.
seconds() {
  printf '%d.%02d' $(($1 / 1000)) $(($1 % 1000 / 10))
}

# stage NAME COMMAND…: runs a command and prints its name, result and duration. `set -e` has no
# effect in a function that runs as COMMAND.
stage() {
  local name=$1 start rc=0
  shift
  echo "=== $name"
  start=$(now_ms)
  "$@" || rc=$?
  local result=ok
  [ $rc = 0 ] || result="failed ($rc)"
  echo "=== $name: $result after $(seconds $(($(now_ms) - start))) s"
  return "$rc"
}
