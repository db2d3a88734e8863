//! The memory balloon, section 5.5: the guest hands memory back, because it was asked to (inflating)
//! or because it has no use for it (free page reporting). The host's pages behind it are freed at once
//! and come back, as zeroes, when the guest touches them.

use std::fmt;
use std::io::Read;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use virtio_queue::Reader;

use super::queue::Chain;
use super::state::{decode, encode};
use super::{ActivateError, Activation, Broken, Device, Serve, Signals, StateError, Worker};
use crate::memory::{self, RamSlice};

const KIND: u32 = 5;
const QUEUES: [u16; 3] = [128, 128, 128];
const INFLATE: usize = 0;
const REPORT: usize = 2;

/// The guest may take memory back before it runs out.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// The guest tells of pages that it does not use.
const F_REPORTING: u64 = 1 << 5;

/// The balloon counts in these, whatever the guest's pages are.
const PAGE: u64 = 4096;
/// Page numbers of one request: more than any driver sends.
const NUMBERS_MAX: usize = 4096;

const CONFIG_ACTUAL: u64 = 4;

#[derive(Default)]
struct Shared {
    target: AtomicU32,
    actual: AtomicU32,
    freed: AtomicU64,
    signals: Mutex<Option<Arc<Signals>>>,
}

impl Shared {
    fn set_signals(&self, signals: Option<Arc<Signals>>) {
        *self.signals.lock().unwrap_or_else(PoisonError::into_inner) = signals;
    }
}

/// What the host can ask and tell. It stays valid when the device is gone, and does nothing then.
#[derive(Clone, Default)]
pub struct Handle(Arc<Shared>);

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Handle(target {}, actual {})", self.target(), self.actual())
    }
}

impl Handle {
    /// Asks the guest to hand back that many bytes in all; how far it goes is up to it.
    pub fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        self.0.target.store(pages, Ordering::Release);
        if let Some(signals) = &*self.0.signals.lock().unwrap_or_else(PoisonError::into_inner) {
            signals.config_changed(0, || self.0.target.load(Ordering::Acquire).to_le_bytes().to_vec());
        }
    }

    /// What the guest was asked for, in bytes.
    pub fn target(&self) -> u64 {
        u64::from(self.0.target.load(Ordering::Acquire)) * PAGE
    }

    /// What the guest says that it has handed back, in bytes.
    pub fn actual(&self) -> u64 {
        u64::from(self.0.actual.load(Ordering::Acquire)) * PAGE
    }

    /// Bytes of the host that were freed since the start, some of them more than once.
    pub fn freed(&self) -> u64 {
        self.0.freed.load(Ordering::Relaxed)
    }
}

/// What host and guest have told each other, in pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct State {
    target: u32,
    actual: u32,
}

/// The device.
#[derive(Debug, Default)]
pub struct Balloon {
    handle: Handle,
    worker: Option<Worker<Freeing>>,
}

impl Balloon {
    /// The host's side of it.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }
}

impl Device for Balloon {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        F_DEFLATE_ON_OOM | F_REPORTING
    }

    fn queues(&self) -> &[u16] {
        &QUEUES
    }

    fn configuration(&self) -> Vec<u8> {
        let Shared { target, actual, .. } = &*self.handle.0;
        [target, actual].iter().flat_map(|pages| pages.load(Ordering::Acquire).to_le_bytes()).collect()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if offset == CONFIG_ACTUAL && data.len() == 4 {
            self.handle.0.actual.store(crate::bus::value(data), Ordering::Release);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.handle.0.set_signals(Some(Arc::clone(&activation.signals)));
        let worker = Worker::spawn("balloon", Freeing(self.handle.clone()), activation)
            .map_err(|source| ActivateError { device: "balloon", source })?;
        self.worker = Some(worker);
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        let Shared { target, actual, .. } = &*self.handle.0;
        encode(&State { target: target.load(Ordering::Acquire), actual: actual.load(Ordering::Acquire) })
    }

    /// Nothing is freed: what the guest has handed back is not in the RAM that was saved either.
    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        let State { target, actual } = decode(state)?;
        self.handle.0.target.store(target, Ordering::Release);
        self.handle.0.actual.store(actual, Ordering::Release);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
        self.handle.0.set_signals(None);
        self.handle.0.actual.store(0, Ordering::Release);
    }
}

#[derive(Debug)]
struct Freeing(Handle);

impl Freeing {
    fn free(&self, chain: &Chain, addr: u64, len: u64) -> Result<(), Broken> {
        memory::discard(chain.memory(), addr, len).map_err(|error| Broken(error.to_string()))?;
        self.0.0.freed.fetch_add(len, Ordering::Relaxed);
        Ok(())
    }

    fn inflate(&self, chain: &Chain) -> Result<(), Broken> {
        let mut reader: Reader<'_, RamSlice<'_>> = chain.clone().reader(chain.memory())?;
        let len = reader.available_bytes();
        if !len.is_multiple_of(4) || len / 4 > NUMBERS_MAX {
            return Err(Broken(format!("{len} bytes of page numbers")));
        }
        let mut bytes = vec![0; len];
        reader.read_exact(&mut bytes).map_err(|error| Broken(error.to_string()))?;
        let pages = bytes.chunks_exact(4).map(crate::bus::value);
        for (first, count) in runs(pages) {
            self.free(chain, u64::from(first) * PAGE, count * PAGE)?;
        }
        Ok(())
    }

    fn report(&self, chain: &Chain) -> Result<(), Broken> {
        for range in chain.clone() {
            self.free(chain, range.addr().0, u64::from(range.len()))?;
        }
        Ok(())
    }
}

/// Neighbours in a list of page numbers, taken together: (first, how many).
fn runs(pages: impl Iterator<Item = u32>) -> Vec<(u32, u64)> {
    let mut runs: Vec<(u32, u64)> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some((first, count)) if u64::from(*first) + *count == u64::from(page) => *count += 1,
            _ => runs.push((page, 1)),
        }
    }
    runs
}

impl Serve for Freeing {
    fn serve(&mut self, index: usize, chain: Chain) -> Result<u32, Broken> {
        match index {
            INFLATE => self.inflate(&chain)?,
            REPORT => self.report(&chain)?,
            // Deflating: the pages come back by being touched.
            _ => {}
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::super::testing;
    use super::*;
    use crate::memory::GuestRam;

    #[test]
    fn neighbours_are_freed_together() {
        for (pages, expected) in [
            (&[][..], &[][..]),
            (&[7], &[(7, 1)]),
            (&[7, 8, 9, 3, 4], &[(7, 3), (3, 2)]),
            (&[9, 8, 7], &[(9, 1), (8, 1), (7, 1)]),
            (&[u32::MAX, 0], &[(u32::MAX, 1), (0, 1)]),
        ] {
            assert_eq!(runs(pages.iter().copied()), expected);
        }
    }

    #[test]
    fn target_and_actual_meet_in_the_configuration() {
        let mut balloon = Balloon::default();
        let handle = balloon.handle();
        handle.set_target(3 * PAGE + 1);
        assert_eq!(balloon.configuration(), [3, 0, 0, 0, 0, 0, 0, 0]);
        balloon.write_config(CONFIG_ACTUAL, &2u32.to_le_bytes());
        balloon.write_config(0, &9u32.to_le_bytes());
        balloon.write_config(CONFIG_ACTUAL, &[1]);
        assert_eq!((handle.target(), handle.actual()), (3 * PAGE, 2 * PAGE));
        handle.set_target(u64::MAX);
        assert_eq!(handle.target(), u64::from(u32::MAX) * PAGE);
    }

    #[test]
    fn what_was_asked_and_answered_is_kept() {
        let mut balloon = Balloon::default();
        balloon.handle().set_target(9 * PAGE);
        balloon.write_config(CONFIG_ACTUAL, &4u32.to_le_bytes());
        let bytes = balloon.save().unwrap();
        let mut other = Balloon::default();
        let handle = other.handle();
        other.restore(&bytes).unwrap();
        assert_eq!((handle.target(), handle.actual(), handle.freed()), (9 * PAGE, 4 * PAGE, 0));
        assert_eq!(other.save().unwrap(), bytes);
        for bytes in [&bytes[1..], &[], &[0xff; 11]] {
            Balloon::default().restore(bytes).unwrap_err();
        }
    }

    const RAM: u64 = 0x20_0000;

    /// RAM full of sevens behind the rings.
    fn ram() -> Arc<GuestRam> {
        let ram = Arc::new(memory::anonymous(&[(0, RAM)]).unwrap());
        ram.write_slice(&vec![7; (RAM - testing::DATA) as usize], GuestAddress(testing::DATA)).unwrap();
        ram
    }

    fn byte(ram: &GuestRam, at: u64) -> u8 {
        ram.read_obj(GuestAddress(at)).unwrap()
    }

    fn inflate(ram: &Arc<GuestRam>, numbers: &[u8]) -> Result<u32, Broken> {
        ram.write_slice(numbers, GuestAddress(testing::DATA)).unwrap();
        let chain = testing::chain(ram, &[(testing::DATA, numbers.len() as u32, 0)]);
        Freeing(Handle::default()).serve(INFLATE, chain)
    }

    #[test]
    fn pages_of_the_balloon_are_freed_and_others_are_not() {
        let numbers = |pages: &[u32]| pages.iter().flat_map(|page| page.to_le_bytes()).collect::<Vec<_>>();
        let last = (RAM / PAGE) as u32;
        for (bytes, ok, freed) in [
            (numbers(&[0x100, 0x101]), true, true),
            (numbers(&[0x100, last]), false, true),
            (numbers(&[last, 0x100]), false, false),
            (numbers(&[u32::MAX]), false, false),
            (vec![0; 5], false, false),
            (vec![0; 4 * (NUMBERS_MAX + 1)], false, false),
        ] {
            let ram = ram();
            assert_eq!(inflate(&ram, &bytes).is_ok(), ok, "{} bytes", bytes.len());
            // One page may be a part of a larger one of the host's.
            if PAGE == 4096 && freed {
                assert_eq!(byte(&ram, 0x100 * PAGE), 0);
            }
            assert_eq!(byte(&ram, 0x110 * PAGE), 7);
        }
    }

    #[test]
    fn reported_ranges_are_freed_if_they_are_ram() {
        for (parts, ok) in [
            (&[(0x10_0000, 0x1_0000, 2), (0x18_0000, 0x1_0000, 2)][..], true),
            (&[(0x10_0000, 0x1_0000, 2), (RAM - PAGE, 2 * PAGE as u32, 2)], false),
            (&[(0x10_0000, 0x1_0000, 2), (u64::MAX, 1, 2)], false),
        ] {
            let ram = ram();
            let handle = Handle::default();
            let result = Freeing(handle.clone()).serve(REPORT, testing::chain(&ram, parts));
            assert_eq!(result.is_ok(), ok);
            assert_eq!((byte(&ram, 0x10_0000), byte(&ram, 0x11_0000)), (0, 7));
            assert_eq!(handle.freed(), if ok { 0x2_0000 } else { 0x1_0000 });
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        /// Nothing but RAM is freed, whatever the guest says; nothing else can be wrong with a request.
        #[test]
        fn no_request_upsets_it(
            numbers in proptest::collection::vec(prop_oneof![0u32..0x300, any::<u32>()], 0..40),
            cut in 0usize..4,
            ranges in proptest::collection::vec(
                (prop_oneof![0..RAM + PAGE, any::<u64>()], any::<u32>(), any::<u16>()), 1..10),
            queue in 0usize..5,
        ) {
            let ram = ram();
            let mut bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
            bytes.truncate(bytes.len().saturating_sub(cut));
            let pages = numbers.iter().all(|number| u64::from(*number) < RAM / PAGE);
            let whole = cut == 0 || numbers.is_empty();
            prop_assert_eq!(inflate(&ram, &bytes).is_ok(), pages && whole || bytes.is_empty());
            let _ = Freeing(Handle::default()).serve(queue, testing::chain(&ram, &ranges));
        }
    }
}
