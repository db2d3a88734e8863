//! Memory by the page: the kernel's own calls, since an allocator keeps what is freed.

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use anyhow::{Context, Result};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Pages of this process, zeroed at first; given back when dropped.
pub struct Pages {
    at: NonNull<c_void>,
    len: usize,
}

impl Pages {
    /// Of `len` bytes.
    pub fn new(len: usize) -> Result<Self> {
        let size = NonZeroUsize::new(len).context("no pages at all")?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: the kernel chooses where, so that nothing that is there already is replaced.
        let at = unsafe { mmap_anonymous(None, size, protection, MapFlags::MAP_PRIVATE) };
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
