//! Memory by the page: the kernel's own calls, since an allocator keeps what is freed; and the physical side of
//! it, which takes root.

use std::ffi::c_void;
use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use anyhow::{Context, Result, ensure};
use nix::sys::mman::{MapFlags, ProtFlags, mlock, mmap, mmap_anonymous, munmap};

/// Bytes of a page, where guests of these tests run.
pub const PAGE: usize = 4096;

const PROTECTION: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

/// Pages of this process, zeroed at first; given back when dropped.
pub struct Pages {
    at: NonNull<c_void>,
    len: usize,
}

impl Pages {
    /// Of `len` bytes.
    pub fn new(len: usize) -> Result<Self> {
        let size = NonZeroUsize::new(len).context("no pages at all")?;
        // SAFETY: the kernel chooses where, so that nothing that is there already is replaced.
        let at = unsafe { mmap_anonymous(None, size, PROTECTION, MapFlags::MAP_PRIVATE) };
        Ok(Self { at: at.with_context(|| format!("taking {len} bytes of memory"))?, len })
    }

    /// To be read.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: they are mapped for as long as `self` lives, and borrowed as it is.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr().cast(), self.len) }
    }

    /// To be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: they are mapped for as long as `self` lives, and borrowed as it is.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr().cast(), self.len) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: nobody refers to them any more, since each reference borrows `self`.
        if let Err(error) = unsafe { munmap(self.at, self.len) } {
            eprintln!("guest-part: giving back memory: {error}");
        }
    }
}

/// Accesses to memory that somebody else may change, or that is none: each is made, as wide as it is asked for,
/// by one plain instruction. What is not in reach reads as 0 and is not written.
///
/// It keeps what it maps: there is one of each kind for the time of a program.
pub struct Window {
    at: NonNull<c_void>,
    len: usize,
}

macro_rules! accesses {
    ($($read:ident, $write:ident: $kind:ty;)*) => {
        $(
            /// One load.
            #[inline(never)]
            pub fn $read(&self, offset: usize) -> $kind {
                match self.place::<$kind>(offset) {
                    // SAFETY: `place` has seen that it is within the mapping and aligned, and any bits are a
                    // number.
                    Some(place) => unsafe { place.read_volatile() },
                    None => 0,
                }
            }

            /// One store.
            #[inline(never)]
            pub fn $write(&self, offset: usize, value: $kind) {
                if let Some(place) = self.place::<$kind>(offset) {
                    // SAFETY: as above; nothing in this program is a reference to it.
                    unsafe { place.write_volatile(value) }
                }
            }
        )*
    };
}

impl Window {
    /// `len` bytes of physical memory.
    pub fn physical(memory: &File, address: u64, len: usize) -> Result<Self> {
        let size = NonZeroUsize::new(len).context("an empty window")?;
        let offset = i64::try_from(address).context("an address beyond all memory")?;
        // SAFETY: the kernel chooses where, so that nothing that is there already is replaced.
        let at = unsafe { mmap(None, size, PROTECTION, MapFlags::MAP_SHARED, memory.as_fd(), offset) };
        Ok(Self { at: at.with_context(|| format!("mapping {address:#x} of the machine"))?, len })
    }

    fn place<T>(&self, offset: usize) -> Option<*mut T> {
        let fits = offset.checked_add(size_of::<T>()).is_some_and(|end| end <= self.len);
        (fits && offset.is_multiple_of(size_of::<T>()))
            .then(|| self.at.as_ptr().wrapping_byte_add(offset).cast())
    }

    accesses! {
        read8, write8: u8;
        read16, write16: u16;
        read32, write32: u32;
        read64, write64: u64;
    }
}

/// Memory of this process whose place in the machine is known, page by page.
pub struct Arena {
    window: Window,
    physical: Vec<u64>,
}

impl Arena {
    /// Of so many pages.
    pub fn new(pages: usize) -> Result<Self> {
        let len = pages * PAGE;
        let size = NonZeroUsize::new(len).context("an empty arena")?;
        // SAFETY: the kernel chooses where, so that nothing that is there already is replaced.
        let at = unsafe { mmap_anonymous(None, size, PROTECTION, MapFlags::MAP_PRIVATE) };
        let window = Window { at: at.context("taking memory")?, len };
        // SAFETY: it is mapped, for good.
        unsafe { mlock(window.at, len) }.context("locking memory")?;
        let map = File::open("/proc/self/pagemap").context("opening the map of pages")?;
        let first = window.at.as_ptr() as u64 / PAGE as u64;
        let physical = (first..first + pages as u64)
            .map(|page| {
                const PRESENT: u64 = 1 << 63;
                const FRAME: u64 = (1 << 55) - 1;
                let mut entry = [0; 8];
                map.read_exact_at(&mut entry, page * 8).context("reading the map of pages")?;
                let entry = u64::from_le_bytes(entry);
                ensure!(entry & PRESENT != 0 && entry & FRAME != 0, "where a page is cannot be known");
                Ok((entry & FRAME) * PAGE as u64)
            })
            .collect::<Result<_>>()?;
        Ok(Self { window, physical })
    }

    /// How many pages there are.
    pub fn pages(&self) -> usize {
        self.physical.len()
    }

    /// Where page `index` is in the machine.
    pub fn address(&self, index: usize) -> u64 {
        self.physical[index]
    }

    /// All of it, by offset.
    pub fn window(&self) -> &Window {
        &self.window
    }

    /// Writes `bytes` at the start of page `index`, as many as fit.
    pub fn put(&self, index: usize, bytes: &[u8]) {
        for (offset, byte) in bytes.iter().take(PAGE).enumerate() {
            self.window.write8(index * PAGE + offset, *byte);
        }
    }
}
