//! The reference pages in `docs/`, made from the declarations of the documents they describe. A test holds them in sync.

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

/// Prints one page.
pub fn run(page: Page, output: &mut dyn io::Write) -> Result<()> {
    let text = match page {
        Page::Config => config(),
        Page::CloudProperties => cloud_properties(),
    };
    output.write_all(text.as_bytes()).map_err(|e| Error::os("print the page", e))
}

/// `docs/config.md`.
pub fn config() -> String {
    let mut page = String::from(
        "# Configuration\n\n\
         `bosh-qemu-cpi` reads one JSON file: the one `--config` names, else the one `BOSH_QEMU_CPI_CONFIG` names, else\n\
         `/etc/bosh-qemu-cpi/cpi.json` if it is there. Every key has a default that runs; `{}` is a configuration. An\n\
         unknown key or a wrong value is an error that names the file and the key's path.\n\n",
    );
    let _ = writeln!(
        page,
        "A cpi-config entry's properties override the keys {} for its calls. No other key can be overridden:\n\
         a request can not point the CPI at other directories or programs.\n",
        CONTEXT_KEYS.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ")
    );
    table(&mut page, &Config::keys(), "");
    page.push_str(
        "\n# Machine templates\n\n\
         A machine template is a TOML file that says what kind of computer a VM is. `q35` is built in\n\
         (`qemu-templates/q35.toml`); `<name>.toml` in `qemu.templates_dir` adds one or replaces it.\n\n",
    );
    table(&mut page, &Template::keys(), "");
    page.push_str(
        "\n# Network profiles\n\n\
         A network profile is a TOML file that says how a network reaches the world. `nat`, `routed`, `isolated`, `bridge`,\n\
         `vlan` and `user` are built in (`netconfig/`; `docs/networking.md` draws each); `<name>.toml` in\n\
         `network_profiles_dir` adds one or replaces it.\n\n",
    );
    table(&mut page, &Profile::keys(), "");
    page
}

/// `docs/cloud-properties.md`.
pub fn cloud_properties() -> String {
    let mut page = String::from(
        "# Cloud properties\n\n\
         What a manifest or cloud config may ask of this CPI. An unknown key is an error with a suggestion. Keys that are\n\
         not given come from the configuration's `vm_defaults` and `disk_defaults`.\n",
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
