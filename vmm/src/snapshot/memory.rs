//! Guest RAM in a file: written with holes where it is all zeroes, or [packed](super::pack) where holes would be lost
//! on the way; and checked.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryRegion, MemoryRegionAddress};

use super::layers::{self, Base, Collector, Extent, Layers, REGIONS_MAX};
use super::pack::Packer;
use super::presence::Presence;
use crate::memory::{self, GuestRam, Region};

/// What is looked at for zeroes: the smallest page that a host has.
const PAGE: usize = layers::PAGE as usize;
/// What is read at a time, and what regions begin at a multiple of: a huge page of most processors.
const CHUNK: usize = 2 << 20;

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Where each region is.
    pub regions: Vec<Region>,
    /// Length of the file.
    pub len: u64,
    /// Bytes of its pages that are not all zeroes.
    pub data: u64,
    /// As [`Header::memory_crc`](super::Header::memory_crc) has it.
    pub crc: u32,
    /// In which parts of the file, or of what it lies over, something is.
    pub parts: Vec<Extent>,
    /// What it lies over, and which parts of it do.
    pub over: Option<(Base, Vec<Extent>)>,
}

/// How RAM is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Each page where it belongs, with holes between: for those who map it.
    Sparse,
    /// One run behind the other: for those who carry it.
    Packed,
    /// Only what is not as it was when the machine was restored, each page where it belongs: for those who map it over the
    /// file that the machine was restored from.
    Over,
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

/// Counts, sums and collects pages that are not zero.
struct Sum {
    data: u64,
    crc: crc32fast::Hasher,
    parts: Collector,
    host_page: u64,
}

impl Sum {
    fn new() -> Self {
        let crc = crc32fast::Hasher::new();
        Self { data: 0, crc, parts: Collector::default(), host_page: memory::page_size() }
    }

    fn page(&mut self, offset: u64, page: &[u8]) {
        self.data += page.len() as u64;
        self.crc.update(&offset.to_le_bytes());
        self.crc.update(page);
        self.parts.page_of(offset, self.host_page);
    }
}

fn is_zero(page: &[u8]) -> bool {
    page.chunks(64).all(|part| part == &[0; 64][..part.len()])
}

/// Where the regions of RAM are in a file, and its length.
fn places(ram: &GuestRam) -> (Vec<Region>, u64) {
    let (mut regions, mut end) = (Vec::new(), 0u64);
    for region in ram.iter() {
        let offset = end;
        end = (offset + region.len()).next_multiple_of(CHUNK as u64);
        regions.push(Region { addr: region.start_addr().raw_value(), len: region.len(), offset });
    }
    (regions, end)
}

fn beyond(error: impl std::fmt::Display) -> io::Error {
    io::Error::other(error.to_string())
}

/// Writes all of `ram`, or what of it is not `under` it, into `out`, an empty file. The guest stands still.
pub fn write(ram: &GuestRam, under: Option<&Layers>, out: &File, form: Form) -> io::Result<Written> {
    if form == Form::Over {
        let under =
            under.ok_or_else(|| io::Error::other("the machine was not restored, so it lies over nothing"))?;
        return write_over(ram, under, out);
    }
    let mut presence = Presence::of_this_process();
    let mut buffer = vec![0; CHUNK];
    let mut sum = Sum::new();
    let (regions, end) = places(ram);
    let mut sink = match form {
        Form::Sparse | Form::Over => {
            // What is beyond the last page that is written is a hole, too.
            out.set_len(end)?;
            Sink::Sparse(out)
        }
        Form::Packed => Sink::Packed(Packer::new(out, end)?),
    };
    for (region, at) in ram.iter().zip(&regions) {
        let host = region.get_host_address(MemoryRegionAddress(0)).map_err(beyond)? as u64;
        for start in (0..region.len()).step_by(CHUNK) {
            let len = (region.len() - start).min(CHUNK as u64) as usize;
            let under = under.map(|layers| (layers, at.offset + start));
            let pages = presence.pages(host + start, len.div_ceil(PAGE), under);
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
    let parts: Vec<_> = in_regions(&regions, sum.parts.finish()).map(|(_, part)| part).collect();
    if form == Form::Sparse {
        layers::fill(out, &parts)?;
    }
    Ok(Written { regions, len: end, data: sum.data, crc: sum.crc.finalize(), parts, over: None })
}

/// Tells of each page, by its place in a file, that is not as it was when the machine was restored, or, with what is `under`
/// it, of each that is not the base's.
pub(super) fn own_pages(ram: &GuestRam, under: Option<&Layers>, tell: impl FnMut(u64)) -> io::Result<()> {
    let own = |presence: &mut Presence, host, count, offset| {
        let mut pages = presence.own(host, count);
        if let Some(layers) = under {
            layers.mark_over(offset, &mut pages);
        }
        pages
    };
    pages(ram, own, tell)
}

/// Tells of each page, by its place in a file, that is as it was when the machine was restored, and that somebody has looked at
/// since, or at one beside it.
pub(super) fn seen_pages(ram: &GuestRam, tell: impl FnMut(u64)) -> io::Result<()> {
    pages(ram, |presence, host, count, _| presence.seen(host, count), tell)
}

/// Tells of each page which those are that `which` finds among so many, at an address and at a place in a file.
fn pages(
    ram: &GuestRam,
    which: impl Fn(&mut Presence, u64, usize, u64) -> Vec<bool>,
    mut tell: impl FnMut(u64),
) -> io::Result<()> {
    let mut presence = Presence::of_this_process();
    let (regions, _) = places(ram);
    for (region, at) in ram.iter().zip(&regions) {
        let host = region.get_host_address(MemoryRegionAddress(0)).map_err(beyond)? as u64;
        for start in (0..region.len()).step_by(CHUNK) {
            let len = (region.len() - start).min(CHUNK as u64) as usize;
            let offset = at.offset + start;
            let found = which(&mut presence, host + start, len.div_ceil(PAGE), offset);
            let those = (offset..).step_by(PAGE).zip(found).filter(|(_, is)| *is);
            those.for_each(|(offset, _)| tell(offset));
        }
    }
    Ok(())
}

/// Writes what is not the base's.
fn write_over(ram: &GuestRam, under: &Layers, out: &File) -> io::Result<Written> {
    let (regions, end) = places(ram);
    if end != under.id.len {
        return Err(io::Error::other("the machine's RAM is not as long as what lies under it"));
    }
    let mut collector = Collector::default();
    own_pages(ram, Some(under), |offset| collector.page(offset))?;
    out.set_len(end)?;
    let (mut sum, mut sink, mut buffer) = (Sum::new(), Sink::Sparse(out), vec![0; CHUNK]);
    let mut extents = Vec::new();
    for (addr, extent) in in_regions(&regions, collector.finish()) {
        for start in (0..extent.len).step_by(CHUNK) {
            let chunk = &mut buffer[..(extent.len - start).min(CHUNK as u64) as usize];
            ram.read_slice(chunk, GuestAddress(addr + start)).map_err(beyond)?;
            write_chunk(chunk, extent.offset + start, &mut sink, &mut sum)?;
        }
        extents.push(extent);
    }
    layers::fill(out, &extents)?;
    let (data, crc, parts) = (sum.data, sum.crc.finalize(), under.parts.clone());
    Ok(Written { regions, len: end, data, crc, parts, over: Some((under.id, extents)) })
}

/// The extents cut at the borders of regions, with their guest-physical addresses. What lies between two regions is gone.
pub(crate) fn in_regions(
    regions: &[Region],
    extents: impl IntoIterator<Item = Extent>,
) -> impl Iterator<Item = (u64, Extent)> {
    extents.into_iter().flat_map(move |extent| {
        regions.iter().filter_map(move |region| {
            let start = extent.offset.max(region.offset);
            let end = (extent.offset + extent.len).min(region.offset + region.len);
            let cut = Extent { offset: start, len: end.checked_sub(start).filter(|len| *len > 0)? };
            Some((region.addr + (start - region.offset), cut))
        })
    })
}

/// Maps `ram`, that of a snapshot with these regions, from what is under it.
pub fn restored(under: &Layers, regions: &[Region]) -> Result<GuestRam, memory::Error> {
    let places: Vec<_> = regions.iter().map(|region| (region.addr, region.len)).collect();
    let ram = memory::anonymous(&places)?;
    memory::in_small_pages(&ram);
    let over = under.over.iter().map(|(file, extents)| (file, extents));
    for (file, extents) in std::iter::once((&under.base, &under.parts)).chain(over) {
        for (addr, Extent { offset, len }) in in_regions(regions, extents.iter().copied()) {
            memory::map_over(&ram, addr, len, file, offset)?;
        }
    }
    Ok(ram)
}

/// Makes `ram`, which a snapshot's file is mapped for, what it was when it was mapped: only what was written to it since is
/// given back. Nobody writes to it meanwhile.
pub fn rewind(ram: &GuestRam) -> io::Result<()> {
    let mut presence = Presence::of_this_process();
    for region in ram.iter() {
        let host = region.get_host_address(MemoryRegionAddress(0)).map_err(beyond)? as u64;
        for start in (0..region.len()).step_by(CHUNK) {
            let len = (region.len() - start).min(CHUNK as u64);
            let own = presence.own(host + start, (len as usize).div_ceil(PAGE));
            for (run, is_own) in runs(own.into_iter()) {
                if is_own {
                    let at = region.start_addr().raw_value() + start + (run.start * PAGE) as u64;
                    memory::discard(ram, at, (run.len() * PAGE) as u64).map_err(beyond)?;
                }
            }
        }
    }
    Ok(())
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

/// The bytes that are not zero pages, and their checksum. All of them must be in these `parts`.
pub(super) fn checksum(
    file: &File,
    parts: &[Extent],
    mut progress: impl FnMut(u64, u64),
) -> io::Result<(u64, u32)> {
    let len = file.metadata()?.len();
    let (mut sum, mut buffer, mut from) = (Sum::new(), vec![0; CHUNK], 0);
    while let Some(data) = extent(file, from)? {
        // Pages begin at multiples of their size, wherever the file system's blocks do.
        let mut at = data.start / PAGE as u64 * PAGE as u64;
        while at < data.end {
            let want = (data.end.next_multiple_of(PAGE as u64).min(len) - at).min(CHUNK as u64) as usize;
            let chunk = &mut buffer[..want];
            file.read_exact_at(chunk, at)?;
            for (page, offset) in chunk.chunks(PAGE).zip((at..).step_by(PAGE)) {
                if !is_zero(page) {
                    if layers::covered(parts, offset, 1).next().is_none() {
                        let why = format!("there is something at {offset:#x}, which is in none of its parts");
                        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
                    }
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

    const HIGH: u64 = 1 << 32;
    const ALL: &[Extent] = &[Extent { offset: 0, len: 1 << 40 }];

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

    fn under(file: &File, written: &Written) -> Layers {
        let id = Base { len: written.len, data: written.data, crc: written.crc };
        Layers { base: file.try_clone().unwrap(), id, parts: written.parts.clone(), over: None }
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
        let written = write(&ram, None, &first, Form::Sparse).unwrap();
        assert_eq!((written.len, written.data), (12 << 20, 2 * PAGE as u64));
        assert_eq!(checksum(&first, ALL, |_, _| ()).unwrap(), (written.data, written.crc));

        let layers = under(&first, &written);
        let again = restored(&layers, &written.regions).unwrap();
        for (addr, value) in [(0x1234, 7), (HIGH + 0x3f_ffff, 8), (0x10_0000, 0)] {
            assert_eq!(again.read_obj::<u8>(GuestAddress(addr)).unwrap(), value, "{addr:#x}");
        }
        // One page becomes zero, one is new, one is read only.
        again.write_obj(0u8, GuestAddress(0x1234)).unwrap();
        again.write_obj(9u8, GuestAddress(0x50_0000)).unwrap();
        let _: u8 = again.read_obj(GuestAddress(0x60_0000)).unwrap();
        let second = file();
        let second_written = write(&again, Some(&layers), &second, Form::Sparse).unwrap();
        assert_eq!(second_written.data, 2 * PAGE as u64);
        let third = restored(&under(&second, &second_written), &second_written.regions).unwrap();
        for (addr, value) in [(0x1234, 0), (HIGH + 0x3f_ffff, 8), (0x50_0000, 9)] {
            assert_eq!(third.read_obj::<u8>(GuestAddress(addr)).unwrap(), value, "{addr:#x}");
        }
        // The first one is as it was.
        assert_eq!(checksum(&first, ALL, |_, _| ()).unwrap(), (written.data, written.crc));
    }

    #[cfg(target_os = "linux")]
    fn in_memory() -> File {
        nix::sys::memfd::memfd_create(c"ram", nix::sys::memfd::MFdFlags::empty()).unwrap().into()
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_file_in_memory_grows_by_nothing_that_a_machine_does() {
        use std::os::unix::fs::MetadataExt;

        const LEN: u64 = 64 << 20;
        let taken = |file: &File| file.metadata().unwrap().blocks() * 512;
        // More than there can be parts, close to each other, and far apart.
        for (step, filled) in [(2, true), (16, false)] {
            let ram = memory::anonymous(&[(0, LEN)]).unwrap();
            let pages = (0..2 * layers::EXTENTS_MAX).map(|page| 0x10_0000 + (step * page * PAGE) as u64);
            for addr in pages.chain([0, LEN - 1]) {
                ram.write_obj(7u8, GuestAddress(addr)).unwrap();
            }
            let saved = in_memory();
            let written = write(&ram, None, &saved, Form::Sparse).unwrap();
            let parts: u64 = written.parts.iter().map(|part| part.len).sum();
            assert!(parts > written.data, "{parts} of {}", written.data);
            let takes = if filled { parts } else { written.data };
            assert_eq!(taken(&saved), takes);
            assert_eq!(checksum(&saved, &written.parts, |_, _| ()).unwrap(), (written.data, written.crc));

            let packed = tempfile();
            assert_eq!(write(&ram, None, &packed, Form::Packed).unwrap(), written);
            let unpacked = in_memory();
            super::super::unpack(&packed, &unpacked, |_, _| ()).unwrap();
            assert_eq!((taken(&unpacked), unpacked.metadata().unwrap().len()), (takes, written.len));

            let again = restored(&under(&saved, &written), &written.regions).unwrap();
            for addr in (0..LEN).step_by(PAGE) {
                let _: u8 = again.read_obj(GuestAddress(addr)).unwrap();
                again.write_obj(9u8, GuestAddress(addr)).unwrap();
            }
            // What it takes less, if the host takes pages back, is no matter here.
            assert!(taken(&saved) <= parts, "{} of {parts}", taken(&saved));
        }
    }

    /// RAM with a value here and there, saved, and what is under who is restored from it.
    fn a_base() -> (Layers, Vec<Region>) {
        let ram = memory::anonymous(&[(0, 8 << 20), (HIGH, 0x30_1000)]).unwrap();
        for addr in [0x1234, 0x30_0000, HIGH, HIGH + 0x30_0fff] {
            ram.write_obj(7u8, GuestAddress(addr)).unwrap();
        }
        let base = file();
        let written = write(&ram, None, &base, Form::Sparse).unwrap();
        (under(&base, &written), written.regions)
    }

    #[test]
    fn what_lies_over_a_base_is_what_has_changed() {
        let (layers, regions) = a_base();
        let second = restored(&layers, &regions).unwrap();
        second.write_obj(0u8, GuestAddress(0x1234)).unwrap();
        second.write_obj(9u8, GuestAddress(0x60_0000)).unwrap();
        let over = file();
        let written = write(&second, Some(&layers), &over, Form::Over).unwrap();
        assert_eq!(written.data, PAGE as u64, "a page of zeroes is a hole");
        assert_eq!(checksum(&over, ALL, |_, _| ()).unwrap(), (written.data, written.crc));
        let (base, extents) = written.over.unwrap();
        let page = |offset| Extent { offset, len: PAGE as u64 };
        assert_eq!((base, &extents[..]), (layers.id, &[page(0x1000), page(0x60_0000)][..]));

        // One more above, over the same base: what lay over it is taken along.
        let layers = Layers { over: Some((over, extents)), ..layers };
        let third = restored(&layers, &regions).unwrap();
        let values = |ram: &GuestRam| {
            [0x1234, 0x30_0000, 0x60_0000, HIGH, HIGH + 0x30_0fff]
                .map(|addr| ram.read_obj::<u8>(GuestAddress(addr)).unwrap())
        };
        assert_eq!(values(&third), [0, 7, 9, 7, 7]);
        third.write_obj(5u8, GuestAddress(HIGH)).unwrap();
        let more = file();
        let written = write(&third, Some(&layers), &more, Form::Over).unwrap();
        assert_eq!((written.data, written.over.as_ref().unwrap().1.len()), (2 * PAGE as u64, 3));
        let fourth = Layers { over: Some((more, written.over.unwrap().1)), ..under_of(&layers) };
        assert_eq!(values(&restored(&fourth, &regions).unwrap()), [0, 7, 9, 5, 7]);

        // All of it is written where that is wanted, and it goes back to where it was.
        let all = file();
        let written = write(&third, Some(&layers), &all, Form::Sparse).unwrap();
        assert_eq!(values(&restored(&under(&all, &written), &regions).unwrap()), [0, 7, 9, 5, 7]);
        rewind(&third).unwrap();
        assert_eq!(values(&third), [0, 7, 9, 7, 7]);
    }

    fn under_of(layers: &Layers) -> Layers {
        let (base, parts) = (layers.base.try_clone().unwrap(), layers.parts.clone());
        Layers { base, id: layers.id, parts, over: None }
    }

    #[test]
    fn who_has_booted_lies_over_nothing() {
        let ram = memory::anonymous(&[(0, 1 << 20)]).unwrap();
        assert!(write(&ram, None, &file(), Form::Over).is_err());
    }

    #[test]
    fn what_was_written_since_is_undone_and_the_rest_stays() {
        let ram = memory::anonymous(&[(0, 8 << 20), (HIGH, 4 << 20)]).unwrap();
        ram.write_obj(7u8, GuestAddress(0x1234)).unwrap();
        ram.write_obj(8u8, GuestAddress(HIGH + 0x3f_ffff)).unwrap();
        let saved = file();
        let written = write(&ram, None, &saved, Form::Sparse).unwrap();
        let again = restored(&under(&saved, &written), &written.regions).unwrap();
        let values = || {
            [0x1234, 0x20_0000, HIGH, HIGH + 0x3f_ffff]
                .map(|addr| again.read_obj::<u8>(GuestAddress(addr)).unwrap())
        };
        for _ in 0..2 {
            for addr in [0x1234, 0x20_0000, HIGH] {
                again.write_obj(9u8, GuestAddress(addr)).unwrap();
            }
            assert_eq!(values(), [9, 9, 9, 8]);
            rewind(&again).unwrap();
            assert_eq!(values(), [7, 0, 0, 8]);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        /// What is written is what is restored, wherever it is.
        #[test]
        fn memory_comes_back_as_it_was(
            writes in proptest::collection::vec((0u64..0x60_0000, any::<u64>()), 0..200),
            changes in proptest::collection::vec((0u64..0x60_0000, any::<u64>()), 0..400),
        ) {
            let ram = memory::anonymous(&[(0, 0x50_0000), (HIGH, 0x10_0000)]).unwrap();
            let place = |at: u64| GuestAddress(if at < 0x50_0000 { at } else { HIGH + at - 0x50_0000 });
            for (at, value) in &writes {
                let _ = ram.write_obj(*value, place(*at));
            }
            let out = file();
            let written = write(&ram, None, &out, Form::Sparse).unwrap();
            prop_assert_eq!(checksum(&out, ALL, |_, _| ()).unwrap(), (written.data, written.crc));
            let packed = file();
            prop_assert_eq!(&write(&ram, None, &packed, Form::Packed).unwrap(), &written);
            let unpacked = file();
            super::super::unpack(&packed, &unpacked, |_, _| ()).unwrap();
            prop_assert_eq!(checksum(&unpacked, ALL, |_, _| ()).unwrap(), (written.data, written.crc));
            prop_assert_eq!(unpacked.metadata().unwrap().len(), written.len);
            let layers = under(&unpacked, &written);
            let again = restored(&layers, &written.regions).unwrap();
            // What is written over it, and over that, is what it is.
            let over = file();
            let mut above = Layers { over: None, ..under_of(&layers) };
            for (at, value) in &changes {
                let _ = ram.write_obj(*value, place(*at));
                let _ = again.write_obj(*value, place(*at));
            }
            let over_written = write(&again, Some(&layers), &over, Form::Over).unwrap();
            prop_assert_eq!(checksum(&over, ALL, |_, _| ()).unwrap(), (over_written.data, over_written.crc));
            above.over = Some((over, over_written.over.unwrap().1));
            let again = restored(&above, &written.regions).unwrap();
            for page in (0..0x60_0000).step_by(PAGE) {
                let (mut one, mut other) = ([0; PAGE], [0; PAGE]);
                ram.read_slice(&mut one, place(page)).unwrap();
                again.read_slice(&mut other, place(page)).unwrap();
                prop_assert!(one == other, "page {:#x}", page);
            }
        }
    }
}
