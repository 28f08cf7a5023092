# shellcheck shell=sh
# What agent, serve and disk share.

settings=/run/settings.json
plan=/run/plan

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

# Reads the settings from the config drive, which must stay for the VM's life: the real agent comes back to it with
# every disk action. Leaves them in $settings and what they ask for in $plan; says on standard output what is wrong.
read_settings() {
  for label in CONFIG-2 config-2; do
    drive=/dev/disk/by-label/$label
    [ ! -e "$drive" ] || break
  done
  [ -e "$drive" ] || { echo "there is no disk labelled config-2 or CONFIG-2"; return 1; }
  mkdir -p /run/config
  mount -o ro "$drive" /run/config || { echo "$drive can not be mounted"; return 1; }
  copy_settings /run/config/ec2/latest
  result=$?
  umount /run/config
  return $result
}

copy_settings() {
  for file in meta-data.json user-data; do
    [ -e "$1/$file" ] || { echo "there is no ec2/latest/$file"; return 1; }
  done
  umask 077
  jq -r -L /usr/lib/guest --slurpfile meta "$1/meta-data.json" 'include "settings"; plan' "$1/user-data" > "$plan.new" 2> /dev/null ||
    { echo "ec2/latest/meta-data.json or user-data is not JSON, or not as settings are"; return 1; }
  ! sed -n 's/^problem|//p' "$plan.new" | grep . || return 1
  cp "$1/user-data" "$settings.new"
  mv "$settings.new" "$settings"
  mv "$plan.new" "$plan"
}
