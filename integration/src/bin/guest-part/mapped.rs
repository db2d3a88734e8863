//! Writes to a file by way of a mapping, and stays until it is killed.

use std::fs::OpenOptions;
use std::num::NonZeroUsize;
use std::{slice, thread};

use anyhow::{Context, Result};
use integration::pattern;
use nix::sys::mman::{MapFlags, ProtFlags, mmap};

pub fn write(path: &str, seed: u64, length: NonZeroUsize) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path);
    let file = file.with_context(|| format!("opening {path}"))?;
    file.set_len(length.get() as u64)?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping where the kernel likes changes nothing that is there.
    let at =
        unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, &file, 0) }.context("mapping it")?;
    // SAFETY: the mapping is of this length and never undone, its file no shorter, and nobody else has it.
    let bytes = unsafe { slice::from_raw_parts_mut(at.as_ptr().cast::<u8>(), length.get()) };
    pattern::fill(seed, 0, bytes);
    println!("written");
    loop {
        thread::park();
    }
}
