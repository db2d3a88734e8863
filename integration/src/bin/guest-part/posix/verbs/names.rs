//! Names: making, linking, moving and removing them.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, RenameFlags, open, readlink, renameat2};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::{UnlinkatFlags, chdir, linkat, mkdir, mkfifo, symlinkat, unlinkat, write};

use super::super::words::{Told, mode, number, ok, shown, wrong};
use super::super::world::World;

pub fn call(world: &mut World, verb: &str, args: &[&str]) -> Option<Told> {
    Some(match (verb, args) {
        ("file", [path]) => file(path, ""),
        ("file", [path, text]) => file(path, text),
        ("mkdir", [path]) => ok(mkdir(*path, Mode::from_bits_retain(0o777))),
        ("mkdir", [path, bits]) => mode(bits).and_then(|bits| ok(mkdir(*path, bits))),
        ("rmdir", [path]) => ok(unlinkat(AT_FDCWD, *path, UnlinkatFlags::RemoveDir)),
        ("unlink", [path]) => ok(unlinkat(AT_FDCWD, *path, UnlinkatFlags::NoRemoveDir)),
        ("link", [old, new]) => ok(linkat(AT_FDCWD, *old, AT_FDCWD, *new, AtFlags::empty())),
        ("link-target", [old, new]) => ok(linkat(AT_FDCWD, *old, AT_FDCWD, *new, AtFlags::AT_SYMLINK_FOLLOW)),
        ("link-open", [slot, new]) => link_open(world, slot, new),
        ("symlink", [target, path]) => ok(symlinkat(*target, AT_FDCWD, *path)),
        ("readlink", [path]) => readlink(*path).map(|to| shown(to.as_encoded_bytes())).map_err(Into::into),
        ("rename", [old, new]) => rename(old, new, "0"),
        ("rename", [old, new, how]) => rename(old, new, how),
        ("mkfifo", [path, bits]) => mode(bits).and_then(|bits| ok(mkfifo(*path, bits))),
        ("mknod", [path, kind, bits]) => node(path, kind, bits),
        ("chdir", [path]) => ok(chdir(*path)),
        ("type", [path]) => kind(path),
        ("same", [one, other]) => same(one, other),
        _ => return None,
    })
}

fn file(path: &str, text: &str) -> Told {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    let fd = open(path, flags, Mode::from_bits_retain(0o666))?;
    ok(write(&fd, text.as_bytes()))
}

/// Gives what is open a name, as one does with a file that never had one.
fn link_open(world: &World, slot: &str, new: &str) -> Told {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", world.fd(slot)?.as_raw_fd());
    ok(linkat(AT_FDCWD, path.as_str(), AT_FDCWD, new, AtFlags::AT_SYMLINK_FOLLOW))
}

fn rename(old: &str, new: &str, how: &str) -> Told {
    let flags = match how {
        "0" => RenameFlags::empty(),
        "noreplace" => RenameFlags::RENAME_NOREPLACE,
        "exchange" => RenameFlags::RENAME_EXCHANGE,
        "both" => RenameFlags::RENAME_NOREPLACE | RenameFlags::RENAME_EXCHANGE,
        "whiteout" => RenameFlags::RENAME_WHITEOUT,
        _ => return wrong(format!("{how} is no way to rename")),
    };
    ok(renameat2(AT_FDCWD, old, AT_FDCWD, new, flags))
}

/// `fifo`, `sock`, `file`, or `char:1:3` and `block:7:0`.
fn node(path: &str, kind: &str, bits: &str) -> Told {
    let words: Vec<&str> = kind.split(':').collect();
    let (kind, device) = match words[..] {
        ["fifo"] => (SFlag::S_IFIFO, 0),
        ["sock"] => (SFlag::S_IFSOCK, 0),
        ["file"] => (SFlag::S_IFREG, 0),
        ["dir"] => (SFlag::S_IFDIR, 0),
        ["char", major, minor] => (SFlag::S_IFCHR, makedev(number(major)?, number(minor)?)),
        ["block", major, minor] => (SFlag::S_IFBLK, makedev(number(major)?, number(minor)?)),
        _ => return wrong(format!("{kind} is no kind of node")),
    };
    ok(mknod(path, kind, mode(bits)?, device))
}

/// What is there, not following a symbolic link: one that leads nowhere is there, too.
fn kind(path: &str) -> Told {
    let kind = SFlag::from_bits_truncate(Path::new(path).symlink_metadata()?.mode());
    Ok(name_of(kind).to_owned())
}

pub fn name_of(kind: SFlag) -> &'static str {
    match kind & SFlag::S_IFMT {
        SFlag::S_IFREG => "file",
        SFlag::S_IFDIR => "dir",
        SFlag::S_IFLNK => "symlink",
        SFlag::S_IFIFO => "fifo",
        SFlag::S_IFSOCK => "sock",
        SFlag::S_IFCHR => "char",
        SFlag::S_IFBLK => "block",
        _ => "nothing-known",
    }
}

fn same(one: &str, other: &str) -> Told {
    let id = |path: &str| Path::new(path).symlink_metadata().map(|data| (data.dev(), data.ino()));
    Ok(if id(one)? == id(other)? { "same" } else { "different" }.to_owned())
}
