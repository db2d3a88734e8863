//! Making them anew where the guest goes on.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, fchown};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, fchmod, futimens, mkdirat};
use nix::sys::time::TimeSpec;
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::Orphan;
use crate::devices::virtio::fs::query::Time;

/// Files with names in a directory. The names go when this is dropped.
pub struct Made<'a> {
    directory: &'a OwnedFd,
    named: Vec<(&'a Orphan, &'a str)>,
    files: Vec<File>,
}

impl<'a> Made<'a> {
    /// Makes each by its name, none of which there may be yet. They are the monitor's alone until they have their
    /// owners, so that whoever finds a name cannot read what is in it.
    pub fn make(
        directory: &'a OwnedFd,
        orphans: &'a [Orphan],
        names: &'a BTreeMap<u64, String>,
    ) -> io::Result<Self> {
        let mut made = Self { directory, named: Vec::new(), files: Vec::new() };
        for orphan in orphans {
            let name = names.get(&orphan.id).ok_or(io::ErrorKind::NotFound)?;
            made.add(orphan, name)?;
        }
        Ok(made)
    }

    fn add(&mut self, orphan: &'a Orphan, name: &'a str) -> io::Result<()> {
        let flags = OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let file = if orphan.is_directory() {
            mkdirat(self.directory, name, Mode::S_IRWXU)?;
            self.named.push((orphan, name));
            openat(self.directory, name, flags | OFlag::O_RDONLY | OFlag::O_DIRECTORY, Mode::empty())?
        } else {
            let new = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
            let file = openat(self.directory, name, flags | new, Mode::S_IRUSR | Mode::S_IWUSR)?;
            self.named.push((orphan, name));
            file
        };
        let file = File::from(file);
        if !orphan.is_directory() {
            file.set_len(orphan.size)?;
            for (at, run) in orphan.content.runs() {
                file.write_all_at(run, at)?;
            }
        }
        self.files.push(file);
        Ok(())
    }

    /// To be called when the server has them open: they lose their names, and become whose they were.
    pub fn settle(mut self) -> io::Result<()> {
        while let Some((orphan, name)) = self.named.pop() {
            remove(self.directory, orphan, name)?;
            // There are as many as names, once all are made.
            let Some(file) = self.files.pop() else { continue };
            fchown(&file, Some(orphan.uid), Some(orphan.gid))?;
            // Behind the owner, who takes set-user-id bits with him.
            fchmod(&file, Mode::from_bits_truncate(orphan.mode))?;
            futimens(&file, &spec(orphan.accessed), &spec(orphan.modified))?;
        }
        Ok(())
    }
}

impl Drop for Made<'_> {
    fn drop(&mut self) {
        for (orphan, name) in self.named.drain(..) {
            // There is nobody to tell.
            let _ = remove(self.directory, orphan, name);
        }
    }
}

fn remove(directory: &OwnedFd, orphan: &Orphan, name: &str) -> nix::Result<()> {
    let what = if orphan.is_directory() { UnlinkatFlags::RemoveDir } else { UnlinkatFlags::NoRemoveDir };
    match unlinkat(directory, name, what) {
        // Somebody has cleared up.
        Err(Errno::ENOENT) => Ok(()),
        done => done,
    }
}

fn spec(time: Time) -> TimeSpec {
    TimeSpec::new(time.seconds, i64::from(time.nanoseconds))
}
