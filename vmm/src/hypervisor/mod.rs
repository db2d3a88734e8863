//! The seam between the monitor and whatever runs guest instructions.
//!
//! Three traits: a [`Hypervisor`] makes a [`Vm`], a [`Vm`] makes [`Vcpu`]s and [`IrqLine`]s. They
//! speak only in types of this crate, so the run loop, the devices and the boot code are the same
//! on every backend. What differs between processors goes through the types of
//! [`arch::native`](crate::arch::native), not through methods that only one of them has.
//!
//! Threads: a [`Vcpu`] is created, used and dropped on one thread (Hypervisor.framework insists,
//! and KVM pays for a move); everything else may be called from any.

pub mod check;
mod exit;
#[cfg(target_os = "linux")]
pub mod kvm;
#[cfg(test)]
pub mod testing;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::arch::native;
use crate::event::Event;
use crate::memory::GuestRam;
use crate::registers;

pub use exit::{Crash, Exit, SystemEvent};

/// A host facility that can run guests.
pub trait Hypervisor: Send + Sync {
    /// The machines it makes.
    type Vm: Vm;

    /// Makes a machine with all of its memory and its interrupt controller.
    ///
    /// The order of construction decides the time it takes, by an order of magnitude, so all
    /// that is needed is in the plan and the order is the backend's.
    fn create_vm(&self, plan: &VmPlan) -> Result<Self::Vm, Error>;

    /// What it is called, by its snapshots too.
    fn name(&self) -> &'static str;

    /// What the host's processor can do for guests.
    fn cpu_model(&self) -> Result<native::CpuModel, Error>;

    /// What of this host a saved guest depends on, beyond its own state: a host with another one may not be
    /// able to go on with it.
    fn fingerprint(&self) -> Result<native::Fingerprint, Error>;
}

/// What a machine is made of.
#[derive(Debug, Clone)]
pub struct VmPlan {
    /// Guest RAM. The machine keeps a share, so the mapping outlives the guest's use of it.
    pub ram: Arc<GuestRam>,
    /// How many processors will be created, with ids from 0.
    pub vcpus: u32,
    /// Whether there is an interrupt controller in the hypervisor. Without one a processor that
    /// halts comes back with [`Exit::Halted`]; only guests of a few instructions do without.
    pub interrupt_controller: bool,
    /// Registers of devices, which a guest reads without an exit where the hypervisor can have it so.
    pub registers: Option<Arc<registers::Pages>>,
    /// Who answers the calls by which a guest of aarch64 turns processors and the machine on and off.
    pub psci: PsciBy,
}

/// Who answers PSCI calls. Elsewhere than on aarch64 there are none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum PsciBy {
    /// The hypervisor, which tells the monitor of the machine's end only.
    #[default]
    Hypervisor,
    /// The monitor, by way of the exit for calls. Processors but the first do not run before they have
    /// been entered at an address.
    Monitor,
}

/// One machine.
pub trait Vm: Send + Sync + 'static {
    /// Its processors.
    type Vcpu: Vcpu;

    /// What there is of a machine that is no processor's: interrupt controller and clocks.
    type State: State;

    /// Makes processor `id` for the calling thread.
    fn create_vcpu(&self, id: u32) -> Result<Self::Vcpu, Error>;

    /// To be called once, when all processors exist and none has run: what the interrupt controller
    /// could not settle before it knew them is settled now. Lines exist only after it.
    fn seal(&self) -> Result<(), Error>;

    /// The wire `line` of the interrupt controller: a GSI on x86_64, the number of a shared
    /// peripheral interrupt (INTID - 32) on aarch64.
    fn irq_line(&self, line: u32, trigger: Trigger) -> Result<Arc<dyn IrqLine>, Error>;

    /// Lets a store of the 32-bit `value` to `addr` set `event`, without an exit. False where the
    /// hypervisor cannot do that: then the store is an exit like any other. To be called when all
    /// processors exist.
    fn doorbell(&self, addr: u64, value: u32, event: &Event) -> Result<bool, Error>;

    /// What is no processor's. To be called when all processors stand still and have been
    /// [saved](Vcpu::save), and no device drives a wire.
    fn save(&self) -> Result<Self::State, Error>;

    /// Takes over what [`Vm::save`] gave. To be called once, or once after each [`Vm::rewind`], on a sealed machine of the
    /// same plan, after all processors have been [restored](Vcpu::restore) and before the first of them runs.
    fn restore(&self, state: &Self::State) -> Result<(), Error>;

    /// Lets processors and machine be restored anew, although they have run. To be called when all of them stand still; an
    /// error where the hypervisor knows no way back.
    fn rewind(&self) -> Result<(), Error>;
}

/// A part of a machine as it is written into a snapshot: complete, so that nothing is guessed where it is
/// read again. Its encoding is its type's; whatever changes that changes the format's epoch.
pub trait State: Serialize + DeserializeOwned + Clone + PartialEq + fmt::Debug + Send + 'static {}

impl<T: Serialize + DeserializeOwned + Clone + PartialEq + fmt::Debug + Send + 'static> State for T {}

/// How the guest was told to listen to a wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trigger {
    /// The interrupt is pending for as long as the wire is high.
    Level,
    /// Each rise of the wire is an interrupt.
    Edge,
}

/// A wire into the interrupt controller.
pub trait IrqLine: Send + Sync {
    /// Drives the wire. On an [`Trigger::Edge`] wire each `true` is one interrupt and `false` does
    /// nothing.
    fn set(&self, high: bool) -> Result<(), Error>;

    /// What the host's kernel can interrupt the guest with by itself: an eventfd, of which each write is one interrupt.
    fn event(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// One processor, owned by the thread that created it.
pub trait Vcpu {
    /// All that there is of it.
    type State: State;

    /// Its number, from 0.
    fn id(&self) -> u32;

    /// What the guest calls it: the APIC id on x86_64, MPIDR_EL1 on aarch64.
    fn hardware_id(&self) -> Result<u64, Error>;

    /// The means to get it out of [`Vcpu::run`] from another thread.
    fn kicker(&self) -> Arc<dyn Kick>;

    /// Sets the state before the first instruction. On a processor that has run it is a reset first, and
    /// nothing is left of what it did.
    fn enter_at(&mut self, entry: &native::Entry) -> Result<(), Error>;

    /// Runs the guest until something needs the monitor.
    ///
    /// The answer to a read is written into the exit's buffer and takes effect at the next call.
    /// That call *completes* the access before anything else, also when it has been kicked; so
    /// [`Exit::Kicked`] is the one point at which the processor is between two instructions and
    /// its state may be looked at, saved or replaced.
    fn run(&mut self) -> Result<Exit<'_>, Error>;

    /// All that has to be known to go on elsewhere, exactly here. To be called where [`Vcpu::run`] came
    /// back with [`Exit::Kicked`], or before it ran at all; it goes on as if nothing had been asked.
    fn save(&mut self) -> Result<Self::State, Error>;

    /// Becomes what was saved. To be called on one of the same number that has not run, or whose machine was
    /// [rewound](Vm::rewind).
    fn restore(&mut self, state: &Self::State) -> Result<(), Error>;

    /// Lets the guest know that it stood still, so that it does not take the time for its own: called
    /// between a pause and the next [`Vcpu::run`], and after [`Vcpu::restore`].
    fn stood_still(&mut self) -> Result<(), Error>;

    /// Has the hypervisor map `len` bytes of RAM from `addr` into the guest, whole pages, so that the first access to each needs
    /// no exit. To be called between [`Vcpu::restore`] and [`Vcpu::run`]. False where it knows no such thing.
    fn map_ahead(&mut self, _addr: u64, _len: u64) -> Result<bool, Error> {
        Ok(false)
    }

    /// General registers, for people who read crash reports.
    fn registers(&self) -> Result<native::Registers, Error>;
}

/// Gets one processor out of the guest.
pub trait Kick: Send + Sync {
    /// The current [`Vcpu::run`], or the next one if none is under way, returns [`Exit::Kicked`].
    ///
    /// Kicks are not counted: any number before the return is one. Whoever kicks says first, in
    /// memory that the processor's thread reads after the return, what it is wanted for.
    fn kick(&self);
}

/// The hypervisor refused something.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device node could not be opened.
    #[error("cannot open {}: {source}", path.display())]
    Open {
        /// Which node.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The node answers, but not as the hypervisor this crate speaks to.
    #[error("{} speaks version {found} of the interface, not {wanted}", path.display())]
    Version {
        /// Which node.
        path: PathBuf,
        /// What it said.
        found: i32,
        /// What is needed.
        wanted: i32,
    },
    /// A call failed.
    #[error("{call} on {object} failed: {source}")]
    Call {
        /// Name of the call in the hypervisor's own documentation.
        call: &'static str,
        /// What it was made on.
        object: String,
        /// What came back.
        source: io::Error,
    },
    /// The hypervisor took fewer values than it was given.
    #[error("{call} on {object} took {done} of {given} values; the next is {next}")]
    Partial {
        /// Name of the call.
        call: &'static str,
        /// What it was made on.
        object: String,
        /// How many were taken.
        done: usize,
        /// How many were given.
        given: usize,
        /// The first that was not.
        next: String,
    },
    /// A saved state is damaged, or of a machine that is not like this one.
    #[error(
        "cannot restore {object}: {why}; take a snapshot that was made whole, of a machine like this one"
    )]
    State {
        /// What it was to be the state of.
        object: String,
        /// What is wrong with it.
        why: String,
    },
    /// Guest RAM has more regions or other addresses than the hypervisor can map.
    #[error("cannot give the guest RAM at {base:#x}, {len:#x} bytes: {why}")]
    Ram {
        /// Guest-physical address.
        base: u64,
        /// Length.
        len: u64,
        /// What stands against it.
        why: &'static str,
    },
}
