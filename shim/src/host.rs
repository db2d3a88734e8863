//! The host, as planning asks about it.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};
use runtime_spec::host::{Files, Found, Owner};

use crate::error::{Error, Result};

/// Of the file system in which namespaces are files; see `magic(7)`.
const NSFS: FsType = FsType(0x6e73_6673);
/// Kinds of namespaces, as `/proc/1/ns` names them.
const NAMESPACES: [&str; 8] = ["net", "pid", "ipc", "uts", "mnt", "user", "cgroup", "time"];

/// The files of this host.
pub struct HostFiles;

impl Files for HostFiles {
    fn look(&self, path: &Path) -> Found {
        let Ok(metadata) = fs::metadata(path) else { return Found::Missing };
        let kind = metadata.file_type();
        let number = metadata.rdev();
        let (major, minor) = (
            i64::from(nix::sys::stat::major(number) as u32),
            i64::from(nix::sys::stat::minor(number) as u32),
        );
        if statfs(path).is_ok_and(|found| found.filesystem_type() == NSFS) {
            let is = |name: &str| {
                fs::metadata(format!("/proc/1/ns/{name}"))
                    .is_ok_and(|first| (first.dev(), first.ino()) == (metadata.dev(), metadata.ino()))
            };
            Found::Namespace { initial: NAMESPACES.iter().any(|name| is(name)), id: metadata.ino() }
        } else if kind.is_dir() {
            Found::Directory
        } else if kind.is_file() {
            Found::File
        } else if kind.is_socket() {
            Found::Socket(Owner { uid: metadata.uid(), gid: metadata.gid(), mode: metadata.mode() & 0o7777 })
        } else if kind.is_fifo() {
            Found::Fifo
        } else if kind.is_char_device() {
            Found::Character { major, minor }
        } else if kind.is_block_device() {
            Found::Block { major, minor }
        } else {
            Found::Missing
        }
    }

    fn tmpfs_size(&self, path: &Path) -> Option<u64> {
        let found = statfs(path).ok().filter(|found| found.filesystem_type() == TMPFS_MAGIC)?;
        let above = fs::metadata(path.parent()?).ok()?;
        let mounted = fs::metadata(path).ok()?.dev() != above.dev();
        mounted.then(|| found.blocks().saturating_mul(u64::try_from(found.block_size()).unwrap_or(4096)))
    }
}

/// The node of a disk of these numbers: the kernel's own, whatever other nodes there are.
pub fn disk(major: i64, minor: i64) -> Result<PathBuf> {
    let none = |why: &str| {
        Error::precondition(format!(
            "the host's disk {major}:{minor}: {why}; give one that lsblk shows, or leave it out"
        ))
    };
    let told = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent"))
        .map_err(|_| none("the kernel has no such disk"))?;
    let name = told.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    let path = Path::new("/dev").join(name.ok_or_else(|| none("the kernel has no name for it"))?);
    match HostFiles.look(&path) {
        Found::Block { major: found, minor: too } if (found, too) == (major, minor) => Ok(path),
        _ => Err(none(&format!("{} is something else", path.display()))),
    }
}

/// Processors that are online.
pub fn cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(u32::MAX))
}

/// Bytes of memory.
pub fn memory() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|total| total.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(1 << 20) * 1024
}

/// Its name.
pub fn name() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_there_is() {
        for (path, found) in [
            ("/", Found::Directory),
            ("/proc/self/exe", Found::File),
            ("/dev/null", Found::Character { major: 1, minor: 3 }),
            ("/none", Found::Missing),
        ] {
            assert_eq!(HostFiles.look(Path::new(path)), found, "{path}");
        }
        assert!(matches!(HostFiles.look(Path::new("/proc/self/ns/net")), Found::Namespace { .. }));
        assert!(memory() > 1 << 20 && cpus() > 0);
        assert_eq!(HostFiles.tmpfs_size(Path::new("/")), None);
    }

    #[test]
    fn disks_have_their_own_nodes() {
        for entry in fs::read_dir("/sys/dev/block").into_iter().flatten().flatten() {
            let name = entry.file_name();
            let (major, minor) = name.to_str().unwrap().split_once(':').unwrap();
            let (major, minor) = (major.parse().unwrap(), minor.parse().unwrap());
            // Where there are nodes at all.
            if let Ok(path) = disk(major, minor) {
                assert_eq!(HostFiles.look(&path), Found::Block { major, minor });
            }
        }
        for (major, minor) in [(4095, 1_048_575), (-1, 0)] {
            assert!(disk(major, minor).unwrap_err().text.contains("no such disk"));
        }
    }
}
