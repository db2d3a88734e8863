//! Guest RAM.
//!
//! RAM is shared by everything that touches it: the hypervisor maps it into the guest, devices
//! read rings from it, the loader fills it. All of them hold an [`Arc`](std::sync::Arc) of one [`GuestRam`], so the
//! mapping outlives its last user and nobody has to tear down in a particular order.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::bitmap::WithBitmapSlice;
use vm_memory::mmap::FromRangesError;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

/// RAM of one guest: disjoint regions of host memory at guest-physical addresses.
pub type GuestRam = GuestMemoryMmap<RamBitmap>;

/// What RAM remembers about writes to it: nothing. The file server wants a type of its own for that.
#[cfg(all(target_os = "linux", feature = "fs"))]
pub type RamBitmap = vhost_user_backend::bitmap::BitmapMmapRegion;
/// What RAM remembers about writes to it: nothing.
#[cfg(not(all(target_os = "linux", feature = "fs")))]
pub type RamBitmap = ();

/// What a piece of RAM is sliced with.
pub type RamSlice<'a> = <RamBitmap as WithBitmapSlice<'a>>::S;

/// A region of RAM, and where a file has what is in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Region {
    /// Guest-physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
    /// Where it begins in the file.
    pub offset: u64,
}

/// RAM could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The machine was given no memory at all.
    #[error("a guest needs memory: give it at least one region that is not empty")]
    Empty,
    /// The host refused the mapping.
    #[error(
        "cannot map {bytes} bytes of guest RAM: {source}; lower the guest's memory or the host's use of it"
    )]
    Map {
        /// Size of all regions together.
        bytes: u64,
        /// What the mapping said.
        source: FromRangesError,
    },
    /// The host refused to map a part of a snapshot.
    #[error("cannot map {len:#x} bytes of a snapshot's memory at {addr:#x}: {why}")]
    Restore {
        /// Guest-physical address.
        addr: u64,
        /// Bytes.
        len: u64,
        /// What the mapping said.
        why: String,
    },
}

/// Maps anonymous, zeroed memory for the regions given as (guest-physical address, length).
///
/// Pages cost nothing until the guest touches them.
pub fn anonymous(regions: &[(u64, u64)]) -> Result<GuestRam, Error> {
    let bytes: u64 = regions.iter().map(|(_, len)| len).sum();
    if bytes == 0 {
        return Err(Error::Empty);
    }
    let ranges: Vec<_> = regions.iter().map(|&(addr, len)| (GuestAddress(addr), len as usize)).collect();
    GuestRam::from_ranges(&ranges).map_err(|source| Error::Map { bytes, source })
}

/// Has the host spend no huge pages on `ram`, of whose pages few will be touched.
pub fn in_small_pages(ram: &GuestRam) {
    #[cfg(target_os = "linux")]
    for region in ram.iter() {
        // SAFETY: it is the mapping of a region of guest RAM, which stays mapped while `ram` lives; what it holds does not
        // change. Where the kernel has no huge pages the call fails, and there are none.
        unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_NOHUGEPAGE) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = ram;
}

/// Maps a part of a file over a part of `ram`, privately: it reads as the file does, and what is written to it stays here. All
/// who do so share the pages that they do not write to. Nobody uses that part yet.
pub fn map_over(ram: &GuestRam, addr: u64, len: u64, file: &File, offset: u64) -> Result<(), Error> {
    let failed = |why: String| Error::Restore { addr, len, why };
    let size = usize::try_from(len).map_err(|error| failed(error.to_string()))?;
    let at = libc::off_t::try_from(offset).map_err(|error| failed(error.to_string()))?;
    let slice = ram.get_slice(GuestAddress(addr), size).map_err(|error| failed(error.to_string()))?;
    let host = slice.ptr_guard_mut();
    // SAFETY: it replaces the mapping of a slice of guest RAM, all of it, by another one that can be read and written in the
    // same way; that of the whole region, which is unmapped with it, stays mapped while `ram` lives. Where the addresses are
    // no multiples of a page the call fails and changes nothing.
    let mapped = unsafe {
        libc::mmap(
            host.as_ptr().cast(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED,
            file.as_raw_fd(),
            at,
        )
    };
    if mapped == libc::MAP_FAILED { Err(failed(io::Error::last_os_error().to_string())) } else { Ok(()) }
}

/// Writes to all pages of a part of `ram` without changing what they hold, so that nobody has to wait for that later.
#[cfg(target_os = "linux")]
pub fn populate(ram: &GuestRam, addr: u64, len: u64) -> io::Result<()> {
    let size = usize::try_from(len).map_err(io::Error::other)?;
    let slice =
        ram.get_slice(GuestAddress(addr), size).map_err(|error| io::Error::other(error.to_string()))?;
    let host = slice.ptr_guard_mut();
    // SAFETY: it is a slice of guest RAM, which stays mapped while `ram` lives; the kernel makes its pages writable, as if
    // each had been written to with what is there.
    let done = unsafe { libc::madvise(host.as_ptr().cast(), size, libc::MADV_POPULATE_WRITE) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// There is no such call.
#[cfg(not(target_os = "linux"))]
pub fn populate(_ram: &GuestRam, _addr: u64, _len: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// The guest has no use for a range: what the host spends on it is given back, and the guest reads
/// zeroes there, or what a snapshot had there. A part that is not RAM is an error, and nothing happens;
/// parts of host pages at either end stay.
pub fn discard(ram: &GuestRam, addr: u64, len: u64) -> Result<(), DiscardError> {
    let refused = DiscardError { addr, len };
    let fits = usize::try_from(len).is_ok_and(|len| ram.check_range(GuestAddress(addr), len));
    if !fits {
        return Err(refused);
    }
    let page = page_size() as usize;
    // It fits, so it is no more than an address space.
    for slice in ram.get_slices(GuestAddress(addr), len as usize) {
        let slice = slice.map_err(|_| refused)?;
        let guard = slice.ptr_guard_mut();
        let start = (guard.as_ptr() as usize).next_multiple_of(page);
        let end = (guard.as_ptr() as usize + slice.len()) / page * page;
        if start < end {
            // SAFETY: start..end are whole pages inside of a slice of guest RAM, which stays mapped
            // while `ram` lives. The pages stay readable and writable; only what they hold changes,
            // and of guest RAM nobody in this process holds a reference, since the guest may change
            // it at any time.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
        }
    }
    Ok(())
}

/// The range is not RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{len:#x} bytes at {addr:#x} are not all RAM")]
pub struct DiscardError {
    addr: u64,
    len: u64,
}

/// Bytes of a page of the host.
pub fn page_size() -> u64 {
    // SAFETY: sysconf takes no pointer.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    // Every system says; this is what most would.
    u64::try_from(size).unwrap_or(4096)
}

/// The number of bytes in all regions.
pub fn size(ram: &GuestRam) -> u64 {
    ram.iter().map(GuestMemoryRegion::len).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn regions_are_zeroed_and_writable() {
        let ram = anonymous(&[(0, 0x1000), (0x10_0000, 0x2000)]).unwrap();
        assert_eq!(size(&ram), 0x3000);
        assert_eq!(ram.read_obj::<u64>(GuestAddress(0x10_1ff8)).unwrap(), 0);
        ram.write_obj(7u32, GuestAddress(0xffc)).unwrap();
        assert_eq!(ram.read_obj::<u32>(GuestAddress(0xffc)).unwrap(), 7);
        assert!(ram.write_obj(7u32, GuestAddress(0x1000)).is_err(), "the hole is no memory");
    }

    #[test]
    fn what_is_discarded_reads_as_zeroes_and_the_rest_stays() {
        let ram = anonymous(&[(0, 0x2_0000), (0x10_0000, 0x2_0000)]).unwrap();
        for addr in (0..0x2_0000).step_by(0x1000) {
            ram.write_obj(7u8, GuestAddress(addr)).unwrap();
        }
        discard(&ram, 0x1_0000, 0x1_0000).unwrap();
        assert_eq!(ram.read_obj::<u8>(GuestAddress(0xf000)).unwrap(), 7);
        assert_eq!(ram.read_obj::<u8>(GuestAddress(0x1_0000)).unwrap(), 0);
        discard(&ram, 0x1, 0x10).unwrap();
        assert_eq!(ram.read_obj::<u8>(GuestAddress(0)).unwrap(), 7, "less than a page");
        for (addr, len) in [(0x1_0000, 0x1_0001), (0x5_0000, 1), (u64::MAX, 2), (0, u64::MAX)] {
            assert_eq!(discard(&ram, addr, len), Err(DiscardError { addr, len }));
        }
        discard(&ram, 0, 0).unwrap();
    }

    #[test]
    fn no_memory_is_an_error_and_not_a_panic() {
        assert!(matches!(anonymous(&[]), Err(Error::Empty)));
        assert!(matches!(anonymous(&[(0, 0)]), Err(Error::Empty)));
        assert!(matches!(anonymous(&[(0, 1 << 62)]), Err(Error::Map { .. })));
    }
}
