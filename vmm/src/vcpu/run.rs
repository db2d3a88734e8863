//! The loop around one processor.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{Desk, Go, Member, desk};
#[cfg(target_arch = "aarch64")]
use crate::arch::aarch64::psci::Verdict;
use crate::bus::Bus;
use crate::hypervisor::{Crash, Error, Exit, SystemEvent, Vcpu};

/// Where accesses go.
#[derive(Debug, Default)]
pub struct Buses {
    /// Memory space.
    pub memory: Bus,
    /// Port space, which only x86_64 has.
    pub ports: Bus,
}

/// Exits of one processor by kind. Written by its thread, read by any.
#[derive(Debug, Default)]
pub struct Counters {
    memory: AtomicU64,
    ports: AtomicU64,
    calls: AtomicU64,
    kicks: AtomicU64,
    unclaimed: AtomicU64,
}

/// What [`Counters`] count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counts {
    /// Loads and stores that are not to RAM.
    pub memory: u64,
    /// `in` and `out`.
    pub ports: u64,
    /// Calls of the firmware.
    pub calls: u64,
    /// Kicks.
    pub kicks: u64,
    /// Of the accesses, those that no device answered.
    pub unclaimed: u64,
}

impl Counters {
    /// The counts so far.
    pub fn get(&self) -> Counts {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            memory: of(&self.memory),
            ports: of(&self.ports),
            calls: of(&self.calls),
            kicks: of(&self.kicks),
            unclaimed: of(&self.unclaimed),
        }
    }

    fn count(&self, counter: &AtomicU64, claimed: bool) {
        counter.fetch_add(1, Ordering::Relaxed);
        if !claimed {
            self.unclaimed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Why a processor's thread came home.
#[derive(Debug)]
pub enum Ended {
    /// It was told to.
    Stopped,
    /// The guest asked for something that ends the machine.
    System(SystemEvent),
    /// It halted, and nothing can wake it.
    Halted,
    /// It cannot go on.
    Crash(Box<Crash>),
    /// The hypervisor failed.
    Failed(Error),
}

/// Who turns processors on and off, where that is the monitor's business.
#[cfg(target_arch = "aarch64")]
pub type Power = crate::arch::aarch64::psci::Psci;
/// Nobody: the hypervisor's interrupt controller starts processors.
#[cfg(target_arch = "x86_64")]
#[derive(Debug)]
pub enum Power {}

#[cfg(target_arch = "x86_64")]
impl Power {
    /// There is nothing to know.
    pub fn save(&self) {
        match *self {}
    }
}

/// Serves a processor until it is told to stop or cannot go on.
pub fn run<V: Vcpu>(
    vcpu: &mut V,
    desk: &Desk<V::State>,
    buses: &Buses,
    power: Option<&Power>,
    member: &Member,
    counters: &Counters,
) -> Ended {
    if let Err(ended) = begin(vcpu, desk, power, member) {
        return ended;
    }
    #[cfg(target_arch = "aarch64")]
    let vcpu_id = vcpu.id();
    loop {
        let exit = match vcpu.run() {
            Ok(exit) => exit,
            Err(error) => return Ended::Failed(error),
        };
        match exit {
            Exit::MmioRead { addr, data } => {
                counters.count(&counters.memory, buses.memory.read(addr, data));
            }
            Exit::MmioWrite { addr, data } => {
                counters.count(&counters.memory, buses.memory.write(addr, data));
            }
            #[cfg(target_arch = "x86_64")]
            Exit::PortRead { port, size, data } => {
                for data in data.chunks_mut(size) {
                    counters.count(&counters.ports, buses.ports.read(u64::from(port), data));
                }
            }
            #[cfg(target_arch = "x86_64")]
            Exit::PortWrite { port, size, data } => {
                for data in data.chunks(size) {
                    counters.count(&counters.ports, buses.ports.write(u64::from(port), data));
                }
            }
            #[cfg(target_arch = "aarch64")]
            Exit::Call { x, answer } => {
                counters.count(&counters.calls, true);
                match call(vcpu_id, power, member, x) {
                    Verdict::Return(value) => *answer = value,
                    Verdict::System(event) => return Ended::System(event),
                    Verdict::Off => {
                        if let Err(ended) = begin(vcpu, desk, power, member) {
                            return ended;
                        }
                    }
                }
            }
            Exit::Kicked => {
                counters.count(&counters.kicks, true);
                if member.is_running() && !desk.is_waiting() {
                    continue;
                }
                // It may have become one that is off.
                if let Err(ended) = begin(vcpu, desk, power, member) {
                    return ended;
                }
                if let Err(error) = vcpu.stood_still() {
                    return Ended::Failed(error);
                }
            }
            Exit::Halted => return Ended::Halted,
            Exit::System(SystemEvent::TripleFault) => return triple_fault(vcpu),
            Exit::System(event) => return Ended::System(event),
            Exit::Crash(crash) => return Ended::Crash(crash),
        }
    }
}

/// Waits until the processor may run: until it is on, where it can be off.
#[cfg(target_arch = "aarch64")]
fn begin<V: Vcpu>(
    vcpu: &mut V,
    desk: &Desk<V::State>,
    power: Option<&Power>,
    member: &Member,
) -> Result<(), Ended> {
    let (id, mut entry) = (vcpu.id(), None);
    let ready = || match power {
        Some(power) if !power.is_on(id) => {
            entry = power.begin(id);
            entry.is_some()
        }
        _ => true,
    };
    match desk::wait(vcpu, desk, member, ready) {
        Go::Away => Err(Ended::Stopped),
        Go::On => entry.map_or(Ok(()), |entry| vcpu.enter_at(&entry)).map_err(Ended::Failed),
    }
}

/// As above.
#[cfg(target_arch = "x86_64")]
fn begin<V: Vcpu>(
    vcpu: &mut V,
    desk: &Desk<V::State>,
    _power: Option<&Power>,
    member: &Member,
) -> Result<(), Ended> {
    match desk::wait(vcpu, desk, member, || true) {
        Go::Away => Err(Ended::Stopped),
        Go::On => Ok(()),
    }
}

/// A call that the hypervisor handed over.
#[cfg(target_arch = "aarch64")]
fn call(vcpu: u32, power: Option<&Power>, member: &Member, x: [u64; 4]) -> Verdict {
    // Without a power there is nobody behind the number: not supported.
    let verdict = power.map_or(Verdict::Return(u64::MAX), |power| power.call(vcpu, x));
    // It may have turned another one on, which waits for that.
    member.nudge();
    verdict
}

fn triple_fault(vcpu: &impl Vcpu) -> Ended {
    Ended::Crash(Box::new(Crash {
        vcpu: vcpu.id(),
        reason: "triple fault".into(),
        registers: vcpu.registers().ok(),
    }))
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::arch::native;
    use crate::bus::BusDevice;
    use crate::hypervisor::Kick;
    use crate::vcpu::{Epoch, Phase};

    /// Exits of a script, each optionally with a change of phase before it.
    enum Script {
        Load(u64),
        Store(u64),
        Kick(Phase),
        Event(SystemEvent),
    }

    struct Scripted {
        script: VecDeque<Script>,
        epoch: Arc<Epoch>,
        data: [u8; 4],
    }

    struct NoKick;

    impl Kick for NoKick {
        fn kick(&self) {}
    }

    impl Vcpu for Scripted {
        type State = ();

        fn id(&self) -> u32 {
            0
        }
        fn hardware_id(&self) -> Result<u64, Error> {
            Ok(0)
        }
        fn kicker(&self) -> Arc<dyn Kick> {
            Arc::new(NoKick)
        }
        fn enter_at(&mut self, _: &native::Entry) -> Result<(), Error> {
            Ok(())
        }
        fn run(&mut self) -> Result<Exit<'_>, Error> {
            Ok(match self.script.pop_front() {
                Some(Script::Load(addr)) => Exit::MmioRead { addr, data: &mut self.data },
                Some(Script::Store(addr)) => Exit::MmioWrite { addr, data: &self.data },
                Some(Script::Kick(phase)) => {
                    self.epoch.set(phase);
                    Exit::Kicked
                }
                Some(Script::Event(event)) => Exit::System(event),
                None => Exit::Halted,
            })
        }
        fn save(&mut self) -> Result<(), Error> {
            Ok(())
        }
        fn restore(&mut self, (): &()) -> Result<(), Error> {
            Ok(())
        }
        fn stood_still(&mut self) -> Result<(), Error> {
            Ok(())
        }
        fn registers(&self) -> Result<native::Registers, Error> {
            Ok(native::Registers::default())
        }
    }

    #[derive(Default)]
    struct Echo(Mutex<Vec<Vec<u8>>>);

    impl BusDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data[0] = offset as u8;
        }
        fn write(&self, _: u64, data: &[u8]) {
            self.0.lock().unwrap().push(data.to_vec());
        }
    }

    fn scripted(script: Vec<Script>) -> (Ended, Counts, Vec<Vec<u8>>) {
        let epoch = Arc::new(Epoch::new());
        let member = Member::join(&epoch);
        epoch.set(Phase::Run);
        let echo = Arc::new(Echo::default());
        let mut buses = Buses::default();
        buses.memory.insert("echo", 0x1000, 0x100, Arc::clone(&echo) as Arc<dyn BusDevice>).unwrap();
        let counters = Counters::default();
        let mut vcpu = Scripted { script: script.into(), epoch, data: [0xee; 4] };
        let ended = run(&mut vcpu, &Desk::default(), &buses, None, &member, &counters);
        let stores = std::mem::take(&mut *echo.0.lock().unwrap());
        (ended, counters.get(), stores)
    }

    #[test]
    fn accesses_reach_devices_and_answers_the_guest() {
        use Script::{Load, Store};
        let (ended, counts, stores) =
            scripted(vec![Load(0x1042), Store(0x1000), Load(0x9000), Store(0x1000)]);
        assert!(matches!(ended, Ended::Halted));
        assert_eq!(counts, Counts { memory: 4, unclaimed: 1, ..Counts::default() });
        assert_eq!(stores, [vec![0x42, 0, 0, 0], vec![0xff; 4]]);
    }

    #[test]
    fn a_kick_is_looked_into_and_not_taken_for_a_stop() {
        let (ended, counts, _) = scripted(vec![Script::Kick(Phase::Run), Script::Kick(Phase::Stop)]);
        assert!(matches!(ended, Ended::Stopped));
        assert_eq!(counts.kicks, 2);
    }

    #[test]
    fn what_ends_a_machine_is_told_apart() {
        let (ended, ..) = scripted(vec![Script::Event(SystemEvent::TripleFault)]);
        assert!(matches!(ended, Ended::Crash(crash) if crash.registers.is_some()));
        for event in [SystemEvent::PowerOff, SystemEvent::Reset, SystemEvent::Crash] {
            let (ended, ..) = scripted(vec![Script::Event(event)]);
            assert!(matches!(ended, Ended::System(found) if found == event));
        }
    }
}
