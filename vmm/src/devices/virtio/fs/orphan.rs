//! Files that a guest has open and that were removed. There is no name by which they could be found again, and no way
//! back to one, so a snapshot keeps what is in them, and they are made anew where the guest goes on.
//!
//! Only what is in a file and what its owner sets is kept: not its extended attributes, which are few on such files,
//! and of which an access list or a capability matters to nobody who has the file open already.

mod content;
mod keep;
mod make;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use self::content::Content;
pub use self::keep::keep;
pub use self::make::Made;
use super::super::StateError;
use super::query::Time;

/// Files of a share that are kept. A program has a handful.
pub const FILES_MAX: usize = 1024;
/// Bytes in all of them that are kept: half of what the state of a device can have.
pub const CONTENT_MAX: usize = 64 << 20;

/// One such file, or a directory, which has been empty since it was removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Orphan {
    /// By which guest and server know it.
    id: u64,
    /// Its type and its permissions.
    mode: u32,
    uid: u32,
    gid: u32,
    size: u64,
    accessed: Time,
    modified: Time,
    content: Content,
}

impl Orphan {
    fn is_directory(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFDIR
    }

    /// How many bytes are in it, if it could be one.
    fn check(&self) -> Result<usize, StateError> {
        let kind = self.mode & libc::S_IFMT;
        let known = [libc::S_IFREG, libc::S_IFDIR].contains(&kind);
        let size = if self.is_directory() { 0 } else { self.size };
        let times = [self.accessed, self.modified];
        if !known || i64::try_from(size).is_err() || times.iter().any(|time| time.nanoseconds > 999_999_999) {
            return Err(self.contradicts());
        }
        self.content.check(size).ok_or_else(|| self.contradicts())
    }

    fn contradicts(&self) -> StateError {
        StateError(format!("what was saved of the removed file {} contradicts itself", self.id))
    }
}

/// Refuses what was not kept by [`keep`].
pub fn check(orphans: &[Orphan]) -> Result<(), StateError> {
    let mut left = CONTENT_MAX;
    for orphan in orphans {
        let rest = left.checked_sub(orphan.check()?);
        left = rest.ok_or_else(|| {
            StateError(format!("more than {CONTENT_MAX} bytes of removed files were saved"))
        })?;
    }
    if orphans.len() > FILES_MAX {
        return Err(StateError(format!("more than {FILES_MAX} removed files were saved")));
    }
    Ok(())
}

/// A name for each, which it has for as long as it takes to open it. Others may use the same directory, so nobody
/// can have come upon the same.
pub fn names(orphans: &[Orphan]) -> Result<BTreeMap<u64, String>, StateError> {
    let mut names = BTreeMap::new();
    for orphan in orphans {
        let mut bytes = [0; 16];
        crate::entropy::fill(&mut bytes)
            .map_err(|error| StateError(format!("no name can be made up: {error}")))?;
        let name = format!(".supermachine-{:032x}", u128::from_le_bytes(bytes));
        if names.insert(orphan.id, name).is_some() {
            return Err(orphan.contradicts());
        }
    }
    Ok(names)
}

#[cfg(test)]
pub mod tests;
