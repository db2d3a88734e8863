//! Where those who go on from a snapshot write first: a hint beside it, by which their monitor writes to these pages ahead,
//! on a thread of its own. Each is a copy that somebody has to make, and the guest need not wait for all of them.
//!
//! ```text
//! magic, 8 bytes; CRC-32 of the rest; extents, encoded by postcard
//! ```

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use serde::{Deserialize, Serialize};

use super::layers::{self, Collector, Extent};
use super::memory::{in_regions, own_pages};
use crate::devices::virtio::at_most;
use crate::memory::{self, GuestRam, Region};

/// The name of the hint in a snapshot's directory.
pub const WRITES_FILE: &str = "writes";
const MAGIC: [u8; 8] = *b"SUPRWRIT";
const EXTENTS_MAX: usize = 2048;
/// A longer file is none.
const LEN_MAX: u64 = 64 << 10;
/// Who writes to more has begun with work of its own.
const BYTES_MAX: u64 = 64 << 20;
const STACK: usize = 128 * 1024;

#[derive(Serialize, Deserialize)]
struct Hint(#[serde(deserialize_with = "at_most::<EXTENTS_MAX, _, _>")] Vec<Extent>);

/// Writes down where a machine that was restored has written until now; says whether that is a hint.
pub fn record(ram: &GuestRam, mut out: impl Write) -> io::Result<bool> {
    let mut collector = Collector::default();
    own_pages(ram, None, |offset| collector.page(offset))?;
    let extents = collector.finish_to(EXTENTS_MAX);
    if extents.iter().map(|extent| extent.len).sum::<u64>() > BYTES_MAX {
        return Ok(false);
    }
    let body = postcard::to_stdvec(&Hint(extents)).map_err(io::Error::other)?;
    out.write_all(&[&MAGIC[..], &crc32fast::hash(&body).to_le_bytes(), &body].concat())?;
    Ok(true)
}

/// The hint in a snapshot's directory, if there is one that is whole.
pub(super) fn read(directory: &Path, len: u64) -> Option<Vec<Extent>> {
    let file = File::open(directory.join(WRITES_FILE)).ok()?;
    let mut bytes = Vec::new();
    file.take(LEN_MAX).read_to_end(&mut bytes).ok()?;
    let (sum, body) = bytes.strip_prefix(&MAGIC)?.split_first_chunk::<4>()?;
    let Hint(extents) =
        postcard::from_bytes(body).ok().filter(|_| crc32fast::hash(body).to_le_bytes() == *sum)?;
    let total: u64 = extents.iter().map(|extent| extent.len).sum();
    (layers::check_order(&extents, len).is_ok() && total <= BYTES_MAX).then_some(extents)
}

/// Writes to these pages of `ram`, that of a machine which is being restored, on a thread that ends by itself. What they
/// hold stays.
pub(crate) fn write_ahead(ram: &Arc<GuestRam>, regions: &[Region], extents: Vec<Extent>) {
    let (ram, regions) = (Arc::clone(ram), regions.to_vec());
    let ahead = move || {
        for (addr, extent) in in_regions(&regions, extents) {
            if let Err(error) = memory::populate(&ram, addr, extent.len) {
                log::debug!("pages are not written to ahead: {error}");
                return;
            }
        }
    };
    if let Err(error) = thread::Builder::new().name("ahead".into()).stack_size(STACK).spawn(ahead) {
        log::debug!("pages are not written to ahead: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use vm_memory::{Bytes, GuestAddress};

    use super::super::{Base, Form, Layers, restore_memory, write_memory};
    use super::*;

    const LATE: Duration = Duration::from_secs(20);

    fn own(ram: &GuestRam) -> Vec<u64> {
        let mut all = Vec::new();
        own_pages(ram, None, |offset| all.push(offset)).unwrap();
        all
    }

    #[test]
    fn what_is_written_to_first_is_written_to_ahead_and_stays_what_it_is() {
        let room = std::env::temp_dir().join(format!("vmm-writes-{}", std::process::id()));
        std::fs::create_dir_all(&room).unwrap();
        let booted = memory::anonymous(&[(0, 8 << 20)]).unwrap();
        booted.write_obj(7u8, GuestAddress(0x1234)).unwrap();
        let base = File::options().create_new(true).read(true).write(true).open(room.join("memory")).unwrap();
        let written = write_memory(&booted, None, &base, Form::Sparse).unwrap();
        let id = Base { len: written.len, data: written.data, crc: written.crc };
        let layers = Layers { base, id, parts: written.parts.clone(), over: None };

        let first = restore_memory(&layers, &written.regions).unwrap();
        assert_eq!(own(&first), [0u64; 0]);
        for addr in [0x1234, 0x60_0000] {
            first.write_obj(9u8, GuestAddress(addr)).unwrap();
        }
        let page = memory::page_size();
        assert_eq!(own(&first).len() as u64, 2 * page / layers::PAGE, "no more than was written to");
        let hint = room.join(WRITES_FILE);
        assert!(record(&first, File::create(&hint).unwrap()).unwrap());
        let extents = read(&room, id.len).unwrap();
        let again = Arc::new(restore_memory(&layers, &written.regions).unwrap());
        write_ahead(&again, &written.regions, extents);
        let late = Instant::now() + LATE;
        while own(&again) != own(&first) {
            assert!(Instant::now() < late, "{:?}, not {:?}", own(&again), own(&first));
            thread::yield_now();
        }
        for (addr, value) in [(0x1234, 7), (0x60_0000, 0)] {
            assert_eq!(again.read_obj::<u8>(GuestAddress(addr)).unwrap(), value);
        }

        // What is damaged, or of something shorter, is no hint.
        assert!(read(&room, 0x1000).is_none());
        let good = std::fs::read(&hint).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(&hint, bad).unwrap();
            assert!(read(&room, id.len).is_none(), "byte {at}");
        }
        std::fs::remove_dir_all(&room).unwrap();
        assert!(read(&room, id.len).is_none());
    }
}
