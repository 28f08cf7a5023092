//! Network profiles: how a network reaches the world, as data. The built-in ones are in `netconfig/`.

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

/// Profiles that are part of the program.
const BUILT_IN: &[(&str, &str)] = built_in!["nat", "routed", "isolated", "bridge", "vlan", "user"];

document! {
    /// A network profile.
    pub struct Profile {
        /// What a VM's network card is wired to.
        wire: Wiring;
        /// The bridge of networks that name none.
        bridge: Option<LinkName>;
        /// `own-bridge`: whether the host has the gateway's address on the bridge.
        gateway: bool = false;
        /// `own-bridge`: whether the host passes packets on between the bridge and its other links.
        forward: bool = false;
        /// `own-bridge`: whether VMs reach the world under the host's own address.
        masquerade: bool = false;
        /// Whether VMs on one bridge reach each other.
        neighbours: bool = true;
    }
}

choice! {
    /// What a network card is wired to.
    pub enum Wiring ("\"own-bridge\", \"bridge\", \"vlan\" or \"user\"") {
        /// A bridge that we make.
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
    /// The profile `name`: `<directory>/<name>.toml` if that is there, else the built-in one.
    ///
    /// # Errors
    /// [`ErrorKind::BadConfig`] naming the file and the key, or listing the built-in names.
    pub fn load(name: &str, directory: Option<&Path>) -> Result<Self> {
        let is_name = !name.is_empty()
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
        if !is_name {
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
                    "built in: {}; others come from network_profiles_dir",
                    known.join(", ")
                );
                Err(Error::new(
                    ErrorKind::BadConfig,
                    format!("there is no network profile '{name}'"),
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
        match profile.objection() {
            Some(objection) => {
                Err(Error::new(ErrorKind::BadConfig, format!("'{source}': {objection}")))
            }
            None => Ok(profile),
        }
    }

    /// What the types alone do not say.
    fn objection(&self) -> Option<&'static str> {
        let ours = self.wire == Wiring::OwnBridge;
        match () {
            () if self.gateway && !ours => {
                Some("gateway: only a bridge of ours (wire = \"own-bridge\") has one")
            }
            () if self.forward && !self.gateway => {
                Some("forward: a host without the gateway's address gets no packets")
            }
            () if self.masquerade && !self.forward => {
                Some("masquerade: only packets that are passed on can be")
            }
            () if self.wire == Wiring::User && (self.bridge.is_some() || !self.neighbours) => {
                Some("wire: \"user\" has no bridge and no neighbours")
            }
            () if ours && self.bridge.is_none() => {
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
    fn a_directory_comes_first_and_its_mistakes_are_named() {
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
        'DIR/nat.toml': gateway: only a bridge of ours (wire = "own-bridge") has one
        'DIR/nat.toml': forward: a host without the gateway's address gets no packets
        'DIR/nat.toml': masquerade: only packets that are passed on can be
        'DIR/nat.toml': bridge: missing; wire = "own-bridge" needs a name for it
        'DIR/nat.toml': wire: "user" has no bridge and no neighbours
        "#);
        assert!(
            Profile::load("routed", Some(dir.path())).is_ok(),
            "what is not in the directory is built in"
        );
    }

    #[test]
    fn a_name_is_no_path() {
        assert_eq!(Profile::load("../nat", None).unwrap_err().kind(), ErrorKind::BadConfig);
        assert!(Profile::load("nta", None).unwrap_err().report().contains("built in: nat, routed"));
    }
}
