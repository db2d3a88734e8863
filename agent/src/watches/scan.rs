//! What processes watch, as the kernel tells it of their descriptors (`Documentation/filesystems/proc.rst`).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use agent_api::{MOST_WATCHED, MOST_WATCHED_BYTES};
use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::libc;
use nix::mount::{MntFlags, umount2};
use runtime_spec::layout::{GUEST_BINDS, subtree};

/// The longest handle of a file that the kernel makes.
const HANDLE_MAX: usize = libc::MAX_HANDLE_SZ as usize;
const INOTIFY: &str = "anon_inode:inotify";

/// A file that is watched: the number of its file system, and how that finds it again, whatever its name is by then.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Watched {
    device: u64,
    kind: i32,
    handle: Vec<u8>,
}

/// The places of the binds that any process watches, as many as can be told of.
pub fn watched() -> Result<BTreeMap<PathBuf, Watched>> {
    let mounts = mounts()?;
    let mut places = BTreeMap::new();
    if mounts.is_empty() {
        return Ok(places);
    }
    let mut all = HashSet::new();
    for process in fs::read_dir("/proc").context("reading /proc")?.flatten() {
        let is_process = process.file_name().as_bytes().first().is_some_and(u8::is_ascii_digit);
        // It may have ended, or be the kernel's.
        if let Ok(descriptors) = fs::read_dir(process.path().join("fd"))
            && is_process
        {
            for descriptor in descriptors.flatten() {
                if !fs::read_link(descriptor.path()).is_ok_and(|to| to.as_os_str() == INOTIFY) {
                    continue;
                }
                let about = process.path().join("fdinfo").join(descriptor.file_name());
                let about = fs::read_to_string(about).unwrap_or_default();
                let found = about.lines().filter_map(Watched::parse);
                let known = found.filter(|watched| mounts.contains_key(&watched.device));
                all.extend(known.take(MOST_WATCHED.saturating_sub(all.len())));
            }
        }
    }
    let mut bytes = 0;
    for watched in all {
        // What is gone by now is watched by nobody else.
        let Some(path) = watched.open(&mounts).ok().and_then(|file| path_of(&file).ok()) else { continue };
        let Ok(place) = path.strip_prefix(GUEST_BINDS) else { continue };
        bytes += place.as_os_str().len();
        if bytes > MOST_WATCHED_BYTES {
            break;
        }
        places.insert(place.to_owned(), watched);
    }
    Ok(places)
}

/// Mounts, by the numbers of their file systems.
type Mounts = HashMap<u64, PathBuf>;

/// Those of the binds.
pub fn mounts() -> Result<Mounts> {
    let all = fs::read("/proc/self/mountinfo").context("reading mountinfo")?;
    Ok(mounts_of(&all, Path::new(GUEST_BINDS)))
}

/// Takes away what the kernel has mounted in the binds of a container, which is gone.
pub fn leave(id: &str) {
    let Ok(mounts) = mounts() else { return };
    let binds = Path::new(GUEST_BINDS).join(subtree(id));
    for place in mounts.values().filter(|place| place.starts_with(&binds)) {
        // It is nobody's any more.
        let _ = umount2(place, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    }
}

impl Watched {
    /// `inotify wd:1 ino:2 sdev:2d mask:fff ignored_mask:0 fhandle-bytes:c fhandle-type:81 f_handle:00ff..`, all in hex.
    fn parse(line: &str) -> Option<Self> {
        let words = line.strip_prefix("inotify ")?;
        let word = |name: &str| {
            let found = words.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix(':'));
            found.filter(|text| text.is_ascii())
        };
        let number = |name| u64::from_str_radix(word(name)?, 16).ok();
        let text = word("f_handle")?;
        let bytes = (0..text.len() / 2).map(|at| u8::from_str_radix(&text[at * 2..at * 2 + 2], 16).ok());
        let handle = bytes.collect::<Option<Vec<_>>>()?;
        let is_whole = number("fhandle-bytes") == Some(handle.len() as u64) && handle.len() <= HANDLE_MAX;
        is_whole.then_some(Self {
            device: number("sdev")?,
            kind: i32::try_from(number("fhandle-type")?).ok()?,
            handle,
        })
    }

    /// Opens it, but not to read or write.
    pub fn open(&self, mounts: &Mounts) -> io::Result<OwnedFd> {
        /// `struct file_handle`, with all the room that it can need.
        #[repr(C)]
        struct Handle {
            bytes: u32,
            kind: i32,
            content: [u8; HANDLE_MAX],
        }
        let root = File::open(mounts.get(&self.device).ok_or(io::ErrorKind::NotFound)?)?;
        let mut handle = Handle { bytes: 0, kind: self.kind, content: [0; HANDLE_MAX] };
        let room = handle.content.get_mut(..self.handle.len()).ok_or(io::ErrorKind::InvalidInput)?;
        room.copy_from_slice(&self.handle);
        handle.bytes = u32::try_from(self.handle.len()).map_err(io::Error::other)?;
        // SAFETY: the kernel reads a handle of as many bytes as it says, for which there is room.
        let fd = Errno::result(unsafe {
            libc::open_by_handle_at(
                root.as_raw_fd(),
                std::ptr::from_mut(&mut handle).cast(),
                libc::O_PATH | libc::O_CLOEXEC,
            )
        })?;
        // SAFETY: the kernel has just made it, and nobody else knows its number.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// Mounts of the share at `place` and below it, by the numbers of their file systems: a mount of the host's in it is a file system
/// of its own here.
fn mounts_of(mountinfo: &[u8], place: &Path) -> Mounts {
    let lines = mountinfo.split(|byte| *byte == b'\n');
    let mounts = lines.filter_map(|line| {
        let mut words = line.split(|byte| *byte == b' ');
        let device = std::str::from_utf8(words.nth(2)?).ok()?;
        let point = PathBuf::from(std::ffi::OsStr::from_bytes(&unescaped(words.nth(1)?)));
        let kind = words.skip_while(|word| *word != b"-").nth(1)?;
        if kind != b"virtiofs" || !point.starts_with(place) {
            return None;
        }
        let (major, minor) = device.split_once(':')?;
        // As the kernel has it inside.
        Some((major.parse::<u64>().ok()? << 20 | minor.parse::<u64>().ok()?, point))
    });
    mounts.collect()
}

/// A path with blanks and the like as `\040`.
fn unescaped(word: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((first, behind)) = rest.split_first() {
        let code = (*first == b'\\').then(|| std::str::from_utf8(behind.get(..3)?).ok()).flatten();
        let byte = code.and_then(|code| u8::from_str_radix(code, 8).ok());
        plain.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &behind[3..] } else { behind };
    }
    plain
}

fn path_of(file: &OwnedFd) -> io::Result<PathBuf> {
    fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_tells_what_is_watched() {
        let line = "inotify wd:1 ino:2a sdev:2d mask:fce ignored_mask:0 fhandle-bytes:4 fhandle-type:81 f_handle:00ff102a";
        let watched = Watched { device: 0x2d, kind: 0x81, handle: vec![0, 0xff, 0x10, 0x2a] };
        assert_eq!(Watched::parse(line), Some(watched));
        for wrong in [
            "pos:\t0",
            "inotify wd:1 ino:2a sdev:2d mask:fce",
            "inotify wd:1 sdev:2d fhandle-bytes:5 fhandle-type:81 f_handle:00ff102a",
            "inotify wd:1 sdev:2d fhandle-bytes:2 fhandle-type:81 f_handle:00fg",
            "inotify wd:1 sdev:2d fhandle-bytes:2 fhandle-type:81 f_handle:00ä0",
        ] {
            assert_eq!(Watched::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn mounts_are_those_of_the_share() {
        let mountinfo = b"22 1 0:20 / /proc rw shared:1 - proc proc rw
40 22 0:45 / /run/supermachine/binds rw,nodev - virtiofs binds rw
41 40 0:46 / /run/supermachine/binds/c1/binds/0 rw,nodev master:3 shared:4 - virtiofs binds rw
42 40 0:47 / /run/supermachine/binds/c\\0401\\134 rw - virtiofs binds rw
43 40 0:48 / /run/supermachine/share rw - virtiofs containers rw
44 40 0:49 / /run/supermachine/binds/x rw - tmpfs virtiofs rw
";
        let mounts = mounts_of(mountinfo, Path::new("/run/supermachine/binds"));
        let mut mounts: Vec<_> =
            mounts.iter().map(|(device, path)| (*device, path.to_str().unwrap())).collect();
        mounts.sort_unstable();
        let below = "/run/supermachine/binds";
        assert_eq!(
            mounts,
            [(45, below), (46, &*format!("{below}/c1/binds/0")), (47, &*format!("{below}/c 1\\"))]
        );
        assert_eq!(unescaped(b"a\\"), b"a\\");
        assert_eq!(unescaped(b"\\9999"), b"\\9999");
    }
}
