//! Saved hosts: booted once, their services up, then stopped and kept. Starting from one is a
//! matter of mapping its memory and reading half a megabyte of device state.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::cache::digest;
use crate::host::{BOOT, Host, Workshop};
use crate::progress::Step;
use crate::qemu::Memory;
use crate::tools;

/// The init of the host is in its memory: a change of it makes another saved host.
const INIT: [&str; 6] = [
    include_str!("protocol.rs"),
    include_str!("init/main.rs"),
    include_str!("init/boot.rs"),
    include_str!("init/command.rs"),
    include_str!("init/prepare.rs"),
    include_str!("init/serve.rs"),
];

/// Beyond the memory that a booted host has touched.
const ROOM: u64 = 1 << 30;

pub struct Saved {
    dir: PathBuf,
}

impl Saved {
    /// The saved host of this description, made if it is not in the cache.
    pub fn open(workshop: &Workshop) -> Result<Self> {
        let spec = workshop.spec.name();
        let run = format!("saving-{}", std::process::id());
        let key = Self::key(workshop)?;
        let name = format!("{spec}-{key}");
        let dir = workshop.cache.entry("saved", &name, ROOM, false, |dir| save(workshop, &run, dir))?;
        workshop.cache.prune("saved", &name)?;
        Ok(Self { dir })
    }

    fn key(workshop: &Workshop) -> Result<String> {
        let machine = workshop.qemu.fingerprint(workshop.spec, workshop.accel);
        let image = workshop.image.identity()?;
        Ok(digest([machine.as_str(), image.as_str()].into_iter().chain(INIT).map(str::as_bytes)))
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn disk(&self) -> PathBuf {
        self.dir.join("disk")
    }

    pub fn memory(&self) -> PathBuf {
        self.dir.join("memory")
    }

    pub fn devices(&self) -> PathBuf {
        self.dir.join("devices")
    }
}

fn save(workshop: &Workshop, run_name: &str, dir: &Path) -> Result<()> {
    let step = Step::begin(format!("booting the host {} once, to save it", workshop.spec.name()));
    let run = workshop.cache.new_run(run_name)?;
    let disk = dir.join("disk");
    crate::host::overlay(&workshop.image.disk(), "raw", &disk)?;
    let mut machine = workshop.machine(&run, disk, None)?;
    let memory = dir.join("memory");
    machine.memory = Memory::Shared(memory.clone());
    let host = Host::launch(workshop, run, &machine, false, BOOT)?;
    host.save(&dir.join("devices"))?;
    // What the kernel freed it did not write over with zeros, but much was never used.
    tools::run(tools::command("fallocate").arg("--dig-holes").arg(&memory))?;
    let used = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&memory)?) * 512;
    step.done(format_args!("{} MiB of memory in use", used >> 20));
    Ok(())
}
