use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::super::queue::Track;
use super::packet::STREAM;
use super::*;
use crate::event::Event;
use crate::hypervisor::testing::Wire;
use crate::memory::{self, GuestRam};
use crate::registers::Page;
use crate::standstill::Standstill;
use crate::vcpu::Phase;

const CID: u64 = 7;
const SIZE: u16 = 16;
/// Each queue has its rings and its buffers in a part of RAM of its own.
const QUEUE: u64 = 0x10_0000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const DATA: u64 = 0x1_0000;
const BUFFER: u64 = 0x1000;
const LONG: Duration = Duration::from_secs(20);
/// Something that must not happen has had its chance.
const WHILE: Duration = Duration::from_millis(50);

/// A guest with a driver made by hand, which rings only when it is asked to.
struct Guest {
    ram: Arc<GuestRam>,
    tracks: [Arc<Track>; 3],
}

/// The device that it is on.
struct Machine {
    device: Vsock,
    directory: PathBuf,
    bells: [Arc<Event>; 3],
    signals: Arc<Signals>,
    standstill: Arc<Standstill>,
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.device.reset();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

impl Machine {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name =
            format!("vmm-vsock-device-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let directory = std::env::temp_dir().join(name);
        fs::create_dir(&directory).unwrap();
        let standstill = Arc::new(Standstill::new().unwrap());
        Self {
            device: Vsock::new(CID, &directory).unwrap(),
            directory,
            bells: std::array::from_fn(|_| Arc::new(Event::new().unwrap())),
            signals: Arc::new(Signals::new(Arc::new(Wire::default()), Page::alone())),
            standstill,
        }
    }

    fn start(&mut self, guest: &Guest, ready: &[usize]) {
        let queue = |index: usize| {
            let mut queue = Queue::new(SIZE).unwrap();
            let base = index as u64 * QUEUE;
            queue.set_desc_table_address(Some(base as u32), None);
            queue.set_avail_ring_address(Some((base + AVAILABLE) as u32), None);
            queue.set_used_ring_address(Some((base + USED) as u32), None);
            queue.set_event_idx(true);
            queue.set_ready(ready.contains(&index));
            VirtQueue::new(queue, guest.ram.clone(), self.bells[index].clone(), Arc::default())
                .on(guest.tracks[index].clone())
        };
        let activation = Activation {
            ram: guest.ram.clone(),
            queues: (0..3).map(queue).collect(),
            signals: self.signals.clone(),
            standstill: self.standstill.clone(),
            features: 0,
        };
        self.device.activate(activation).unwrap();
    }

    fn run(&self) {
        self.standstill.set(Phase::Run);
    }

    fn pause(&self) {
        self.standstill.set(Phase::Pause);
        self.standstill.epoch().wait_parked(LONG).unwrap();
    }

    /// The guest goes on on another.
    fn moved(&mut self, guest: &Guest) -> Self {
        self.pause();
        let state = self.device.save().unwrap();
        self.device.reset();
        let mut other = Self::new();
        other.device.restore(&state).unwrap();
        other.start(guest, &[RX, TX, EVENT]);
        other.run();
        other
    }

    fn connect(&self, port: u32) -> UnixStream {
        let mut stream = UnixStream::connect(self.directory.join(SOCKET)).unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        stream
    }
}

impl Guest {
    fn new() -> Self {
        let ram = Arc::new(memory::anonymous(&[(0, 3 * QUEUE)]).unwrap());
        Self { ram, tracks: std::array::from_fn(|_| Arc::default()) }
    }

    fn offered(&self, queue: usize) -> u16 {
        self.ram.load(GuestAddress(queue as u64 * QUEUE + AVAILABLE + 2), Ordering::Acquire).unwrap()
    }

    fn used(&self, queue: usize) -> u16 {
        self.ram.load(GuestAddress(queue as u64 * QUEUE + USED + 2), Ordering::Acquire).unwrap()
    }

    /// Offers the next buffer of a queue, and rings if the device has asked for that.
    fn offer(&self, machine: &Machine, queue: usize, bytes: &[u8], len: u32) {
        let (base, index) = (queue as u64 * QUEUE, self.offered(queue));
        let slot = u64::from(index % SIZE);
        let (at, buffer) = (base + slot * 16, base + DATA + slot * BUFFER);
        self.ram.write_slice(bytes, GuestAddress(buffer)).unwrap();
        self.ram.write_obj(buffer, GuestAddress(at)).unwrap();
        self.ram.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.ram.write_obj(if queue == TX { 0u16 } else { 2 }, GuestAddress(at + 12)).unwrap();
        self.ram.write_obj(slot as u16, GuestAddress(base + AVAILABLE + 4 + slot * 2)).unwrap();
        self.ram.store(index.wrapping_add(1), GuestAddress(base + AVAILABLE + 2), Ordering::SeqCst).unwrap();
        std::sync::atomic::fence(Ordering::SeqCst);
        let asked = base + USED + 4 + u64::from(SIZE) * 8;
        let asked: u16 = self.ram.load(GuestAddress(asked), Ordering::Relaxed).unwrap();
        if asked == index {
            machine.bells[queue].set();
        }
    }

    fn fill(&self, machine: &Machine) {
        for _ in 0..8 {
            self.offer(machine, RX, &[], BUFFER as u32);
            self.offer(machine, EVENT, &[], 8);
        }
    }

    fn send(&self, machine: &Machine, op: u16, host: u32, guest: u32) {
        let header = Header {
            src_cid: CID,
            dst_cid: 2,
            src_port: guest,
            dst_port: host,
            kind: STREAM,
            op,
            buf_alloc: 1000,
            ..Header::default()
        };
        self.offer(machine, TX, &header.to_bytes(), HEADER as u32);
    }

    /// The packet for the guest of that number.
    fn packet(&self, index: u16) -> Header {
        self.wait(|guest| guest.used(RX) != index);
        let slot = u64::from(index % SIZE);
        let mut bytes = [0; HEADER];
        self.ram.read_slice(&mut bytes, GuestAddress(RX as u64 * QUEUE + DATA + slot * BUFFER)).unwrap();
        Header::from_bytes(&bytes)
    }

    fn wait(&self, what: impl Fn(&Self) -> bool) {
        let until = Instant::now() + LONG;
        while !what(self) {
            assert!(Instant::now() < until);
            thread::yield_now();
        }
    }

    /// The number of events, of which the last one is a reset of the transport.
    fn is_reset(&self, events: u16) {
        self.wait(|guest| guest.used(EVENT) == events);
        let slot = u64::from((events - 1) % SIZE);
        let base = EVENT as u64 * QUEUE;
        let used: [u32; 2] = [
            self.ram.read_obj(GuestAddress(base + USED + 4 + slot * 8)).unwrap(),
            self.ram.read_obj(GuestAddress(base + USED + 8 + slot * 8)).unwrap(),
        ];
        assert_eq!(used, [slot as u32, 4]);
        assert_eq!(self.ram.read_obj::<u32>(GuestAddress(base + DATA + slot * BUFFER)).unwrap(), 0);
    }
}

#[test]
fn a_guest_that_goes_on_elsewhere_hears_that_its_streams_are_gone_before_anything_else() {
    let (guest, mut first) = (Guest::new(), Machine::new());
    guest.fill(&first);
    first.start(&guest, &[RX, TX, EVENT]);
    first.run();
    let host = first.connect(77);
    let before = guest.packet(0);
    assert_eq!((before.op, before.dst_port), (op::REQUEST, 77));
    guest.send(&first, op::RESPONSE, before.src_port, 77);
    guest.wait(|guest| guest.used(TX) == 1);
    assert_eq!(guest.used(EVENT), 0);
    first.pause();
    // Sent in the last moment, on streams that will be gone, and for a new one.
    guest.send(&first, op::RW, before.src_port, 77);
    guest.send(&first, op::REQUEST, 5000, 1234);
    let second = first.moved(&guest);
    let _listener = UnixListener::bind(second.directory.join("vsock_5000")).unwrap();
    guest.is_reset(1);
    let waiting = second.connect(78);
    thread::sleep(WHILE);
    assert_eq!((guest.used(RX), guest.used(TX), guest.used(EVENT)), (1, 1, 1), "it has not heard yet");
    // It gives the buffer back when it has.
    guest.offer(&second, EVENT, &[], 8);
    guest.wait(|guest| guest.used(TX) == 3);
    let mut packets = [guest.packet(1), guest.packet(2)];
    packets.sort_by_key(|packet| packet.dst_port);
    assert_eq!((packets[0].op, packets[0].dst_port), (op::REQUEST, 78));
    assert_eq!((packets[1].op, packets[1].dst_port), (op::RESPONSE, 1234));
    assert_ne!(packets[0].src_port, before.src_port, "a stream that it had");
    // From here on it is as ever, and nothing more is said.
    guest.send(&second, op::RW, before.src_port, 77);
    let refused = guest.packet(3);
    assert_eq!((refused.op, refused.src_port, refused.dst_port), (op::RST, before.src_port, 77));
    thread::sleep(WHILE);
    assert_eq!((guest.used(RX), guest.used(EVENT)), (4, 1));
    drop((host, waiting));
}

#[test]
fn each_move_is_told_once_also_if_the_guest_has_not_heard_of_the_last_one() {
    let (guest, mut machine) = (Guest::new(), Machine::new());
    guest.fill(&machine);
    machine.start(&guest, &[RX, TX, EVENT]);
    machine.run();
    for events in 1..20 {
        machine = machine.moved(&guest);
        guest.is_reset(events);
        if events % 3 != 0 {
            guest.offer(&machine, EVENT, &[], 8);
        }
        if events % 2 != 0 {
            // A pause is no move.
            machine.pause();
            machine.run();
        }
    }
    guest.offer(&machine, EVENT, &[], 8);
    let _host = machine.connect(80);
    assert_eq!(guest.packet(0).dst_port, 80);
    assert_eq!(guest.used(EVENT), 19);
}

#[test]
fn who_had_no_streams_hears_nothing_and_who_has_no_buffer_hears_later() {
    // Nobody was at work.
    let (guest, mut first) = (Guest::new(), Machine::new());
    guest.fill(&first);
    let mut second = first.moved(&guest);
    let _host = second.connect(79);
    assert_eq!(guest.packet(0).dst_port, 79);
    assert_eq!(guest.used(EVENT), 0);
    // A driver that starts over had none either.
    second.pause();
    let state = second.device.save().unwrap();
    second.device.reset();
    let mut third = Machine::new();
    third.device.restore(&state).unwrap();
    third.device.reset();
    third.start(&guest, &[RX, TX, EVENT]);
    third.run();
    let _host = third.connect(80);
    assert_eq!(guest.packet(1).dst_port, 80);
    assert_eq!(guest.used(EVENT), 0);
    for (ready, told) in [(&[RX, TX, EVENT][..], 1), (&[RX, TX], 0)] {
        let (guest, mut machine) = (Guest::new(), Machine::new());
        guest.offer(&machine, RX, &[], BUFFER as u32);
        machine.device.restore(&encode(&State { active: true }).unwrap()).unwrap();
        machine.start(&guest, ready);
        machine.run();
        let _host = machine.connect(81);
        if told > 0 {
            thread::sleep(WHILE);
            assert_eq!(guest.used(RX), 0);
            guest.offer(&machine, EVENT, &[], 8);
            guest.is_reset(1);
            guest.offer(&machine, EVENT, &[], 8);
        }
        assert_eq!((guest.packet(0).dst_port, guest.used(EVENT)), (81, told));
    }
}

#[test]
fn a_buffer_without_room_for_an_event_breaks_the_device() {
    let (guest, mut machine) = (Guest::new(), Machine::new());
    guest.offer(&machine, EVENT, &[], 3);
    machine.device.restore(&encode(&State { active: true }).unwrap()).unwrap();
    machine.start(&guest, &[RX, TX, EVENT]);
    machine.run();
    guest.wait(|_| machine.signals.is_reset_needed());
    for bytes in [&[][..], &[2], &[1, 1]] {
        Machine::new().device.restore(bytes).unwrap_err();
    }
}
