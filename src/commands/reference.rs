//! Generates the reference pages in `docs/` from the declared keys of the configuration, templates,
//! profiles and cloud properties. A test compares the pages with the output.

use std::fmt::Write;
use std::io;

use crate::cli::Page;
use crate::config::{CONTEXT_KEYS, Config};
use crate::cpi::properties::{DiskCloudProperties, SubnetCloudProperties, VmCloudProperties};
use crate::cpi::stemcell::LightStemcell;
use crate::error::{Error, Result};
use crate::net::profile::Profile;
use crate::qemu::Template;
use crate::schema::{Key, Property};

/// Prints `page`, Markdown.
pub fn run(page: Page, output: &mut dyn io::Write) -> Result<()> {
    let text = match page {
        Page::Config => config(),
        Page::CloudProperties => cloud_properties(),
    };
    output.write_all(text.as_bytes()).map_err(|e| Error::os("print the page", e))
}

/// Text of `docs/config.md`.
pub fn config() -> String {
    let mut page = String::from(
        "# Configuration\n\n\
         `bosh-qemu-cpi` reads one JSON file: the one that `--config` names, else the one that\n\
         `BOSH_QEMU_CPI_CONFIG` names, else `/etc/bosh-qemu-cpi/cpi.json` if it exists. Every\n\
         key has a working default, so `{}` is a valid configuration. An unknown key or an\n\
         invalid value is an error that names the file and the key's path.\n\n",
    );
    let _ = writeln!(
        page,
        "The properties of a cpi-config entry override these keys for its calls: {}.\n\
         No other key can be overridden: a request cannot point the CPI at other directories or\n\
         programs.\n",
        CONTEXT_KEYS.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ")
    );
    table(&mut page, &Config::keys(), "");
    page.push_str(
        "\n# Machine templates\n\n\
         A machine template is a TOML file that describes the virtual machine's hardware.\n\
         `q35` is built in (`qemu-templates/q35.toml`); a file `<name>.toml` in\n\
         `qemu.templates_dir` adds a template or replaces the built-in one of that name.\n\n",
    );
    table(&mut page, &Template::keys(), "");
    page.push_str(
        "\n# Network profiles\n\n\
         A network profile is a TOML file that describes how a network connects to others.\n\
         `nat`, `routed`, `isolated`, `bridge`, `vlan` and `user` are built in (`netconfig/`;\n\
         `docs/networking.md` draws each); a file `<name>.toml` in `network_profiles_dir` adds a\n\
         profile or replaces the built-in one of that name.\n\n",
    );
    table(&mut page, &Profile::keys(), "");
    page
}

/// Text of `docs/cloud-properties.md`.
pub fn cloud_properties() -> String {
    let mut page = String::from(
        "# Cloud properties\n\n\
         The cloud properties that a manifest or cloud config may set for this CPI. An unknown\n\
         key is an error with a suggestion. Missing keys come from the configuration's\n\
         `vm_defaults` and `disk_defaults`.\n",
    );
    let sections = [
        (
            "VMs: `vm_types[]`, `vm_extensions[]`, `azs[]`, `resource_pools[]`",
            VmCloudProperties::keys(),
        ),
        ("Persistent disks: `disk_types[]`, `disk_pools[]`", DiskCloudProperties::keys()),
        ("Networks: `networks[].subnets[]`", SubnetCloudProperties::keys()),
        ("Light stemcells (`stemcell_formats: [qemu-light]`)", LightStemcell::keys()),
    ];
    for (title, keys) in sections {
        let _ = write!(page, "\n## {title}\n\n");
        table(&mut page, &keys, "");
    }
    page
}

fn table(page: &mut String, keys: &[Key], above: &str) {
    if above.is_empty() {
        page.push_str("| key | value | default | meaning |\n|---|---|---|---|\n");
    }
    for key in keys {
        let path = format!("{above}{}", key.name);
        let aliases: String =
            key.aliases.iter().map(|alias| format!(" (also `{alias}`)")).collect();
        let default = (key.default)().filter(|value| !value.is_object());
        let default = default.map_or_else(String::new, |value| format!("`{value}`"));
        let doc = key.doc.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ");
        let _ = writeln!(page, "| `{path}`{aliases} | {} | {default} | {doc} |", key.expected);
        let named = match key.expected {
            "an object of named entries" => ".<name>.",
            "an array" => "[].",
            _ => ".",
        };
        table(page, &(key.keys)(), &format!("{path}{named}"));
    }
}
