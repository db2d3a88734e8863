//! From a configuration to a machine that stands before its first instruction, or from a snapshot to one that
//! stands where another one stood. There is one way for both, and what differs is what each part begins with.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io::Write;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use super::board::{self, Board};
use super::generation::Generation;
use super::life::{Attached, HeldPort, Machine, Phases};
use super::ram::{Extent, Ram};
use super::shell::{Begin, Shell, Source, VcpuState, read_native};
use super::{Config, Error, Restore};
use crate::arch::native::{boot, layout};
use crate::console::{Marker, Output};
use crate::devices::virtio::mem::Mem;
use crate::devices::virtio::mmio::Transport;
use crate::devices::virtio::{Device, Signals};
use crate::event::Event;
use crate::hypervisor::{Hypervisor, IrqLine, Trigger, Vm, VmPlan};
use crate::kernel::Image;
use crate::memory::GuestRam;
use crate::registers;
use crate::slots::{SlotId, SlotMap};
use crate::snapshot::{Layers, Shape, Snapshot};
use crate::standstill::Standstill;
use crate::vcpu::Buses;

/// Devices by name.
type Devices = Vec<(SlotId, Box<dyn Device>)>;

/// What a machine's guest begins with.
enum Origin {
    Boot(Boot),
    Snapshot(Box<Snapshot>),
}

struct Boot {
    kernel: Image,
    initrd: Option<Image>,
    command_line: String,
}

/// What a machine is fitted with, whatever its guest begins with.
struct Fittings {
    console: Box<dyn Write + Send>,
    markers: Vec<Marker>,
    devices: Devices,
}

impl Machine {
    /// Builds a machine. Its guest stands still until [`Machine::resume`].
    pub fn build<H: Hypervisor>(hypervisor: &H, config: Config) -> Result<Self, Error> {
        let begun = Instant::now();
        config.check()?;
        let kernel = Image::open("kernel", &config.kernel)?;
        let initrd = config.initrd.as_deref().map(|path| Image::open("initrd", path)).transpose()?;
        let shape = config.shape();
        let ram = Ram::new(&shape)?;
        let origin = Origin::Boot(Boot { kernel, initrd, command_line: config.command_line });
        let Config { console, markers, devices, .. } = config;
        raise(hypervisor, begun, shape, ram, origin, Fittings { console, markers, devices })
    }

    /// Goes on with a machine from where its snapshot was taken. Its guest stands still until
    /// [`Machine::resume`]. Whatever fails, nothing is left of it.
    pub fn restore<H: Hypervisor>(hypervisor: &H, restore: Restore) -> Result<Self, Error> {
        let begun = Instant::now();
        let Restore { snapshot, console, markers, devices } = restore;
        let shape = snapshot.state.shape;
        super::config::check_shape(&shape).map_err(|error| snapshot.damaged(error.to_string()))?;
        if snapshot.state.vcpus.len() != shape.vcpus as usize {
            let found = snapshot.state.vcpus.len();
            return Err(snapshot.damaged(format!("it has {found} of {} processors", shape.vcpus)).into());
        }
        let devices = in_order(&snapshot, devices)?;
        let ram = Ram::restored(&snapshot)?;
        let origin = Origin::Snapshot(Box::new(snapshot));
        raise(hypervisor, begun, shape, ram, origin, Fittings { console, markers, devices })
    }
}

/// The devices in the order of the snapshot's slots: they must be the same.
fn in_order(snapshot: &Snapshot, mut devices: Devices) -> Result<Devices, Error> {
    let mut ordered = Vec::new();
    for (id, _) in &snapshot.state.devices {
        // The machine's own, which is made with its memory.
        if id == MEM {
            continue;
        }
        let at = devices.iter().position(|(given, _)| given.as_str() == id);
        let at =
            at.ok_or_else(|| Error::Device { id: SlotId::new(id), why: "the snapshot has it; give it too" })?;
        ordered.push(devices.swap_remove(at));
    }
    match devices.pop() {
        Some((id, _)) => Err(Error::Device { id, why: "the snapshot does not have it; leave it out" }),
        None => Ok(ordered),
    }
}

/// The name of the device by which memory is plugged.
const MEM: &str = "mem";

/// The one way to a machine. Loading, and decoding, goes on while the hypervisor makes machine and processors, since
/// neither needs the other before the end.
fn raise<H: Hypervisor>(
    hypervisor: &H,
    begun: Instant,
    shape: Shape,
    ram: Ram,
    origin: Origin,
    mut fittings: Fittings,
) -> Result<Machine, Error> {
    let mem = ram.device();
    let extent = Extent::new(&shape, mem.as_ref().map(Mem::handle));
    if let Some(mem) = mem {
        fittings.devices.push((SlotId::new(MEM), Box::new(mem)));
    }
    let registers = registers::Pages::new(layout::VIRTIO.base, fittings.devices.len())?;
    let plan = VmPlan {
        ram: Arc::clone(&ram.all),
        vcpus: shape.vcpus,
        interrupt_controller: true,
        registers: Some(Arc::clone(&registers)),
        psci: shape.psci,
    };
    let (guest, load, shell, made) = thread::scope(|scope| {
        let loader = scope.spawn(|| {
            let guest = Guest::<H::Vm>::load(origin, &ram.boot);
            (guest, begun.elapsed())
        });
        let shell = Shell::build(hypervisor, &plan);
        let made = begun.elapsed();
        let (guest, load) = loader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (guest, load, shell, made)
    });
    let (shell, mut guest) = (shell?, guest?);
    // Cheap now that there is a processor to ask.
    let fingerprint = hypervisor.fingerprint()?;
    if let Some(snapshot) = guest.snapshot() {
        snapshot.check_host(hypervisor.name(), &fingerprint)?;
    }
    guest.begin_early(&shell, &ram)?;
    let output = Output::new(fittings.console, fittings.markers, shell.on_marker())
        .map_err(|source| Error::Host { what: "start the console's thread", source })?;
    let output = Arc::new(output);
    let saved = guest.snapshot();
    let mut board = board::assemble(&*shell.vm, Arc::clone(&output), shell.on_system_event())?;
    if let Some(snapshot) = saved {
        board.chips.restore(&snapshot.state.board)?;
    }
    let standstill = Arc::clone(&shell.shared.standstill);
    let (slots, devices) =
        attach(&*shell.vm, &ram.all, &registers, fittings.devices, &standstill, &mut board.buses)?;
    let power =
        board::power(shape.psci, &shell.hardware_ids, &ram.all, saved.map(|snapshot| &snapshot.state))
            .map_err(|why| Error::Tables(why.to_owned()))?
            .map(Arc::new);
    guest.finish(hypervisor, &ram.boot, &shell, &slots, &devices)?;
    let under = guest.into_layers();
    let Board { buses, console, power: button, generation, chips } = board;
    let generation = Generation::new(Arc::clone(&ram.all), generation)?;
    if under.is_some() {
        // Another one may go on from the same snapshot, or has.
        generation.renew()?;
    }
    let crew = shell.start(buses, power.as_ref())?;
    let console = Arc::new(HeldPort { port: console, standstill, offering: Mutex::new(()) });
    Ok(Machine {
        native: Box::new(Source { vm: crew.vm, desks: crew.desks, shared: Arc::clone(&crew.shared) }),
        shared: crew.shared,
        turn: Mutex::new(()),
        threads: crew.threads,
        counters: crew.counters,
        console,
        output,
        button,
        generation,
        memory: extent,
        ram: ram.all,
        under,
        devices,
        shape,
        hypervisor: hypervisor.name(),
        fingerprint,
        power,
        chips,
        phases: Phases { hypervisor: made, load, build: begun.elapsed() },
    })
}

/// A guest on its way into the machine.
enum Guest<V: Vm> {
    /// A kernel in RAM.
    Booting { loaded: boot::Loaded, command_line: String },
    /// What another machine was.
    Saved { snapshot: Box<Snapshot>, vcpus: Vec<Box<VcpuState<V>>>, vm: V::State },
}

impl<V: Vm> Guest<V> {
    /// Needs nothing of the machine but its memory.
    fn load(origin: Origin, ram: &GuestRam) -> Result<Self, Error> {
        match origin {
            Origin::Boot(Boot { kernel, initrd, command_line }) => {
                Ok(Self::Booting { loaded: boot::load(ram, kernel, initrd)?, command_line })
            }
            Origin::Snapshot(snapshot) => {
                let (vcpus, vm) = read_native::<V>(&snapshot)?;
                Ok(Self::Saved { snapshot, vcpus, vm })
            }
        }
    }

    fn snapshot(&self) -> Option<&Snapshot> {
        match self {
            Self::Booting { .. } => None,
            Self::Saved { snapshot, .. } => Some(snapshot),
        }
    }

    /// What its memory is mapped from.
    fn into_layers(self) -> Option<Layers> {
        match self {
            Self::Booting { .. } => None,
            Self::Saved { snapshot, .. } => Some(snapshot.memory),
        }
    }

    /// Processors and interrupt controller become what they were before anything drives a wire.
    fn begin_early(&mut self, shell: &Shell<V>, ram: &Ram) -> Result<(), Error> {
        if let Self::Saved { vcpus, vm, .. } = self {
            let shares = ram.ahead(vcpus.len());
            shell.begin(vcpus.drain(..).map(Begin::Restore))?;
            shell.vm.restore(vm)?;
            shell.bring(shares)?;
        }
        Ok(())
    }

    /// What comes last, since it needs all devices in their places: the tables to boot by, or what the devices were.
    fn finish(
        &self,
        hypervisor: &impl Hypervisor<Vm = V>,
        ram: &GuestRam,
        shell: &Shell<V>,
        slots: &SlotMap,
        devices: &[Attached],
    ) -> Result<(), Error> {
        match self {
            Self::Booting { loaded, command_line } => {
                let mut seed = [0; 64];
                crate::entropy::fill(&mut seed)
                    .map_err(|source| Error::Host { what: "get randomness", source })?;
                let platform = boot::Platform {
                    command_line,
                    hardware_ids: &shell.hardware_ids,
                    slots,
                    model: &hypervisor.cpu_model()?,
                    seed: &seed,
                };
                let entries = boot::finish(ram, loaded, &platform);
                let entries = entries.map_err(|error| Error::Tables(error.to_string()))?;
                shell.begin(entries.into_iter().map(|entry| Begin::Enter(entry.map(Box::new))))
            }
            Self::Saved { snapshot, .. } => {
                // Both are in the order of the slots, and of the same length: the devices were put in that order.
                for (device, (_, state)) in devices.iter().zip(&snapshot.state.devices) {
                    let restored = device.transport.restore(state);
                    restored.map_err(|source| Error::RestoreDevice { id: device.id.clone(), source })?;
                }
                Ok(())
            }
        }
    }
}

/// Gives each virtio device its slot, its wire and, but for those that are idle, its doorbells.
fn attach<V: Vm>(
    vm: &V,
    ram: &Arc<GuestRam>,
    registers: &Arc<registers::Pages>,
    devices: Devices,
    standstill: &Arc<Standstill>,
    buses: &mut Buses,
) -> Result<(SlotMap, Vec<Attached>), Error> {
    let mut slots = SlotMap::new(layout::VIRTIO);
    // One end for all who share a wire: two of them would each lower what the other has just raised.
    let mut wires: BTreeMap<u32, Arc<dyn IrqLine>> = BTreeMap::new();
    let acknowledged = Event::new().map_err(|source| Error::Host { what: "make an eventfd", source })?;
    let acknowledged = Arc::new(acknowledged);
    let mut attached = Vec::new();
    for (id, device) in devices {
        let slot =
            if device.shares_wire() { slots.add_sharing(id.clone())? } else { slots.add(id.clone())? };
        let wire = match wires.entry(slot.line) {
            Entry::Occupied(wire) => Arc::clone(wire.get()),
            Entry::Vacant(place) => Arc::clone(place.insert(vm.irq_line(slot.line, Trigger::Edge)?)),
        };
        let (kind, idle) = (device.kind(), device.is_idle());
        let signals = Signals::new(wire, registers.page(slot.base));
        let transport = Transport::new(device, Arc::clone(ram), signals, Arc::clone(standstill))
            .map_err(|source| Error::Transport { id: id.clone(), source })?;
        let transport = Arc::new(transport);
        buses.memory.insert(id.as_str(), slot.base, slot.len, Arc::clone(&transport) as _)?;
        let acknowledged = Arc::clone(&acknowledged);
        let device = Attached { id, kind, base: slot.base, transport, acknowledged, engaged: Mutex::new(0) };
        if !idle {
            device.engage(vm, usize::MAX)?;
        }
        attached.push(device);
    }
    Ok((slots, attached))
}

/// Slots are next to each other.
const _: () = assert!(layout::VIRTIO.stride == registers::WINDOW);

/// The loader fills the RAM that the hypervisor maps meanwhile; both only need to share it.
const _: fn() = || {
    fn shared<T: Sync>() {}
    shared::<GuestRam>();
};
