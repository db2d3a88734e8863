use proptest::prelude::*;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::{self, GuestRam};

const DISK: u64 = 64 * 1024;

/// A request by hand: a ring of one queue in guest RAM, and a disk.
struct Bed {
    ram: Arc<GuestRam>,
    disk: Disk,
}

const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const DATA: u64 = 0x1_0000;

impl Bed {
    fn new(read_only: bool) -> Self {
        let path = std::env::temp_dir().join(format!(
            "vmm-block-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file.set_len(DISK).unwrap();
        Self::with(Some(&Medium {
            file: Arc::new(file),
            len: DISK,
            unit: 512,
            read_only,
            id: "a disk with a long name".into(),
        }))
    }

    fn with(medium: Option<&Medium>) -> Self {
        let ram = Arc::new(memory::anonymous(&[(0, 0x10_0000)]).unwrap());
        Self { ram, disk: Disk::new(medium, Limiter::default(), Arc::default()) }
    }

    /// Sends the parts, each (bytes, how long if to be written by the device), and returns the status
    /// with what was written before it.
    fn send(&mut self, out: &[&[u8]], room: usize) -> Result<(u8, Vec<u8>), Broken> {
        let mut at = DATA;
        let mut parts: Vec<(u64, u32, u16)> = Vec::new();
        for bytes in out {
            self.ram.write_slice(bytes, GuestAddress(at)).unwrap();
            parts.push((at, bytes.len() as u32, 0));
            at += bytes.len() as u64;
        }
        let answer = at;
        if room > 0 {
            parts.push((answer, room as u32, 2));
        }
        let last = parts.len() - 1;
        for (index, (address, len, flags)) in parts.iter().enumerate() {
            let descriptor = DESCRIPTORS + index as u64 * 16;
            let next = u16::from(index < last);
            self.ram.write_obj(*address, GuestAddress(descriptor)).unwrap();
            self.ram.write_obj(*len, GuestAddress(descriptor + 8)).unwrap();
            self.ram.write_obj(flags | next, GuestAddress(descriptor + 12)).unwrap();
            self.ram.write_obj(index as u16 + 1, GuestAddress(descriptor + 14)).unwrap();
        }
        self.ram.write_obj(1u16, GuestAddress(AVAILABLE + 2)).unwrap();
        let mut queue = Queue::new(16).unwrap();
        queue.set_desc_table_address(Some(DESCRIPTORS as u32), None);
        queue.set_avail_ring_address(Some(AVAILABLE as u32), None);
        queue.set_used_ring_address(Some(USED as u32), None);
        queue.set_ready(true);
        let chain = queue.iter(Arc::clone(&self.ram)).unwrap().next().unwrap();
        self.disk.serve(0, chain)?;
        let mut data = vec![0; room];
        self.ram.read_slice(&mut data, GuestAddress(answer)).unwrap();
        let status = data.pop().unwrap();
        Ok((status, data))
    }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn what_is_written_is_read_back() {
    let mut bed = Bed::new(false);
    let data: Vec<u8> = (0..2048u32).map(|n| (n / 3) as u8).collect();
    assert_eq!(bed.send(&[&header(T_OUT, 3), &data], 1).unwrap().0, S_OK);
    assert_eq!(bed.send(&[&header(T_FLUSH, 0)], 1).unwrap().0, S_OK);
    let (status, read) = bed.send(&[&header(T_IN, 3)], 2049).unwrap();
    assert_eq!(status, S_OK);
    assert_eq!(read, data);
    let (_, id) = bed.send(&[&header(T_GET_ID, 0)], 21).unwrap();
    assert_eq!(id, b"a disk with a long n");
}

#[test]
fn what_cannot_be_is_answered_with_an_error() {
    let sectors = DISK / SECTOR;
    let block = vec![1; 512];
    for (read_only, kind, sector, data, room, status) in [
        (false, T_IN, sectors - 1, None, 513, S_OK),
        (false, T_IN, sectors, None, 513, S_IOERR),
        (false, T_IN, u64::MAX, None, 513, S_IOERR),
        (false, T_IN, u64::MAX / 512, None, 513, S_IOERR),
        (false, T_IN, 0, None, 512, S_IOERR),
        (false, T_OUT, sectors - 1, Some(&block[..]), 1, S_OK),
        (false, T_OUT, sectors, Some(&block[..]), 1, S_IOERR),
        (false, T_OUT, 0, Some(&block[..100]), 1, S_IOERR),
        (true, T_OUT, 0, Some(&block[..]), 1, S_IOERR),
        (true, T_IN, 0, None, 513, S_OK),
        (true, T_FLUSH, 0, None, 1, S_OK),
        (true, T_DISCARD, 0, Some(&block[..16]), 1, S_IOERR),
        (false, 99, 0, None, 1, S_UNSUPP),
    ] {
        let mut bed = Bed::new(read_only);
        let header = header(kind, sector);
        let parts: Vec<&[u8]> = std::iter::once(&header[..]).chain(data).collect();
        assert_eq!(bed.send(&parts, room).unwrap().0, status, "{kind} at {sector}");
    }
}

#[test]
fn of_an_empty_drive_nothing_is_read_or_written() {
    let block = vec![1; 512];
    for (kind, data, room, status) in [
        (T_IN, None, 513, S_IOERR),
        (T_IN, None, 1, S_IOERR),
        (T_OUT, Some(&block[..]), 1, S_IOERR),
        (T_DISCARD, Some(&block[..16]), 1, S_IOERR),
        (T_WRITE_ZEROES, Some(&block[..16]), 1, S_IOERR),
        (T_FLUSH, None, 1, S_OK),
        (T_GET_ID, None, 21, S_OK),
    ] {
        let mut bed = Bed::with(None);
        let header = header(kind, 0);
        let parts: Vec<&[u8]> = std::iter::once(&header[..]).chain(data).collect();
        let (code, read) = bed.send(&parts, room).unwrap();
        assert_eq!(code, status, "{kind}");
        assert!(read.iter().all(|byte| *byte == 0), "{kind}");
    }
}

#[test]
fn a_request_without_header_or_status_breaks_the_queue() {
    let mut bed = Bed::new(false);
    assert!(bed.send(&[&[0; 15]], 1).is_err());
    assert!(bed.send(&[&header(T_FLUSH, 0)], 0).is_err());
}

#[cfg(target_os = "linux")]
#[test]
fn ranges_read_as_zeroes_after() {
    let sectors = DISK / SECTOR;
    for (kind, range, status) in [
        (T_DISCARD, range(8, 8, 0), S_OK),
        (T_WRITE_ZEROES, range(8, 8, 0), S_OK),
        (T_WRITE_ZEROES, range(8, 8, RANGE_UNMAP), S_OK),
        (T_DISCARD, range(8, 0, 0), S_OK),
        (T_DISCARD, range(8, 8, RANGE_UNMAP), S_UNSUPP),
        (T_WRITE_ZEROES, range(8, 8, 2), S_UNSUPP),
        (T_DISCARD, range(sectors, 1, 0), S_IOERR),
        (T_DISCARD, range(0, u32::MAX, 0), S_IOERR),
        (T_DISCARD, vec![0; 15], S_IOERR),
        (T_DISCARD, vec![0; 16 * 33], S_IOERR),
    ] {
        let mut bed = Bed::new(false);
        bed.send(&[&header(T_OUT, 0), &vec![7; 16 * 512]], 1).unwrap();
        let (code, _) = bed.send(&[&header(kind, 0), &range], 1).unwrap();
        // Not every file system of a test machine can zero a range in place.
        if code == S_UNSUPP && kind == T_WRITE_ZEROES && range[12] == 0 {
            continue;
        }
        assert_eq!(code, status, "{kind} {range:?}");
        let (_, read) = bed.send(&[&header(T_IN, 0)], 16 * 512 + 1).unwrap();
        let zeroed = status == S_OK && range[8] == 8;
        assert!(read[..8 * 512].iter().all(|byte| *byte == 7));
        assert!(read[8 * 512..].iter().all(|byte| *byte == if zeroed { 0 } else { 7 }));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn no_request_upsets_it(
        kind in prop_oneof![0u32..16, any::<u32>()],
        sector in prop_oneof![0u64..200, any::<u64>()],
        data in proptest::collection::vec(any::<u8>(), 0..1100),
        room in 0usize..1100,
    ) {
        let mut bed = Bed::new(false);
        let _ = bed.send(&[&header(kind, sector), &data], room);
    }
}
