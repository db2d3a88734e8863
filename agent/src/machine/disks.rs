//! Disks of the machine, found by their serial numbers.

use std::fs;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// For a disk that the kernel has not looked at yet.
const DEADLINE: Duration = Duration::from_secs(5);

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
    for entry in fs::read_dir("/sys/block")? {
        let directory = entry?.path();
        let Ok(found) = fs::read_to_string(directory.join("serial")) else { continue };
        if found.trim() != serial {
            continue;
        }
        let numbers = fs::read_to_string(directory.join("dev"))?;
        let (major, minor) = numbers.trim().split_once(':').context("numbers of a disk")?;
        let name = directory.file_name().unwrap_or_default();
        let path = std::path::Path::new("/dev").join(name);
        if !path.exists() {
            return Ok(None);
        }
        return Ok(Some(Disk { path, major: major.parse()?, minor: minor.parse()? }));
    }
    Ok(None)
}
