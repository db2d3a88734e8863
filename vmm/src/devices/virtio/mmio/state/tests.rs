use std::os::fd::AsFd;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::super::state::{decode, encode};
use super::super::tests::{AVAILABLE, BUFFER, DESCRIPTORS, Guest, USED};
use super::super::{
    DEVICE_FEATURES_SEL, DRIVER_FEATURES_SEL, F_COMMON, F_EVENT_IDX, INTERRUPT_STATUS, QUEUE_READY,
    QUEUE_SEL, S_NEEDS_RESET, STATUS,
};
use super::*;
use crate::event::wait_readable_for;
use crate::vcpu::Phase;

const LONG: Duration = Duration::from_secs(20);

impl Guest {
    fn pause(&self) {
        self.standstill.set(Phase::Pause);
        self.standstill.epoch().wait_parked(LONG).unwrap();
    }

    /// Another over the same RAM that goes on where this one stands, by way of bytes.
    fn moved(&self) -> Self {
        let state: State = decode(&encode(&self.transport.save().unwrap()).unwrap()).unwrap();
        let other = Self::over(self.ram.clone());
        other.transport.restore(&state).unwrap();
        assert_eq!(other.transport.save().unwrap().queues, state.queues);
        let bells = other.transport.doorbells().iter();
        let rung =
            wait_readable_for(&bells.map(|bell| bell.as_fd()).collect::<Vec<_>>(), Some(Duration::ZERO));
        assert_eq!(rung.unwrap(), [true]);
        other
    }

    /// What a driver does that sleeps until it is interrupted: takes answers from number `seen` on until it has
    /// `total`, each of which must be the one that is due.
    fn take(&self, mut seen: u16, total: u16) {
        let mut heard = 0;
        let until = Instant::now() + LONG;
        while seen != total {
            while self.used() != seen {
                let slot = u64::from(seen % 16);
                let head: u32 = self.ram.read_obj(GuestAddress(USED + 4 + slot * 8)).unwrap();
                assert_eq!(u64::from(head), slot);
                seen = seen.wrapping_add(1);
            }
            // Used_event, behind the sixteen entries.
            self.ram.store(seen, GuestAddress(AVAILABLE + 4 + 32), Ordering::Relaxed).unwrap();
            fence(Ordering::SeqCst);
            if self.used() != seen || seen == total {
                continue;
            }
            while self.wire.0.load(Ordering::SeqCst) == heard {
                assert!(Instant::now() < until, "no interrupt for answer {seen} of {total}");
                std::thread::yield_now();
            }
            heard = self.wire.0.load(Ordering::SeqCst);
        }
        assert_eq!(self.used(), total, "more answers than requests");
    }
}

#[test]
fn each_request_is_answered_once_however_often_the_machine_moves() {
    for features in [F_VERSION_1, F_VERSION_1 | F_EVENT_IDX] {
        let mut guest = Guest::new();
        guest.start_with(features, USED);
        let (mut offered, mut seen) = (0u16, 0u16);
        for round in 0..60u16 {
            // Some before the pause, of which any may be answered, and some whose kick comes too late.
            let (before, late) = (round % 7, round % 5);
            for _ in 0..before {
                guest.offer(offered, BUFFER, 8);
                offered += 1;
            }
            guest.pause();
            for _ in 0..late {
                guest.offer(offered, BUFFER, 8);
                offered += 1;
            }
            let other = guest.moved();
            drop(guest);
            other.standstill.set(Phase::Run);
            other.take(seen, offered);
            seen = offered;
            guest = other;
        }
    }
}

#[test]
fn the_machine_that_was_saved_goes_on() {
    let guest = Guest::new();
    guest.start_with(F_VERSION_1 | F_EVENT_IDX, USED);
    let mut offered = 0;
    for _ in 0..20 {
        for _ in 0..5 {
            guest.offer(offered, BUFFER, 8);
            offered += 1;
        }
        guest.pause();
        let state = guest.transport.save().unwrap();
        assert_eq!(guest.transport.save().unwrap(), state);
        guest.standstill.set(Phase::Run);
        guest.take(offered - 5, offered);
    }
}

#[test]
fn what_the_driver_was_not_told_and_has_not_acknowledged_is_told_again() {
    let moved = |given, signalled, interrupt_status, ready| {
        let guest = Guest::new();
        guest.start(USED);
        guest.pause();
        let mut state = guest.transport.save().unwrap();
        state.interrupt_status = interrupt_status;
        state.queues[0].ready = ready;
        state.queues[0].position = Position { taken: given, given, signalled };
        let other = Guest::over(guest.ram.clone());
        other.transport.restore(&state).unwrap();
        (other.wire.0.load(Ordering::SeqCst), other.transport.save().unwrap().interrupt_status)
    };
    for (given, signalled, interrupt_status, ready, expected) in [
        (0, 0, 0, true, (0, 0)),
        (5, 5, 0, true, (0, 0)),
        (5, 5, USED_BUFFER, true, (1, USED_BUFFER)),
        (5, 5, CONFIGURATION, true, (1, CONFIGURATION)),
        (5, 4, 0, true, (1, USED_BUFFER)),
        (0, u16::MAX, CONFIGURATION, true, (1, CONFIGURATION | USED_BUFFER)),
        (5, 4, 0, false, (0, 0)),
    ] {
        assert_eq!(moved(given, signalled, interrupt_status, ready), expected, "{given} {signalled}");
    }
}

#[test]
fn a_driver_that_has_seen_all_answers_is_not_interrupted_again() {
    // That buffers were used may stay when it has acknowledged it.
    for (given, seen, interrupts) in [(5, 5, 0), (5, 4, 1), (5, 0, 1), (0, 0, 0), (0, u16::MAX, 1)] {
        let guest = Guest::new();
        guest.start_with(F_VERSION_1 | F_EVENT_IDX, USED);
        guest.pause();
        let mut state = guest.transport.save().unwrap();
        state.interrupt_status = USED_BUFFER;
        state.queues[0].position = Position { taken: given, given, signalled: given };
        guest.ram.write_obj(seen, GuestAddress(AVAILABLE + 4 + 32)).unwrap();
        let other = Guest::over(guest.ram.clone());
        other.transport.restore(&state).unwrap();
        assert_eq!(other.wire.0.load(Ordering::SeqCst), interrupts, "{seen} of {given}");
        assert_eq!(other.get(INTERRUPT_STATUS), USED_BUFFER, "one that comes all the same has a cause");
        assert_eq!(other.transport.look().unheard, interrupts);
    }
}

#[test]
fn a_driver_that_has_not_begun_or_broke_its_device_finds_it_so() {
    // Halfway through its registers.
    let guest = Guest::new();
    guest.negotiate(F_VERSION_1);
    for (register, value) in [(DEVICE_FEATURES_SEL, 1), (DRIVER_FEATURES_SEL, 1), (QUEUE_SEL, 0)] {
        guest.set(register, value);
    }
    guest.set(super::super::QUEUE_DESC_LOW, DESCRIPTORS as u32);
    guest.pause();
    let state = guest.transport.save().unwrap();
    let other = guest.moved();
    assert_eq!(other.transport.save().unwrap(), state);
    other.standstill.set(Phase::Run);
    other.start(USED);
    other.offer(0, BUFFER, 8);
    other.take(0, 1);
    // Broken.
    let guest = Guest::new();
    guest.start(0xffff_f000);
    guest.pause();
    let other = guest.moved();
    other.standstill.set(Phase::Run);
    assert_ne!(other.get(STATUS) & S_NEEDS_RESET, 0);
    other.set(STATUS, 0);
    other.start(USED);
    other.offer(0, BUFFER, 8);
    other.take(0, 1);
}

#[test]
fn the_machine_itself_can_be_put_back() {
    let guest = Guest::new();
    guest.start(USED);
    guest.offer(0, BUFFER, 8);
    guest.take(0, 1);
    guest.pause();
    let state = guest.transport.save().unwrap();
    let mut rings = vec![0; 0x3000];
    guest.ram.read_slice(&mut rings, GuestAddress(DESCRIPTORS)).unwrap();
    for _ in 0..3 {
        guest.standstill.set(Phase::Run);
        for index in 1..10 {
            guest.offer(index, BUFFER, 8);
        }
        guest.wait(|guest| guest.used() == 10);
        guest.pause();
        guest.ram.write_slice(&rings, GuestAddress(DESCRIPTORS)).unwrap();
        guest.transport.restore(&state).unwrap();
        assert_eq!(guest.transport.save().unwrap().queues, state.queues);
    }
}

/// Makes a state another.
type Change<'a> = &'a dyn Fn(&mut State);

#[test]
fn what_does_not_fit_is_named_and_leaves_a_device_after_reset() {
    let guest = Guest::new();
    guest.start(USED);
    guest.pause();
    let state = guest.transport.save().unwrap();
    let cases: [(Change<'_>, &str); 16] = [
        (&|state| state.kind = 1, "device id was 1 and is 4"),
        (&|state| state.driver_features |= 1 << 40 | 1 << 3, "bits 3, 40"),
        (
            &|state| {
                state.status = 3;
                state.features |= 1 << 5;
            },
            "bits 5",
        ),
        (&|state| state.driver_features = 0, "status"),
        (&|state| state.status = S_DRIVER_OK, "status"),
        (&|state| state.status |= S_NEEDS_RESET, "status"),
        (&|state| state.interrupt_status = 4, "interrupts for 0x4"),
        (&|state| state.queues.clear(), "number of queues was 0"),
        (&|state| state.queues.push(state.queues[0]), "number of queues was 2"),
        (&|state| state.queues[0].max_size = 128, "largest queue was 128 and is 64"),
        (&|state| state.queues[0].size = 3, "queue 0"),
        (&|state| state.queues[0].size = 128, "queue 0"),
        (&|state| state.queues[0].size = 0, "queue 0"),
        (&|state| state.queues[0].available = 1, "queue 0"),
        (&|state| state.queues[0].descriptors = u64::MAX - 15, "queue 0 is not in the guest's RAM"),
        (&|state| state.device = vec![1], "no state"),
    ];
    for (change, word) in cases {
        let other = Guest::over(guest.ram.clone());
        let mut changed = state.clone();
        change(&mut changed);
        let error = other.transport.restore(&changed).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
        assert_eq!((other.get(STATUS), other.get(QUEUE_READY)), (0, 0), "{error}");
        other.transport.restore(&state).unwrap();
    }
}

fn queue() -> impl Strategy<Value = QueueState> {
    let address = || prop_oneof![4 => 0u64..0x1_1000, 1 => any::<u64>()].prop_map(|at| at & !0xf);
    let size = prop_oneof![8 => (0u32..8).prop_map(|shift| 1 << shift), 1 => any::<u16>()];
    let position =
        any::<[u16; 3]>().prop_map(|[taken, given, signalled]| Position { taken, given, signalled });
    (size, prop_oneof![8 => Just(true), 1 => any::<bool>()], address(), address(), address(), position)
        .prop_map(|(size, ready, descriptors, available, used, position)| QueueState {
            max_size: 64,
            size,
            ready,
            descriptors,
            available,
            used,
            position,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    /// Whatever a state holds, over whatever RAM: it is refused, or the device works or asks for a reset, and a
    /// driver can start over.
    #[test]
    fn no_state_upsets_it(
        garbage in proptest::collection::vec(any::<u8>(), 0x400),
        queues in proptest::collection::vec(queue(), 1..3),
        status in prop_oneof![4 => Just(0xfu32), 1 => any::<u32>()],
        driver_features in prop_oneof![4 => Just(F_COMMON), 1 => any::<u64>()],
        registers in any::<[u32; 4]>(),
        interrupt_status in 0u32..5,
        needs_reset in prop_oneof![4 => Just(false), 1 => Just(true)],
        device in prop_oneof![8 => Just(vec![]), 1 => Just(vec![0u8; 3])],
    ) {
        let guest = Guest::new();
        guest.pause();
        for address in [DESCRIPTORS, AVAILABLE, USED] {
            guest.ram.write_slice(&garbage, GuestAddress(address)).unwrap();
        }
        let [device_features_sel, driver_features_sel, queue_sel, config_generation] = registers;
        let state = State {
            kind: 4, features: F_COMMON, status, device_features_sel, driver_features_sel, driver_features,
            queue_sel, interrupt_status, config_generation, needs_reset, queues, device,
        };
        let state: State = decode(&encode(&state).unwrap()).unwrap();
        if guest.transport.restore(&state).is_ok() {
            prop_assert_eq!(guest.transport.save().unwrap().queues, state.queues);
        } else {
            prop_assert_eq!(guest.get(STATUS), 0);
        }
        guest.standstill.set(Phase::Run);
        for register in 0..0x40 {
            guest.get(register * 4);
        }
        guest.set(STATUS, 0);
        prop_assert_eq!(guest.get(STATUS), 0);
    }

    #[test]
    fn no_bytes_upset_it(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        if let Ok(state) = decode::<State>(&bytes) {
            let guest = Guest::new();
            guest.pause();
            let _ = guest.transport.restore(&state);
        }
    }
}
