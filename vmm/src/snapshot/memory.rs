//! Guest RAM in a file: written with holes where it is all zeroes, or [packed](super::pack) where holes would be lost
//! on the way; and checked.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use vm_memory::{Address, GuestMemory, GuestMemoryRegion, MemoryRegionAddress};

use super::pack::Packer;
use super::presence::Presence;
use crate::memory::{GuestRam, Region};

/// What is looked at for zeroes: the smallest page that a host has.
const PAGE: usize = 4096;
/// What is read at a time, and what regions begin at a multiple of: a huge page of most processors.
const CHUNK: usize = 2 << 20;
/// More regions than any machine has.
const REGIONS_MAX: usize = 16;

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Where each region is.
    pub regions: Vec<Region>,
    /// Length of the file.
    pub len: u64,
    /// Bytes of it that are no hole.
    pub data: u64,
    /// As [`Header::memory_crc`](super::Header::memory_crc) has it.
    pub crc: u32,
}

/// How RAM is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Each page where it belongs, with holes between: for those who map it.
    Sparse,
    /// One run behind the other: for those who carry it.
    Packed,
}

/// Where runs of pages go.
enum Sink<'a> {
    Sparse(&'a File),
    Packed(Packer<&'a File>),
}

impl Sink<'_> {
    fn run(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Sparse(file) => file.write_all_at(bytes, offset),
            Self::Packed(packer) => packer.run(offset, bytes),
        }
    }
}

/// Counts and sums pages that are not zero.
#[derive(Default)]
struct Sum {
    data: u64,
    crc: crc32fast::Hasher,
}

impl Sum {
    fn page(&mut self, offset: u64, page: &[u8]) {
        self.data += page.len() as u64;
        self.crc.update(&offset.to_le_bytes());
        self.crc.update(page);
    }
}

fn is_zero(page: &[u8]) -> bool {
    page.chunks(64).all(|part| part == &[0; 64][..part.len()])
}

/// Writes all of `ram` into `out`, an empty file. The guest stands still.
pub fn write(ram: &GuestRam, out: &File, form: Form) -> io::Result<Written> {
    let mut presence = Presence::of_this_process();
    let mut buffer = vec![0; CHUNK];
    let (mut sum, mut regions, mut end) = (Sum::default(), Vec::new(), 0u64);
    for region in ram.iter() {
        let offset = end;
        end = (offset + region.len()).next_multiple_of(CHUNK as u64);
        regions.push(Region { addr: region.start_addr().raw_value(), len: region.len(), offset });
    }
    let mut sink = match form {
        Form::Sparse => {
            // What is beyond the last page that is written is a hole, too.
            out.set_len(end)?;
            Sink::Sparse(out)
        }
        Form::Packed => Sink::Packed(Packer::new(out, end)?),
    };
    for (region, at) in ram.iter().zip(&regions) {
        let beyond = |error: vm_memory::GuestMemoryError| io::Error::other(error.to_string());
        let host = region.get_host_address(MemoryRegionAddress(0)).map_err(beyond)? as u64;
        for start in (0..region.len()).step_by(CHUNK) {
            let len = (region.len() - start).min(CHUNK as u64) as usize;
            let under = region.file_offset().map(|file| (file.file(), file.start() + start));
            let pages = presence.pages(host + start, len.div_ceil(PAGE), under)?;
            if !pages.iter().any(|present| *present) {
                continue;
            }
            let chunk = &mut buffer[..len];
            let slice = region.get_slice(MemoryRegionAddress(start), len).map_err(beyond)?;
            for (run, present) in runs(pages.iter().copied()) {
                let bytes = run.start * PAGE..(run.end * PAGE).min(len);
                if present {
                    let part = slice.subslice(bytes.start, bytes.len()).map_err(io::Error::other)?;
                    part.copy_to(&mut chunk[bytes]);
                } else {
                    chunk[bytes].fill(0);
                }
            }
            write_chunk(chunk, at.offset + start, &mut sink, &mut sum)?;
        }
    }
    if let Sink::Packed(packer) = sink {
        packer.finish()?;
    }
    Ok(Written { regions, len: end, data: sum.data, crc: sum.crc.finalize() })
}

/// Writes the pages of a chunk that are not zero, neighbours together.
fn write_chunk(chunk: &[u8], offset: u64, out: &mut Sink<'_>, sum: &mut Sum) -> io::Result<()> {
    for (run, zero) in runs(chunk.chunks(PAGE).map(is_zero)) {
        if zero {
            continue;
        }
        let bytes = run.start * PAGE..(run.end * PAGE).min(chunk.len());
        for (page, at) in chunk[bytes.clone()].chunks(PAGE).zip((bytes.start..).step_by(PAGE)) {
            sum.page(offset + at as u64, page);
        }
        out.run(offset + bytes.start as u64, &chunk[bytes])?;
    }
    Ok(())
}

/// Neighbours that are alike, as ranges.
fn runs<T: PartialEq + Copy>(values: impl Iterator<Item = T>) -> Vec<(std::ops::Range<usize>, T)> {
    let mut runs: Vec<(std::ops::Range<usize>, T)> = Vec::new();
    for (index, value) in values.enumerate() {
        match runs.last_mut() {
            Some((run, last)) if *last == value => run.end = index + 1,
            _ => runs.push((index..index + 1, value)),
        }
    }
    runs
}

/// Whether these regions can be in a file of that length, and if not, why.
pub(super) fn check(regions: &[Region], len: u64) -> Result<(), String> {
    if regions.is_empty() || regions.len() > REGIONS_MAX {
        return Err(format!("it has {} regions of RAM", regions.len()));
    }
    let mut above = 0;
    for Region { addr, len: size, offset } in regions {
        let aligned = [addr, size, offset].into_iter().all(|value| value.is_multiple_of(PAGE as u64));
        let end = addr.checked_add(*size);
        let in_file = offset.checked_add(*size).is_some_and(|end| end <= len);
        match end {
            Some(end) if *size > 0 && aligned && in_file && *addr >= above => above = end,
            _ => {
                return Err(format!(
                    "a region of RAM cannot be {size:#x} bytes at {addr:#x}, {offset:#x} in the file"
                ));
            }
        }
    }
    Ok(())
}

/// Where data begins and ends at or behind `from`; none when there is only a hole.
pub(super) fn extent(file: &File, from: u64) -> io::Result<Option<std::ops::Range<u64>>> {
    let seek = |from: u64, whence| {
        let from = i64::try_from(from).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        match lseek(file, from, whence) {
            Ok(found) => Ok(Some(found.cast_unsigned())),
            Err(Errno::ENXIO) => Ok(None),
            Err(error) => Err(io::Error::from(error)),
        }
    };
    let Some(start) = seek(from, Whence::SeekData)? else { return Ok(None) };
    Ok(seek(start, Whence::SeekHole)?.map(|end| start..end))
}

/// The bytes that are not zero pages, and their checksum.
pub(super) fn checksum(file: &File, mut progress: impl FnMut(u64, u64)) -> io::Result<(u64, u32)> {
    let len = file.metadata()?.len();
    let (mut sum, mut buffer, mut from) = (Sum::default(), vec![0; CHUNK], 0);
    while let Some(data) = extent(file, from)? {
        // Pages begin at multiples of their size, wherever the file system's blocks do.
        let mut at = data.start / PAGE as u64 * PAGE as u64;
        while at < data.end {
            let want = (data.end.next_multiple_of(PAGE as u64).min(len) - at).min(CHUNK as u64) as usize;
            let chunk = &mut buffer[..want];
            file.read_exact_at(chunk, at)?;
            for (page, offset) in chunk.chunks(PAGE).zip((at..).step_by(PAGE)) {
                if !is_zero(page) {
                    sum.page(offset, page);
                }
            }
            at += want as u64;
            progress(at, len);
        }
        from = at;
    }
    progress(len, len);
    Ok((sum.data, sum.crc.finalize()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory;

    const HIGH: u64 = 1 << 32;

    fn file() -> File {
        tempfile()
    }

    fn tempfile() -> File {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("vmm-memory-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        let file = File::options().create_new(true).read(true).write(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file
    }

    #[test]
    fn regions_lie_behind_each_other_and_are_checked() {
        let good = Region { addr: 0, len: 0x10_0000, offset: 0 };
        let high = Region { addr: HIGH, len: 0x10_0000, offset: 0x20_0000 };
        for (regions, ok) in [
            (vec![good, high], true),
            (vec![], false),
            (vec![good; 2], false),
            (vec![high, good], false),
            (vec![Region { offset: 0x20_1000, ..high }], false),
            (vec![Region { offset: u64::MAX - 0xfff, ..good }], false),
            (vec![Region { addr: u64::MAX - 0xfff, ..good }], false),
            (vec![Region { len: 0, ..good }], false),
            (vec![Region { len: 0x800, ..good }], false),
            (vec![Region { addr: 1, ..good }], false),
        ] {
            assert_eq!(check(&regions, 0x30_0000).is_ok(), ok, "{regions:?}");
        }
        assert!(check(&vec![good; REGIONS_MAX + 1], 0x30_0000).is_err());
    }

    #[test]
    fn a_restored_machine_is_written_with_what_it_has_changed() {
        let ram = memory::anonymous(&[(0, 8 << 20), (HIGH, 4 << 20)]).unwrap();
        ram.write_obj(7u8, GuestAddress(0x1234)).unwrap();
        ram.write_obj(8u8, GuestAddress(HIGH + 0x3f_ffff)).unwrap();
        let first = file();
        let written = write(&ram, &first, Form::Sparse).unwrap();
        assert_eq!((written.len, written.data), (12 << 20, 2 * PAGE as u64));
        assert_eq!(checksum(&first, |_, _| ()).unwrap(), (written.data, written.crc));

        let again = memory::restored(&first, &written.regions).unwrap();
        for (addr, value) in [(0x1234, 7), (HIGH + 0x3f_ffff, 8), (0x10_0000, 0)] {
            assert_eq!(again.read_obj::<u8>(GuestAddress(addr)).unwrap(), value, "{addr:#x}");
        }
        // One page becomes zero, one is new, one is read only.
        again.write_obj(0u8, GuestAddress(0x1234)).unwrap();
        again.write_obj(9u8, GuestAddress(0x50_0000)).unwrap();
        let _: u8 = again.read_obj(GuestAddress(0x60_0000)).unwrap();
        let second = file();
        let second_written = write(&again, &second, Form::Sparse).unwrap();
        assert_eq!(second_written.data, 2 * PAGE as u64);
        let third = memory::restored(&second, &second_written.regions).unwrap();
        for (addr, value) in [(0x1234, 0), (HIGH + 0x3f_ffff, 8), (0x50_0000, 9)] {
            assert_eq!(third.read_obj::<u8>(GuestAddress(addr)).unwrap(), value, "{addr:#x}");
        }
        // The first one is as it was.
        assert_eq!(checksum(&first, |_, _| ()).unwrap(), (written.data, written.crc));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        /// What is written is what is restored, wherever it is.
        #[test]
        fn memory_comes_back_as_it_was(
            writes in proptest::collection::vec((0u64..0x60_0000, any::<u64>()), 0..200),
        ) {
            let ram = memory::anonymous(&[(0, 0x50_0000), (HIGH, 0x10_0000)]).unwrap();
            let place = |at: u64| GuestAddress(if at < 0x50_0000 { at } else { HIGH + at - 0x50_0000 });
            for (at, value) in &writes {
                let _ = ram.write_obj(*value, place(*at));
            }
            let out = file();
            let written = write(&ram, &out, Form::Sparse).unwrap();
            prop_assert_eq!(checksum(&out, |_, _| ()).unwrap(), (written.data, written.crc));
            let packed = file();
            prop_assert_eq!(&write(&ram, &packed, Form::Packed).unwrap(), &written);
            let unpacked = file();
            super::super::unpack(&packed, &unpacked, |_, _| ()).unwrap();
            prop_assert_eq!(checksum(&unpacked, |_, _| ()).unwrap(), (written.data, written.crc));
            prop_assert_eq!(unpacked.metadata().unwrap().len(), written.len);
            let again = memory::restored(&unpacked, &written.regions).unwrap();
            for page in (0..0x60_0000).step_by(PAGE) {
                let (mut one, mut other) = ([0; PAGE], [0; PAGE]);
                ram.read_slice(&mut one, place(page)).unwrap();
                again.read_slice(&mut other, place(page)).unwrap();
                prop_assert!(one == other, "page {:#x}", page);
            }
        }
    }
}
