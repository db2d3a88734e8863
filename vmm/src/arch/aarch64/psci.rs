//! The Power State Coordination Interface (Arm DEN 0022, version 1.1) and the calls of the SMC Calling
//! Convention (DEN 0028) by which a guest finds it. For hypervisors that leave the guest's calls to the
//! monitor.
//!
//! A processor is off, pending or on. Each changes hands by one compare-and-swap: who turns it from off to
//! pending, and nobody else, says where it begins; its own thread takes that and turns it on; and only it
//! itself turns itself off.

use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::Entry;
use crate::hypervisor::SystemEvent;

/// Function identifiers. Those with a 64-bit form differ from it in bit 30.
mod function {
    pub(super) const SMCCC_VERSION: u32 = 0x8000_0000;
    pub(super) const SMCCC_ARCH_FEATURES: u32 = 0x8000_0001;
    pub(super) const PSCI_VERSION: u32 = 0x8400_0000;
    pub(super) const CPU_SUSPEND: u32 = 0x8400_0001;
    pub(super) const CPU_OFF: u32 = 0x8400_0002;
    pub(super) const CPU_ON: u32 = 0x8400_0003;
    pub(super) const AFFINITY_INFO: u32 = 0x8400_0004;
    pub(super) const MIGRATE_INFO_TYPE: u32 = 0x8400_0006;
    pub(super) const SYSTEM_OFF: u32 = 0x8400_0008;
    pub(super) const SYSTEM_RESET: u32 = 0x8400_0009;
    pub(super) const PSCI_FEATURES: u32 = 0x8400_000a;
    pub(super) const SYSTEM_RESET2: u32 = 0x8400_0012;

    /// Parameters and results are 64 bits wide.
    pub(super) const WIDE: u32 = 1 << 30;
    /// Those that have a 64-bit form.
    pub(super) const BOTH: [u32; 4] = [CPU_SUSPEND, CPU_ON, AFFINITY_INFO, SYSTEM_RESET2];
}

/// Identifiers of PSCI, for hypervisors that want to know which calls to hand over: the first of the
/// 32-bit and of the 64-bit ones.
pub const FUNCTIONS: [u32; 2] = [0x8400_0000, 0xc400_0000];
/// How many identifiers belong to PSCI from each of [`FUNCTIONS`].
pub const FUNCTIONS_LEN: u32 = 0x20;

const VERSION_1_1: i64 = 0x1_0001;
const SUCCESS: i64 = 0;
const NOT_SUPPORTED: i64 = -1;
const INVALID_PARAMETERS: i64 = -2;
const ALREADY_ON: i64 = -4;
const ON_PENDING: i64 = -5;
const INVALID_ADDRESS: i64 = -9;

/// MIGRATE_INFO_TYPE: there is no trusted operating system that could be in the way.
const NO_TRUSTED_OS: i64 = 2;
/// The one architectural type of SYSTEM_RESET2.
const SYSTEM_WARM_RESET: u64 = 0;
/// AFFINITY_INFO of the highest level there is.
const AFFINITY_LEVELS: u64 = 3;

/// Aff3 to Aff0 of MPIDR_EL1, where PSCI has them too.
const AFFINITY: u64 = 0xff_00ff_ffff;

const ON: u8 = 0;
const OFF: u8 = 1;
const PENDING: u8 = 2;

/// What becomes of the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on, with this in x0.
    Return(u64),
    /// It is off. Its thread waits for [`Psci::begin`].
    Off,
    /// The machine ends.
    System(SystemEvent),
}

#[derive(Debug)]
struct Processor {
    affinity: u64,
    state: AtomicU8,
    /// Where it begins, from whoever made it pending until it takes it.
    entry: Mutex<Option<Entry>>,
}

/// Which processors are on, to be known to go on elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Each processor, by number.
    pub processors: Vec<ProcessorState>,
}

/// A processor in a [`State`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProcessorState {
    /// It runs.
    On,
    /// Somebody must turn it on.
    Off,
    /// Somebody has, and it is to begin here.
    Pending {
        /// Program counter.
        pc: u64,
        /// X0.
        x0: u64,
    },
}

/// The processors of a machine, as PSCI sees them. All but the first are off.
#[derive(Debug)]
pub struct Psci {
    processors: Vec<Processor>,
    ram: Vec<Range<u64>>,
}

impl Psci {
    /// For processors with these MPIDR_EL1, by number, and RAM at these addresses.
    pub fn new(mpidrs: &[u64], ram: Vec<Range<u64>>) -> Self {
        let processor = |(index, mpidr): (usize, &u64)| Processor {
            affinity: mpidr & AFFINITY,
            state: AtomicU8::new(if index == 0 { ON } else { OFF }),
            entry: Mutex::new(None),
        };
        Self { processors: mpidrs.iter().enumerate().map(processor).collect(), ram }
    }

    /// Becomes what was saved. None runs yet.
    pub fn restore(&self, state: &State) -> Result<(), &'static str> {
        if state.processors.len() != self.processors.len() {
            return Err("the snapshot has another number of processors to turn on and off");
        }
        for (processor, saved) in self.processors.iter().zip(&state.processors) {
            let (word, entry) = match *saved {
                ProcessorState::On => (ON, None),
                ProcessorState::Off => (OFF, None),
                ProcessorState::Pending { pc, x0 } => (PENDING, Some(Entry { pc, x0 })),
            };
            *processor.entry.lock().unwrap_or_else(PoisonError::into_inner) = entry;
            processor.state.store(word, Ordering::Release);
        }
        Ok(())
    }

    /// What there is to know while all stand still.
    pub fn save(&self) -> State {
        let of = |processor: &Processor| {
            let entry = processor.entry.lock().unwrap_or_else(PoisonError::into_inner);
            match (processor.state.load(Ordering::Acquire), entry.as_ref()) {
                (ON, _) => ProcessorState::On,
                (PENDING, Some(entry)) => ProcessorState::Pending { pc: entry.pc, x0: entry.x0 },
                _ => ProcessorState::Off,
            }
        };
        State { processors: self.processors.iter().map(of).collect() }
    }

    /// Whether a processor may run.
    pub fn is_on(&self, number: u32) -> bool {
        self.processors.get(number as usize).is_some_and(|cpu| cpu.state.load(Ordering::Acquire) == ON)
    }

    /// To be asked by the thread of a processor that is off: where it begins, once somebody has turned it
    /// on. It is on then. After [`Self::call`] by another processor the answer may be another.
    pub fn begin(&self, number: u32) -> Option<Entry> {
        let processor = self.processors.get(number as usize)?;
        let entry = processor.entry.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        processor.state.store(ON, Ordering::Release);
        Some(entry)
    }

    /// Processor `number` calls with these in x0 to x3.
    pub fn call(&self, number: u32, x: [u64; 4]) -> Verdict {
        // The upper half of x0 is not part of the identifier.
        let id = x[0] as u32;
        let is_wide = id & function::WIDE != 0;
        let function = id & !function::WIDE;
        if is_wide && !function::BOTH.contains(&function) {
            return answer(NOT_SUPPORTED, false);
        }
        let [_, a, b, c] = if is_wide { x } else { x.map(|x| u64::from(x as u32)) };
        let result = match function {
            function::SMCCC_VERSION | function::PSCI_VERSION => VERSION_1_1,
            function::SMCCC_ARCH_FEATURES => match a as u32 {
                function::SMCCC_VERSION | function::SMCCC_ARCH_FEATURES => SUCCESS,
                _ => NOT_SUPPORTED,
            },
            function::PSCI_FEATURES => features(a as u32),
            // A processor that suspends may wake up at once, and a deeper state may be taken for standby.
            function::CPU_SUSPEND => SUCCESS,
            function::CPU_OFF => return self.off(number),
            function::CPU_ON => self.on(a, b, c),
            function::AFFINITY_INFO => self.affinity_info(a, b),
            function::MIGRATE_INFO_TYPE => NO_TRUSTED_OS,
            function::SYSTEM_OFF => return Verdict::System(SystemEvent::PowerOff),
            function::SYSTEM_RESET => return Verdict::System(SystemEvent::Reset),
            function::SYSTEM_RESET2 if a == SYSTEM_WARM_RESET => return Verdict::System(SystemEvent::Reset),
            function::SYSTEM_RESET2 => INVALID_PARAMETERS,
            _ => NOT_SUPPORTED,
        };
        answer(result, is_wide)
    }

    fn off(&self, number: u32) -> Verdict {
        if let Some(processor) = self.processors.get(number as usize) {
            processor.state.store(OFF, Ordering::Release);
        }
        Verdict::Off
    }

    fn on(&self, target: u64, pc: u64, x0: u64) -> i64 {
        let Some(processor) = self.processors.iter().find(|processor| processor.affinity == target) else {
            return INVALID_PARAMETERS;
        };
        if !pc.is_multiple_of(4) || !self.ram.iter().any(|range| range.contains(&pc)) {
            return INVALID_ADDRESS;
        }
        match processor.state.compare_exchange(OFF, PENDING, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => {
                *processor.entry.lock().unwrap_or_else(PoisonError::into_inner) = Some(Entry { pc, x0 });
                SUCCESS
            }
            Err(PENDING) => ON_PENDING,
            Err(_) => ALREADY_ON,
        }
    }

    /// Of one processor, or, at a higher level, of all that share the fields from there on: on if any is.
    fn affinity_info(&self, target: u64, level: u64) -> i64 {
        let mask = match level {
            0..=2 => AFFINITY & (u64::MAX << (8 * level)),
            AFFINITY_LEVELS => AFFINITY & !0xff_ffff,
            _ => return INVALID_PARAMETERS,
        };
        if target & !AFFINITY != 0 {
            return INVALID_PARAMETERS;
        }
        let states: Vec<u8> = self
            .processors
            .iter()
            .filter(|processor| processor.affinity & mask == target & mask)
            .map(|processor| processor.state.load(Ordering::Acquire))
            .collect();
        match [ON, PENDING, OFF].into_iter().find(|state| states.contains(state)) {
            Some(state) => state.into(),
            None => INVALID_PARAMETERS,
        }
    }
}

fn features(id: u32) -> i64 {
    let function = id & !function::WIDE;
    let is_known = match function {
        function::PSCI_VERSION
        | function::CPU_OFF
        | function::MIGRATE_INFO_TYPE
        | function::SYSTEM_OFF
        | function::SYSTEM_RESET
        | function::PSCI_FEATURES
        | function::SMCCC_VERSION => id == function,
        function => function::BOTH.contains(&function),
    };
    if is_known { SUCCESS } else { NOT_SUPPORTED }
}

/// Negative numbers as wide as the call.
fn answer(result: i64, is_wide: bool) -> Verdict {
    Verdict::Return(if is_wide { result.cast_unsigned() } else { u64::from(result.cast_unsigned() as u32) })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    const RAM: Range<u64> = 0x4000_0000..0x5000_0000;
    const PC: u64 = 0x4008_0000;

    const fn wide(result: i64) -> Verdict {
        Verdict::Return(result.cast_unsigned())
    }

    const fn narrow(result: i64) -> Verdict {
        Verdict::Return(result.cast_unsigned() as u32 as u64)
    }

    /// Two clusters of two; affinities may come with the bits that are always set in MPIDR_EL1.
    fn psci() -> Psci {
        Psci::new(&[0x8000_0000, 0x8000_0001, 0x8000_0100, 0x8000_0101], vec![RAM])
    }

    #[test]
    fn calls_that_change_nothing() {
        const X: u64 = 0xffff_ffff_0000_0000;
        for (x, verdict) in [
            ([0x8400_0000, 0, 0, 0], narrow(0x1_0001)),
            // The identifier is the lower half.
            ([X | 0x8400_0000, 0, 0, 0], narrow(0x1_0001)),
            ([0xc400_0000, 0, 0, 0], narrow(-1)),
            ([0x8000_0000, 0, 0, 0], narrow(0x1_0001)),
            ([0x8000_0001, 0x8000_0000, 0, 0], narrow(0)),
            ([0x8000_0001, 0x8000_0001, 0, 0], narrow(0)),
            ([0x8000_0001, 0x8000_8000, 0, 0], narrow(-1)),
            ([0x8400_0001, 0, 0, 0], narrow(0)),
            ([0xc400_0001, 0, 0, 0], wide(0)),
            ([0x8400_0006, 0, 0, 0], narrow(2)),
            ([0x8400_0005, 0, 0, 0], narrow(-1)),
            ([0x8400_0007, 0, 0, 0], narrow(-1)),
            ([0x8400_000e, 0, 0, 0], narrow(-1)),
            ([0xc400_000e, 0, 0, 0], narrow(-1)),
            ([0x8600_0000, 0, 0, 0], narrow(-1)),
            ([0, 0, 0, 0], narrow(-1)),
            ([u64::MAX, 0, 0, 0], narrow(-1)),
        ] {
            assert_eq!(psci().call(0, x), verdict, "{x:#x?}");
        }
    }

    #[test]
    fn features_are_those_that_answer() {
        for id in [
            0x8400_0000u64,
            0x8400_0001,
            0xc400_0001,
            0x8400_0002,
            0x8400_0003,
            0xc400_0003,
            0x8400_0004,
            0xc400_0004,
            0x8400_0006,
            0x8400_0008,
            0x8400_0009,
            0x8400_000a,
            0x8400_0012,
            0xc400_0012,
            0x8000_0000,
        ] {
            assert_eq!(psci().call(0, [0x8400_000a, id, 0, 0]), narrow(0), "{id:#x}");
        }
        for id in
            [0xc400_0000u64, 0xc400_0002, 0xc400_0008, 0x8400_0005, 0x8400_000e, 0x8400_001f, 0xc000_0000, 0]
        {
            assert_eq!(psci().call(0, [0x8400_000a, id, 0, 0]), narrow(-1), "{id:#x}");
        }
    }

    #[test]
    fn what_ends_the_machine() {
        use SystemEvent::{PowerOff, Reset};
        for (x, verdict) in [
            ([0x8400_0008, 0, 0, 0], Verdict::System(PowerOff)),
            ([0x8400_0009, 0, 0, 0], Verdict::System(Reset)),
            ([0x8400_0012, 0, 0, 0], Verdict::System(Reset)),
            ([0xc400_0012, 0, 7, 0], Verdict::System(Reset)),
            ([0x8400_0012, 1, 0, 0], narrow(-2)),
            ([0xc400_0012, 0x8000_0000, 0, 0], wide(-2)),
        ] {
            assert_eq!(psci().call(0, x), verdict, "{x:#x?}");
        }
    }

    #[test]
    fn cpu_on_names_a_processor_and_an_address() {
        for (x, verdict) in [
            ([0xc400_0003, 1, PC, 7], wide(0)),
            ([0x8400_0003, 1, PC, 7], narrow(0)),
            // Of a 32-bit call the upper halves mean nothing.
            ([0x8400_0003, 1 << 32 | 1, 1 << 32 | PC, 1 << 32 | 7], narrow(0)),
            ([0xc400_0003, 0x101, PC, 7], wide(0)),
            ([0xc400_0003, 0, PC, 7], wide(-4)),
            ([0xc400_0003, 2, PC, 7], wide(-2)),
            ([0xc400_0003, 0x8000_0001, PC, 7], wide(-2)),
            ([0xc400_0003, 1 << 32 | 1, PC, 7], wide(-2)),
            ([0xc400_0003, u64::MAX, PC, 7], wide(-2)),
            ([0xc400_0003, 1, RAM.end, 7], wide(-9)),
            ([0xc400_0003, 1, 0, 7], wide(-9)),
            ([0xc400_0003, 1, PC + 2, 7], wide(-9)),
            ([0xc400_0003, 1, 1 << 32 | PC, 7], wide(-9)),
        ] {
            assert_eq!(psci().call(0, x), verdict, "{x:#x?}");
        }
    }

    #[test]
    fn a_processor_is_off_pending_and_on_and_off_again() {
        let psci = psci();
        let on = |pc| psci.call(0, [0xc400_0003, 1, pc, pc]);
        let info = |target, level| psci.call(0, [0xc400_0004, target, level, 0]);
        assert!(psci.is_on(0) && !psci.is_on(1));
        for _ in 0..3 {
            assert_eq!(info(1, 0), wide(1));
            assert_eq!(psci.begin(1), None);
            assert_eq!(on(PC), wide(0));
            assert_eq!(info(1, 0), wide(2));
            assert_eq!(on(PC + 4), wide(-5), "where it begins was said already");
            assert_eq!(psci.begin(1), Some(Entry { pc: PC, x0: PC }));
            assert_eq!(psci.begin(1), None);
            assert_eq!(info(1, 0), wide(0));
            assert_eq!(on(PC), wide(-4));
            assert_eq!(psci.call(1, [0x8400_0002, 0, 0, 0]), Verdict::Off);
        }
        for (target, level, verdict) in [
            (0, 0, wide(0)),
            (0x100, 0, wide(1)),
            // All of the second cluster is off, of the first one is on.
            (0x100, 1, wide(1)),
            (0x1ff, 1, wide(1)),
            (0x7f, 1, wide(0)),
            (0x100, 2, wide(0)),
            (0x200, 2, wide(0)),
            (0x200, 1, wide(-2)),
            (0xff_ffff, 3, wide(0)),
            (1 << 32, 3, wide(-2)),
            (1 << 31, 3, wide(-2)),
            (2, 0, wide(-2)),
            (0, 4, wide(-2)),
            (0, u64::MAX, wide(-2)),
        ] {
            assert_eq!(info(target, level), verdict, "{target:#x} at {level}");
        }
        assert_eq!(psci.begin(99), None);
    }

    #[test]
    fn of_many_who_turn_one_on_at_once_one_does() {
        for _ in 0..50 {
            let psci = Arc::new(psci());
            let callers: Vec<_> = (0..4u64)
                .map(|caller| {
                    let psci = Arc::clone(&psci);
                    thread::spawn(move || psci.call(0, [0xc400_0003, 1, PC + 4 * caller, caller]))
                })
                .collect();
            let verdicts: Vec<_> = callers.into_iter().map(|caller| caller.join().unwrap()).collect();
            let winner = verdicts.iter().position(|verdict| *verdict == wide(0)).unwrap() as u64;
            assert_eq!(verdicts.iter().filter(|verdict| **verdict == wide(-5)).count(), 3);
            assert_eq!(psci.begin(1), Some(Entry { pc: PC + 4 * winner, x0: winner }));
        }
    }
}
