//! RAM packed: what a file with holes is where holes would be lost, as in an archive or on a wire.
//!
//! ```text
//! magic, 8 bytes; length of the file with holes, 64 bits
//! runs: offset in that file, 64 bits; length, 32 bits; CRC-32 of offset, length and bytes; the bytes
//! the last run: offset of all ones, length 0
//! ```
//!
//! Numbers are little endian; runs ascend.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::FileExt;

use super::layers::{self, Collector, PAGE};
use crate::memory::page_size;

const MAGIC: [u8; 8] = *b"SUPRPACK";
/// The largest run.
const RUN_MAX: usize = 2 << 20;
/// More RAM than any machine has, with room for the alignment of its regions.
const LEN_MAX: u64 = 1 << 40;
const END: u64 = u64::MAX;

/// Writes runs.
pub(super) struct Packer<W>(W);

impl<W: Write> Packer<W> {
    pub(super) fn new(mut out: W, len: u64) -> io::Result<Self> {
        out.write_all(&MAGIC)?;
        out.write_all(&len.to_le_bytes())?;
        Ok(Self(out))
    }

    /// Of at most [`RUN_MAX`] bytes.
    pub(super) fn run(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(&head(offset, bytes))?;
        self.0.write_all(bytes)
    }

    pub(super) fn finish(mut self) -> io::Result<()> {
        self.0.write_all(&head(END, &[]))?;
        self.0.flush()
    }
}

fn head(offset: u64, bytes: &[u8]) -> [u8; 16] {
    let mut head = [0; 16];
    head[..8].copy_from_slice(&offset.to_le_bytes());
    // A run has no more than RUN_MAX.
    head[8..12].copy_from_slice(&(bytes.len() as u32).to_le_bytes());
    let sum = sum(&head, bytes);
    head[12..].copy_from_slice(&sum.to_le_bytes());
    head
}

fn sum(head: &[u8; 16], bytes: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(&head[..12]);
    sum.update(bytes);
    sum.finalize()
}

fn damaged(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("packed RAM is damaged: {}", why.into()))
}

/// Unpacks `from` into `to`, an empty file. `progress` hears how much of the RAM is behind, and how much there is.
pub fn unpack(from: &File, to: &File, mut progress: impl FnMut(u64, u64)) -> io::Result<()> {
    // It was written, or looked at, by the same descriptor.
    io::Seek::seek(&mut &*from, io::SeekFrom::Start(0))?;
    let mut from = BufReader::with_capacity(1 << 16, from);
    let mut start = [0; 16];
    from.read_exact(&mut start)?;
    let (magic, len) = start.split_at(8);
    let len = u64::from_le_bytes(len.try_into().unwrap_or_default());
    if magic != MAGIC || len > LEN_MAX {
        return Err(damaged("it does not begin like it"));
    }
    to.set_len(len)?;
    let (mut buffer, mut behind) = (vec![0; RUN_MAX], 0);
    let (mut parts, host_page) = (Collector::default(), page_size());
    loop {
        let mut head = [0; 16];
        from.read_exact(&mut head)?;
        let offset = u64::from_le_bytes(head[..8].try_into().unwrap_or_default());
        let size = u32::from_le_bytes(head[8..12].try_into().unwrap_or_default()) as usize;
        let bytes = buffer.get_mut(..size).ok_or_else(|| damaged(format!("a run of {size} bytes")))?;
        from.read_exact(bytes)?;
        if sum(&head, bytes).to_le_bytes() != head[12..] {
            return Err(damaged(format!("the checksum of a run at {offset:#x} does not fit")));
        }
        if offset == END {
            layers::fill(to, &parts.finish())?;
            progress(len, len);
            return match (size, from.read(&mut [0])?) {
                (0, 0) => Ok(()),
                _ => Err(damaged("something is behind its end")),
            };
        }
        let end = offset.checked_add(size as u64).filter(|end| *end <= len && offset >= behind);
        behind = end.ok_or_else(|| damaged(format!("a run of {size} bytes at {offset:#x} of {len:#x}")))?;
        to.write_all_at(bytes, offset)?;
        let pages = offset / PAGE..behind.div_ceil(PAGE);
        pages.for_each(|page| parts.page_of(page * PAGE, host_page));
        progress(behind, len);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A file without a name.
    fn file(bytes: &[u8]) -> File {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("vmm-pack-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        let mut file = File::options().create_new(true).read(true).write(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn packed(len: u64, runs: &[(u64, &[u8])]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut packer = Packer::new(&mut bytes, len).unwrap();
        for (offset, run) in runs {
            packer.run(*offset, run).unwrap();
        }
        packer.finish().unwrap();
        bytes
    }

    fn unpacked(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let to = file(&[]);
        unpack(&file(bytes), &to, |done, all| assert!(done <= all))?;
        let mut all = vec![0; to.metadata()?.len() as usize];
        to.read_exact_at(&mut all, 0)?;
        Ok(all)
    }

    #[test]
    fn runs_come_back_where_they_were() {
        assert_eq!(unpacked(&packed(6, &[(1, b"ab"), (3, b"c")])).unwrap(), b"\0abc\0\0");
        assert_eq!(unpacked(&packed(3, &[])).unwrap(), [0; 3]);
        // Two in each of many pages.
        let runs: Vec<_> = (0..600)
            .flat_map(|page| [(2 * page * PAGE + 1, &b"a"[..]), (2 * page * PAGE + 5, b"b")])
            .collect();
        let all = unpacked(&packed(1200 * PAGE, &runs)).unwrap();
        assert_eq!(all.iter().filter(|byte| **byte != 0).count(), 1200);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (runs, word) in [
            (&[(5u64, &b"ab"[..])][..], "0x5"),
            (&[(2, b"ab"), (3, b"c")], "0x3"),
            (&[(u64::MAX - 1, b"ab")], "run"),
        ] {
            let error = unpacked(&packed(6, runs)).unwrap_err().to_string();
            assert!(error.contains("damaged") && error.contains(word), "{error}");
        }
        let good = packed(6, &[(1, b"ab")]);
        assert!(unpacked(&[&good[..], b"x"].concat()).is_err());
        assert!(unpacked(&packed(LEN_MAX + 1, &[])).is_err());
        for len in 0..good.len() {
            assert!(unpacked(&good[..len]).is_err(), "{len} bytes");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn no_damage_is_unpacked(at in any::<proptest::sample::Index>(), flip in 1u8..) {
            let mut bytes = packed(64, &[(1, b"ab"), (30, &[7; 20])]);
            // The length says how much there is, and has no checksum: the state's header does.
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assume!(!(8..16).contains(&at));
            prop_assert!(unpacked(&bytes).is_err());
        }
    }
}
