//! A root file system of nothing but a busybox, made of the host's.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

const BUSYBOX: &str = "/usr/bin/busybox";

/// Makes one in `root`.
pub(super) fn make(root: &Path) -> Result<()> {
    for directory in ["bin", "dev", "etc", "proc", "sys", "tmp", "root", "run"] {
        fs::create_dir_all(root.join(directory)).with_context(|| format!("creating {}", root.display()))?;
    }
    fs::copy(BUSYBOX, root.join("bin/busybox")).with_context(|| format!("copying {BUSYBOX}"))?;
    let listed = Command::new(BUSYBOX).arg("--list").output().context("asking busybox for its applets")?;
    ensure!(listed.status.success(), "busybox does not list its applets");
    for applet in String::from_utf8(listed.stdout)?.lines().filter(|name| *name != "busybox") {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n")?;
    fs::write(root.join("etc/plain"), "not a program\n")?;
    Ok(())
}
