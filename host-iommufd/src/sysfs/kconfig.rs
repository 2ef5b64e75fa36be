use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::{Root, Seen};

/// How the running kernel was configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelConfig {
    /// The file that said so.
    pub path: PathBuf,
    settings: BTreeMap<String, Setting>,
}

/// A tristate option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setting {
    /// `=y`
    BuiltIn,
    /// `=m`
    Module,
    /// Not set, or not known to this kernel.
    Off,
}

impl KernelConfig {
    /// The configuration of the kernel `release`, from the first of the usual places that has it.
    pub(super) fn read(root: &Root, release: &str) -> Seen<Self> {
        let places = [
            format!("/boot/config-{release}"),
            format!("/lib/modules/{release}/config"),
            format!("/usr/lib/modules/{release}/config"),
        ];
        let mut hidden = Seen::Absent;
        for place in places {
            match root.text(&place) {
                Seen::Known(text) => return Seen::Known(Self::parse(place, &text)),
                Seen::Absent => {}
                Seen::Hidden { path, why } => hidden = Seen::Hidden { path, why },
            }
        }
        match decompressed(root, "/proc/config.gz").map(|text| Self::parse("/proc/config.gz", &text)) {
            Seen::Absent => hidden,
            seen => seen,
        }
    }

    fn parse(path: impl Into<PathBuf>, text: &str) -> Self {
        let settings = text.lines().filter_map(|line| {
            let (name, value) = line.strip_prefix("CONFIG_")?.split_once('=')?;
            let setting = match value {
                "y" => Setting::BuiltIn,
                "m" => Setting::Module,
                _ => return None,
            };
            Some((name.to_owned(), setting))
        });
        Self { path: path.into(), settings: settings.collect() }
    }

    /// The option `CONFIG_…`, named without that.
    pub fn get(&self, option: &str) -> Setting {
        self.settings.get(option).copied().unwrap_or(Setting::Off)
    }

    /// Whether the option is built in or a module.
    pub fn has(&self, option: &str) -> bool {
        self.get(option) != Setting::Off
    }
}

/// The text of a gzip file, by the system's own `gzip`.
fn decompressed(root: &Root, path: &str) -> Seen<String> {
    let hidden = |why: String| Seen::Hidden { path: path.into(), why };
    let file = match std::fs::File::open(root.path(path)) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Seen::Absent,
        Err(error) => return hidden(error.to_string()),
    };
    match Command::new("gzip").args(["-d", "-c"]).stdin(file).stderr(Stdio::null()).output() {
        Ok(output) if output.status.success() => {
            Seen::Known(String::from_utf8_lossy(&output.stdout).into_owned())
        }
        Ok(_) => hidden("gzip cannot read it".into()),
        Err(error) => hidden(format!("gzip does not run: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_built_in_modules_or_off() {
        let text = "CONFIG_IOMMUFD=m\n# CONFIG_VFIO is not set\nCONFIG_PCI=y\nCONFIG_HZ=250\n";
        let config = KernelConfig::parse("/boot/config", text);
        assert_eq!(config.get("IOMMUFD"), Setting::Module);
        assert_eq!(config.get("PCI"), Setting::BuiltIn);
        for option in ["VFIO", "HZ", "NEW"] {
            assert_eq!(config.get(option), Setting::Off);
        }
        assert!(config.has("IOMMUFD") && !config.has("VFIO"));
    }
}
