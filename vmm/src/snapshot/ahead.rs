//! What those who go on from a snapshot use first: a hint beside it, by which their monitor brings these pages ahead. To some of
//! them they write: each is a copy that somebody has to make. Others they only read, which takes an exit for each.
//!
//! ```text
//! magic, 8 bytes; CRC-32 of the rest; both lists of extents, encoded by postcard
//! ```

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use serde::{Deserialize, Serialize};

use super::layers::{self, Collector, Extent};
use super::memory::{in_regions, own_pages, seen_pages};
use crate::devices::virtio::at_most;
use crate::memory::{self, GuestRam, Region};

/// The name of the hint in a snapshot's directory.
pub const AHEAD_FILE: &str = "ahead";
const MAGIC: [u8; 8] = *b"SUPRAHED";
const EXTENTS_MAX: usize = 2048;
/// A longer file is none.
const LEN_MAX: u64 = 128 << 10;
/// Who uses more has begun with work of its own.
const BYTES_MAX: u64 = 64 << 20;
const STACK: usize = 128 * 1024;

/// Pages of a memory's file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ahead {
    /// To which those who go on write.
    #[serde(deserialize_with = "at_most::<EXTENTS_MAX, _, _>")]
    pub writes: Vec<Extent>,
    /// At which they look.
    #[serde(deserialize_with = "at_most::<EXTENTS_MAX, _, _>")]
    pub reads: Vec<Extent>,
}

/// Writes down what a machine that was restored has used until now; says whether that is a hint.
pub fn record(ram: &GuestRam, mut out: impl Write) -> io::Result<bool> {
    let (mut writes, mut reads) = (Collector::default(), Collector::default());
    own_pages(ram, None, |offset| writes.page(offset))?;
    seen_pages(ram, |offset| reads.page(offset))?;
    let mut hint = Ahead { writes: writes.finish_to(EXTENTS_MAX), reads: reads.finish_to(EXTENTS_MAX) };
    if bytes(&hint.writes) > BYTES_MAX {
        return Ok(false);
    }
    if bytes(&hint.reads) > BYTES_MAX {
        hint.reads.clear();
    }
    let body = postcard::to_stdvec(&hint).map_err(io::Error::other)?;
    out.write_all(&[&MAGIC[..], &crc32fast::hash(&body).to_le_bytes(), &body].concat())?;
    Ok(true)
}

fn bytes(extents: &[Extent]) -> u64 {
    extents.iter().fold(0, |sum, extent| sum.saturating_add(extent.len))
}

/// The hint in a snapshot's directory, if there is one that is whole.
pub(super) fn read(directory: &Path, len: u64) -> Option<Ahead> {
    let file = File::open(directory.join(AHEAD_FILE)).ok()?;
    let mut read = Vec::new();
    file.take(LEN_MAX).read_to_end(&mut read).ok()?;
    let (sum, body) = read.strip_prefix(&MAGIC)?.split_first_chunk::<4>()?;
    let hint: Ahead =
        postcard::from_bytes(body).ok().filter(|_| crc32fast::hash(body).to_le_bytes() == *sum)?;
    let good = |extents: &[Extent]| layers::check_order(extents, len).is_ok() && bytes(extents) <= BYTES_MAX;
    (good(&hint.writes) && good(&hint.reads)).then_some(hint)
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
        let room = std::env::temp_dir().join(format!("vmm-ahead-{}", std::process::id()));
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
        let hint = room.join(AHEAD_FILE);
        assert!(record(&first, File::create(&hint).unwrap()).unwrap());
        let found = read(&room, id.len).unwrap();
        assert_eq!(bytes(&found.writes), 2 * page);
        let again = Arc::new(restore_memory(&layers, &written.regions).unwrap());
        write_ahead(&again, &written.regions, found.writes);
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
