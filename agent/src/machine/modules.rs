//! The kernel's modules that the initrd brings, in files whose names begin with a number: that is the order in
//! which they load.
//!
//! Drivers are loaded at boot. File systems only when one is to be mounted, and the driver of disks when there is one, as
//! most containers have none of their own: a module is loaded after all that stand before it.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};

use crate::boot::load_module;

/// Those that wait until they are needed, by their names in [`need`](Modules::need).
const LATER: &[&str] = &["overlay", "erofs", "ext4", "virtio_blk"];

/// Modules, open because the directory they are in disappears.
pub struct Modules(VecDeque<(String, File)>);

impl Modules {
    /// Those in `directory`; there may be none, when the kernel has everything built in.
    pub fn open(directory: &Path) -> Result<Self> {
        if !directory.is_dir() {
            return Ok(Self(VecDeque::new()));
        }
        let mut paths =
            fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>()?;
        paths.sort();
        let open = |path: &std::path::PathBuf| {
            let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
            Ok((module_name(path), file))
        };
        Ok(Self(paths.iter().map(open).collect::<Result<_>>()?))
    }

    /// Loads everything up to the last driver.
    pub fn load_devices(&mut self) -> Result<()> {
        let first_later = self.0.iter().position(|(name, _)| LATER.contains(&name.as_str()));
        self.load_first(first_later.unwrap_or(self.0.len()))
    }

    /// Loads the module `name` and all that stand before it, if there is one.
    pub fn need(&mut self, name: &str) -> Result<()> {
        match self.0.iter().position(|(known, _)| known == name) {
            Some(position) => self.load_first(position + 1),
            None => Ok(()),
        }
    }

    fn load_first(&mut self, count: usize) -> Result<()> {
        for (name, file) in self.0.drain(..count) {
            load_module(&file).with_context(|| format!("loading the module {name}"))?;
        }
        Ok(())
    }
}

/// `virtio_net` of `05-virtio_net.ko`.
fn module_name(path: &Path) -> String {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    let stem = file.split('.').next().unwrap_or_default();
    let name = stem.split_once('-').map_or(stem, |(_, name)| name);
    name.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_modules() {
        for (path, name) in [
            ("/modules/05-virtio_net.ko", "virtio_net"),
            ("/modules/12-virtio-rng.ko.xz", "virtio_rng"),
            ("ext4.ko", "ext4"),
        ] {
            assert_eq!(module_name(Path::new(path)), name);
        }
    }
}
