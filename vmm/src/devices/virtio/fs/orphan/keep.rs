//! Reading them where the guest stands still.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use nix::sys::statfs::{OVERLAYFS_SUPER_MAGIC, statfs};

use super::content::{BLOCK, Builder, Content};
use super::{CONTENT_MAX, FILES_MAX, Orphan};
use crate::devices::virtio::fs::query::{Attributes, Open, Query};

/// Bytes that are looked at, zeroes or not, since the guest waits meanwhile. Holes are not looked at where the file
/// system knows them.
const LOOK_MAX: u64 = 1 << 30;

/// What stands against keeping them.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{FILES_MAX} are the most that are kept")]
    Files,
    #[error("more than {} MiB are in them, the most that is kept", CONTENT_MAX >> 20)]
    Content,
    #[error("more than {} MiB would have to be read to find what is in them", LOOK_MAX >> 20)]
    Look,
    #[error("one is neither a file nor a directory, and others are not kept")]
    Kind,
    #[error("one was not removed, but has a name outside, or one that is not UTF-8")]
    Elsewhere,
    #[error("one cannot be read: {0}")]
    Read(#[from] io::Error),
}

/// What may yet be read.
pub struct Left {
    /// Of what is kept.
    pub content: usize,
    /// Of what is looked at.
    pub look: u64,
}

/// What is in the files with these numbers, and what they are.
pub fn keep(query: &Query<'_>, files: &[u64]) -> Result<Vec<Orphan>, Error> {
    within(query, files, Left { content: CONTENT_MAX, look: LOOK_MAX })
}

/// The same in other bounds.
pub fn within(query: &Query<'_>, files: &[u64], mut left: Left) -> Result<Vec<Orphan>, Error> {
    if files.len() > FILES_MAX {
        return Err(Error::Files);
    }
    files.iter().map(|file| one(query, *file, &mut left)).collect()
}

fn one(query: &Query<'_>, file: u64, left: &mut Left) -> Result<Orphan, Error> {
    // Before it is read, which is an access.
    let attributes = query.attributes(file)?;
    let is_directory = match attributes.mode & libc::S_IFMT {
        libc::S_IFDIR => true,
        libc::S_IFREG => false,
        _ => return Err(Error::Kind),
    };
    if attributes.links > 0 && !removed_from_overlay(&attributes) {
        return Err(Error::Elsewhere);
    }
    let content =
        if is_directory { Content::default() } else { read(&query.open(file)?, attributes.size, left)? };
    let Attributes { mode, uid, gid, size, accessed, modified, .. } = attributes;
    Ok(Orphan { id: file, mode, uid, gid, size, accessed, modified, content })
}

/// Whether it is a file of a lower layer that the overlay does not show any more. The count of its links is that of
/// the layer, where it goes on. The server has it open, and what says the same of itself down to the nanosecond is it.
fn removed_from_overlay(attributes: &Attributes) -> bool {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else { return false };
    entries.flatten().any(|entry| {
        let path = entry.path();
        let removed =
            fs::read_link(&path).is_ok_and(|to| to.as_os_str().as_encoded_bytes().ends_with(b" (deleted)"));
        removed
            && fs::metadata(&path).is_ok_and(|found| {
                found.ino() == attributes.inode
                    && found.mode() == attributes.mode
                    && found.size() == attributes.size
                    && found.ctime() == attributes.changed.seconds
                    && found.ctime_nsec() == i64::from(attributes.changed.nanoseconds)
            })
            && statfs(&path).is_ok_and(|on| on.filesystem_type() == OVERLAYFS_SUPER_MAGIC)
    })
}

fn read(file: &Open<'_>, size: u64, left: &mut Left) -> Result<Content, Error> {
    let block = BLOCK as u64;
    let mut content = Builder::default();
    let mut at = 0;
    while at < size {
        let (from, to) = match file.data(at) {
            Ok(Some(from)) => (from.max(at), file.hole(from.max(at))?.unwrap_or(size)),
            Ok(None) => break,
            // A file system that knows no holes.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => (at, size),
            Err(error) => return Err(error.into()),
        };
        // Whole blocks, of which `at` is one's beginning.
        let mut next = from / block * block;
        at = to.max(next + 1).checked_next_multiple_of(block).unwrap_or(size);
        while next < at.min(size) {
            let asked = at.min(size) - next;
            let bytes = file.read(next, asked)?;
            left.look = left.look.checked_sub(bytes.len() as u64).ok_or(Error::Look)?;
            for (index, bytes) in (0..).zip(bytes.chunks(BLOCK)) {
                if bytes.iter().any(|byte| *byte != 0) {
                    left.content = left.content.checked_sub(bytes.len()).ok_or(Error::Content)?;
                    content.push(next + index * block, bytes);
                }
            }
            // Shorter than it said, as somebody else cuts it.
            if !bytes.len().is_multiple_of(BLOCK) || bytes.is_empty() {
                break;
            }
            next += bytes.len() as u64;
        }
    }
    Ok(content.build())
}
