//! Which pages of a mapping can hold anything: a machine has touched a small part of the RAM that it was given, and
//! a restored one has changed a small part of what it maps.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::memory::extent;
use crate::memory;

/// Linux's list of the pages of a process, eight bytes for each. Nobody needs a right to see of their own which
/// are there.
const PAGEMAP: &str = "/proc/self/pagemap";
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// Of a file, or shared: in a private mapping, a page that was not written to.
const OF_FILE: u64 = 1 << 61;

/// Who knows.
pub(super) struct Presence {
    /// None where there is no such list: then every page can hold something.
    pagemap: Option<File>,
    page: u64,
    entries: Vec<u8>,
}

impl Presence {
    pub(super) fn of_this_process() -> Self {
        let pagemap = File::open(PAGEMAP)
            .inspect_err(|error| log::debug!("{PAGEMAP}: {error}; all of the RAM is looked at"))
            .ok();
        Self { pagemap, page: memory::page_size(), entries: Vec::new() }
    }

    /// Of `count` pieces of 4 KiB from `host` on, whether each can hold something else than zeroes. `under` is the
    /// file that is mapped there, if one is, and where in it.
    pub(super) fn pages(
        &mut self,
        host: u64,
        count: usize,
        under: Option<(&File, u64)>,
    ) -> io::Result<Vec<bool>> {
        const PIECE: u64 = 4096;
        let end = host + count as u64 * PIECE;
        let (first, last) = (host / self.page, end.div_ceil(self.page));
        // A few thousand.
        let len = (last - first) as usize * 8;
        self.entries.resize(len, 0);
        let known = match &self.pagemap {
            Some(pagemap) => pagemap.read_exact_at(&mut self.entries, first * 8).is_ok(),
            None => false,
        };
        if !known {
            return Ok(vec![true; count]);
        }
        let mut below = vec![false; count];
        if let Some((file, offset)) = under {
            mark_data(file, offset, PIECE, &mut below)?;
        }
        let page = self.page;
        let is_own = |piece: usize| {
            let index = ((host + piece as u64 * PIECE) / page - first) as usize * 8;
            let entry = self.entries.get(index..index + 8).and_then(|entry| entry.try_into().ok());
            let entry = entry.map_or(PRESENT, u64::from_le_bytes);
            entry & (PRESENT | SWAPPED) != 0 && entry & OF_FILE == 0
        };
        Ok((0..count).map(|piece| is_own(piece) || below[piece]).collect())
    }
}

/// Marks the pieces of a file, from `offset` on, in which there is data.
fn mark_data(file: &File, offset: u64, piece: u64, marks: &mut [bool]) -> io::Result<()> {
    let end = offset + marks.len() as u64 * piece;
    let mut from = offset;
    while from < end {
        let Some(data) = extent(file, from)?.filter(|data| data.start < end) else { return Ok(()) };
        let first = ((data.start.max(offset) - offset) / piece) as usize;
        let last = ((data.end.min(end) - offset).div_ceil(piece)) as usize;
        marks[first..last].fill(true);
        from = data.end;
    }
    Ok(())
}
