# shellcheck shell=sh
# What agent, serve and disk share.

settings=/run/settings.json

say() {
  echo "$*" > /dev/console
}

# Waits until a path is there, as long as the real agent does.
appears() {
  tries=300
  until [ -e "$1" ]; do
    tries=$((tries - 1))
    [ "$tries" -gt 0 ] || return 1
    usleep 100000
  done
}

# The expression $1 of the settings, with the functions of settings.jq.
setting() {
  jq -r -L /usr/lib/guest "include \"settings\"; $1" "$settings"
}

# Reads the settings from the config drive, which must stay for the VM's life: the real agent comes back to it with
# every disk action. Says on standard output what is wrong.
read_settings() {
  for label in CONFIG-2 config-2; do
    drive=/dev/disk/by-label/$label
    [ ! -e "$drive" ] || break
  done
  [ -e "$drive" ] || { echo "there is no disk labelled config-2 or CONFIG-2"; return 1; }
  mkdir -p /run/config
  mount -o ro "$drive" /run/config || { echo "$drive can not be mounted"; return 1; }
  problem=$(copy_settings /run/config/ec2/latest)
  umount /run/config
  [ -z "$problem" ] || { echo "$problem"; return 1; }
}

copy_settings() {
  jq -e 'type == "object"' "$1/meta-data.json" > /dev/null 2>&1 || { echo "ec2/latest/meta-data.json is missing or no object"; return; }
  jq -e 'type == "object"' "$1/user-data" > /dev/null 2>&1 || { echo "ec2/latest/user-data is missing or no object"; return; }
  (umask 077 && cp "$1/user-data" "$settings.new")
  mv "$settings.new" "$settings"
  setting problems
}
