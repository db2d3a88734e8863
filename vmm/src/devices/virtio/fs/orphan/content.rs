//! What is in a file, without what is zeroes.

use serde::{Deserialize, Serialize};

/// Bytes of a block: what is all zeroes in one is left out.
pub const BLOCK: usize = 4096;
/// Bytes before a run: its place, its length.
const HEAD: usize = 12;

/// Runs of blocks in ascending order, each with its head before it. They are bytes here, too, and no list: a list of
/// many small ones would take many times the memory of what they are read from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content(Vec<u8>);

impl Content {
    /// The runs and their places, up to one that is cut short.
    pub fn runs(&self) -> Runs<'_> {
        Runs(&self.0)
    }

    /// How many bytes it has, if it is that of a file of `size` bytes: none beyond the end, none twice.
    pub fn check(&self, size: u64) -> Option<usize> {
        let (mut end, mut bytes) = (0, 0);
        let mut runs = self.runs();
        for (at, run) in runs.by_ref() {
            if run.is_empty() || at < end {
                return None;
            }
            end = at.checked_add(run.len() as u64).filter(|end| *end <= size)?;
            bytes += run.len();
        }
        runs.0.is_empty().then_some(bytes)
    }
}

/// Of a [`Content`].
pub struct Runs<'a>(&'a [u8]);

impl<'a> Iterator for Runs<'a> {
    type Item = (u64, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (head, rest) = self.0.split_first_chunk::<HEAD>()?;
        let (at, len) = head.split_first_chunk::<8>()?;
        let len = u32::from_le_bytes(*len.first_chunk()?);
        let (run, rest) = rest.split_at_checked(len as usize)?;
        self.0 = rest;
        Some((u64::from_le_bytes(*at), run))
    }
}

/// Puts a content together.
#[derive(Default)]
pub struct Builder {
    bytes: Vec<u8>,
    /// Where the last run has its length, and where in the file it ends.
    last: Option<(usize, u64)>,
}

impl Builder {
    /// Adds a block behind all others, and not a byte to what has 4 GiB already.
    pub fn push(&mut self, at: u64, block: &[u8]) {
        if self.last.is_none_or(|(_, end)| end != at) {
            self.bytes.extend(at.to_le_bytes());
            self.last = Some((self.bytes.len(), at));
            self.bytes.extend([0; 4]);
        }
        self.bytes.extend(block);
        if let Some((place, end)) = &mut self.last {
            *end += block.len() as u64;
            let len = (self.bytes.len() - *place - 4) as u32;
            self.bytes[*place..*place + 4].copy_from_slice(&len.to_le_bytes());
        }
    }

    pub fn build(self) -> Content {
        Content(self.bytes)
    }
}
