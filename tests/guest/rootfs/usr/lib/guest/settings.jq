# The settings as the real agent takes them: it panics, or exits, or never becomes reachable over what is named here.

def hint_problems($name):
  if . == null or type == "string" then empty
  elif type != "object" then "\($name) is neither a string nor an object"
  else to_entries[] | select(.value | type != "string") | "\($name).\(.key) is not a string" end;

def network_problems($name):
  (if .type == "vip" then empty
   elif (.mac | type) != "string" then "networks.\($name).mac is missing"
   elif .mac | test("^([0-9a-f]{2}:){5}[0-9a-f]{2}$") | not then "networks.\($name).mac is not lower case with colons"
   elif .type == "dynamic" or .use_dhcp == true or .ip == null or .netmask == null then
     "networks.\($name) wants DHCP, which this guest does not have"
   else empty end),
  (if .prefix == null or (.prefix | type) == "string" then empty else "networks.\($name).prefix is not a string" end);

def all_problems:
  (if (.agent_id | type) == "string" and .agent_id != "" then empty else "agent_id is missing" end),
  (if (.vm.name | type) == "string" then empty else "vm.name is missing" end),
  (if (.mbus // .env.bosh.mbus.urls[0]) == null then "mbus is missing" else empty end),
  (if (.blobstore // .env.bosh.blobstores[0]) == null then "blobstore is missing" else empty end),
  (if (.disks.system // "" | type) == "string" then empty else "disks.system is not a string" end),
  (.disks.ephemeral | hint_problems("disks.ephemeral")),
  (.disks.persistent // {} | to_entries[] | .key as $cid | .value | hint_problems("disks.persistent.\($cid)")),
  (if (.env.bosh.swap_size // 0 | type) == "number" then empty else "env.bosh.swap_size is not a number" end),
  (.networks // {} | to_entries[] | .key as $name | .value | network_problems($name));

# All of them on one line; nothing if there are none.
def problems: [all_problems] | if . == [] then empty else join("; ") end;

# The ephemeral disk's path; nothing if there is none.
def ephemeral: .disks.ephemeral | if type == "object" then .path else . end // empty;

# Length of a netmask, which for IPv6 comes in the long form: ffff:ffff:ffff:ffff:0000:0000:0000:0000.
def prefix_length:
  if contains(":") then [scan("[fec8]") | {"f": 4, "e": 3, "c": 2, "8": 1}[.]]
  else [split(".")[] | {"255": 8, "254": 7, "252": 6, "248": 5, "240": 4, "224": 3, "192": 2, "128": 1, "0": 0}[.]] end
  | add // 0;

def has_default($what): .default // [] | index($what) != null;

# For each network "mac|address/length|gateway"; the gateway only where it is the default one, as the real agent does it.
def addresses:
  .networks[] | select(.type != "vip")
  | "\(.mac)|\(.ip)/\(.netmask | prefix_length)|\(if has_default("gateway") then .gateway // "" else "" end)";

# For each extra route "mac|destination/length|gateway".
def routes:
  .networks[] | select(.type != "vip") | .mac as $mac | .routes // [] | .[]
  | "\($mac)|\(.destination)/\(.netmask | prefix_length)|\(.gateway)";

# Name servers of the network that has them by default, or of the only one.
def name_servers:
  [.networks[]] | if length == 1 then .[0] else map(select(has_default("dns")))[0] end | .dns // [] | .[];

# Where a key is, never what it holds: settings are full of secrets.
def key_paths: [paths(type != "object" and type != "array") | map(tostring) | join(".")];
