//! The memory device, section 5.15 (virtio-mem): a region of guest-physical memory of which the guest
//! uses as many blocks as the host asks for.
//!
//! The region is part of guest RAM from the start, since adding memory to a running machine is slow;
//! what is not plugged is memory that nobody has touched, or that was freed when it was unplugged. A
//! guest that touches an unplugged block finds zeroes there, at the host's cost, like any memory of
//! its own that it has not used yet: the sum of memory and region is what bounds it.

use std::fmt;
use std::io::{Read, Write};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::{Reader, Writer};

use super::queue::Chain;
use super::state::{decode, encode, same};
use super::{ActivateError, Activation, Broken, Device, Serve, Signals, StateError, Worker};
use crate::memory::{self, GuestRam, RamSlice};

const KIND: u32 = 24;
const QUEUES: [u16; 1] = [128];

/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: the driver leaves unplugged blocks alone.
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// Where the configuration space has what the host asks for.
const CONFIG_REQUESTED: u64 = 48;

/// What is plugged and unplugged at a time: a huge page of most processors.
pub const BLOCK: u64 = 2 << 20;

const REQUEST: usize = 24;
const RESPONSE: usize = 10;

const T_PLUG: u16 = 0;
const T_UNPLUG: u16 = 1;
const T_UNPLUG_ALL: u16 = 2;
const T_STATE: u16 = 3;

const ACK: u16 = 0;
const NACK: u16 = 1;
const ERROR: u16 = 3;

const STATE_PLUGGED: u16 = 0;
const STATE_UNPLUGGED: u16 = 1;
const STATE_MIXED: u16 = 2;

/// What the host asks for cannot be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{asked} bytes of pluggable memory: it must be a multiple of {BLOCK} and at most {region}")]
pub struct SizeError {
    asked: u64,
    region: u64,
}

/// What is plugged: all that has to be known to go on elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct State {
    /// Guest-physical address of the region.
    pub addr: u64,
    /// What the host asks for, in bytes.
    pub requested: u64,
    /// A bit each block, those of lower addresses first; set where it is plugged.
    pub blocks: Vec<u64>,
    /// Number of blocks.
    pub count: u64,
}

impl State {
    fn new(addr: u64, len: u64) -> Self {
        let count = len / BLOCK;
        // No region has more blocks than an address space has words.
        let words = count.div_ceil(64) as usize;
        Self { addr, requested: 0, blocks: vec![0; words], count }
    }

    /// Whether one that was saved can go on in place of this one, which is of a region that is there.
    fn check(&self, saved: &Self) -> Result<(), StateError> {
        same("region's address", &saved.addr, &self.addr)?;
        same("number of blocks", &saved.count, &self.count)?;
        let words = self.blocks.len();
        // Bits behind the last block stand for nothing.
        let spare = words as u64 * 64 - self.count;
        let within = saved.blocks.len() == words
            && saved.blocks.last().is_none_or(|last| u64::from(last.leading_zeros()) >= spare);
        let asked = saved.requested.is_multiple_of(BLOCK) && saved.requested <= self.region();
        if within && asked {
            return Ok(());
        }
        Err(StateError("what was saved of its blocks contradicts itself".into()))
    }

    fn region(&self) -> u64 {
        self.count * BLOCK
    }

    fn plugged(&self) -> u64 {
        self.blocks.iter().map(|word| u64::from(word.count_ones())).sum::<u64>() * BLOCK
    }

    /// The blocks of a request, if it is about blocks of the region.
    fn range(&self, addr: u64, count: u16) -> Option<Range<u64>> {
        let offset = addr.checked_sub(self.addr).filter(|offset| offset.is_multiple_of(BLOCK))?;
        let first = offset / BLOCK;
        let end = first.checked_add(u64::from(count))?;
        (count > 0 && end <= self.count).then_some(first..end)
    }

    fn is_plugged(&self, block: u64) -> bool {
        // It is one of `count`, so that the word is there.
        self.blocks.get((block / 64) as usize).is_some_and(|word| word >> (block % 64) & 1 != 0)
    }

    fn set(&mut self, blocks: Range<u64>, plugged: bool) {
        for block in blocks {
            if let Some(word) = self.blocks.get_mut((block / 64) as usize) {
                let bit = 1 << (block % 64);
                *word = if plugged { *word | bit } else { *word & !bit };
            }
        }
    }

    fn state(&self, mut blocks: Range<u64>) -> u16 {
        let first = self.is_plugged(blocks.start);
        match (blocks.all(|block| self.is_plugged(block) == first), first) {
            (true, true) => STATE_PLUGGED,
            (true, false) => STATE_UNPLUGGED,
            (false, _) => STATE_MIXED,
        }
    }

    /// Answers a request, as (type, state), and says which memory it frees, as (address, length).
    fn answer(&mut self, request: &[u8; REQUEST]) -> ((u16, u16), Option<(u64, u64)>) {
        let half = |at: usize| u16::from_le_bytes([request[at], request[at + 1]]);
        let addr = request[8..16].iter().rev().fold(0, |addr, byte| addr << 8 | u64::from(*byte));
        let kind = half(0);
        if kind == T_UNPLUG_ALL {
            self.blocks.fill(0);
            return ((ACK, 0), Some((self.addr, self.region())));
        }
        let Some(blocks) = self.range(addr, half(16)) else { return ((ERROR, 0), None) };
        let bytes = (blocks.end - blocks.start) * BLOCK;
        let state = self.state(blocks.clone());
        match (kind, state) {
            (T_PLUG, STATE_UNPLUGGED) if self.plugged() + bytes > self.requested => ((NACK, 0), None),
            (T_PLUG, STATE_UNPLUGGED) => {
                self.set(blocks, true);
                ((ACK, 0), None)
            }
            (T_UNPLUG, STATE_PLUGGED) => {
                self.set(blocks, false);
                ((ACK, 0), Some((addr, bytes)))
            }
            (T_STATE, state) => ((ACK, state), None),
            _ => ((ERROR, 0), None),
        }
    }
}

struct Inner {
    state: State,
    signals: Option<Arc<Signals>>,
}

/// What the host can ask and tell. It stays valid when the device is gone, and does nothing then.
#[derive(Clone)]
pub struct Handle(Arc<Mutex<Inner>>);

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Handle(requested {}, plugged {})", self.requested(), self.plugged())
    }
}

impl Handle {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the guest to use as many bytes of the region; how far it goes, and when, is up to it. More
    /// than was asked for it cannot have.
    pub fn request(&self, bytes: u64) -> Result<(), SizeError> {
        let mut inner = self.lock();
        let region = inner.state.region();
        if bytes > region || !bytes.is_multiple_of(BLOCK) {
            return Err(SizeError { asked: bytes, region });
        }
        if inner.state.requested != bytes {
            inner.state.requested = bytes;
            let signals = inner.signals.clone();
            // Who shows it asks here.
            drop(inner);
            if let Some(signals) = signals {
                signals.config_changed(CONFIG_REQUESTED, || self.requested().to_le_bytes().to_vec());
            }
        }
        Ok(())
    }

    /// What the guest was asked to use, in bytes.
    pub fn requested(&self) -> u64 {
        self.lock().state.requested
    }

    /// What it uses, in bytes.
    pub fn plugged(&self) -> u64 {
        self.lock().state.plugged()
    }

    /// The most it can be asked for, in bytes.
    pub fn region(&self) -> u64 {
        self.lock().state.region()
    }
}

/// The device.
#[derive(Debug)]
pub struct Mem {
    handle: Handle,
    worker: Option<Worker<Plugging>>,
}

impl Mem {
    /// For the region at `addr`, which is guest RAM, with nothing plugged. Both are multiples of
    /// [`BLOCK`]; a part of a block at the end is not used.
    pub fn new(addr: u64, len: u64) -> Self {
        let inner = Inner { state: State::new(addr, len), signals: None };
        Self { handle: Handle(Arc::new(Mutex::new(inner))), worker: None }
    }

    /// The host's side of it.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    fn config(&self) -> [u8; 56] {
        let inner = self.handle.lock();
        let state = &inner.state;
        let mut config = [0; 56];
        let region = state.region();
        // Behind the size of a block, the node and padding, which are not used.
        let fields = [(0, BLOCK), (16, state.addr), (24, region), (32, region)];
        for (at, value) in
            fields.into_iter().chain([(40, state.plugged()), (CONFIG_REQUESTED as usize, state.requested)])
        {
            config[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        config
    }
}

impl Device for Mem {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        F_UNPLUGGED_INACCESSIBLE
    }

    fn queues(&self) -> &[u16] {
        &QUEUES
    }

    fn configuration(&self) -> Vec<u8> {
        self.config().to_vec()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.handle.lock().signals = Some(Arc::clone(&activation.signals));
        let worker = Worker::spawn("mem", Plugging(self.handle.clone()), activation)
            .map_err(|source| ActivateError { device: "mem", source })?;
        self.worker = Some(worker);
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        encode(&self.handle.lock().state)
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        let saved: State = decode(state)?;
        let mut inner = self.handle.lock();
        inner.state.check(&saved)?;
        inner.state = saved;
        Ok(())
    }

    /// What is plugged stays plugged: the next kernel finds its memory so.
    fn reset(&mut self) {
        self.worker = None;
        self.handle.lock().signals = None;
    }
}

#[derive(Debug)]
struct Plugging(Handle);

impl Plugging {
    fn answer(&self, ram: &GuestRam, request: &[u8; REQUEST]) -> Result<[u8; RESPONSE], Broken> {
        let ((kind, state), freed) = {
            let mut inner = self.0.lock();
            inner.state.answer(request)
        };
        if let Some((addr, len)) = freed {
            memory::discard(ram, addr, len).map_err(|error| Broken(error.to_string()))?;
        }
        let mut response = [0; RESPONSE];
        response[..2].copy_from_slice(&kind.to_le_bytes());
        response[8..].copy_from_slice(&state.to_le_bytes());
        Ok(response)
    }
}

impl Serve for Plugging {
    fn serve(&mut self, _index: usize, chain: Chain) -> Result<u32, Broken> {
        let broken = |error: std::io::Error| Broken(format!("a memory request: {error}"));
        let ram = chain.memory().clone();
        let mut reader: Reader<'_, RamSlice<'_>> = chain.clone().reader(&ram)?;
        let mut writer: Writer<'_, RamSlice<'_>> = chain.writer(&ram)?;
        let mut request = [0; REQUEST];
        reader.read_exact(&mut request).map_err(broken)?;
        let response = self.answer(&ram, &request)?;
        writer.write_all(&response).map_err(broken)?;
        Ok(RESPONSE as u32)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    const ADDR: u64 = 1 << 32;
    const BLOCKS: u64 = 70;

    fn request(kind: u16, addr: u64, count: u16) -> [u8; REQUEST] {
        let mut request = [0; REQUEST];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&addr.to_le_bytes());
        request[16..18].copy_from_slice(&count.to_le_bytes());
        request
    }

    #[test]
    fn blocks_come_and_go_as_the_host_has_asked() {
        let mut state = State::new(ADDR, BLOCKS * BLOCK + 4096);
        assert_eq!(state.region(), BLOCKS * BLOCK);
        state.requested = 66 * BLOCK;
        let at = |block: u64| ADDR + block * BLOCK;
        for (kind, addr, count, answer, plugged) in [
            (T_STATE, at(0), 70, (ACK, STATE_UNPLUGGED), 0),
            (T_PLUG, at(1), 65, (ACK, 0), 65),
            (T_PLUG, at(1), 1, (ERROR, 0), 65),
            (T_PLUG, at(0), 2, (ERROR, 0), 65),
            (T_STATE, at(0), 2, (ACK, STATE_MIXED), 65),
            (T_STATE, at(1), 65, (ACK, STATE_PLUGGED), 65),
            (T_PLUG, at(66), 2, (NACK, 0), 65),
            (T_PLUG, at(69), 1, (ACK, 0), 66),
            (T_PLUG, at(68), 1, (NACK, 0), 66),
            (T_UNPLUG, at(0), 2, (ERROR, 0), 66),
            (T_UNPLUG, at(63), 2, (ACK, 0), 64),
            (T_UNPLUG, at(63), 1, (ERROR, 0), 64),
            (T_PLUG, at(0), 0, (ERROR, 0), 64),
            (T_STATE, at(69), 2, (ERROR, 0), 64),
            (T_STATE, at(0) + 4096, 1, (ERROR, 0), 64),
            (T_STATE, ADDR - BLOCK, 1, (ERROR, 0), 64),
            (T_STATE, u64::MAX - BLOCK + 1, u16::MAX, (ERROR, 0), 64),
            (9, at(0), 1, (ERROR, 0), 64),
            (T_UNPLUG_ALL, 0, 0, (ACK, 0), 0),
        ] {
            let (answered, freed) = state.answer(&request(kind, addr, count));
            assert_eq!((answered, state.plugged()), (answer, plugged * BLOCK), "{kind} {addr:#x} {count}");
            let frees = matches!(kind, T_UNPLUG | T_UNPLUG_ALL) && answer.0 == ACK;
            assert_eq!(freed.is_some(), frees);
        }
    }

    #[test]
    fn what_is_unplugged_is_given_back() {
        let ram = memory::anonymous(&[(ADDR, 4 * BLOCK)]).unwrap();
        let mem = Mem::new(ADDR, 4 * BLOCK);
        let plugging = Plugging(mem.handle());
        mem.handle().request(4 * BLOCK).unwrap();
        plugging.answer(&ram, &request(T_PLUG, ADDR, 4)).unwrap();
        for block in 0..4 {
            ram.write_obj(7u8, GuestAddress(ADDR + block * BLOCK)).unwrap();
        }
        mem.handle().request(2 * BLOCK).unwrap();
        let response = plugging.answer(&ram, &request(T_UNPLUG, ADDR + BLOCK, 2)).unwrap();
        assert_eq!(response, [0; RESPONSE]);
        let bytes: Vec<u8> =
            (0..4).map(|block| ram.read_obj(GuestAddress(ADDR + block * BLOCK)).unwrap()).collect();
        assert_eq!(bytes, [7, 0, 0, 7]);
        assert_eq!(mem.handle().plugged(), 2 * BLOCK);
    }

    #[test]
    fn the_host_asks_for_blocks_of_the_region() {
        let mem = Mem::new(ADDR, 4 * BLOCK);
        let handle = mem.handle();
        for (bytes, ok) in [
            (0, true),
            (4 * BLOCK, true),
            (BLOCK, true),
            (BLOCK + 1, false),
            (5 * BLOCK, false),
            (u64::MAX, false),
        ] {
            assert_eq!(handle.request(bytes).is_ok(), ok, "{bytes}");
        }
        let config = mem.configuration();
        let field = |at: usize| u64::from_le_bytes(config[at..at + 8].try_into().unwrap());
        assert_eq!([0, 16, 24, 32, 40, 48].map(field), [BLOCK, ADDR, 4 * BLOCK, 4 * BLOCK, 0, BLOCK]);
    }

    #[test]
    fn what_is_plugged_is_kept_for_the_same_region_only() {
        let mut mem = Mem::new(ADDR, BLOCKS * BLOCK);
        mem.handle().request(66 * BLOCK).unwrap();
        mem.handle.lock().state.answer(&request(T_PLUG, ADDR + 3 * BLOCK, 65));
        let bytes = mem.save().unwrap();
        let mut other = Mem::new(ADDR, BLOCKS * BLOCK);
        other.restore(&bytes).unwrap();
        assert_eq!(other.handle.lock().state, mem.handle.lock().state);
        assert_eq!((other.handle().requested(), other.handle().plugged()), (66 * BLOCK, 65 * BLOCK));
        assert_eq!(other.save().unwrap(), bytes);
        for (mut other, word) in [
            (Mem::new(ADDR + BLOCK, BLOCKS * BLOCK), "address"),
            (Mem::new(ADDR, (BLOCKS - 1) * BLOCK), "number of blocks"),
        ] {
            assert!(other.restore(&bytes).unwrap_err().to_string().contains(word));
        }
        let state: State = decode(&bytes).unwrap();
        let cases: [&dyn Fn(&mut State); 5] = [
            &|state| state.blocks.push(0),
            &|state| state.blocks.clear(),
            &|state| state.blocks[1] |= 1 << 6,
            &|state| state.requested += 1,
            &|state| state.requested = (BLOCKS + 1) * BLOCK,
        ];
        for change in cases {
            let mut changed = state.clone();
            change(&mut changed);
            let error = other.restore(&encode(&changed).unwrap()).unwrap_err().to_string();
            assert!(error.contains("contradicts"), "{error}");
        }
        assert_eq!(other.save().unwrap(), bytes, "what is refused changes nothing");
    }

    proptest! {
        /// Whatever is restored, the device counts within its region.
        #[test]
        fn no_state_upsets_it(
            bytes in proptest::collection::vec(any::<u8>(), 0..40),
            blocks in proptest::collection::vec(any::<u64>(), 0..3),
            requested in any::<u64>(),
        ) {
            let mut mem = Mem::new(ADDR, BLOCKS * BLOCK);
            let made = encode(&State { addr: ADDR, requested, blocks, count: BLOCKS }).unwrap();
            for bytes in [bytes, made] {
                let _ = mem.restore(&bytes);
                let state = mem.handle.lock().state.clone();
                prop_assert!(state.plugged() <= state.region() && state.requested <= state.region());
            }
        }

        /// No sequence of requests plugs more than was asked for, or frees what is not of the region.
        #[test]
        fn no_request_upsets_it(
            requests in proptest::collection::vec(
                (0u16..5, prop_oneof![(0..BLOCKS + 2).prop_map(|block| ADDR + block * BLOCK), any::<u64>()],
                 prop_oneof![0u16..80, any::<u16>()]),
                1..60),
            requested in 0..BLOCKS,
        ) {
            let mut state = State::new(ADDR, BLOCKS * BLOCK);
            state.requested = requested * BLOCK;
            for (kind, addr, count) in requests {
                let (_, freed) = state.answer(&request(kind, addr, count));
                prop_assert!(state.plugged() <= state.requested);
                if let Some((addr, len)) = freed {
                    prop_assert!(addr >= ADDR && addr + len <= ADDR + BLOCKS * BLOCK);
                }
            }
        }
    }
}
