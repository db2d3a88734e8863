//! What is mounted for a container before it is made: the share, disks, overlays of them, and its shared memory.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;
use oci_spec::runtime::Spec;
use runtime_spec::layout;
use runtime_spec::plan::{Mount, Shm, Source};

use crate::machine::disks;

/// Options that are flags of the kernel's: set, or cleared.
const FLAGS: &[(&str, MsFlags, bool)] = &[
    ("ro", MsFlags::MS_RDONLY, true),
    ("rw", MsFlags::MS_RDONLY, false),
    ("nosuid", MsFlags::MS_NOSUID, true),
    ("suid", MsFlags::MS_NOSUID, false),
    ("nodev", MsFlags::MS_NODEV, true),
    ("dev", MsFlags::MS_NODEV, false),
    ("noexec", MsFlags::MS_NOEXEC, true),
    ("exec", MsFlags::MS_NOEXEC, false),
    ("sync", MsFlags::MS_SYNCHRONOUS, true),
    ("async", MsFlags::MS_SYNCHRONOUS, false),
    ("dirsync", MsFlags::MS_DIRSYNC, true),
    ("noatime", MsFlags::MS_NOATIME, true),
    ("atime", MsFlags::MS_NOATIME, false),
    ("nodiratime", MsFlags::MS_NODIRATIME, true),
    ("diratime", MsFlags::MS_NODIRATIME, false),
    ("relatime", MsFlags::MS_RELATIME, true),
    ("norelatime", MsFlags::MS_RELATIME, false),
    ("strictatime", MsFlags::MS_STRICTATIME, true),
    ("nostrictatime", MsFlags::MS_STRICTATIME, false),
    ("lazytime", MsFlags::MS_LAZYTIME, true),
    ("bind", MsFlags::MS_BIND, true),
    ("rbind", MsFlags::MS_BIND.union(MsFlags::MS_REC), true),
    ("silent", MsFlags::MS_SILENT, true),
    ("defaults", MsFlags::empty(), true),
];

/// Mounts the tree that the machine shares, in both ways.
pub fn share() -> Result<()> {
    for (tag, at) in [(layout::SHARE_TAG, layout::GUEST_SHARE), (layout::BINDS_TAG, layout::GUEST_BINDS)] {
        if let Err(errno) = mount(Some(tag), at, Some("virtiofs"), MsFlags::MS_NODEV, None::<&str>) {
            bail!("mounting the share {tag}: {errno}");
        }
    }
    Ok(())
}

/// Mounts one thing.
pub fn one(what: &Mount) -> Result<()> {
    for directory in &what.mkdir {
        DirBuilder::new()
            .recursive(true)
            .mode(directory.mode)
            .create(&directory.path)
            .with_context(|| format!("creating {}", directory.path.display()))?;
        fs::set_permissions(&directory.path, fs::Permissions::from_mode(directory.mode))?;
        if let Some((uid, gid)) = directory.owner {
            chown(&directory.path, Some(uid), Some(gid))?;
        }
    }
    fs::create_dir_all(&what.target).with_context(|| format!("creating {}", what.target.display()))?;
    let (mut flags, mut data) = parse(&what.options);
    if what.typ == "bind" {
        flags |= MsFlags::MS_BIND;
    }
    for disk in &what.devices {
        data.push(format!("device={}", source(disk)?.display()));
    }
    let from = source(&what.source)?;
    let place = || format!("mounting {} ({}) on {}", from.display(), what.typ, what.target.display());
    let data = data.join(",");
    let typ = Some(what.typ.as_str()).filter(|typ| *typ != "bind");
    mount(Some(&from), &what.target, typ, flags, Some(data.as_str())).with_context(place)?;
    if flags.contains(MsFlags::MS_BIND) && flags != flags & (MsFlags::MS_BIND | MsFlags::MS_REC) {
        // A bind has the flags of what it binds until it is told otherwise.
        let flags = (flags - MsFlags::MS_REC) | MsFlags::MS_REMOUNT;
        mount(None::<&str>, &what.target, None::<&str>, flags, None::<&str>).with_context(place)?;
    }
    Ok(())
}

/// Shared memory; who comes second finds it.
pub fn shm(shm: &Shm) -> Result<()> {
    if shm.path.exists() {
        return Ok(());
    }
    fs::create_dir(&shm.path).with_context(|| format!("creating {}", shm.path.display()))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let data = format!("mode=1777,size={}", shm.size);
    mount(Some("shm"), &shm.path, Some("tmpfs"), flags, Some(data.as_str()))
        .with_context(|| format!("mounting shared memory on {}", shm.path.display()))
}

/// Goes into those directories of the host that are bound. What the host has mounted there is a file system of its own here, which the
/// kernel mounts when somebody first goes into it: here, and so there is one for the agent and for all that have their mounts from it.
/// What is told of files in it is heard by those who watch them.
pub fn go_into_binds(spec: &Spec) {
    for mount in spec.mounts().iter().flatten() {
        if let Some(source) = mount.source().as_ref().filter(|source| source.starts_with(layout::GUEST_BINDS))
        {
            // A file is none, and what fails here does so again where it is told.
            let _ = open(source, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty());
        }
    }
}

/// Unmounts places, the last first. What is not mounted is done already.
pub fn unmount(places: &[PathBuf]) -> Result<()> {
    for place in places.iter().rev() {
        match umount2(place, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            // Somebody who does not matter any more is still there: it goes when they do.
            Err(_) => match umount2(place, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH) {
                Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
                Err(errno) => bail!("unmounting {}: {errno}", place.display()),
            },
        }
        let _ = fs::remove_dir(place);
    }
    Ok(())
}

fn source(source: &Source) -> Result<PathBuf> {
    match source {
        Source::Path(path) => Ok(path.clone()),
        Source::Disk(serial) => Ok(disks::find(serial)?.path),
    }
}

fn parse(options: &[String]) -> (MsFlags, Vec<String>) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        match FLAGS.iter().find(|(name, ..)| name == option) {
            Some((_, flag, true)) => flags |= *flag,
            Some((_, flag, false)) => flags -= *flag,
            None => data.push(option.clone()),
        }
    }
    (flags, data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options() {
        for (given, flags, data) in [
            (&["ro", "lowerdir=/a:/b"][..], MsFlags::MS_RDONLY, &["lowerdir=/a:/b"][..]),
            (&["ro", "rw", "noatime"], MsFlags::MS_NOATIME, &[]),
            (&["rbind"], MsFlags::MS_BIND | MsFlags::MS_REC, &[]),
            (&["defaults", "index=off"], MsFlags::empty(), &["index=off"]),
        ] {
            let given: Vec<_> = given.iter().map(|&option| option.to_owned()).collect();
            let (found, rest) = parse(&given);
            assert_eq!((found, rest.iter().map(String::as_str).collect::<Vec<_>>()), (flags, data.to_vec()));
        }
    }
}
