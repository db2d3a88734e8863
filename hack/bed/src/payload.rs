//! What the working tree builds for a host: its init, and the product where a package would put it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use anyhow::{Context, Result, bail};

use crate::cache::children;
use crate::spec::Arch;

pub struct Payload {
    dir: PathBuf,
}

impl Payload {
    /// Builds what changed since the last time.
    pub fn build(arch: Arch) -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let script = root.join("hack/build");
        let status = Command::new(&script)
            .arg(arch.name())
            .stdin(Stdio::null())
            .stdout(std::io::stderr())
            .status()
            .with_context(|| format!("running {}", script.display()))?;
        if !status.success() {
            bail!("the working tree does not build for {} (hack/build ended with {status})", arch.name());
        }
        Ok(Self { dir: root.join("target/bed").join(arch.name()) })
    }

    /// The tree that is copied over the host's.
    pub fn dir(&self) -> PathBuf {
        self.dir.join("root")
    }

    pub fn init(&self) -> PathBuf {
        self.dir.join("testbed-init")
    }

    pub fn monitor(&self) -> PathBuf {
        self.dir().join("usr/bin/supermachine-vmm")
    }

    /// When the newest file of the tree was written.
    pub fn newest(&self) -> Result<SystemTime> {
        fn newest(path: &Path) -> Result<SystemTime> {
            let meta = path.symlink_metadata()?;
            let mut time = meta.modified()?;
            if meta.is_dir() {
                for child in children(path)? {
                    time = time.max(newest(&child)?);
                }
            }
            Ok(time)
        }
        newest(&self.dir())
    }
}
