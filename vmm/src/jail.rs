//! What the process may still do, once it faces a guest: as little as its devices need.
//!
//! A monitor that a guest has taken over finds itself here. The order of [`Jail::enter`], and why:
//!
//! 1. Inherited descriptors are closed ([`close_inherited`]), before anything else is opened: what the
//!    parent had open is nobody's business here.
//! 2. The cgroup and the network namespace are joined while their paths still lead there.
//! 3. A mount namespace of its own, in which every mount is a slave: what the host mounts into a shared
//!    directory later is seen by the guest, and nothing that is done here is seen by the host.
//! 4. The root is a tmpfs, over a directory of the host's, which holds the entries as bind mounts and
//!    nothing else; then it is the only mount tree there is (`pivot_root`), and read-only. Paths of
//!    entries are resolved before this, by the host's root; everything that is opened by path *after* it,
//!    a share by its file server, a socket of the guest's choice, finds nothing but the entries.
//! 5. Limits: no core dumps (they would hold the guest's memory), no locked memory, no message queues, no
//!    real time; many open files, since a file server keeps one for each file that a guest knows.
//! 6. Capabilities, but for those in the list, leave every set, also the bounding set, and never come back:
//!    no-new-privs.
//!
//! All of it is the calling thread's, and inherited by threads that it starts: the process must have no
//! other yet, and is told when it has.
//!
//! What was opened before (a terminal, a console's file, a tap, the control socket of an owner) stays open
//! and is the only way out. No process of a jail can be started: there is no file to execute, and every
//! mount is `noexec`.

use std::ffi::CString;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{chdir, pivot_root};

/// Open files of a machine: its devices', and one for each file of a share that the guest knows.
const FILES: u64 = 1 << 20;

/// The process could not be jailed; what state it is in is not known, and it should end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A step was refused.
    #[error("cannot {what} {}: {source}{}", path.display(), mend(what, source))]
    Step {
        /// What was attempted.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Jails are for whole processes.
    #[error("a process of {0} threads cannot be jailed: enter the jail before starting any")]
    Threads(usize),
    /// An entry would be where none can be.
    #[error("{} cannot be a place in a jail: it must be absolute and without dots", .0.display())]
    Place(PathBuf),
}

fn mend(what: &str, source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EPERM) => "; a jail takes root's privileges to build",
        Some(libc::EINVAL) if what == CHANGE_ROOT => {
            "; the root file system must be a mounted one, not an initramfs"
        }
        _ => "",
    }
}

const CHANGE_ROOT: &str = "make a root of";

/// What a guest may do to an entry by way of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Look.
    ReadOnly,
    /// Change.
    ReadWrite,
}

/// A file, directory or device node of the host, with all that is mounted below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where it is on the host.
    pub source: PathBuf,
    /// Where it is in the jail.
    pub place: PathBuf,
    /// What may be done to it.
    pub access: Access,
}

/// A right that a device needs, by its number in `capabilities(7)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Capability {
    /// Files change owner.
    Chown = 0,
    /// Files are opened that their mode denies.
    DacOverride = 1,
    /// Modes, times and attributes of others' files are set.
    Fowner = 3,
    /// Set-group-id bits survive.
    Fsetid = 4,
    /// Groups are changed.
    Setgid = 6,
    /// Users are changed.
    Setuid = 7,
    /// Device nodes are made.
    Mknod = 27,
    /// Capabilities of files are set.
    Setfcap = 31,
}

/// What the file server needs for a share that behaves like a file system: a guest's root gives files away
/// (CHOWN), passes by modes (DAC_OVERRIDE, FOWNER), keeps set-group-id bits (FSETID), makes device nodes, which
/// an overlay's whiteouts are too (MKNOD), and sets file capabilities, which packages are installed with
/// (SETFCAP); and each file is made by a thread that is, for this one call, the guest's user (SETUID, SETGID).
///
/// Not among them, though it costs a little: SYS_ADMIN, by which `trusted.` attributes are read.
pub const FILE_SERVER: &[Capability] = &[
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Mknod,
    Capability::Setfcap,
];

/// A jail to be entered.
#[derive(Debug, Default)]
pub struct Jail {
    /// A directory of the host to build the root on. It is only looked at; the host sees no change in it.
    pub root: PathBuf,
    /// What is in it.
    pub entries: Vec<Entry>,
    /// The network namespace to join; without one the process stays where it is.
    pub network: Option<OwnedFd>,
    /// The directory of the cgroup to join; without one the process stays where it is.
    pub cgroup: Option<PathBuf>,
    /// What stays allowed.
    pub capabilities: Vec<Capability>,
}

fn step<T, E: Into<io::Error>>(
    what: &'static str,
    path: impl AsRef<Path>,
    result: Result<T, E>,
) -> Result<T, Error> {
    result.map_err(|source| Error::Step { what, path: path.as_ref().into(), source: source.into() })
}

impl Jail {
    /// Goes in, for good.
    pub fn enter(&self) -> Result<(), Error> {
        let threads =
            step("count the threads in", "/proc/self/task", fs::read_dir("/proc/self/task"))?.count();
        if threads != 1 {
            return Err(Error::Threads(threads));
        }
        if let Some(cgroup) = &self.cgroup {
            let procs = cgroup.join("cgroup.procs");
            let file = fs::OpenOptions::new().write(true).open(&procs);
            // 0 is the process that writes.
            step("join the cgroup of", &procs, file.and_then(|mut file| file.write_all(b"0")))?;
        }
        if let Some(network) = &self.network {
            step("join", "the network namespace", setns(network, CloneFlags::CLONE_NEWNET))?;
        }
        self.build()?;
        change_root(&self.root)?;
        limit()?;
        step("drop", "capabilities", keep_only(&self.capabilities))?;
        // SAFETY: PR_SET_NO_NEW_PRIVS takes numbers only.
        let done = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        step("renounce", "new privileges", check(done))
    }

    fn build(&self) -> Result<(), Error> {
        step("make", "a mount namespace", unshare(CloneFlags::CLONE_NEWNS))?;
        let none: Option<&Path> = None;
        let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
        step("take in mounts below", "/", mount(none, "/", none, slave, none))?;
        let options = "mode=0755,size=1m,nr_inodes=4k";
        step(
            "mount a tmpfs on",
            &self.root,
            mount(Some("tmpfs"), &self.root, Some("tmpfs"), PLAIN, Some(options)),
        )?;
        self.entries.iter().try_for_each(|entry| entry.bind(&self.root))
    }
}

/// For what is neither a device node nor a program.
const PLAIN: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

impl Entry {
    /// With the same place in the jail as on the host.
    pub fn same(path: impl Into<PathBuf>, access: Access) -> Self {
        let source = path.into();
        Self { place: source.clone(), source, access }
    }

    fn bind(&self, root: &Path) -> Result<(), Error> {
        let inside = below(root, &self.place).ok_or_else(|| Error::Place(self.place.clone()))?;
        let metadata = step("look at", &self.source, fs::metadata(&self.source))?;
        let parent = inside.parent().unwrap_or(root);
        let mut builder = fs::DirBuilder::new();
        let made =
            builder.recursive(true).mode(0o755).create(if metadata.is_dir() { &inside } else { parent });
        step("make a place for", &self.source, made)?;
        if !metadata.is_dir() {
            step("make a place for", &self.source, fs::File::create_new(&inside))?;
        }
        let none: Option<&Path> = None;
        let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
        step("bind", &self.source, mount(Some(&self.source), &inside, none, bind, none))?;
        let mut attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
        let kind = metadata.file_type();
        if !kind.is_char_device() && !kind.is_block_device() {
            attributes |= libc::MOUNT_ATTR_NODEV;
        }
        if self.access == Access::ReadOnly {
            attributes |= libc::MOUNT_ATTR_RDONLY;
        }
        step("restrict the mount of", &self.source, restrict(&inside, attributes))
    }
}

/// Where `place` is below `root`.
fn below(root: &Path, place: &Path) -> Option<PathBuf> {
    use std::path::Component;
    let mut parts = place.components();
    if parts.next() != Some(Component::RootDir) {
        return None;
    }
    let inner = parts.as_path();
    let plain = parts.all(|part| matches!(part, Component::Normal(_)));
    (plain && inner.file_name().is_some()).then(|| root.join(inner))
}

/// Restricts a mount and all mounts below it.
fn restrict(path: &Path, attributes: u64) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attr = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: `path` ends with a nul and `attr` has the size that is said; both are only read.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    check(done)
}

fn check(done: impl Into<i64>) -> io::Result<()> {
    if done.into() == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn change_root(root: &Path) -> Result<(), Error> {
    step("go to", root, chdir(root))?;
    // The old root is put on top of the new one, and taken off.
    step(CHANGE_ROOT, root, pivot_root(".", "."))?;
    step("leave", "the host's root", umount2(".", MntFlags::MNT_DETACH))?;
    step("go to", "/", chdir("/"))?;
    let none: Option<&Path> = None;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | PLAIN;
    step("write-protect", "/", mount(none, "/", none, flags, none))
}

fn limit() -> Result<(), Error> {
    umask(Mode::from_bits_truncate(0o077));
    let (_, files) = step("read", "limits", getrlimit(Resource::RLIMIT_NOFILE))?;
    for (resource, limit) in [
        (Resource::RLIMIT_NOFILE, files.min(FILES)),
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_MEMLOCK, 0),
        (Resource::RLIMIT_MSGQUEUE, 0),
        (Resource::RLIMIT_RTPRIO, 0),
    ] {
        step("set", "limits", setrlimit(resource, limit, limit))?;
    }
    Ok(())
}

/// Takes all other capabilities out of every set.
fn keep_only(kept: &[Capability]) -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    /// _LINUX_CAPABILITY_VERSION_3
    const VERSION: u32 = 0x2008_0522;

    let bits = kept.iter().fold(0u64, |bits, capability| bits | 1 << *capability as u8);
    for number in 0..64 {
        // SAFETY: both take numbers only. There is no bit for a number that this kernel does not know.
        let known = unsafe { libc::prctl(libc::PR_CAPBSET_READ, number, 0, 0, 0) };
        if known == 1 && bits & 1 << number == 0 {
            // SAFETY: as above.
            check(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) })?;
        }
    }
    // SAFETY: takes numbers only.
    check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) })?;
    let header = Header { version: VERSION, pid: 0 };
    let half = |bits: u64| Data { effective: bits as u32, permitted: bits as u32, inheritable: 0 };
    let data = [half(bits), half(bits >> 32)];
    // SAFETY: header and two sets of data are what version 3 reads, and it only reads them.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) })
}

/// Closes every descriptor but the first three and those in `keep`. To be called before this process has
/// opened any of its own.
pub fn close_inherited(keep: &[RawFd]) -> io::Result<()> {
    for (first, last) in gaps(keep) {
        // SAFETY: close_range takes numbers only, and nothing in this process uses these yet.
        check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) })?;
    }
    Ok(())
}

/// The ranges between descriptors that are kept.
fn gaps(keep: &[RawFd]) -> Vec<(u32, u32)> {
    let mut keep: Vec<u32> =
        keep.iter().filter_map(|fd| u32::try_from(*fd).ok()).filter(|fd| *fd > 2).collect();
    keep.sort_unstable();
    let mut first = 3;
    let mut gaps = Vec::new();
    for fd in keep {
        if first < fd {
            gaps.push((first, fd - 1));
        }
        first = fd + 1;
    }
    gaps.push((first, u32::MAX));
    gaps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_closed_around_those_that_stay() {
        const END: u32 = u32::MAX;
        for (keep, expected) in [
            (&[][..], &[(3, END)][..]),
            (&[3], &[(4, END)]),
            (&[7, 4, 0, -1, 5], &[(3, 3), (6, 6), (8, END)]),
            (&[4, 4], &[(3, 3), (5, END)]),
        ] {
            assert_eq!(gaps(keep), expected, "{keep:?}");
        }
    }

    #[test]
    fn a_place_is_absolute_and_plain() {
        for (place, expected) in [
            ("/share/0", Some("/j/share/0")),
            ("/dev/kvm", Some("/j/dev/kvm")),
            ("share", None),
            ("/", None),
            ("/a/../..", None),
            ("/../x", None),
            ("", None),
        ] {
            assert_eq!(below(Path::new("/j"), Path::new(place)), expected.map(PathBuf::from), "{place:?}");
        }
    }

    #[test]
    fn a_process_with_threads_is_not_jailed() {
        // Tests have threads.
        let error = Jail { root: "/nonexistent".into(), ..Jail::default() }.enter().unwrap_err();
        assert!(matches!(error, Error::Threads(2..)), "{error}");
    }
}
