use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::queue::Chain;
use super::super::rng::Rng;
use super::super::{ActivateError, AtOnce, Broken, Serve};
use super::*;
use crate::hypervisor::testing::Wire;
use crate::memory;
use crate::registers::Page;
use crate::vcpu::Phase;

pub(super) struct Guest {
    pub(super) transport: Transport,
    pub(super) ram: Arc<GuestRam>,
    pub(super) wire: Arc<Wire>,
    pub(super) standstill: Arc<Standstill>,
}

pub(super) const DESCRIPTORS: u64 = 0x1000;
pub(super) const AVAILABLE: u64 = 0x2000;
pub(super) const USED: u64 = 0x3000;
pub(super) const BUFFER: u64 = 0x4000;

impl Guest {
    pub(super) fn new() -> Self {
        let guest = Self::over(Arc::new(memory::anonymous(&[(0, 0x1_0000)]).unwrap()));
        guest.standstill.set(Phase::Run);
        guest
    }

    /// One that stands still, over RAM that is there already.
    pub(super) fn over(ram: Arc<GuestRam>) -> Self {
        Self::made(Box::new(Rng::default()), ram)
    }

    fn of(device: Box<dyn Device>) -> Self {
        Self::made(device, Arc::new(memory::anonymous(&[(0, 0x1_0000)]).unwrap()))
    }

    fn made(device: Box<dyn Device>, ram: Arc<GuestRam>) -> Self {
        let wire = Arc::new(Wire::default());
        let signals = Signals::new(wire.clone(), Page::alone());
        let standstill = Arc::new(Standstill::new().unwrap());
        let transport = Transport::new(device, Arc::clone(&ram), signals, Arc::clone(&standstill)).unwrap();
        Self { transport, ram, wire, standstill }
    }

    pub(super) fn get(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub(super) fn set(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    pub(super) fn negotiate(&self, features: u64) {
        self.set(STATUS, S_ACKNOWLEDGE);
        self.set(STATUS, S_ACKNOWLEDGE | S_DRIVER);
        for select in [0, 1] {
            self.set(DRIVER_FEATURES_SEL, select);
            self.set(DRIVER_FEATURES, half(features, select));
        }
        self.set(STATUS, S_ACKNOWLEDGE | S_DRIVER | S_FEATURES_OK);
    }

    pub(super) fn start(&self, used: u64) {
        self.start_with(F_VERSION_1, used);
    }

    pub(super) fn start_with(&self, features: u64, used: u64) {
        self.negotiate(features);
        self.set(QUEUE_SEL, 0);
        self.set(QUEUE_NUM, 16);
        for (offset, value) in
            [(QUEUE_DESC_LOW, DESCRIPTORS), (QUEUE_DRIVER_LOW, AVAILABLE), (QUEUE_DEVICE_LOW, used)]
        {
            self.set(offset, value as u32);
        }
        self.set(QUEUE_READY, 1);
        self.set(STATUS, 0xf);
    }

    /// Puts a writable buffer into the ring as request number `index` (from 0).
    pub(super) fn offer(&self, index: u16, address: u64, len: u32) {
        let slot = u64::from(index % 16);
        let descriptor = DESCRIPTORS + slot * 16;
        self.ram.write_obj(address, GuestAddress(descriptor)).unwrap();
        self.ram.write_obj(len, GuestAddress(descriptor + 8)).unwrap();
        self.ram.write_obj(2u16, GuestAddress(descriptor + 12)).unwrap();
        self.ram.write_obj(slot as u16, GuestAddress(AVAILABLE + 4 + slot * 2)).unwrap();
        self.ram.write_obj(index + 1, GuestAddress(AVAILABLE + 2)).unwrap();
        self.set(QUEUE_NOTIFY, 0);
    }

    pub(super) fn wait(&self, what: impl Fn(&Self) -> bool) {
        let until = Instant::now() + Duration::from_secs(20);
        while !what(self) {
            assert!(Instant::now() < until, "{:?}", self.transport);
            std::thread::yield_now();
        }
    }

    pub(super) fn used(&self) -> u16 {
        self.ram.read_obj(GuestAddress(USED + 2)).unwrap()
    }
}

#[test]
fn identification() {
    let guest = Guest::new();
    for (offset, value) in [
        (MAGIC_VALUE, 0x7472_6976),
        (VERSION, 2),
        (DEVICE_ID, 4),
        (QUEUE_NUM_MAX, 64),
        (QUEUE_READY, 0),
        (INTERRUPT_STATUS, 0),
        (STATUS, 0),
        (SHM_LEN_LOW, u32::MAX),
        (SHM_BASE_HIGH, u32::MAX),
        (CONFIG, 0),
        (0x0f0, 0),
    ] {
        assert_eq!(guest.get(offset), value, "{offset:#x}");
    }
    guest.set(DEVICE_FEATURES_SEL, 1);
    assert_eq!(guest.get(DEVICE_FEATURES), 1);
    guest.set(DEVICE_FEATURES_SEL, 2);
    assert_eq!(guest.get(DEVICE_FEATURES), 0);
    guest.set(QUEUE_SEL, 1);
    assert_eq!(guest.get(QUEUE_NUM_MAX), 0);
    let mut odd = [7; 2];
    guest.transport.read(1, &mut odd);
    assert_eq!(odd, *b"ir", "a part of a register is read as that of memory");
}

#[test]
fn features_are_agreed_upon_or_not() {
    for (features, agreed) in [
        (F_VERSION_1, true),
        (F_COMMON, true),
        (F_EVENT_IDX, false),
        (0, false),
        (F_VERSION_1 | 1 << 40, false),
    ] {
        let guest = Guest::new();
        guest.negotiate(features);
        assert_eq!(guest.get(STATUS) & S_FEATURES_OK != 0, agreed, "{features:#x}");
        guest.set(STATUS, 0xf);
        assert_eq!(guest.get(STATUS) & S_DRIVER_OK != 0, agreed);
    }
}

#[test]
fn requests_are_served_and_a_reset_starts_over() {
    let guest = Guest::new();
    for _ in 0..2 {
        guest.start(USED);
        guest.wire.0.store(0, Ordering::SeqCst);
        for index in 0..40 {
            guest.ram.write_obj(0u64, GuestAddress(BUFFER)).unwrap();
            guest.offer(index, BUFFER, 8);
            guest.wait(|guest| guest.used() == index + 1);
            assert_ne!(guest.ram.read_obj::<u64>(GuestAddress(BUFFER)).unwrap(), 0);
            // A request that is offered before the last one's interrupt may share it.
            guest.wait(|guest| guest.wire.0.load(Ordering::SeqCst) == u32::from(index) + 1);
        }
        assert_eq!(guest.get(INTERRUPT_STATUS), 1);
        guest.set(INTERRUPT_ACK, 1);
        assert_eq!(guest.get(INTERRUPT_STATUS), 0);
        guest.set(STATUS, 0);
        assert_eq!((guest.get(STATUS), guest.get(QUEUE_READY)), (0, 0));
        for address in [AVAILABLE, USED] {
            guest.ram.write_obj(0u32, GuestAddress(address)).unwrap();
        }
    }
}

/// A device with two queues, of which the second is served at once: by writing its number down, and a byte into requests.
struct Prompt {
    rung: Arc<Mutex<Vec<usize>>>,
    queue: Option<AtOnce<Byte>>,
}

struct Byte;

impl Serve for Byte {
    fn serve(&mut self, _index: usize, chain: Chain) -> Result<u32, Broken> {
        let ram = chain.memory().clone();
        chain.writer(&ram)?.write_obj(7u8).map_err(|error| Broken(error.to_string()))?;
        Ok(1)
    }
}

impl Device for Prompt {
    fn kind(&self) -> u32 {
        99
    }

    fn queues(&self) -> &[u16] {
        &[16, 16]
    }

    fn served_at_once(&self) -> usize {
        1
    }

    fn rung(&mut self, index: usize) {
        self.rung.lock().unwrap().push(index);
        if let Some(queue) = &mut self.queue {
            queue.rung();
        }
    }

    // What is tested of its second queue is set up where the first one's parts are.
    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let queue = activation.queues.swap_remove(0);
        self.queue = Some(AtOnce::new(Byte, queue, activation.signals));
        Ok(())
    }

    fn reset(&mut self) {
        self.queue = None;
    }
}

#[test]
fn what_is_served_at_once_is_served_before_the_driver_goes_on() {
    let rung = Arc::new(Mutex::default());
    let guest = Guest::of(Box::new(Prompt { rung: Arc::clone(&rung), queue: None }));
    assert_eq!(guest.transport.doorbells().len(), 1);
    // Too early, and of a queue that is not there.
    guest.set(QUEUE_NOTIFY, 1);
    guest.set(QUEUE_NOTIFY, 2);
    assert_eq!(*rung.lock().unwrap(), [1]);
    guest.start(USED);
    for index in 0..3 {
        // This rings the first queue, whose doorbell nobody waits for here.
        guest.offer(index, BUFFER + u64::from(index), 1);
        assert_eq!(guest.used(), index);
        guest.set(QUEUE_NOTIFY, 1);
        assert_eq!(guest.used(), index + 1);
    }
    let bytes: [u8; 4] = guest.ram.read_obj(GuestAddress(BUFFER)).unwrap();
    assert_eq!(bytes, [7, 7, 7, 0]);
    // A ring that says of more than it can hold.
    guest.ram.write_obj(100u16, GuestAddress(AVAILABLE + 2)).unwrap();
    guest.set(QUEUE_NOTIFY, 1);
    assert_ne!(guest.get(STATUS) & S_NEEDS_RESET, 0);
    guest.set(QUEUE_NOTIFY, 1);
    assert_eq!(guest.used(), 3);
    guest.set(STATUS, 0);
    guest.ram.write_obj([0u16; 2], GuestAddress(AVAILABLE)).unwrap();
    guest.ram.write_obj([0u16; 2], GuestAddress(USED)).unwrap();
    guest.start(USED);
    guest.offer(0, BUFFER, 1);
    guest.set(QUEUE_NOTIFY, 1);
    assert_eq!(guest.used(), 1);
}

#[test]
fn a_queue_outside_of_memory_needs_a_reset() {
    let guest = Guest::new();
    guest.start(0xffff_f000);
    assert_ne!(guest.get(STATUS) & S_NEEDS_RESET, 0);
    guest.set(STATUS, 0);
    assert_eq!(guest.get(STATUS), 0);
}

#[test]
fn a_driver_that_breaks_the_ring_needs_a_reset_and_can_have_it() {
    let guest = Guest::new();
    guest.start(USED);
    // More requests than the ring has room for.
    guest.ram.write_obj(1000u16, GuestAddress(AVAILABLE + 2)).unwrap();
    guest.set(QUEUE_NOTIFY, 0);
    guest.wait(|guest| guest.get(STATUS) & S_NEEDS_RESET != 0);
    guest.set(STATUS, 0);
    guest.ram.write_obj(0u16, GuestAddress(AVAILABLE + 2)).unwrap();
    guest.start(USED);
    guest.offer(0, BUFFER, 8);
    guest.wait(|guest| guest.used() == 1);
}

#[test]
fn buffers_that_are_not_there_or_huge_are_no_harm() {
    for (address, len) in [(0xffff_0000, 8), (u64::MAX, u32::MAX), (0, u32::MAX), (BUFFER, 0)] {
        let guest = Guest::new();
        guest.start(USED);
        guest.offer(0, address, len);
        guest.wait(|guest| guest.used() == 1 || guest.get(STATUS) & S_NEEDS_RESET != 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_access_upsets_it(
        garbage in proptest::collection::vec(any::<u8>(), 0x400),
        accesses in proptest::collection::vec(
            (any::<bool>(), 0u64..0x90, prop_oneof![any::<u32>(), 0u32..0x10, 0x1000u32..0x4000]), 0..100),
    ) {
        let guest = Guest::new();
        for address in [DESCRIPTORS, AVAILABLE, USED] {
            guest.ram.write_slice(&garbage, GuestAddress(address)).unwrap();
        }
        guest.start(USED);
        for (store, register, value) in accesses {
            if store { guest.set(register * 4, value) } else { guest.get(register * 4); }
        }
        guest.set(STATUS, 0);
        prop_assert_eq!(guest.get(STATUS), 0);
    }
}
