//! Registers that a guest reads without an exit.
//!
//! What a device's registers hold is kept in a page of this process. A hypervisor that can map such pages into the guest
//! so that stores to them are exits has loads answered by the processor itself; where none can, a load is an exit, and is
//! answered from the same page. So there is one truth, and whoever changes a register puts it here at once.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::{MmapRegion, VolatileMemory};

use crate::memory::page_size;

/// The size of a device's window.
pub const WINDOW: u64 = 0x1000;

/// The host gives no memory for them.
#[derive(Debug, thiserror::Error)]
#[error("cannot map {len} bytes for the registers of devices: {source}")]
pub struct Error {
    len: u64,
    source: vm_memory::mmap::MmapRegionError,
}

/// The windows of neighbouring devices.
pub struct Pages {
    base: u64,
    region: MmapRegion<()>,
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pages({} windows at {:#x})", self.size() / WINDOW, self.base)
    }
}

impl Pages {
    /// For so many windows, the first of them at a guest-physical address.
    pub fn new(base: u64, windows: usize) -> Result<Arc<Self>, Error> {
        // Whole pages of the host, as only these can be mapped.
        let len = (windows.max(1) as u64).saturating_mul(WINDOW).next_multiple_of(page_size());
        let region = usize::try_from(len).map_err(|_| vm_memory::mmap::MmapRegionError::InvalidPointer);
        let region = region.and_then(MmapRegion::new).map_err(|source| Error { len, source })?;
        Ok(Arc::new(Self { base, region }))
    }

    /// Guest-physical address of the first.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Bytes of all, whole pages of the host.
    pub fn size(&self) -> u64 {
        self.region.size() as u64
    }

    /// Where they are in this process, for as long as this lives.
    pub fn host(&self) -> *mut u8 {
        self.region.as_ptr()
    }

    /// That of the device whose window begins at a guest-physical address.
    pub fn page(self: &Arc<Self>, addr: u64) -> Page {
        let start = addr.checked_sub(self.base).and_then(|start| usize::try_from(start).ok());
        Page { pages: Arc::clone(self), start: start.unwrap_or(usize::MAX) }
    }
}

/// The window of one device, of whose registers each is 32 bits wide.
///
/// One that is not among its pages holds zeroes, whatever is put into it.
#[derive(Debug)]
pub struct Page {
    pages: Arc<Pages>,
    start: usize,
}

impl Page {
    fn word(&self, offset: u64) -> Option<&AtomicU32> {
        let offset = usize::try_from(offset).ok().filter(|offset| *offset < WINDOW as usize)?;
        let at = self.start.checked_add(offset)?;
        // None of what is not aligned, or not inside of the mapping.
        VolatileMemory::get_atomic_ref(&self.pages.region, at).ok()
    }

    /// What a register holds.
    pub fn get(&self, offset: u64) -> u32 {
        self.word(offset).map_or(0, |word| u32::from_le(word.load(Ordering::Acquire)))
    }

    fn change(&self, offset: u64, change: impl FnOnce(&AtomicU32) -> u32) -> u32 {
        let Some(word) = self.word(offset) else { return 0 };
        let before = change(word);
        publish(word);
        u32::from_le(before)
    }

    /// Has a register hold `value`.
    pub fn set(&self, offset: u64, value: u32) {
        self.change(offset, |word| word.swap(value.to_le(), Ordering::AcqRel));
    }

    /// Sets bits of a register.
    pub fn raise(&self, offset: u64, bits: u32) {
        self.change(offset, |word| word.fetch_or(bits.to_le(), Ordering::AcqRel));
    }

    /// Clears bits of a register.
    pub fn lower(&self, offset: u64, bits: u32) {
        self.change(offset, |word| word.fetch_and(!bits.to_le(), Ordering::AcqRel));
    }

    /// Has what begins at `offset`, a multiple of four, hold these bytes. Each register of it changes as a whole.
    pub fn fill(&self, offset: u64, bytes: &[u8]) {
        for (at, bytes) in (offset..).step_by(4).zip(bytes.chunks(4)) {
            let mut word = self.get(at).to_le_bytes();
            word[..bytes.len()].copy_from_slice(bytes);
            self.set(at, u32::from_le_bytes(word));
        }
    }

    /// What a load of `data.len()` bytes from `offset` finds.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.get(at & !3).to_le_bytes()[(at & 3) as usize];
        }
    }
}

/// A guest on aarch64 maps registers as those of a device, and on a processor without FEAT_S2FWB its loads do not look into
/// caches.
#[cfg(all(target_arch = "aarch64", target_os = "linux"))]
fn publish(word: &AtomicU32) {
    // SAFETY: it changes nothing that can be seen but by loads past the caches: it writes a line of memory that is there, and
    // mapped, out of them. Linux lets programs do that.
    unsafe {
        std::arch::asm!("dc cvac, {at}", "dsb ish", at = in(reg) word.as_ptr(), options(nostack, preserves_flags));
    }
}

#[cfg(not(all(target_arch = "aarch64", target_os = "linux")))]
fn publish(_word: &AtomicU32) {}

#[cfg(test)]
impl Page {
    /// One that nobody maps.
    pub(crate) fn alone() -> Self {
        Pages::new(0, 1).unwrap().page(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_hold_what_was_put_into_them_and_end_with_their_window() {
        let pages = Pages::new(0xd000_0000, 3).unwrap();
        assert_eq!((pages.base(), pages.size()), (0xd000_0000, 0x3000u64.next_multiple_of(page_size())));
        let [first, second] = [0xd000_0000, 0xd000_1000].map(|addr| pages.page(addr));
        second.set(0x60, 1);
        second.raise(0x60, 6);
        second.lower(0x60, 2);
        assert_eq!((second.get(0x60), first.get(0x60)), (5, 0));
        second.fill(0x100, &[1, 2, 3, 4, 5, 6]);
        let mut bytes = [0xff; 9];
        second.read(0xff, &mut bytes);
        assert_eq!(bytes, [0, 1, 2, 3, 4, 5, 6, 0, 0]);
        second.fill(0x104, &[9]);
        assert_eq!((second.get(0x100), second.get(0x104)), (0x0403_0201, 0x0609));
        // SAFETY: nobody else uses the mapping, and it has three windows.
        assert_eq!(unsafe { *pages.host().add(0x1060) }, 5, "this is what is mapped");

        first.set(0xffc, 7);
        first.fill(0xffc, &[8; 8]);
        assert_eq!(second.get(0), 0, "behind its end is another's");
        for offset in [0x1000, 0x61, u64::MAX] {
            second.set(offset, 1);
            assert_eq!(second.get(offset), 0);
        }
        for addr in [0, 0xd000_0000 + pages.size(), u64::MAX] {
            let none = pages.page(addr);
            none.set(0, 1);
            assert_eq!(none.get(0), 0);
        }
    }
}
