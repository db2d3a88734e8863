use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::time::Instant;

use proptest::prelude::*;
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::super::super::limit::{Limiter, Limits, Rate};
use super::super::super::queue::Track;
use super::super::medium::Medium;
use super::*;
use crate::event::Event;
use crate::hypervisor::testing::Wire;
use crate::memory;
use crate::registers::Page;
use crate::standstill::Standstill;
use crate::vcpu::Phase;

const DISK: u64 = 256 * 1024;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x5000;
const SIZE: u16 = 256;
/// Each request has a header, data and a status in a part of RAM of its own.
const DATA: u64 = 0x1_0000;
const STRIDE: u64 = 0x2000;

fn image() -> Arc<File> {
    let path = std::env::temp_dir().join(format!(
        "vmm-uring-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    ));
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let content: Vec<u8> = (0..DISK).map(|at| (at / 512 * 7 + at % 251) as u8).collect();
    file.write_all_at(&content, 0).unwrap();
    Arc::new(file)
}

fn medium(file: &Arc<File>, read_only: bool) -> Medium {
    Medium { file: Arc::clone(file), len: DISK, unit: 512, read_only, id: "disk".into() }
}

fn disk(file: &Arc<File>, read_only: bool) -> Disk {
    Disk::new(Some(&medium(file, read_only)), Limiter::default(), Arc::default())
}

/// Requests as (type, sector, length of the data, whether the device writes it).
type Request = (u32, u64, u32, bool);

type Served = (Running, Arc<Signals>);

/// All of the requests in one ring.
struct Bed {
    ram: Arc<GuestRam>,
    count: u16,
}

impl Bed {
    fn new(requests: &[Request]) -> Self {
        let ram = Arc::new(memory::anonymous(&[(0, 0x10_0000)]).unwrap());
        for (index, (kind, sector, len, write)) in (0u64..).zip(requests) {
            let base = DATA + index * STRIDE;
            ram.write_obj(*kind, GuestAddress(base)).unwrap();
            ram.write_obj(*sector, GuestAddress(base + 8)).unwrap();
            ram.write_slice(&vec![index as u8 + 1; *len as usize], GuestAddress(base + 0x100)).unwrap();
            ram.write_obj(0xeeu8, GuestAddress(base + 0x80)).unwrap();
            let data_flags = if *write { 3u16 } else { 1 };
            let parts = [(base, 16, 1), (base + 0x100, *len, data_flags), (base + 0x80, 1, 2)];
            for (part, (address, len, flags)) in (0u64..).zip(parts) {
                let number = index * 3 + part;
                let at = DESCRIPTORS + number * 16;
                ram.write_obj(address, GuestAddress(at)).unwrap();
                ram.write_obj(len, GuestAddress(at + 8)).unwrap();
                ram.write_obj(flags, GuestAddress(at + 12)).unwrap();
                ram.write_obj(number as u16 + 1, GuestAddress(at + 14)).unwrap();
            }
            ram.write_obj(index as u16 * 3, GuestAddress(AVAILABLE + 4 + index * 2)).unwrap();
        }
        let count = requests.len() as u16;
        ram.write_obj(count, GuestAddress(AVAILABLE + 2)).unwrap();
        Self { ram, count }
    }

    fn queue() -> Queue {
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_desc_table_address(Some(DESCRIPTORS as u32), None);
        queue.set_avail_ring_address(Some(AVAILABLE as u32), None);
        queue.set_used_ring_address(Some(USED as u32), None);
        queue.set_ready(true);
        queue
    }

    /// Has the kernel begin to serve them, from where `track` says. None where there is no io_uring.
    fn begin(&self, disk: Disk, track: &Arc<Track>, standstill: &Arc<Standstill>) -> Option<Served> {
        let ring = Uring::new().inspect_err(|error| eprintln!("not tested: {error}")).ok()?;
        let bell = Arc::new(Event::new().unwrap());
        let signals = Arc::new(Signals::new(Arc::new(Wire::default()), Page::alone()));
        let queue = VirtQueue::new(Self::queue(), Arc::clone(&self.ram), bell, Arc::default());
        let activation = Activation {
            ram: Arc::clone(&self.ram),
            queues: vec![queue.on(Arc::clone(track))],
            signals: Arc::clone(&signals),
            features: 0,
            standstill: Arc::clone(standstill),
        };
        Some((Running::spawn(disk, ring, activation).unwrap(), signals))
    }

    fn used(&self) -> u16 {
        self.ram.load(GuestAddress(USED + 2), Ordering::Acquire).unwrap()
    }

    /// Waits for all answers; false when the device needs a reset.
    fn finish(&self, (running, signals): Served) -> bool {
        let until = Instant::now() + Duration::from_secs(20);
        while !signals.is_reset_needed() && self.used() != self.count {
            assert!(Instant::now() < until, "{} of {}", self.used(), self.count);
            thread::yield_now();
        }
        running.stop().unwrap();
        !signals.is_reset_needed()
    }

    /// Both, at once.
    fn run(&self, disk: Disk) -> Option<bool> {
        let standstill = Arc::new(Standstill::new().unwrap());
        standstill.set(Phase::Run);
        self.begin(disk, &Arc::default(), &standstill).map(|served| self.finish(served))
    }

    /// Serves them one after the other.
    fn run_in_order(&self, mut disk: Disk) {
        let mut queue = Self::queue();
        while let Some(chain) = queue.iter(Arc::clone(&self.ram)).unwrap().next() {
            disk.serve(0, chain).unwrap();
        }
    }

    fn result(&self, index: u64) -> (u8, Vec<u8>) {
        let base = DATA + index * STRIDE;
        let mut data = vec![0; 4096];
        self.ram.read_slice(&mut data, GuestAddress(base + 0x100)).unwrap();
        (self.ram.read_obj(GuestAddress(base + 0x80)).unwrap(), data)
    }
}

fn content(file: &File) -> Vec<u8> {
    let mut content = vec![0; DISK as usize];
    file.read_exact_at(&mut content, 0).unwrap();
    content
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    /// Whatever is asked for, answers and image are those of requests that are done one by one. The
    /// writes do not touch what others touch, since order is the driver's business.
    #[test]
    fn it_answers_as_if_one_by_one(
        requests in proptest::collection::vec(
            (prop_oneof![4 => Just(0u32), 4 => Just(1), 1 => Just(4), 1 => 0u32..16, 1 => any::<u32>()],
             prop_oneof![8 => Just(None), 1 => any::<u64>().prop_map(Some)],
             prop_oneof![6 => (1u32..9).prop_map(|sectors| sectors * 512), 1 => 0u32..4096],
             any::<bool>()),
            1..50),
        read_only in any::<bool>(),
    ) {
        let requests: Vec<Request> = (0u64..)
            .zip(requests)
            .map(|(index, (kind, sector, len, write))| {
                let write = match kind { 0 => true, 1 => false, _ => write };
                (kind, sector.unwrap_or(index * 8), len, write)
            })
            .collect();
        let (one, other) = (image(), image());
        let (by_ring, in_order) = (Bed::new(&requests), Bed::new(&requests));
        if by_ring.run(disk(&one, read_only)).is_some() {
            in_order.run_in_order(disk(&other, read_only));
            for index in 0..requests.len() as u64 {
                prop_assert_eq!(by_ring.result(index), in_order.result(index), "{:?}", requests[index as usize]);
            }
            prop_assert!(content(&one) == content(&other));
        }
    }
}

#[test]
fn an_image_that_shrinks_is_an_error_for_those_who_read_there() {
    let file = image();
    file.set_len(DISK / 2).unwrap();
    let bed =
        Bed::new(&[(0, 0, 4096, true), (0, DISK / 512 - 8, 4096, true), (0, DISK / 1024 - 4, 4096, true)]);
    if bed.run(disk(&file, false)).is_some() {
        assert_eq!([0, 1, 2].map(|index| bed.result(index).0), [S_OK, 1, 1]);
    }
}

#[test]
fn a_request_without_a_header_stops_the_device_when_the_others_are_done() {
    let bed = Bed::new(&[(0, 0, 4096, true), (0, 8, 4096, true)]);
    bed.ram.write_obj(15u32, GuestAddress(DESCRIPTORS + 3 * 16 + 8)).unwrap();
    if let Some(fine) = bed.run(disk(&image(), false)) {
        assert!(!fine);
        assert_eq!(bed.result(0).0, S_OK);
    }
}

#[test]
fn in_a_pause_nothing_is_under_way_and_what_a_limit_holds_up_is_in_the_queue() {
    let requests: Vec<Request> = (0..60).map(|index| (0, index * 8, 4096, true)).collect();
    let limits = Limits { operations: Rate { per_second: 500, burst: 10, once: 0 }, ..Limits::default() };
    for _ in 0..8 {
        let (bed, file, track) = (Bed::new(&requests), image(), Arc::new(Track::default()));
        // Each pause is followed by another device that goes on.
        let mut pauses = 0;
        while bed.used() != bed.count {
            let standstill = Arc::new(Standstill::new().unwrap());
            standstill.set(Phase::Run);
            let disk = Disk::new(Some(&medium(&file, false)), Limiter::new(limits), Arc::default());
            let (before, until) = (bed.used(), Instant::now() + Duration::from_secs(20));
            let Some((running, signals)) = bed.begin(disk, &track, &standstill) else { return };
            while bed.used() == before {
                assert!(Instant::now() < until, "{before} of {}", bed.count);
                thread::yield_now();
            }
            standstill.set(Phase::Pause);
            standstill.epoch().wait_parked(Duration::from_secs(20)).unwrap();
            let position = track.get();
            assert_eq!((position.taken, position.given), (bed.used(), bed.used()));
            assert_eq!(position.signalled, position.given);
            assert!(!signals.is_reset_needed());
            drop(running);
            pauses += 1;
        }
        assert!(pauses > 1, "the limit held nothing up");
        let content = content(&file);
        for index in 0..60 {
            let at = index as usize * 4096;
            assert!(bed.result(index) == (S_OK, content[at..at + 4096].to_vec()), "{index}");
        }
    }
}
