//! A machine's life: built, running, paused, ended.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::Error;
use super::board::{Chips, Wire};
use super::generation::Generation;
use super::ram::{Extent, MemoryStatus};
use super::shell::Native;
use crate::arch::native::Fingerprint;
use crate::console::{InputGate, InputPort, Output, OutputStats};
use crate::devices::virtio::mmio::{INTERRUPT_ACK, QUEUE_NOTIFY, Transport};
use crate::devices::virtio::{self, USED_BUFFER};
use crate::event::Event;
use crate::hypervisor::{Crash, Kick, SystemEvent, Vm};
use crate::memory::GuestRam;
use crate::slots::SlotId;
use crate::snapshot::{Layers, Shape};
use crate::standstill::Standstill;
use crate::vcpu::{Counters, Counts, Ended, Phase, Power};

/// How a machine ended.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// The guest turned itself off.
    PowerOff,
    /// The guest wants to start again.
    Reset,
    /// The guest says that its kernel has crashed.
    GuestPanic,
    /// The guest drove a processor into a state without a way out.
    Crash(Box<Crash>),
    /// The host stopped it.
    Stopped,
    /// The hypervisor failed.
    Failed(String),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest turned itself off"),
            Self::Reset => f.write_str("the guest asked for a reset"),
            Self::GuestPanic => f.write_str("the guest's kernel panicked"),
            Self::Crash(crash) => write!(f, "the guest crashed: {crash}"),
            Self::Stopped => f.write_str("the machine was stopped"),
            Self::Failed(error) => write!(f, "the hypervisor failed: {error}"),
        }
    }
}

/// What a machine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Its guest runs.
    Running,
    /// Its guest stands still, also before its first instruction.
    Paused,
    /// It is over.
    Ended,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ended => "over",
        })
    }
}

/// Something that happened to a machine.
#[derive(Debug, Clone)]
pub enum Notice {
    /// It runs, or stands still.
    Status(Status),
    /// The guest printed a line with a [marker](crate::console::Marker) in it: a hint, since any process
    /// in the guest may print.
    Marker(u32),
    /// It is over. The last notice of all.
    Ended(Outcome),
}

/// Is told of everything that happens, by whatever thread it happens on: it must neither block nor call
/// the machine.
pub type Observer = Box<dyn Fn(&Notice) + Send + Sync>;

/// What all of a machine's threads share.
pub(super) struct Shared {
    pub(super) standstill: Arc<Standstill>,
    kickers: Mutex<Vec<Arc<dyn Kick>>>,
    outcome: Mutex<Option<Outcome>>,
    over: Condvar,
    observers: Mutex<Observers>,
}

#[derive(Default)]
struct Observers {
    list: Vec<Observer>,
    /// They have heard the last notice.
    dismissed: bool,
}

impl Shared {
    pub(super) fn new() -> Result<Self, Error> {
        let standstill = Standstill::new()
            .map_err(|source| Error::Host { what: "make an event to pause devices by", source })?;
        Ok(Self {
            standstill: Arc::new(standstill),
            kickers: Mutex::new(Vec::new()),
            outcome: Mutex::new(None),
            over: Condvar::new(),
            observers: Mutex::default(),
        })
    }

    pub(super) fn notify(&self, notice: &Notice) {
        let mut observers = self.observers.lock().unwrap_or_else(PoisonError::into_inner);
        if !observers.dismissed {
            observers.dismissed = matches!(notice, Notice::Ended(_));
            observers.list.iter().for_each(|observer| observer(notice));
        }
    }

    pub(super) fn add_kicker(&self, kicker: Arc<dyn Kick>) {
        self.kickers.lock().unwrap_or_else(PoisonError::into_inner).push(kicker);
    }

    /// Changes what processors and devices do, and makes sure they notice. False once the machine is over.
    pub(super) fn set(&self, phase: Phase) -> bool {
        let live = self.standstill.set(phase);
        for kicker in self.kickers.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            kicker.kick();
        }
        live
    }

    fn outcome(&self) -> MutexGuard<'_, Option<Outcome>> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the machine. The first outcome is the one that counts.
    pub(super) fn end(&self, outcome: Outcome) {
        let mut first = self.outcome();
        let is_first = first.is_none();
        first.get_or_insert_with(|| outcome.clone());
        // Who sees an outcome sees a machine that is over.
        self.set(Phase::Stop);
        drop(first);
        if is_first {
            self.notify(&Notice::Ended(outcome));
        }
        self.over.notify_all();
    }

    /// Hears what the guest wants of the machine.
    pub(super) fn system_event(&self, event: SystemEvent) {
        self.end(match event {
            SystemEvent::PowerOff => Outcome::PowerOff,
            SystemEvent::Reset => Outcome::Reset,
            SystemEvent::Crash => Outcome::GuestPanic,
            // A processor's own thread says more about it.
            SystemEvent::TripleFault => Outcome::Failed("a processor came to a triple fault".into()),
        });
    }

    /// Hears that a processor's thread came home.
    pub(super) fn ended(&self, vcpu: u32, ended: Ended) {
        match ended {
            Ended::Stopped => {}
            Ended::System(event) => self.system_event(event),
            Ended::Halted => self.end(Outcome::Failed(format!("vcpu {vcpu} halted for good"))),
            Ended::Crash(crash) => self.end(Outcome::Crash(crash)),
            Ended::Failed(error) => self.end(Outcome::Failed(error.to_string())),
        }
    }
}

/// The serial port's input, which stands still with the machine.
pub(super) struct HeldPort {
    pub(super) port: Arc<dyn InputPort>,
    pub(super) standstill: Arc<Standstill>,
    /// Held while bytes are offered.
    pub(super) offering: Mutex<()>,
}

impl HeldPort {
    /// Returns when no offer is under way.
    fn settle(&self) {
        drop(self.offering.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl InputPort for HeldPort {
    fn offer(&self, bytes: &[u8]) -> usize {
        let _offering = self.offering.lock().unwrap_or_else(PoisonError::into_inner);
        // The gate is opened when it runs again.
        if self.standstill.epoch().phase() == Phase::Run { self.port.offer(bytes) } else { 0 }
    }

    fn gate(&self) -> &InputGate {
        self.port.gate()
    }
}

/// A device in its slot.
pub(super) struct Attached {
    pub(super) id: SlotId,
    pub(super) kind: u32,
    /// Address of its registers.
    pub(super) base: u64,
    pub(super) transport: Arc<Transport>,
    /// How many of its doorbells, the first ones, ring without an exit.
    pub(super) engaged: Mutex<usize>,
    /// Where the hypervisor has the driver say that it knows of used buffers: to nobody, as it may be told so again.
    pub(super) acknowledged: Arc<Event>,
}

impl Attached {
    /// Has the hypervisor ring the doorbells of its first queues, so many at most, as far as it does not yet.
    pub(super) fn engage(&self, vm: &impl Vm, queues: usize) -> Result<(), Error> {
        let mut engaged = self.engaged.lock().unwrap_or_else(PoisonError::into_inner);
        let first = *engaged == 0;
        for (index, doorbell) in (0..).zip(self.transport.doorbells().iter().take(queues)).skip(*engaged) {
            vm.doorbell(self.base + QUEUE_NOTIFY, index, doorbell)?;
            *engaged += 1;
        }
        if first && *engaged > 0 {
            vm.doorbell(self.base + INTERRUPT_ACK, USED_BUFFER, &self.acknowledged)?;
        }
        Ok(())
    }
}

/// What a device has done so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceCounts {
    /// Its name.
    pub id: SlotId,
    /// Its device id, as virtio counts them.
    pub kind: u32,
    /// What it has done.
    pub counts: virtio::Counts,
}

/// How long the parts of building took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Phases {
    /// Until the hypervisor's machine and processors existed.
    pub hypervisor: Duration,
    /// Until kernel and initrd were in RAM, or a snapshot was decoded, which happens meanwhile.
    pub load: Duration,
    /// Until all was done.
    pub build: Duration,
}

/// One microVM. Dropping it stops it.
pub struct Machine {
    pub(super) shared: Arc<Shared>,
    /// Held by whoever pauses, resumes or saves: one after the other.
    pub(super) turn: Mutex<()>,
    pub(super) threads: Vec<JoinHandle<()>>,
    pub(super) counters: Vec<Arc<Counters>>,
    pub(super) console: Arc<HeldPort>,
    pub(super) output: Arc<Output>,
    pub(super) button: Option<Wire>,
    pub(super) generation: Generation,
    pub(super) memory: Extent,
    pub(super) ram: Arc<GuestRam>,
    /// What that is mapped from, in a machine that was restored.
    pub(super) under: Option<Layers>,
    pub(super) devices: Vec<Attached>,
    pub(super) shape: Shape,
    pub(super) hypervisor: &'static str,
    pub(super) fingerprint: Fingerprint,
    pub(super) power: Option<Arc<Power>>,
    pub(super) chips: Chips,
    pub(super) phases: Phases,
    /// Keeps the hypervisor's machine until the threads have ended.
    pub(super) native: Box<dyn Native>,
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Machine({} vcpus, {})", self.threads.len(), self.status())
    }
}

impl Machine {
    /// What it is doing.
    pub fn status(&self) -> Status {
        match self.shared.standstill.epoch().phase() {
            Phase::Run => Status::Running,
            Phase::Pause => Status::Paused,
            Phase::Stop => Status::Ended,
        }
    }

    /// Whoever pauses, resumes or saves waits for its turn.
    pub(super) fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the guest run: from its first instruction, or from where it was paused.
    pub fn resume(&self) -> Result<(), Error> {
        let _turn = self.turn();
        // Before anything that the guest does from here on; after the last notice it is none.
        self.shared.notify(&Notice::Status(Status::Running));
        if self.shared.set(Phase::Run) {
            self.console.gate().open();
            Ok(())
        } else {
            Err(Error::Order { what: "resume", status: Status::Ended })
        }
    }

    /// Makes the guest stand still: every processor between two instructions, every device between two
    /// requests. When that takes longer than `within`, the guest runs on and this is an error.
    pub fn pause(&self, within: Duration) -> Result<(), Error> {
        let _turn = self.turn();
        if !self.shared.set(Phase::Pause) {
            return Err(Error::Order { what: "pause", status: Status::Ended });
        }
        self.shared.standstill.epoch().wait_parked(within).map_err(|source| {
            self.shared.set(Phase::Run);
            self.console.gate().open();
            Error::Pause { within, source }
        })?;
        self.console.settle();
        // A machine that ends while it is being paused has no processors left to wait for.
        match self.status() {
            Status::Paused => {
                self.shared.notify(&Notice::Status(Status::Paused));
                Ok(())
            }
            status => Err(Error::Order { what: "pause", status }),
        }
    }

    /// Asks the guest to turn itself off. What it makes of that is its business.
    pub fn press_power_button(&self) -> Result<(), Error> {
        let press = self.button.as_ref().ok_or(Error::NoButton)?;
        Ok(press()?)
    }

    /// Asks the guest to use that many bytes of memory, between what it booted with and what it was
    /// built for. How far it goes, and when, is up to it: see [`Machine::memory`].
    pub fn resize_memory(&self, bytes: u64) -> Result<(), Error> {
        self.memory.resize(bytes)
    }

    /// How much memory it uses, and can use.
    pub fn memory(&self) -> MemoryStatus {
        self.memory.status()
    }

    /// Gives the guest a new generation id, and tells it: what it believed to have for itself alone,
    /// random numbers above all, somebody else may have too. Best done while it is paused.
    pub fn renew_generation(&self) -> Result<(), Error> {
        self.generation.renew()
    }

    /// Ends the guest where it is.
    pub fn stop(&self) {
        self.shared.end(Outcome::Stopped);
    }

    /// Something that can stop the machine from elsewhere.
    pub fn stopper(&self) -> impl Fn() + Send + Sync + 'static {
        let shared = Arc::clone(&self.shared);
        move || shared.end(Outcome::Stopped)
    }

    /// Waits for the end.
    pub fn wait(&self) -> Outcome {
        let mut outcome = self.shared.outcome();
        loop {
            match &*outcome {
                Some(outcome) => return outcome.clone(),
                None => {
                    outcome = self.shared.over.wait(outcome).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Waits for the end, but no longer than `within`.
    pub fn wait_for(&self, within: Duration) -> Option<Outcome> {
        let outcome = self.shared.outcome();
        self.shared
            .over
            .wait_timeout_while(outcome, within, |outcome| outcome.is_none())
            .unwrap_or_else(PoisonError::into_inner)
            .0
            .clone()
    }

    /// The serial port, for input.
    pub fn console(&self) -> Arc<dyn InputPort> {
        Arc::clone(&self.console) as Arc<dyn InputPort>
    }

    /// What the console shows: its back-log, and attaching to it.
    pub fn console_output(&self) -> &Arc<Output> {
        &self.output
    }

    /// What went through the console.
    pub fn console_stats(&self) -> OutputStats {
        self.output.stats()
    }

    /// How long building it took.
    pub fn phases(&self) -> Phases {
        self.phases
    }

    /// Guest RAM.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Tells `observer` of everything that happens from now on.
    pub fn observe(&self, observer: Observer) {
        self.shared.observers.lock().unwrap_or_else(PoisonError::into_inner).list.push(observer);
    }

    /// What its virtio devices have done.
    pub fn device_counts(&self) -> Vec<DeviceCounts> {
        self.devices
            .iter()
            .map(|device| DeviceCounts {
                id: device.id.clone(),
                kind: device.kind,
                counts: device.transport.counters().get(),
            })
            .collect()
    }

    /// Has a device that was idle be served as all others are, now that it has been given something: its first queues, so
    /// many at most.
    pub fn engage(&self, id: &str, queues: usize) -> Result<(), Error> {
        match self.devices.iter().find(|device| device.id.as_str() == id) {
            Some(device) => self.native.engage(device, queues),
            None => Ok(()),
        }
    }

    /// Exits of each processor.
    pub fn counts(&self) -> Vec<Counts> {
        self.counters.iter().map(|counters| counters.get()).collect()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
        self.console.gate().close();
        for thread in self.threads.drain(..) {
            // A panic has been reported by itself, and the machine is over anyway.
            let _ = thread.join();
        }
        // Readers of its input may keep the port for as long as their source lasts.
        self.output.close();
    }
}
