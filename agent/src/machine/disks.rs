//! Disks of the machine: in drives, most of which are empty, and found by their serial numbers.
//!
//! A driver asks once what is in a drive. So none is at work on an empty one: the host puts a disk in, then the driver
//! begins, and it has let go before the host takes the disk out.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::modules::Modules;

/// For a disk that the kernel has not looked at yet.
const DEADLINE: Duration = Duration::from_secs(5);
const MODULE: &str = "virtio_blk";
const BUS: &str = "/sys/bus/virtio";
/// What a block device says it is.
const KIND: &str = "0x0002";

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Its node.
    pub path: PathBuf,
    /// Its driver.
    pub major: i64,
    /// Which of the driver's.
    pub minor: i64,
}

/// The disk with this serial number.
pub fn find(serial: &str) -> Result<Disk> {
    let ends = Instant::now() + DEADLINE;
    loop {
        if let Some(disk) = look(serial).context("looking for a disk")? {
            return Ok(disk);
        }
        if Instant::now() > ends {
            bail!("the machine has no disk with the serial number {serial:?}");
        }
        sleep(Duration::from_millis(10));
    }
}

fn look(serial: &str) -> Result<Option<Disk>> {
    let Some(directory) = directory_of(serial)? else { return Ok(None) };
    let numbers = fs::read_to_string(directory.join("dev"))?;
    let (major, minor) = numbers.trim().split_once(':').context("numbers of a disk")?;
    let path = Path::new("/dev").join(directory.file_name().unwrap_or_default());
    if !path.exists() {
        return Ok(None);
    }
    Ok(Some(Disk { path, major: major.parse()?, minor: minor.parse()? }))
}

/// What the kernel says of the disk with this serial number.
fn directory_of(serial: &str) -> io::Result<Option<PathBuf>> {
    for entry in fs::read_dir("/sys/block")? {
        let directory = entry?.path();
        let found = fs::read_to_string(directory.join("serial"));
        if found.is_ok_and(|found| found.trim() == serial) {
            return Ok(Some(directory));
        }
    }
    Ok(None)
}

/// Loads the driver, which begins with nothing by itself.
pub fn need_driver(modules: &mut Modules) -> Result<()> {
    if driver().is_dir() {
        return Ok(());
    }
    let by_itself = Path::new(BUS).join("drivers_autoprobe");
    fs::write(&by_itself, "0").context("keeping the driver from empty drives")?;
    let loaded = modules.need(MODULE);
    fs::write(&by_itself, "1").context("letting drivers begin")?;
    loaded
}

/// Has a driver that is part of the kernel let go of empty drives.
pub fn leave_empty() -> Result<()> {
    if !driver().is_dir() {
        return Ok(());
    }
    for drive in drives()?.into_iter().filter(Drive::is_taken_up) {
        if drive.sectors()? == 0 {
            drive.tell("unbind")?;
        }
    }
    Ok(())
}

/// Has the driver begin with the drives that have these disks, which the host has put in.
pub fn take_up(serials: &[String]) -> Result<()> {
    for serial in serials {
        if directory_of(serial)?.is_some() {
            continue;
        }
        // The host fills the first that is free, so that it is mostly the first that is asked.
        for drive in drives()?.into_iter().filter(|drive| !drive.is_taken_up()) {
            drive.tell("bind")?;
            if drive.sectors()? == 0 {
                drive.tell("unbind")?;
            } else if directory_of(serial)?.is_some() {
                break;
            }
        }
    }
    Ok(())
}

/// Has the driver let go of the drives that have these disks, which nobody uses any more.
pub fn let_go(serials: &[String]) -> Result<()> {
    for serial in serials {
        let Some(directory) = directory_of(serial)? else { continue };
        let device = fs::canonicalize(directory.join("device"))
            .with_context(|| format!("looking for the drive of {serial}"))?;
        Drive(Path::new(BUS).join("devices").join(device.file_name().unwrap_or_default())).tell("unbind")?;
    }
    Ok(())
}

fn driver() -> PathBuf {
    Path::new(BUS).join("drivers").join(MODULE)
}

/// A device for a disk, as the kernel shows it.
struct Drive(PathBuf);

/// In the order of their places in the machine.
fn drives() -> Result<Vec<Drive>> {
    let entries = fs::read_dir(Path::new(BUS).join("devices")).context("looking at the machine's devices")?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if fs::read_to_string(path.join("device")).is_ok_and(|kind| kind.trim() == KIND) {
            found.push((number(&path), Drive(path)));
        }
    }
    found.sort_by_key(|(number, _)| *number);
    Ok(found.into_iter().map(|(_, drive)| drive).collect())
}

/// 12 of `virtio12`.
fn number(path: &Path) -> u32 {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.trim_start_matches(|char: char| !char.is_ascii_digit()).parse().unwrap_or(u32::MAX)
}

impl Drive {
    /// Whether the driver is at work.
    fn is_taken_up(&self) -> bool {
        self.0.join("driver").exists()
    }

    /// How large the disk is that the driver has found; none is one of no size.
    fn sectors(&self) -> Result<u64> {
        let what = || format!("looking at {}", self.0.display());
        let mut disks = fs::read_dir(self.0.join("block")).with_context(what)?;
        let Some(disk) = disks.next() else { return Ok(0) };
        let size = fs::read_to_string(disk.with_context(what)?.path().join("size")).with_context(what)?;
        size.trim().parse().with_context(what)
    }

    fn tell(&self, what: &str) -> Result<()> {
        let name = self.0.file_name().unwrap_or_default().to_string_lossy().into_owned();
        fs::write(driver().join(what), &name).with_context(|| format!("{what} {name}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drives_are_counted_and_not_spelt() {
        let mut names = ["virtio10", "virtio9", "virtio", "virtio0"].map(Path::new);
        names.sort_by_key(|name| number(name));
        assert_eq!(names, ["virtio0", "virtio9", "virtio10", "virtio"].map(Path::new));
    }
}
