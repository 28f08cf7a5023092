# shellcheck shell=bash
# What the scripts share.

# Cargo, where rustup put it for this user.
PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin

die() {
  echo "${0##*/}: $*" >&2
  exit 1
}

# Milliseconds since some fixed moment.
now_ms() {
  echo $((${EPOCHREALTIME/[.,]/} / 1000))
}

# 1234 -> 1.23
seconds() {
  printf '%d.%02d' $(($1 / 1000)) $(($1 % 1000 / 10))
}

# Runs a command and says what it was and how long it took.
stage() {
  local name=$1 start rc=0
  shift
  echo "=== $name"
  start=$(now_ms)
  "$@" || rc=$?
  echo "=== $name: $([ $rc = 0 ] && echo ok || echo "failed ($rc)") after $(seconds $(($(now_ms) - start))) s"
  return $rc
}
