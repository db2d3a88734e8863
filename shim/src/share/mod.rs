//! What the host mounts into the tree that a machine shares.
//!
//! The tree is a mount that propagates into the monitor's jail, so that a container which comes later is seen there
//! too. A bind is therefore complete before it appears: it is cloned apart from any tree, restricted there, and then
//! moved to its place. No guest ever sees it writable that may not write.

pub mod points;

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::path::Path;

use nix::mount::{MsFlags, mount};
use runtime_spec::layout;
use runtime_spec::plan::{Access, Bind, Directory, Mount, Share, Source};

use crate::error::{Attempt, Error, Result};
use crate::journal::{Journal, Made};
use crate::loops;

/// The longest text of options that the kernel reads: a page, with its nul.
const LONGEST_OPTIONS: usize = 4095;

/// Makes the tree of a machine.
pub fn make_tree(journal: &Journal, tree: &Path) -> Result<()> {
    make_directory(tree, 0o711).attempt(format_args!("making {}", tree.display()))?;
    journal.note(Made::Mount(tree.to_owned())).attempt("writing the journal")?;
    let none: Option<&Path> = None;
    mount(Some(tree), tree, none, MsFlags::MS_BIND, none)
        .and_then(|()| mount(none, tree, none, MsFlags::MS_SHARED, none))
        .attempt(format_args!("mounting {}", tree.display()))
}

/// Mounts what a container's machine shares.
pub fn mount_all(journal: &Journal, tree: &Path, id: &str, share: &Share) -> Result<()> {
    let noted = |made| journal.note(made).attempt("writing the journal");
    let subtree = tree.join(layout::subtree(id));
    noted(Made::Tree(subtree.clone()))?;
    make_directory(&tree.join(layout::rootfs(id)), 0o755)
        .attempt(format_args!("making {}", subtree.display()))?;
    for wanted in &share.rootfs {
        make_directory(&wanted.target, 0o755).attempt(format_args!("making {}", wanted.target.display()))?;
        noted(Made::Mount(wanted.target.clone()))?;
        mount_one(wanted)?;
    }
    for wanted in &share.binds {
        let place = tree.join(&wanted.place);
        let made = place.parent().map_or(Ok(()), |parent| make_directory(parent, 0o755)).and_then(|()| {
            if wanted.directory { make_directory(&place, 0o755) } else { File::create(&place).map(drop) }
        });
        made.attempt(format_args!("making {}", place.display()))?;
        noted(Made::Mount(place.clone()))?;
        bind(wanted, &place).attempt(format_args!("mounting {}", wanted.source.display()))?;
    }
    Ok(())
}

fn make_directory(path: &Path, mode: u32) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(mode).create(path)
}

fn mount_one(wanted: &Mount) -> Result<()> {
    let Source::Path(source) = &wanted.source else {
        return Err(Error::invalid("a disk of the machine cannot be mounted on the host"));
    };
    for directory in &wanted.mkdir {
        make_wanted(directory).attempt(format_args!("making {}", directory.path.display()))?;
    }
    let (flags, data) = flags_and_data(&wanted.options);
    let what = format!("mounting {} of type {} on {}", source.display(), wanted.typ, wanted.target.display());
    if wanted.typ == "bind" || flags.contains(MsFlags::MS_BIND) {
        let readonly = flags.contains(MsFlags::MS_RDONLY);
        let wanted = Bind {
            source: source.clone(),
            place: wanted.target.clone(),
            directory: true,
            recursive: flags.contains(MsFlags::MS_REC),
            access: if readonly { Access::ReadOnly } else { Access::ReadWrite },
            follows: false,
        };
        return bind(&wanted, &wanted.place).attempt(what);
    }
    if fs::metadata(source).is_ok_and(|found| found.is_file()) {
        return image(&wanted.typ, source, &wanted.target, flags, &data).attempt(what);
    }
    plain(&wanted.typ, source, &wanted.target, flags, &data).attempt(what)
}

/// An image in a file, on a loop device; erofs needs none where the kernel can do without.
fn image(typ: &str, source: &Path, target: &Path, flags: MsFlags, data: &str) -> io::Result<()> {
    let mut options: Vec<_> = data.split(',').filter(|option| *option != "loop").map(str::to_owned).collect();
    let flags = if typ == "erofs" { flags | MsFlags::MS_RDONLY } else { flags };
    if typ == "erofs" {
        match plain(typ, source, target, flags, &options.join(",")) {
            Err(error) if error.raw_os_error() == Some(libc::ENOTBLK) => {}
            done => return done,
        }
    }
    let readonly = flags.contains(MsFlags::MS_RDONLY);
    let main = loops::attach(source, readonly)?;
    let mut more = Vec::new();
    for option in &mut options {
        if let Some(path) = option.strip_prefix("device=") {
            let device = loops::attach(Path::new(path), true)?;
            *option = format!("device={}", device.path.display());
            more.push(device);
        }
    }
    plain(typ, &main.path, target, flags, &options.join(","))
}

fn make_wanted(directory: &Directory) -> io::Result<()> {
    make_directory(&directory.path, directory.mode)?;
    // Whatever the umask is.
    fs::set_permissions(&directory.path, fs::Permissions::from_mode(directory.mode))?;
    directory.owner.map_or(Ok(()), |(uid, gid)| chown(&directory.path, Some(uid), Some(gid)))
}

/// Many layers make options longer than the kernel reads. What their paths have in common is then left out, and the
/// mount made from there, by a thread whose working directory is its own.
fn plain(typ: &str, source: &Path, target: &Path, flags: MsFlags, data: &str) -> io::Result<()> {
    if data.len() <= LONGEST_OPTIONS {
        return Ok(mount(Some(source), target, Some(typ), flags, Some(data))?);
    }
    let Some((from, short)) = shorten(data).filter(|(_, short)| short.len() <= LONGEST_OPTIONS) else {
        let text =
            format!("its options have {} bytes, of which the kernel reads {LONGEST_OPTIONS}", data.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    };
    std::thread::scope(|scope| {
        let mounting = scope.spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
            nix::unistd::chdir(from)?;
            mount(Some(source), target, Some(typ), flags, Some(short.as_str()))
        });
        mounting
            .join()
            .map_or_else(|_| Err(io::Error::other("the mounting thread panicked")), |done| Ok(done?))
    })
}

/// An overlay's options with paths from the directory that all of its lower ones have in common.
fn shorten(data: &str) -> Option<(&Path, String)> {
    let lower = data.split(',').find_map(|option| option.strip_prefix("lowerdir="))?;
    let mut common = Path::new(lower.split(':').next()?).parent()?;
    for path in lower.split(':') {
        while !Path::new(path).starts_with(common) {
            common = common.parent()?;
        }
    }
    let relative = |path: &str| Some(Path::new(path).strip_prefix(common).ok()?.to_str()?.to_owned());
    let short: Vec<_> = lower.split(':').map(relative).collect::<Option<_>>()?;
    Some((common, data.replace(lower, &short.join(":"))))
}

fn flags_and_data(options: &[String]) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        let (set, clear) = match option.as_str() {
            "ro" => (MsFlags::MS_RDONLY, MsFlags::empty()),
            "rw" => (MsFlags::empty(), MsFlags::MS_RDONLY),
            "nosuid" => (MsFlags::MS_NOSUID, MsFlags::empty()),
            "suid" => (MsFlags::empty(), MsFlags::MS_NOSUID),
            "nodev" => (MsFlags::MS_NODEV, MsFlags::empty()),
            "dev" => (MsFlags::empty(), MsFlags::MS_NODEV),
            "noexec" => (MsFlags::MS_NOEXEC, MsFlags::empty()),
            "exec" => (MsFlags::empty(), MsFlags::MS_NOEXEC),
            "sync" => (MsFlags::MS_SYNCHRONOUS, MsFlags::empty()),
            "noatime" => (MsFlags::MS_NOATIME, MsFlags::empty()),
            "nodiratime" => (MsFlags::MS_NODIRATIME, MsFlags::empty()),
            "relatime" => (MsFlags::MS_RELATIME, MsFlags::empty()),
            "strictatime" => (MsFlags::MS_STRICTATIME, MsFlags::empty()),
            "bind" => (MsFlags::MS_BIND, MsFlags::empty()),
            "rbind" => (MsFlags::MS_BIND | MsFlags::MS_REC, MsFlags::empty()),
            // What a mount in the tree propagates is decided here, not by who asks for it.
            "defaults" | "private" | "rprivate" | "slave" | "rslave" | "shared" | "rshared" | "async" => {
                continue;
            }
            _ => {
                data.push(option.as_str());
                continue;
            }
        };
        flags = flags.difference(clear).union(set);
    }
    (flags, data.join(","))
}

fn bind(wanted: &Bind, place: &Path) -> io::Result<()> {
    let recursive = if wanted.recursive { libc::AT_RECURSIVE as u32 } else { 0 };
    let source = CString::new(wanted.source.as_os_str().as_bytes())?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | recursive;
    // SAFETY: `source` ends with a nul and is only read.
    let tree = check(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, source.as_ptr(), flags) })?;
    // SAFETY: the call has just made this descriptor, for nobody else.
    let tree = unsafe { OwnedFd::from_raw_fd(tree as i32) };
    let propagation = if wanted.follows { libc::MS_SLAVE } else { libc::MS_PRIVATE };
    restrict(&tree, 0, propagation, libc::AT_RECURSIVE)?;
    match wanted.access {
        Access::ReadWrite => {}
        Access::ReadOnly => restrict(&tree, libc::MOUNT_ATTR_RDONLY, 0, 0)?,
        Access::ReadOnlyRecursive => restrict(&tree, libc::MOUNT_ATTR_RDONLY, 0, libc::AT_RECURSIVE)?,
    }
    let place = CString::new(place.as_os_str().as_bytes())?;
    // SAFETY: both texts end with a nul and are only read; the descriptor is open.
    let moved = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            place.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    check(moved).map(drop)
}

/// Restricts a mount that is nowhere yet.
fn restrict(tree: &OwnedFd, attributes: u64, propagation: u64, recursive: i32) -> io::Result<()> {
    let attr = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation, userns_fd: 0 };
    // SAFETY: the text ends with a nul and `attr` has the size that is said; both are only read.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    check(done).map(drop)
}

fn check(result: i64) -> io::Result<i64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_mounts() {
        let options = ["ro", "nosuid", "rw", "rbind", "rprivate", "lowerdir=/a:/b", "index=off"];
        let (flags, data) = flags_and_data(&options.map(str::to_owned));
        assert_eq!(flags, MsFlags::MS_NOSUID | MsFlags::MS_BIND | MsFlags::MS_REC);
        assert_eq!(data, "lowerdir=/a:/b,index=off");
    }

    #[test]
    fn many_layers() {
        let data = "index=off,lowerdir=/s/12/fs:/s/1/fs:/s/3/fs,upperdir=/s/4/fs,workdir=/s/4/work";
        let (from, short) = shorten(data).unwrap();
        assert_eq!(from, Path::new("/s"));
        assert_eq!(short, "index=off,lowerdir=12/fs:1/fs:3/fs,upperdir=/s/4/fs,workdir=/s/4/work");
        assert_eq!(shorten("index=off"), None);
    }
}
