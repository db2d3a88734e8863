//! Which pages of a mapping can hold anything: a machine has touched a small part of the RAM that it was given, and
//! a restored one has changed a small part of what it maps.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::layers::{Layers, PAGE};
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

    /// Of `count` pieces of 4 KiB from `host` on, whether each can hold something else than zeroes. `under` is what is
    /// mapped there, if something is, and where in it.
    pub(super) fn pages(&mut self, host: u64, count: usize, under: Option<(&Layers, u64)>) -> Vec<bool> {
        let mut pages = self.own(host, count);
        if let Some((layers, offset)) = under {
            layers.mark(offset, &mut pages);
        }
        pages
    }

    /// Of `count` pieces of 4 KiB from `host` on, whether each can hold something else than what is mapped there.
    pub(super) fn own(&mut self, host: u64, count: usize) -> Vec<bool> {
        self.those(host, count, true, |entry| entry & (PRESENT | SWAPPED) != 0 && entry & OF_FILE == 0)
    }

    /// Likewise, whether each is as it is mapped there, and somebody has looked at it or at one beside it.
    pub(super) fn seen(&mut self, host: u64, count: usize) -> Vec<bool> {
        self.those(host, count, false, |entry| entry & PRESENT != 0 && entry & OF_FILE != 0)
    }

    /// Those of which the kernel's list says so; without a list, all or none.
    fn those(&mut self, host: u64, count: usize, unknown: bool, is: impl Fn(u64) -> bool) -> Vec<bool> {
        let end = host + count as u64 * PAGE;
        let (first, last) = (host / self.page, end.div_ceil(self.page));
        // A few thousand.
        let len = (last - first) as usize * 8;
        self.entries.resize(len, 0);
        let known = match &self.pagemap {
            Some(pagemap) => pagemap.read_exact_at(&mut self.entries, first * 8).is_ok(),
            None => false,
        };
        if !known {
            return vec![unknown; count];
        }
        let page = self.page;
        let is = |piece: usize| {
            let index = ((host + piece as u64 * PAGE) / page - first) as usize * 8;
            let entry = self.entries.get(index..index + 8).and_then(|entry| entry.try_into().ok());
            entry.map_or(unknown, |entry| is(u64::from_le_bytes(entry)))
        };
        (0..count).map(is).collect()
    }
}
