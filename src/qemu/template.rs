//! Machine templates: a VM's virtual hardware, as data. The built-in ones are in `qemu-templates/`.

use std::path::Path;

use crate::document;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::schema::Property;

/// Templates embedded in the program: name and text.
const BUILT_IN: &[(&str, &str)] = &[("q35", include_str!("../../qemu-templates/q35.toml"))];

document! {
    /// A machine template.
    pub struct Template {
        /// QEMU's machine type. It must be a q35: slots and ACPI hot-plug depend on it.
        machine: String;
        /// Options of the machine, `key=value`.
        machine_options: Vec<String>;
        /// Defaults of devices, `driver.property=value`.
        globals: Vec<String>;
        /// Whether the guest gets a virtio random number generator.
        rng: bool = true;
        /// Whether the guest gets a pvpanic device, which reports a panic of its kernel.
        panic_device: bool = true;
        /// More arguments for QEMU, each a list of words: `[["-smbios", "type=1,product=x"]]`.
        extra_arguments: Vec<Vec<String>>;
    }
}

impl Template {
    /// Loads the template `name` from `<directory>/<name>.toml` if that file exists, else from the
    /// built-in templates.
    ///
    /// # Errors
    /// [`ErrorKind::BadConfig`] names the file and the key. [`ErrorKind::BadRequest`] for an
    /// invalid or unknown name lists the built-in names.
    pub fn load(name: &str, directory: Option<&Path>) -> Result<Self> {
        if !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
            || name.is_empty()
        {
            return Err(Error::new(
                ErrorKind::BadRequest,
                "a machine template's name has only letters, digits, '-' and '_'",
            ));
        }
        if let Some(path) = directory.map(|d| d.join(format!("{name}.toml"))).filter(|p| p.exists())
        {
            let text = std::fs::read_to_string(&path).at("read machine template", &path)?;
            return Self::parse(&text, &path.display().to_string());
        }
        match BUILT_IN.iter().find(|(known, _)| *known == name) {
            Some((_, text)) => Self::parse(text, &format!("qemu-templates/{name}.toml")),
            None => {
                let known: Vec<_> = BUILT_IN.iter().map(|(name, _)| *name).collect();
                Err(Error::new(
                    ErrorKind::BadRequest,
                    format!("there is no machine template '{name}'"),
                )
                .hint(format!(
                    "built in: {}; others come from qemu.templates_dir",
                    known.join(", ")
                )))
            }
        }
    }

    fn parse(text: &str, source: &str) -> Result<Self> {
        let value: serde_json::Value = toml::from_str(text).map_err(|e| {
            Error::new(ErrorKind::BadConfig, format!("'{source}': {}", e.message()))
        })?;
        Self::from_json(&value).map_err(|e| e.in_file(source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_built_in_template_loads() {
        for (name, _) in BUILT_IN {
            Template::load(name, None).unwrap();
        }
    }

    #[test]
    fn template_in_the_directory_takes_precedence_and_its_errors_name_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q35.toml");
        std::fs::write(&path, "machine = \"pc-q35-9.2\"").unwrap();
        assert_eq!(Template::load("q35", Some(dir.path())).unwrap().machine, "pc-q35-9.2");
        std::fs::write(&path, "machin = \"q35\"").unwrap();
        let error = Template::load("q35", Some(dir.path())).unwrap_err().report();
        assert!(error.contains("q35.toml") && error.contains("machin"), "{error}");
    }

    #[test]
    fn template_name_that_is_a_path_is_refused() {
        assert_eq!(Template::load("../q35", None).unwrap_err().kind(), ErrorKind::BadRequest);
        assert!(Template::load("q53", None).unwrap_err().report().contains("built in: q35"));
    }
}
