//! RAM that is packed for carrying, from anybody: an error, or a file that is no longer than it says.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::os::fd::{FromRawFd, OwnedFd};

use libfuzzer_sys::fuzz_target;
use vmm::snapshot::unpack;

/// A file without a name.
fn file() -> File {
    // SAFETY: the name ends with a zero and lives until the call returns.
    let fd = unsafe { libc::memfd_create(c"fuzz".as_ptr(), 0) };
    assert!(fd >= 0, "no memory for a file");
    // SAFETY: it was made just now, and nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }.into()
}

fuzz_target!(|data: &[u8]| {
    let (mut from, to) = (file(), file());
    from.write_all(data).expect("a file takes it");
    if unpack(&from, &to, |done, all| assert!(done <= all)).is_ok() {
        let stated = data.get(8..16).and_then(|len| len.try_into().ok()).map(u64::from_le_bytes);
        assert_eq!(to.metadata().ok().map(|meta| meta.len()), stated);
    }
});
