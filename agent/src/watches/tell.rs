//! What has happened on the host, done once more here, as whom the share knows by it that there is nothing to do.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use agent_api::NEWS_GROUP;
use agent_api::agent::{News, news::What};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, OFlag, OpenHow, ResolveFlag, fallocate, open, openat2};
use nix::libc;
use nix::sys::stat::{Mode, SFlag, fstat, mkdirat, mknodat};
use nix::unistd::{Gid, UnlinkatFlags, setfsgid, symlinkat, unlinkat};
use runtime_spec::layout::GUEST_BINDS;

use super::scan::{self, Watched};

/// What this thread does in a share, as long as this is there, has happened.
struct Happened;

impl Happened {
    fn on_host(what: What, is_directory: bool) -> Option<Self> {
        let number = match what {
            What::NOTHING => return None,
            What::APPEARED => 0,
            What::VANISHED if is_directory => 2,
            What::VANISHED => 1,
            What::CHANGED | What::ATTRIBUTES => 3,
        };
        setfsgid(Gid::from_raw(NEWS_GROUP + number));
        Some(Self)
    }
}

impl Drop for Happened {
    fn drop(&mut self) {
        setfsgid(Gid::from_raw(0));
    }
}

/// Tells whoever watches of what has happened. Of what nobody can be told any more, as it is another by now, nothing is told.
pub fn tell(news: &[News], watched: &BTreeMap<PathBuf, Watched>) -> anyhow::Result<()> {
    let root = open(GUEST_BINDS, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let mounts = scan::mounts()?;
    for one in news {
        let place = Path::new(OsStr::from_bytes(&one.place));
        if one.name.is_empty() {
            // Who has that name by now may be somebody else.
            if let Some(itself) = watched.get(place).and_then(|watched| watched.open(&mounts).ok()) {
                let _ = of_itself(&itself, one);
            }
            // And the kernel finds out that a file which it knows is gone when it looks for it.
            let _ = find(&root, place);
        } else if let Ok(place) = find(&root, place) {
            let _ = of_name(&place, one);
        }
    }
    Ok(())
}

/// Others may move directories about, and lay links.
fn find(root: &OwnedFd, place: &Path) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    openat2(root, place, how)
}

fn kind_of(news: &News) -> SFlag {
    SFlag::from_bits_truncate(news.type_) & SFlag::S_IFMT
}

fn of_itself(file: &OwnedFd, news: &News) -> nix::Result<()> {
    let what = news.what.enum_value_or_default();
    let Some(_happened) = Happened::on_host(what, false) else { return Ok(()) };
    match what {
        What::CHANGED => changed(file).or_else(|_| attributes(file)),
        What::ATTRIBUTES => attributes(file),
        _ => Ok(()),
    }
}

fn of_name(place: &OwnedFd, news: &News) -> nix::Result<()> {
    let name = Path::new(OsStr::from_bytes(&news.name));
    if name.components().count() != 1 || name == Path::new("..") {
        return Err(Errno::EINVAL);
    }
    let (what, kind) = (news.what.enum_value_or_default(), kind_of(news));
    let Some(_happened) = Happened::on_host(what, kind == SFlag::S_IFDIR) else { return Ok(()) };
    let itself = || {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        nix::fcntl::openat(place, name, flags, Mode::empty())
    };
    match what {
        What::NOTHING => Ok(()),
        What::APPEARED => match kind {
            SFlag::S_IFDIR => mkdirat(place, name, Mode::S_IRWXU),
            SFlag::S_IFLNK => symlinkat(".", place, name),
            kind => mknodat(place, name, kind, Mode::S_IRUSR, 0),
        },
        What::VANISHED if kind == SFlag::S_IFDIR => unlinkat(place, name, UnlinkatFlags::RemoveDir),
        What::VANISHED => unlinkat(place, name, UnlinkatFlags::NoRemoveDir),
        What::CHANGED => {
            let file = itself()?;
            changed(&file).or_else(|_| attributes(&file))
        }
        What::ATTRIBUTES => attributes(&itself()?),
    }
}

fn again(file: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// Writes nothing to a file: who watches hears that it was written to and closed.
fn changed(file: &OwnedFd) -> nix::Result<()> {
    if SFlag::from_bits_truncate(fstat(file)?.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
        return Err(Errno::EINVAL);
    }
    let flags = OFlag::O_WRONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = open(again(file).as_str(), flags, Mode::empty())?;
    fallocate(&file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, 1)
}

/// Gives a file the rights that it has.
fn attributes(file: &OwnedFd) -> nix::Result<()> {
    let mode = fstat(file)?.st_mode;
    if SFlag::from_bits_truncate(mode) & SFlag::S_IFMT == SFlag::S_IFLNK {
        return Err(Errno::EINVAL);
    }
    let set = fs::set_permissions(again(file), Permissions::from_mode(mode & 0o7777));
    set.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
}
