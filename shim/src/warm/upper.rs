//! The layer of a root file system that a container writes to: copied with its machine, since a machine that goes on
//! finds its files there.
//!
//! Everything in it is the guest's, and whoever has taken over its monitor may change it meanwhile. So it is walked by
//! descriptors, no link is followed, and how much is copied is limited.

use std::collections::HashMap;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{
    DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown, symlink,
};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2, readlinkat};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, mknod, utimensat};
use nix::sys::time::TimeSpec;

use crate::deadlines;

/// How much a layer may have.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Of content.
    pub bytes: u64,
    /// Files, directories and all else.
    pub entries: u64,
    /// Directories in one another.
    pub depth: usize,
    /// How long it may take.
    pub time: Duration,
}

/// Beyond these a start is no faster than an ordinary one.
pub const LIMITS: Limits = Limits { bytes: 256 << 20, entries: 20_000, depth: 100, time: deadlines::UPPER };

/// Whether there is nothing in it.
pub fn is_empty(layer: &Path) -> io::Result<bool> {
    Ok(fs::read_dir(layer)?.next().is_none())
}

/// Removes what is in it.
pub fn clear(layer: &Path) -> io::Result<()> {
    for entry in fs::read_dir(layer)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Makes `to`, an empty directory, like `from`, with owners, modes, times, extended attributes and links.
pub fn copy(from: &Path, to: &Path, limits: Limits) -> io::Result<()> {
    let mut copying = Copying {
        from: open_in(None, from, OFlag::O_DIRECTORY)?,
        left: limits,
        until: Instant::now() + limits.time,
        links: HashMap::new(),
        directories: vec![(PathBuf::new(), to.to_owned())],
    };
    let mut next = 0;
    while let Some((path, to)) = copying.directories.get(next).cloned() {
        copying.directory(&path, &to)?;
        next += 1;
    }
    // Last, and those within before those around them, as what is made in a directory changes its times.
    for (path, to) in copying.directories.iter().rev() {
        let found = open_in(Some(&copying.from), path, OFlag::O_DIRECTORY)?;
        attributes(&found, &File::from(found.try_clone()?).metadata()?, to)?;
    }
    Ok(())
}

struct Copying {
    from: OwnedFd,
    left: Limits,
    until: Instant,
    /// Where files are that have several names.
    links: HashMap<(u64, u64), PathBuf>,
    /// Those that were found, with what becomes of them.
    directories: Vec<(PathBuf, PathBuf)>,
}

/// Opens what is there, for looking at it: neither through a link, nor outside.
fn open_in(from: Option<&OwnedFd>, path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | flags;
    let how = OpenHow::new().flags(flags);
    let Some(from) = from else { return Ok(openat2(AT_FDCWD, path, how)?) };
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
    Ok(openat2(from, path, how.resolve(resolve))?)
}

/// By which an open descriptor is opened again.
fn again(found: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", found.as_raw_fd()))
}

impl Copying {
    /// What is in it; the directories there come later.
    fn directory(&mut self, path: &Path, to: &Path) -> io::Result<()> {
        let found = open_in(Some(&self.from), path, OFlag::O_DIRECTORY)?;
        for entry in fs::read_dir(again(&found))? {
            let path = path.join(entry?.file_name());
            let place = path.file_name().map(|name| to.join(name)).unwrap_or_default();
            let within = |error: io::Error| {
                // Not all of what a guest has made up.
                let shown: String = path.to_string_lossy().chars().take(200).collect();
                io::Error::new(error.kind(), format!("/{shown}: {error}"))
            };
            self.entry(&path, place).map_err(within)?;
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, to: PathBuf) -> io::Result<()> {
        self.left.entries = self.left.entries.checked_sub(1).ok_or_else(|| too_much("files"))?;
        if Instant::now() >= self.until {
            return Err(io::Error::new(ErrorKind::TimedOut, "copying takes too long"));
        }
        let found = open_in(Some(&self.from), path, OFlag::empty())?;
        let about = File::from(found.try_clone()?).metadata()?;
        let kind = about.file_type();
        if kind.is_dir() {
            if path.components().count() > self.left.depth {
                return Err(too_much("directories in one another"));
            }
            fs::DirBuilder::new().mode(0o700).create(&to)?;
            self.directories.push((path.to_owned(), to));
            return Ok(());
        }
        if about.nlink() > 1 {
            let id = (about.dev(), about.ino());
            if let Some(first) = self.links.get(&id) {
                return fs::hard_link(first, &to);
            }
            self.links.insert(id, to.clone());
        }
        if kind.is_file() {
            self.left.bytes = self.left.bytes.checked_sub(about.len()).ok_or_else(|| too_much("bytes"))?;
            let content = OpenOptions::new().read(true).custom_flags(libc::O_NOATIME).open(again(&found));
            let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&to)?;
            // It may grow while it is read.
            io::copy(&mut io::Read::take(content?, about.len()), &mut &made)?;
        } else if kind.is_symlink() {
            symlink(readlinkat(&found, "")?, &to)?;
            lchown(&to, Some(about.uid()), Some(about.gid()))?;
            return times(&about, &to);
        } else {
            // A removed file of a lower layer is a device here; none of them can be opened by what it is.
            let kind = match kind {
                kind if kind.is_char_device() => SFlag::S_IFCHR,
                kind if kind.is_block_device() => SFlag::S_IFBLK,
                kind if kind.is_fifo() => SFlag::S_IFIFO,
                _ => SFlag::S_IFSOCK,
            };
            mknod(&to, kind, Mode::from_bits_truncate(0o600), about.rdev())?;
        }
        attributes(&found, &about, &to)
    }
}

fn attributes(found: &OwnedFd, about: &Metadata, to: &Path) -> io::Result<()> {
    let again = again(found);
    // First, as a change of owner takes capabilities and set-user-id away.
    lchown(to, Some(about.uid()), Some(about.gid()))?;
    for name in xattr::list_deref(&again).or_else(none_of_these)? {
        if let Some(value) = xattr::get_deref(&again, &name)? {
            xattr::set(to, &name, &value)?;
        }
    }
    fs::set_permissions(to, fs::Permissions::from_mode(about.mode() & 0o7777))?;
    times(about, to)
}

/// Where a file system has no attributes.
fn none_of_these(error: io::Error) -> io::Result<xattr::XAttrs> {
    if error.kind() == ErrorKind::Unsupported { xattr::list("/proc/self/fd") } else { Err(error) }
}

fn too_much(what: &str) -> io::Error {
    let Limits { bytes, entries, depth, .. } = LIMITS;
    let text = format!(
        "there are too many {what} to copy: at most {} MiB in {entries} files, {depth} deep",
        bytes >> 20
    );
    io::Error::new(ErrorKind::FileTooLarge, text)
}

fn times(about: &Metadata, to: &Path) -> io::Result<()> {
    let (read, written) =
        (TimeSpec::new(about.atime(), about.atime_nsec()), TimeSpec::new(about.mtime(), about.mtime_nsec()));
    Ok(utimensat(AT_FDCWD, to, &read, &written, UtimensatFlags::NoFollowSymlink)?)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let directory = std::env::temp_dir().join(format!("upper-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(directory.join("from")).unwrap();
        fs::create_dir_all(directory.join("to")).unwrap();
        directory
    }

    fn shell(directory: &Path, script: &str) -> String {
        let output = Command::new("sh").arg("-ec").arg(script).current_dir(directory).output().unwrap();
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    const MAKE: &str = "cd from
        mkdir -p a/b; echo one >a/one; ln a/one a/b/two; ln -s /etc/passwd link; mkfifo -m 620 pipe
        echo secret >a/b/own; chmod 4750 a/b/own; chmod 1777 a; : >empty; : >'odd
name'
        [ \"$(id -u)\" != 0 ] || { mknod gone c 0 0; chown 12:34 a/b/own; }
        touch -h -d '2001-02-03 04:05:06.789' link a/one a/b a .";
    const LOOK: &str =
        "find . -printf '%y %m %U %G %s %T@ %n %l %p\\\\n' | grep -v '^d.* \\\\.$' | sort; cat a/one a/b/own";

    #[test]
    fn a_copy_is_the_same_in_everything() {
        let directory = scratch("same");
        shell(&directory, MAKE);
        // The rights of a program, which only root gives.
        let rights = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
        let has_rights = xattr::set(directory.join("from/a/b/own"), "security.capability", rights).is_ok();
        // Some file systems have none.
        let marked = xattr::set(directory.join("from/a"), "user.mark", b"x").is_ok();
        copy(&directory.join("from"), &directory.join("to"), LIMITS).unwrap();
        // A directory's length is its file system's own business.
        let look = LOOK.replace("%s", "");
        let (from, to) = (shell(&directory.join("from"), &look), shell(&directory.join("to"), &look));
        assert_eq!(from, to);
        assert!(from.contains("link") && from.contains("secret"));
        let ino = |name: &str| fs::metadata(directory.join(name)).unwrap().ino();
        assert_eq!(ino("to/a/one"), ino("to/a/b/two"));
        assert_ne!(ino("to/a/one"), ino("from/a/one"));
        if marked {
            assert_eq!(xattr::get(directory.join("to/a"), "user.mark").unwrap().unwrap(), b"x");
        }
        if has_rights {
            let copied = xattr::get(directory.join("to/a/b/own"), "security.capability").unwrap();
            assert_eq!(copied.as_deref(), Some(&rights[..]), "a program has lost its rights");
        }
        let root =
            |name: &str| fs::metadata(directory.join(name)).map(|root| (root.mode(), root.mtime())).unwrap();
        assert_eq!(root("from"), root("to"));
        assert!(!is_empty(&directory.join("to")).unwrap());
        clear(&directory.join("to")).unwrap();
        assert!(is_empty(&directory.join("to")).unwrap() && Path::new("/etc/passwd").exists());
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn there_are_limits() {
        let directory = scratch("limits");
        shell(&directory, "cd from; echo 12345 >a; echo 12345 >b");
        let (from, to) = (directory.join("from"), directory.join("to"));
        let enough = Limits { bytes: 12, entries: 2, ..LIMITS };
        for (limits, good) in [
            (enough, true),
            (Limits { bytes: 11, ..enough }, false),
            (Limits { entries: 1, ..enough }, false),
        ] {
            clear(&to).unwrap();
            let copied = copy(&from, &to, limits);
            assert_eq!(copied.is_ok(), good, "{limits:?}");
            if let Err(error) = copied {
                assert!(error.to_string().contains("too many"), "{error}");
            }
        }
        clear(&to).unwrap();
        let late = copy(&from, &to, Limits { time: Duration::ZERO, ..LIMITS }).unwrap_err();
        assert_eq!(late.kind(), ErrorKind::TimedOut);
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn no_tree_is_too_deep_for_us() {
        let directory = scratch("deep");
        let (from, to) = (directory.join("from"), directory.join("to"));
        let deepest = |levels: usize| from.join(vec!["d"; levels].join("/"));
        fs::create_dir_all(deepest(LIMITS.depth)).unwrap();
        copy(&from, &to, LIMITS).unwrap();
        assert!(to.join(deepest(LIMITS.depth).strip_prefix(&from).unwrap()).is_dir());
        clear(&to).unwrap();
        fs::create_dir_all(deepest(LIMITS.depth + 900)).unwrap();
        // As little stack as the shim's threads have.
        let (deep, place) = (from.clone(), to.clone());
        let copying = move || copy(&deep, &place, LIMITS).unwrap_err().to_string();
        let error = std::thread::Builder::new().stack_size(256 << 10).spawn(copying).unwrap().join().unwrap();
        assert!(error.contains("in one another") && error.len() < 1000, "{error}");
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn no_link_leads_out() {
        let directory = scratch("links");
        shell(&directory, "mkdir other; echo theirs >other/file; ln -s ../other from/link");
        let from = open_in(None, &directory.join("from"), OFlag::O_DIRECTORY).unwrap();
        for path in ["link/file", "../other/file", "/etc/passwd"] {
            assert!(open_in(Some(&from), Path::new(path), OFlag::empty()).is_err(), "{path}");
        }
        assert!(open_in(Some(&from), Path::new("link"), OFlag::O_DIRECTORY).is_err());
        // Itself may be a link's target, as containerd's directories may be elsewhere; but what it has is not followed.
        assert!(copy(&directory.join("from/link"), &directory.join("to"), LIMITS).is_err());
        fs::remove_dir_all(&directory).unwrap();
    }
}
