//! Cables between this host and whoever is measured. Both kinds have the same end here.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use integration::command::{Cmd, Finished};

use crate::STEP;
use crate::order::{GUEST, HOST};

/// The host's end.
pub const LINK: &str = "network-time";

fn ip(words: &str) -> Result<Finished> {
    Ok(Cmd::new("ip", STEP).args(words.split(' ')).ok()?)
}

/// The host's end of one that is in. With it goes the whole cable.
struct End;

impl End {
    /// Of the cable that the words `add` are said to `ip` for.
    fn make(add: &str) -> Result<Self> {
        ip(add)?;
        // From here on it goes with the value, whatever fails.
        let end = Self;
        ip(&format!("address add {HOST}/24 dev {LINK}"))?;
        ip(&format!("link set {LINK} up"))?;
        Ok(end)
    }

    fn remove() -> Result<()> {
        ip(&format!("link delete {LINK}")).context("taking a cable out").map(drop)
    }
}

impl Drop for End {
    fn drop(&mut self) {
        if Path::new("/sys/class/net").join(LINK).exists()
            && let Err(error) = Self::remove()
        {
            eprintln!("# {error:#}");
        }
    }
}

/// A cable to a machine, whose end there is the machine's network device.
pub struct Tap {
    _end: End,
}

impl Tap {
    /// Makes one.
    pub fn make() -> Result<Self> {
        Ok(Self { _end: End::make(&format!("tuntap add dev {LINK} mode tap"))? })
    }
}

/// A network namespace with a cable to it.
pub struct Namespace {
    path: PathBuf,
    end: Option<End>,
}

impl Namespace {
    /// Makes one, which is found at `path`.
    pub fn make(path: PathBuf) -> Result<Self> {
        fs::write(&path, "").with_context(|| format!("making {}", path.display()))?;
        // From here on it goes with the value, whatever fails.
        let mut namespace = Self { path, end: None };
        let enter = format!("--net={}", namespace.path.display());
        Cmd::new("unshare", STEP).args([&enter, "true"]).ok()?;
        let words = format!("link add {LINK} type veth peer name eth0 netns {}", namespace.path.display());
        namespace.end = Some(End::make(&words)?);
        let inside = |words: &str| Cmd::new("nsenter", STEP).args([&enter, "ip"]).args(words.split(' ')).ok();
        inside("link set lo up")?;
        inside(&format!("address add {GUEST}/24 dev eth0"))?;
        inside("link set eth0 up")?;
        Ok(namespace)
    }

    /// Where it is found.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Before its namespace, with which the kernel would take it out in its own time.
        drop(self.end.take());
        // There may be none yet: the file is there first.
        let _ = Cmd::new("umount", STEP).arg(&self.path).run();
        if let Err(error) = fs::remove_file(&self.path) {
            eprintln!("# removing {}: {error}", self.path.display());
        }
    }
}
