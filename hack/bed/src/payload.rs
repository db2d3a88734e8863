//! What the working tree builds for a host: its init, and the product where a package would put it.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};

use crate::cache::children;
use crate::kernel::Initrd;
use crate::spec::Arch;
use crate::tools::command;

pub struct Payload {
    dir: PathBuf,
}

impl Payload {
    /// Builds what changed since the last time.
    pub fn build(arch: Arch) -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let script = root.join("hack/build");
        let status = command(&script)
            .arg(arch.name())
            .stdin(Stdio::null())
            .stdout(std::io::stderr())
            .status()
            .with_context(|| format!("running {}", script.display()))?;
        if !status.success() {
            bail!("the working tree does not build for {} (hack/build ended with {status})", arch.name());
        }
        let payload = Self { dir: root.join("target/bed").join(arch.name()) };
        payload.pack("testbed-init", &payload.packed_init())?;
        payload.pack("supermachine-agent", &payload.packed_agent())?;
        Ok(payload)
    }

    /// Packs a program as the init of an initrd: the first archive of a host's and of a test guest's, or the product's.
    fn pack(&self, program: &str, packed: &Path) -> Result<()> {
        let program = self.dir.join(program);
        let time = |path: &Path| path.metadata().and_then(|meta| meta.modified());
        if time(packed).is_ok_and(|packed| time(&program).is_ok_and(|program| program <= packed)) {
            return Ok(());
        }
        let dir = packed.parent().context("the archive has no directory")?;
        fs::create_dir_all(dir)?;
        let aside = packed.with_extension("new");
        let mut archive = Initrd::new(BufWriter::new(File::create(&aside)?));
        for dir in ["dev", "proc", "sys", "root", "tmp", "run"] {
            archive.dir(dir)?;
        }
        archive.file("init", 0o755, &fs::read(&program).with_context(|| program.display().to_string())?)?;
        archive.finish()?;
        Ok(fs::rename(aside, packed)?)
    }

    pub fn packed_init(&self) -> PathBuf {
        self.guest("test-init.cpio")
    }

    pub fn packed_agent(&self) -> PathBuf {
        self.guest("agent.cpio")
    }

    /// A part of guests.
    fn guest(&self, name: &str) -> PathBuf {
        self.dir().join("usr/share/supermachine/guest").join(name)
    }

    /// The tree that is copied over the host's.
    pub fn dir(&self) -> PathBuf {
        self.dir.join("root")
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
