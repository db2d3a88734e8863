//! What lies under the RAM of a machine that was restored: a snapshot's file, or what one has of its own over the file of
//! another, its base. All of them are as long as the RAM, and a page has the same place in each.

use std::fs::File;
use std::io;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// What is looked at, and lies over something else, at once: the smallest page that a host has.
pub(super) const PAGE: u64 = 4096;
/// More regions of RAM than any machine has.
pub(super) const REGIONS_MAX: usize = 16;
/// Each is a mapping of its own in a machine that is restored, and takes microseconds there.
pub(super) const EXTENTS_MAX: usize = 256;
/// So that they can be cut where one region of RAM ends and another begins.
const COLLECTED_MAX: usize = EXTENTS_MAX - REGIONS_MAX;

/// A part of the memory's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Where it begins.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

impl Extent {
    fn range(self) -> Range<u64> {
        self.offset..self.offset + self.len
    }
}

/// Which file another one lies over: whatever it is called, this is in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// Its length.
    pub len: u64,
    /// Bytes of its pages that are not all zeroes.
    pub data: u64,
    /// As [`Header::memory_crc`](super::Header::memory_crc) has it.
    pub crc: u32,
}

/// The files that a machine's RAM is mapped from.
#[derive(Debug)]
pub struct Layers {
    /// All of it, or all but what is over it.
    pub base: File,
    /// Which that is.
    pub id: Base,
    /// What of it is mapped, ascending: all else is a hole.
    pub parts: Vec<Extent>,
    /// What lies over it: ascending parts of another file.
    pub over: Option<(File, Vec<Extent>)>,
}

impl Layers {
    /// Marks the pages from `offset` on that are mapped from a file.
    pub(super) fn mark(&self, offset: u64, marks: &mut [bool]) {
        for pages in covered(&self.parts, offset, marks.len()) {
            marks[pages].fill(true);
        }
        self.mark_over(offset, marks);
    }

    /// Marks the pages from `offset` on that are not the base's.
    pub(super) fn mark_over(&self, offset: u64, marks: &mut [bool]) {
        let Some((_, extents)) = &self.over else { return };
        for pages in covered(extents, offset, marks.len()) {
            marks[pages].fill(true);
        }
    }
}

/// The pages of `count` from `offset` on that are in one of the extents.
pub(super) fn covered(extents: &[Extent], offset: u64, count: usize) -> impl Iterator<Item = Range<usize>> {
    let end = offset + count as u64 * PAGE;
    let first = extents.partition_point(|extent| extent.range().end <= offset);
    let those =
        extents[first..].iter().map(|extent| extent.range()).take_while(move |range| range.start < end);
    // Both are in the slice.
    those.map(move |range| {
        ((range.start.max(offset) - offset) / PAGE) as usize..((range.end.min(end) - offset) / PAGE) as usize
    })
}

/// Leaves no holes in these parts of a file that is to be mapped, where reading from one takes space: on a tmpfs, whose end of
/// space would be that of every machine. Where that would more than double what the file takes, they stay.
pub(super) fn fill(file: &File, parts: &[Extent]) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    if nix::sys::statfs::fstatfs(file)?.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC {
        let taken = std::os::unix::fs::MetadataExt::blocks(&file.metadata()?) * 512;
        if parts.iter().map(|part| part.len).sum::<u64>() > 2 * taken {
            return Ok(());
        }
        for part in parts {
            let [offset, len] =
                [part.offset, part.len].map(|value| i64::try_from(value).map_err(io::Error::other));
            nix::fcntl::fallocate(file, nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE, offset?, len?)?;
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (file, parts);
    Ok(())
}

/// Collects pages, in ascending order, into few extents: what lies between two is taken along where there would be too many.
#[derive(Debug, Default)]
pub(super) struct Collector {
    /// As the file's pages.
    ranges: Vec<Range<u64>>,
}

impl Collector {
    /// What is kept before neighbours are joined.
    const KEPT: usize = 16 * EXTENTS_MAX;

    pub(super) fn page(&mut self, offset: u64) {
        let page = offset / PAGE;
        match self.ranges.last_mut() {
            Some(last) if last.end > page => {}
            Some(last) if last.end == page => last.end += 1,
            _ => self.ranges.push(page..page + 1),
        }
        if self.ranges.len() > Self::KEPT {
            self.join(Self::KEPT / 2);
        }
    }

    /// All of the host's page that has this one: nothing less is mapped by itself.
    pub(super) fn page_of(&mut self, offset: u64, host: u64) {
        let first = offset / host * host;
        (first..first + host).step_by(PAGE as usize).for_each(|page| self.page(page));
    }

    /// Joins those that are closest to each other until `most` are left.
    fn join(&mut self, most: usize) {
        let Some(excess) = self.ranges.len().checked_sub(most).filter(|excess| *excess > 0) else { return };
        let gap = |pair: &[Range<u64>]| pair[1].start - pair[0].end;
        let mut gaps: Vec<u64> = self.ranges.windows(2).map(gap).collect();
        // There is one less than ranges, and `most` is not zero.
        let (_, &mut widest, _) = gaps.select_nth_unstable(excess - 1);
        let mut joined: Vec<Range<u64>> = Vec::with_capacity(most);
        for range in self.ranges.drain(..) {
            match joined.last_mut() {
                Some(last) if range.start - last.end <= widest => last.end = range.end,
                _ => joined.push(range),
            }
        }
        self.ranges = joined;
    }

    pub(super) fn finish(self) -> Vec<Extent> {
        self.finish_to(COLLECTED_MAX)
    }

    pub(super) fn finish_to(mut self, most: usize) -> Vec<Extent> {
        self.join(most);
        let extent =
            |range: Range<u64>| Extent { offset: range.start * PAGE, len: (range.end - range.start) * PAGE };
        self.ranges.into_iter().map(extent).collect()
    }
}

/// Whether these can be parts of a file of that length, and if not, why.
pub(super) fn check(extents: &[Extent], len: u64) -> Result<(), String> {
    if extents.len() > EXTENTS_MAX {
        return Err(format!("its RAM is in {} parts", extents.len()));
    }
    check_order(extents, len)
}

/// Whether they can be parts of a file of that length, however many they are.
pub(super) fn check_order(extents: &[Extent], len: u64) -> Result<(), String> {
    let mut above = 0;
    for Extent { offset, len: size } in extents {
        let aligned = offset.is_multiple_of(PAGE) && size.is_multiple_of(PAGE) && *size > 0;
        match offset.checked_add(*size).filter(|end| aligned && *end <= len && *offset >= above) {
            Some(end) => above = end,
            None => return Err(format!("{size:#x} bytes of RAM at {offset:#x} cannot be a part of it")),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn extent(first: u64, pages: u64) -> Extent {
        Extent { offset: first * PAGE, len: pages * PAGE }
    }

    #[test]
    fn what_is_over_a_file_is_found_where_it_is() {
        let extents = [extent(2, 2), extent(4, 1), extent(10, 5)];
        for (first, count, expected) in [
            (0, 2, &[][..]),
            (0, 3, &[(2, 3)]),
            (3, 4, &[(0, 1), (1, 2)]),
            (5, 5, &[]),
            (12, 100, &[(0, 3)]),
            (15, 1, &[]),
        ] {
            let found = covered(&extents, first * PAGE, count).map(|range| (range.start, range.end));
            assert_eq!(found.collect::<Vec<_>>(), expected, "{count} from {first}");
        }
    }

    #[test]
    fn pages_are_collected_as_the_host_has_them() {
        let mut collector = Collector::default();
        for page in [5, 7, 8, 22, 23] {
            collector.page_of(page * PAGE, 4 * PAGE);
        }
        assert_eq!(collector.finish(), [extent(4, 8), extent(20, 4)]);
    }

    #[test]
    fn parts_ascend_in_the_file() {
        for (extents, ok) in [
            (vec![], true),
            (vec![extent(0, 1), extent(1, 1), extent(5, 5)], true),
            (vec![extent(5, 6)], false),
            (vec![extent(1, 1), extent(0, 1)], false),
            (vec![extent(0, 2), extent(1, 1)], false),
            (vec![extent(1, 0)], false),
            (vec![Extent { offset: 1, len: PAGE }], false),
            (vec![Extent { offset: 0, len: 1 }], false),
            (vec![Extent { offset: u64::MAX - PAGE + 1, len: PAGE }], false),
        ] {
            assert_eq!(check(&extents, 10 * PAGE).is_ok(), ok, "{extents:?}");
        }
        let many: Vec<_> = (0..=EXTENTS_MAX as u64).map(|page| extent(2 * page, 1)).collect();
        assert!(check(&many, 1 << 40).is_err());
    }

    proptest! {
        #[test]
        fn pages_are_all_collected_in_few_parts(
            mut pages in proptest::collection::btree_set(0u64..100_000, 0..9000),
            dense in 0u64..50_000,
        ) {
            pages.extend(dense..dense + 700);
            let mut collector = Collector::default();
            for page in &pages {
                collector.page(page * PAGE);
            }
            let extents = collector.finish();
            prop_assert!(check(&extents, 1 << 40).is_ok());
            let mut marks = vec![false; 101_000];
            for range in covered(&extents, 0, marks.len()) {
                marks[range].fill(true);
            }
            for page in &pages {
                prop_assert!(marks[*page as usize], "page {} is lost", page);
            }
            // Nothing is taken along where that is not needed.
            let apart = pages.iter().filter(|page| **page == 0 || !pages.contains(&(*page - 1))).count();
            if apart <= COLLECTED_MAX {
                prop_assert_eq!(marks.iter().filter(|mark| **mark).count(), pages.len());
            }
        }
    }
}
