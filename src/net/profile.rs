//! Network profiles: data that says how a network reaches the world. `netconfig/` has the built-in
//! ones.

use std::path::Path;

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::link_name::LinkName;
use crate::schema::Property;
use crate::{choice, document};

macro_rules! built_in {
    ($($name:literal),*) => {
        &[$(($name, include_str!(concat!("../../netconfig/", $name, ".toml")))),*]
    };
}

/// The profiles compiled into the program: name and text.
const BUILT_IN: &[(&str, &str)] = built_in!["nat", "routed", "isolated", "bridge", "vlan", "user"];

document! {
    /// A network profile.
    pub struct Profile {
        /// What a VM's NIC is connected to.
        wire: Wiring;
        /// The bridge of networks that name no bridge.
        bridge: Option<LinkName>;
        /// `own-bridge`: whether the host has the gateway's address on the bridge.
        gateway: bool = false;
        /// `own-bridge`: whether the host forwards packets between the bridge and its other links.
        forward: bool = false;
        /// `own-bridge`: whether the host masquerades what VMs send to the world.
        masquerade: bool = false;
        /// Whether VMs on one bridge reach each other.
        neighbours: bool = true;
    }
}

choice! {
    /// What a NIC is connected to.
    pub enum Wiring ("\"own-bridge\", \"bridge\", \"vlan\" or \"user\"") {
        /// A bridge that the CPI makes.
        OwnBridge = "own-bridge",
        /// A bridge that the operator made.
        Bridge = "bridge",
        /// A VLAN of the operator's bridge, or of a link.
        Vlan = "vlan",
        /// QEMU's own network stack.
        User = "user",
    }
}

impl Profile {
    /// Loads the profile `name` from `<directory>/<name>.toml` if that file exists, else the
    /// built-in profile.
    ///
    /// # Errors
    /// [`ErrorKind::BadConfig`] naming the file and the key, or listing the built-in names.
    pub fn load(name: &str, directory: Option<&Path>) -> Result<Self> {
        let is_valid = !name.is_empty()
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
        if !is_valid {
            let problem = "a network profile's name has only letters, digits, '-' and '_'";
            return Err(Error::new(ErrorKind::BadConfig, problem));
        }
        if let Some(path) = directory.map(|d| d.join(format!("{name}.toml"))).filter(|p| p.exists())
        {
            let text = std::fs::read_to_string(&path).at("read network profile", &path);
            return Self::parse(
                &text.map_err(|e| e.with_kind(ErrorKind::BadConfig))?,
                &path.display().to_string(),
            );
        }
        match BUILT_IN.iter().find(|(known, _)| *known == name) {
            Some((_, text)) => Self::parse(text, &format!("netconfig/{name}.toml")),
            None => {
                let known: Vec<_> = BUILT_IN.iter().map(|(name, _)| *name).collect();
                let hint = format!(
                    "use a built-in profile ({}), or put '{name}.toml' into network_profiles_dir",
                    known.join(", ")
                );
                Err(Error::new(
                    ErrorKind::BadConfig,
                    format!("network profile '{name}' does not exist"),
                )
                .hint(hint))
            }
        }
    }

    fn parse(text: &str, source: &str) -> Result<Self> {
        let value: serde_json::Value = toml::from_str(text).map_err(|e| {
            Error::new(ErrorKind::BadConfig, format!("'{source}': {}", e.message()))
        })?;
        let profile = Self::from_json(&value).map_err(|e| e.in_file(source))?;
        match profile.contradiction() {
            Some(problem) => {
                Err(Error::new(ErrorKind::BadConfig, format!("'{source}': {problem}")))
            }
            None => Ok(profile),
        }
    }

    /// Returns the first contradiction between keys, which the schema alone does not find.
    fn contradiction(&self) -> Option<&'static str> {
        let own_bridge = self.wire == Wiring::OwnBridge;
        match () {
            () if self.gateway && !own_bridge => {
                Some("gateway: only a bridge that the CPI makes (wire = \"own-bridge\") has one")
            }
            () if self.forward && !self.gateway => {
                Some("forward: needs gateway = true: VMs send packets only to a gateway")
            }
            () if self.masquerade && !self.forward => Some("masquerade: needs forward = true"),
            () if self.wire == Wiring::User && (self.bridge.is_some() || !self.neighbours) => {
                Some("wire: \"user\" has no bridge and no neighbours")
            }
            () if own_bridge && self.bridge.is_none() => {
                Some("bridge: missing; wire = \"own-bridge\" needs a name for it")
            }
            () => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_built_in_profile_loads() {
        let profiles = BUILT_IN.iter().map(|(name, _)| {
            let profile = serde_json::to_string(&Profile::load(name, None).unwrap()).unwrap();
            format!("{name:<8} {profile}")
        });
        insta::assert_snapshot!(profiles.collect::<Vec<_>>().join("\n"), @r#"
        nat      {"wire":"own-bridge","bridge":"bosh-nat0","gateway":true,"forward":true,"masquerade":true,"neighbours":true}
        routed   {"wire":"own-bridge","bridge":"bosh-routed0","gateway":true,"forward":true,"masquerade":false,"neighbours":true}
        isolated {"wire":"own-bridge","bridge":"bosh-isolated0","gateway":true,"forward":false,"masquerade":false,"neighbours":false}
        bridge   {"wire":"bridge","bridge":null,"gateway":false,"forward":false,"masquerade":false,"neighbours":true}
        vlan     {"wire":"vlan","bridge":null,"gateway":false,"forward":false,"masquerade":false,"neighbours":true}
        user     {"wire":"user","bridge":null,"gateway":false,"forward":false,"masquerade":false,"neighbours":true}
        "#);
    }

    #[test]
    fn a_profile_in_the_directory_wins_and_errors_name_its_keys() {
        let dir = tempfile::tempdir().unwrap();
        let load = |text: &str| {
            std::fs::write(dir.path().join("nat.toml"), text).unwrap();
            let loaded = Profile::load("nat", Some(dir.path())).map_err(|error| error.report());
            loaded.map_err(|text| text.replace(&dir.path().display().to_string(), "DIR"))
        };
        let own = load("wire = \"own-bridge\"\nbridge = \"br-mine\"").unwrap();
        assert_eq!(own.bridge.unwrap().as_str(), "br-mine");
        let refusals = [
            "wir = \"user\"",
            "wire = \"tunnel\"",
            "wire = ",
            "wire = \"bridge\"\nbridge = \"a/b\"",
            "wire = \"bridge\"\ngateway = true",
            "wire = \"own-bridge\"\nbridge = \"b\"\nforward = true",
            "wire = \"own-bridge\"\nbridge = \"b\"\ngateway = true\nmasquerade = true",
            "wire = \"own-bridge\"",
            "wire = \"user\"\nneighbours = false",
        ];
        insta::assert_snapshot!(refusals.map(|text| load(text).unwrap_err()).join("\n"), @r#"
        'DIR/nat.toml': wire: missing; expected "own-bridge", "bridge", "vlan" or "user"
        'DIR/nat.toml': wire: expected "own-bridge", "bridge", "vlan" or "user", got "tunnel"
        'DIR/nat.toml': string values must be quoted, expected literal string
        'DIR/nat.toml': bridge: expected a link name of 1 to 15 letters, digits, ".", "_" and "-", got "a/b"
        'DIR/nat.toml': gateway: only a bridge that the CPI makes (wire = "own-bridge") has one
        'DIR/nat.toml': forward: needs gateway = true: VMs send packets only to a gateway
        'DIR/nat.toml': masquerade: needs forward = true
        'DIR/nat.toml': bridge: missing; wire = "own-bridge" needs a name for it
        'DIR/nat.toml': wire: "user" has no bridge and no neighbours
        "#);
        assert!(
            Profile::load("routed", Some(dir.path())).is_ok(),
            "a profile that the directory lacks is built in"
        );
    }

    #[test]
    fn a_path_as_name_is_refused() {
        assert_eq!(Profile::load("../nat", None).unwrap_err().kind(), ErrorKind::BadConfig);
        assert!(Profile::load("nta", None).unwrap_err().report().contains("(nat, routed"));
    }
}
