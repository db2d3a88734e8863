//! A newer QEMU than the machine's, beside it: unpacked into the cache with all it needs, down to the
//! C library, and started by that library's own loader. Nothing is installed.
//!
//! Before version 10.2, emulated nested virtualization changes a processor's pending interrupts from
//! two threads at once: one of some hundred guests loses an interrupt, and with it the whole host.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::apt::{Apt, NEWER_SUITE};
use crate::cache::{Cache, digest};
use crate::image::unpack;
use crate::progress::Step;
use crate::qemu::package;
use crate::spec::Arch;

/// What building takes.
const ROOM: u64 = 1 << 30;

/// The first version, major and minor, that keeps its interrupts together.
pub const KEEPS_INTERRUPTS: (u32, u32) = (10, 2);

/// Where its parts are.
pub struct NewerQemu {
    root: PathBuf,
}

impl NewerQemu {
    /// One that emulates `arch`, fetched if it is not in the cache.
    pub fn open(cache: &Cache, arch: Arch, rebuild: bool) -> Result<Self> {
        let name = format!("{}-{}", arch.name(), digest([include_bytes!("newer_qemu.rs").as_slice()]));
        let dir = cache.entry("qemu", &name, ROOM, rebuild, |dir| fetch(cache, arch, dir))?;
        cache.prune("qemu", &name)?;
        Ok(Self { root: dir.join("root") })
    }

    /// The words that start `program` of it.
    pub fn words(&self, program: &str) -> Result<Vec<String>> {
        let machine = std::env::consts::ARCH;
        let libraries = self.root.join(format!("usr/lib/{machine}-linux-gnu"));
        let loader = ["usr/lib64/ld-linux-x86-64.so.2", "usr/lib/ld-linux-aarch64.so.1"]
            .map(|path| self.root.join(path))
            .into_iter()
            .find(|path| path.exists())
            .with_context(|| format!("no loader in {}", self.root.display()))?;
        let text = |path: &Path| path.display().to_string();
        Ok(vec![
            text(&loader),
            "--library-path".into(),
            text(&libraries),
            "--argv0".into(),
            program.into(),
            text(&self.root.join("usr/bin").join(program)),
        ])
    }

    /// Where it looks for firmware.
    pub fn data(&self) -> Vec<String> {
        ["usr/share/qemu", "usr/share/seabios"]
            .iter()
            .flat_map(|path| ["-L".to_owned(), self.root.join(path).display().to_string()])
            .collect()
    }

    /// Where it looks for its modules, which must be of its own version.
    pub fn modules(&self) -> PathBuf {
        self.root.join(format!("usr/lib/{}-linux-gnu/qemu", std::env::consts::ARCH))
    }
}

fn fetch(cache: &Cache, arch: Arch, dir: &Path) -> Result<()> {
    let apt = Apt::open(cache.path(&format!("apt-qemu-{}", Arch::NATIVE.debian())), Arch::NATIVE)?;
    let packages = apt.newer_closure(&[package(arch)])?;
    let step = Step::begin(format!("unpacking QEMU of {NEWER_SUITE}"));
    let root = dir.join("root");
    for package in &packages {
        unpack(package, &root)?;
    }
    // The packages have served.
    for package in packages {
        fs::remove_file(&package).with_context(|| format!("removing {}", package.display()))?;
    }
    step.done("");
    Ok(())
}
