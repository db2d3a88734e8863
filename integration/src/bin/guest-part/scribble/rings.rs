//! Queues as no driver builds them: chains that loop or leave the table, lengths up to 4 GiB, tables in tables
//! and outside RAM, heads that are none.
//!
//! What a device may write to is memory of this program, or none of the machine's: the guest is to outlive it.

use crate::mapping::{Arena, PAGE};
use crate::random::Random;

use super::content;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Pages of a queue: its table and its two rings.
pub const PAGES: usize = 3;
/// The most entries that fit in them.
pub const SIZE_MAX: u32 = 256;

/// Where a queue lies, as page numbers of the arena.
#[derive(Clone, Copy)]
pub struct Place {
    pub table: usize,
    pub driver: usize,
    pub device: usize,
}

/// Who scribbles into queues.
pub struct Rings<'a> {
    pub arena: &'a Arena,
    /// Pages behind those of the queues, for requests and tables.
    pub data: usize,
    /// Where RAM ends.
    pub ram_end: u64,
}

impl Rings<'_> {
    fn data_page(&self, random: &mut Random) -> usize {
        self.data + random.below((self.arena.pages() - self.data) as u64) as usize
    }

    /// An address and a length of which a device may do what it likes.
    fn target(&self, random: &mut Random) -> (u64, u32) {
        let page = self.data_page(random);
        let offset = random.pick(&[0, 0, 0, 1, 8, 100, PAGE as u64 - 1]);
        let inside = self.arena.address(page) + offset;
        let room = PAGE as u64 - offset;
        match random.below(12) {
            // Across the end of RAM, or far beyond it.
            0 => (self.ram_end - 16, random.pick(&[17, 4096, u32::MAX])),
            1 => (self.ram_end + random.below(1 << 20) * 8, random.pick(&[0, 1, 4096, u32::MAX])),
            2 => (u64::MAX - random.below(4096), random.pick(&[1, 4096, u32::MAX])),
            3 => (random.pick(&[0xd000_0000, 0x0a00_0000, 0xfee0_0000, 1 << 47]), random.pick(&[1, 4096])),
            4 => (inside, u32::MAX),
            5 => (inside, 0),
            6 => (inside, random.below(room) as u32),
            _ => (inside, random.pick(&[1, 4, 12, 16, 24, 40, 44, 64, 512, room as u32]).min(room as u32)),
        }
    }

    fn descriptor(&self, at: usize, size: u32, random: &mut Random) {
        let (mut address, mut len) = self.target(random);
        let mut flags = random.pick(&[0, WRITE, NEXT, NEXT, NEXT | WRITE, NEXT | WRITE]);
        if random.happens(10) {
            flags |= INDIRECT;
            if random.happens(70) {
                address = self.arena.address(self.data_page(random));
                len = random.pick(&[0, 15, 16, 17, 256, 4096, 0x1_0000, 0xffff_fff0, u32::MAX]);
            }
        }
        if random.happens(3) {
            flags |= random.any() as u16 & !WRITE;
        }
        let next = match random.below(10) {
            0 => random.any() as u16,
            // Itself: the table lies at the start of a page.
            1 => (at % PAGE / 16) as u16,
            _ => random.below(size.into()) as u16,
        };
        let window = self.arena.window();
        window.write64(at, address);
        window.write32(at + 8, len);
        window.write16(at + 12, flags);
        window.write16(at + 14, next);
    }

    /// Requests of that kind everywhere: what another kind has left may mean something to this one.
    pub fn clear(&self, kind: u32, random: &mut Random) {
        for page in self.data..self.arena.pages() {
            self.arena.put(page, &content::request(kind, random));
        }
    }

    /// Requests of that kind in some pages, tables in others.
    pub fn fill(&self, kind: u32, random: &mut Random) {
        for _ in 0..8 {
            let page = self.data_page(random);
            // A balloon would take the numbers of a table for those of pages, of which it frees the memory.
            if kind == content::BALLOON || random.happens(70) {
                self.arena.put(page, &content::request(kind, random));
            } else {
                for entry in 0..16 {
                    self.descriptor(page * PAGE + entry * 16, 16, random);
                }
            }
        }
    }

    /// A whole queue.
    pub fn build(&self, place: Place, size: u32, random: &mut Random) {
        for entry in 0..size.min(SIZE_MAX) as usize {
            self.descriptor(place.table * PAGE + entry * 16, size, random);
        }
        self.offer(place, size, random);
    }

    /// Heads, and how many of them there are said to be.
    pub fn offer(&self, place: Place, size: u32, random: &mut Random) {
        let (window, ring) = (self.arena.window(), place.driver * PAGE);
        for entry in 0..size.min(SIZE_MAX) as usize {
            let head = if random.happens(95) { random.below(size.into()) } else { random.any() };
            window.write16(ring + 4 + entry * 2, head as u16);
        }
        window.write16(ring, random.pick(&[0, 0, 0, 1, 0xffff]));
        let index = window.read16(ring + 2);
        // Those that are too many end it at once, and nothing else is seen.
        let more = match random.below(20) {
            0 => random.pick(&[size + 1, 0x8000, 0xffff]),
            _ => random.pick(&[1, 1, 2, size.div_ceil(4)]),
        };
        window.write16(ring + 2, index.wrapping_add(more as u16));
    }

    /// Changes something while the device may be looking at it.
    pub fn disturb(&self, place: Place, size: u32, random: &mut Random) {
        let entry = random.below(size.min(SIZE_MAX).into()) as usize;
        if random.happens(70) {
            self.descriptor(place.table * PAGE + entry * 16, size, random);
        } else {
            self.offer(place, size, random);
        }
    }
}
