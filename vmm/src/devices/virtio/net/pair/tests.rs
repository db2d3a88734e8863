use std::os::unix::net::UnixDatagram;
use std::sync::atomic::Ordering;
use std::time::Instant;

use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::super::super::limit::{Limits, Rate};
use super::super::super::queue::Track;
use super::super::tap::Tap;
use super::*;
use crate::event::Event;
use crate::hypervisor::testing::Wire;
use crate::memory;
use crate::registers::Page;
use crate::standstill::Standstill;
use crate::vcpu::Phase;

const SIZE: u16 = 16;
/// Each queue has its rings and its buffers in a part of RAM of its own.
const QUEUE: u64 = 0x10_0000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const DATA: u64 = 0x1_0000;
const RX: u64 = 0;
const TX: u64 = 1;

/// A pair whose tap is a socket, with a driver made by hand.
struct Bed {
    ram: Arc<GuestRam>,
    host: UnixDatagram,
    shared: Arc<Shared>,
    signals: Arc<Signals>,
    bells: [Arc<Event>; 2],
    tracks: [Arc<Track>; 2],
    standstill: Arc<Standstill>,
    shape: Shape,
    running: Option<Running>,
}

#[derive(Clone, Copy)]
struct Shape {
    mergeable: bool,
    on: bool,
    tx: Limits,
}

const PLAIN: Shape = Shape {
    mergeable: false,
    on: true,
    tx: Limits {
        bytes: Rate { per_second: 0, burst: 0, once: 0 },
        operations: Rate { per_second: 0, burst: 0, once: 0 },
    },
};

impl Bed {
    fn new(shape: &Shape) -> Self {
        let ram = Arc::new(memory::anonymous(&[(0, 2 * QUEUE)]).unwrap());
        let (host, tap) = UnixDatagram::pair().unwrap();
        tap.set_nonblocking(true).unwrap();
        host.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let port = Arc::new(Port::new(false).unwrap());
        port.plug(Some(Arc::new(Cable::Tap(Tap::like(tap))))).unwrap();
        port.switch(shape.on).unwrap();
        let shared = Arc::new(Shared::new([2; 6], vec![Arc::clone(&port)]));
        shared.set_link(true);
        let signals = Arc::new(Signals::new(Arc::new(Wire::default()), Page::alone()));
        let bells = [Arc::new(Event::new().unwrap()), Arc::new(Event::new().unwrap())];
        let standstill = Arc::new(Standstill::new().unwrap());
        standstill.set(Phase::Run);
        let tracks = [Arc::default(), Arc::default()];
        let mut bed =
            Self { ram, host, shared, signals, bells, tracks, standstill, shape: *shape, running: None };
        bed.start();
        bed
    }

    /// A pair that goes on where the last one was.
    fn start(&mut self) {
        let queue = |index: u64| {
            let mut queue = Queue::new(SIZE).unwrap();
            let base = index * QUEUE;
            queue.set_desc_table_address(Some(base as u32), None);
            queue.set_avail_ring_address(Some((base + AVAILABLE) as u32), None);
            queue.set_used_ring_address(Some((base + USED) as u32), None);
            queue.set_ready(true);
            let (bell, track) = (&self.bells[index as usize], &self.tracks[index as usize]);
            VirtQueue::new(queue, Arc::clone(&self.ram), Arc::clone(bell), Arc::default()).on(track.clone())
        };
        let pair = Pair {
            port: Arc::clone(&self.shared.ports[0]),
            ram: Arc::clone(&self.ram),
            shared: Arc::clone(&self.shared),
            signals: Arc::clone(&self.signals),
            rx_limit: Limiter::default(),
            tx_limit: Limiter::new(self.shape.tx),
            features: if self.shape.mergeable { F_MRG_RXBUF } else { 0 },
            packet_max: 4000,
            name: "net".into(),
        };
        self.running = Some(pair.spawn(queue(RX), queue(TX), &self.standstill).unwrap());
    }

    /// Has the guest go on on another device, with the same tap.
    fn move_on(&mut self) {
        self.standstill.set(Phase::Pause);
        self.standstill.epoch().wait_parked(Duration::from_secs(20)).unwrap();
        for (queue, track) in [RX, TX].into_iter().zip(&self.tracks) {
            let position = track.get();
            assert_eq!((position.taken, position.signalled), (self.used(queue), self.used(queue)));
        }
        self.running = None;
        self.standstill = Arc::new(Standstill::new().unwrap());
        self.start();
        self.standstill.set(Phase::Run);
    }

    /// Offers request number `index` of a queue, of these (address, length) parts.
    fn offer(&self, queue: u64, index: u16, parts: &[(u64, u32)], writable: bool) {
        let base = queue * QUEUE;
        // Each request has room for four descriptors.
        let first = u64::from(index % (SIZE / 4)) * 4;
        for (part, (address, len)) in (0u64..).zip(parts) {
            let at = base + (first + part) * 16;
            let last = part + 1 == parts.len() as u64;
            self.ram.write_obj(*address, GuestAddress(at)).unwrap();
            self.ram.write_obj(*len, GuestAddress(at + 8)).unwrap();
            self.ram.write_obj(u16::from(writable) << 1 | u16::from(!last), GuestAddress(at + 12)).unwrap();
            self.ram.write_obj((first + part + 1) as u16, GuestAddress(at + 14)).unwrap();
        }
        let entry = base + AVAILABLE + 4 + u64::from(index % SIZE) * 2;
        self.ram.write_obj(first as u16, GuestAddress(entry)).unwrap();
        self.ram.store(index.wrapping_add(1), GuestAddress(base + AVAILABLE + 2), Ordering::Release).unwrap();
        self.bells[queue as usize].set();
    }

    fn used(&self, queue: u64) -> u16 {
        self.ram.load(GuestAddress(queue * QUEUE + USED + 2), Ordering::Acquire).unwrap()
    }

    fn used_len(&self, queue: u64, index: u16) -> u32 {
        let at = queue * QUEUE + USED + 8 + u64::from(index % SIZE) * 8;
        self.ram.read_obj(GuestAddress(at)).unwrap()
    }

    fn wait(&self, what: impl Fn(&Self) -> bool) {
        let until = Instant::now() + Duration::from_secs(20);
        while !what(self) {
            assert!(Instant::now() < until, "in vain");
            thread::yield_now();
        }
    }

    fn data(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.ram.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }
}

#[test]
fn packets_from_the_guest_reach_the_tap_whole_however_they_are_cut() {
    let bed = Bed::new(&PLAIN);
    let at = TX * QUEUE + DATA;
    let packet: Vec<u8> = (0..200).collect();
    bed.ram.write_slice(&packet, GuestAddress(at)).unwrap();
    for (index, parts) in [
        (0, vec![(at, 200)]),
        (1, vec![(at, 12), (at + 12, 188)]),
        (2, vec![(at, 5), (at + 5, 0), (at + 5, 100), (at + 105, 95)]),
    ] {
        bed.offer(TX, index, &parts, false);
        let mut buffer = [0; 300];
        let len = bed.host.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..len], packet);
        bed.wait(|bed| bed.used(TX) == index + 1);
    }
    let counts = bed.shared.counters.get();
    assert_eq!((counts.tx.packets, counts.tx.bytes, counts.tx.dropped), (3, 3 * 188, 0));
}

#[test]
fn what_is_larger_than_a_packet_is_dropped_and_so_is_all_while_the_link_is_down() {
    let bed = Bed::new(&PLAIN);
    let at = TX * QUEUE + DATA;
    bed.offer(TX, 0, &[(at, 0x1_0000), (at, 0x1_0000)], false);
    bed.wait(|bed| bed.used(TX) == 1);
    bed.shared.set_link(false);
    bed.offer(TX, 1, &[(at, 100)], false);
    bed.wait(|bed| bed.used(TX) == 2);
    bed.offer(RX, 0, &[(DATA, 2000)], true);
    bed.host.send(&[7; 100]).unwrap();
    bed.wait(|bed| bed.shared.counters.get().rx.dropped == 1);
    bed.shared.set_link(true);
    bed.host.send(&[7; 101]).unwrap();
    bed.wait(|bed| bed.used(RX) == 1);
    assert_eq!(bed.used_len(RX, 0), 101);
    assert_eq!(bed.shared.counters.get().tx.dropped, 2);
}

#[test]
fn what_breaks_the_queue_stops_the_device_and_says_so() {
    let tx = TX * QUEUE + DATA;
    for (queue, parts) in [
        (TX, vec![(tx, 11)]),
        (TX, vec![(u64::MAX - 10, 100)]),
        (TX, vec![(2 * QUEUE - 50, 100)]),
        (TX, vec![(tx, u32::MAX)]),
        (RX, vec![(DATA, 11)]),
        (RX, vec![(4 * QUEUE, 4096)]),
    ] {
        let mut bed = Bed::new(&PLAIN);
        bed.offer(queue, 0, &parts, queue == RX);
        bed.wait(|bed| bed.signals.is_reset_needed());
        bed.running = None;
    }
}

#[test]
fn a_large_packet_fills_several_buffers_and_they_appear_together() {
    let bed = Bed::new(&Shape { mergeable: true, ..PLAIN });
    for index in 0..4 {
        let at = DATA + u64::from(index) * 0x1000;
        // The header is cut in two, in the first part of four.
        bed.offer(RX, index, &[(at, 11), (at + 11, 989)], true);
    }
    bed.host.send(&[0xff; 2500]).unwrap();
    bed.wait(|bed| bed.used(RX) != 0);
    assert_eq!(bed.used(RX), 3, "together");
    assert_eq!([0, 1, 2].map(|index| bed.used_len(RX, index)), [1000, 1000, 500]);
    let first = bed.data(DATA, 1000);
    assert_eq!(
        (&first[..10], &first[10..12], &first[12..]),
        (&[0xff; 10][..], &[3, 0][..], &[0xff; 988][..])
    );
    assert_eq!(bed.data(DATA + 0x1000, 1000), [0xff; 1000]);
    // One is left, and a small packet takes it as soon as the driver has brought more.
    bed.host.send(&[1; 60]).unwrap();
    for index in 4..8 {
        let at = DATA + u64::from(index) * 0x1000;
        bed.offer(RX, index, &[(at, 1000)], true);
        thread::sleep(Duration::from_millis(2));
    }
    bed.wait(|bed| bed.used(RX) == 4);
    assert_eq!(bed.data(DATA + 0x3000, 60)[9..13], [1, 1, 0, 1]);
}

#[test]
fn a_pair_that_is_off_gets_nothing_until_it_is_on() {
    let bed = Bed::new(&Shape { on: false, ..PLAIN });
    bed.offer(RX, 0, &[(DATA, 2000)], true);
    bed.host.send(&[7; 100]).unwrap();
    thread::sleep(Duration::from_millis(20));
    assert_eq!(bed.used(RX), 0);
    bed.shared.ports[0].switch(true).unwrap();
    bed.wait(|bed| bed.used(RX) == 1);
}

#[test]
fn another_tap_can_take_the_place_of_the_first() {
    let bed = Bed::new(&PLAIN);
    let (host, tap) = UnixDatagram::pair().unwrap();
    tap.set_nonblocking(true).unwrap();
    bed.shared.ports[0].plug(Some(Arc::new(Cable::Tap(Tap::like(tap))))).unwrap();
    host.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    bed.offer(RX, 0, &[(DATA, 2000)], true);
    host.send(&[7; 100]).unwrap();
    bed.wait(|bed| bed.used(RX) == 1);
    bed.offer(TX, 0, &[(TX * QUEUE + DATA, 50)], false);
    assert_eq!(host.recv(&mut [0; 100]).unwrap(), 50);
}

#[test]
fn a_rate_limit_leaves_packets_in_the_ring() {
    let operations = Rate { per_second: 50, burst: 1, once: 0 };
    let bed = Bed::new(&Shape { tx: Limits { operations, ..Limits::default() }, ..PLAIN });
    let start = Instant::now();
    let at = TX * QUEUE + DATA;
    for index in 0..4 {
        bed.offer(TX, index, &[(at, 100)], false);
    }
    bed.wait(|bed| bed.used(TX) == 4);
    assert!(start.elapsed() >= Duration::from_millis(55), "{:?}", start.elapsed());
    assert!(bed.shared.counters.get().tx.throttled > 0);
}

#[test]
fn each_packet_passes_once_and_in_order_however_often_the_guest_moves() {
    let operations = Rate { per_second: 2000, burst: 3, once: 0 };
    for mergeable in [false, true] {
        let tx = Limits { operations, ..Limits::default() };
        let mut bed = Bed::new(&Shape { mergeable, tx, ..PLAIN });
        let out = TX * QUEUE + DATA;
        let (mut sent, mut offered, mut received) = (0u16, 0u16, 0u16);
        for round in 0..40u16 {
            for _ in 0..2 {
                // The first is a packet of the guest's, the number of which is behind the header.
                bed.ram.write_obj(sent, GuestAddress(out + u64::from(sent % SIZE) * 16 + 12)).unwrap();
                bed.offer(TX, sent, &[(out + u64::from(sent % SIZE) * 16, 14)], false);
                sent += 1;
                bed.host.send(&[&[0; 12][..], &(sent - 1).to_le_bytes()].concat()).unwrap();
            }
            while offered < received + 4 {
                bed.offer(RX, offered, &[(DATA + u64::from(offered % SIZE) * 0x1000, 0x1000)], true);
                offered += 1;
            }
            if round % 3 == 0 {
                bed.move_on();
            }
            let mut packet = [0; 64];
            for number in [sent - 2, sent - 1] {
                assert_eq!(bed.host.recv(&mut packet).unwrap(), 14);
                assert_eq!(packet[12..14], number.to_le_bytes());
            }
            bed.wait(|bed| bed.used(TX) == sent && bed.used(RX) == received + 2);
            for _ in 0..2 {
                let at = DATA + u64::from(received % SIZE) * 0x1000 + 12;
                assert_eq!(bed.data(at, 2), received.to_le_bytes());
                received += 1;
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever is in the descriptors, the thread goes on or says that it cannot, and can be stopped.
    #[test]
    fn no_descriptor_upsets_it(
        bytes in proptest::collection::vec(any::<u8>(), 256),
        heads in proptest::collection::vec(any::<u16>(), 8),
        near in any::<bool>(),
        mergeable in any::<bool>(),
    ) {
        let mut bed = Bed::new(&Shape { mergeable, ..PLAIN });
        for queue in [RX, TX] {
            let base = queue * QUEUE;
            let mut bytes = bytes.clone();
            if near {
                // Addresses and lengths that could be right.
                for descriptor in bytes.chunks_mut(16) {
                    descriptor[3..8].fill(0);
                    descriptor[10..12].fill(0);
                    let (flags, next) = (descriptor[12] & 7, descriptor[14] & 15);
                    descriptor[12..].copy_from_slice(&[flags, 0, next, 0]);
                }
            }
            bed.ram.write_slice(&bytes, GuestAddress(base)).unwrap();
            for (index, head) in (0u64..).zip(&heads) {
                let head = if near { head % SIZE } else { *head };
                bed.ram.write_obj(head, GuestAddress(base + AVAILABLE + 4 + index * 2)).unwrap();
            }
            bed.ram.write_obj(heads.len() as u16, GuestAddress(base + AVAILABLE + 2)).unwrap();
            bed.bells[queue as usize].set();
        }
        let _ = bed.host.send(&[7; 300]);
        thread::sleep(Duration::from_millis(1));
        bed.running = None;
    }
}

mod socket;
