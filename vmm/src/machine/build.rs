//! From a configuration to a machine that stands before its first instruction.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::board::{self, Wire};
use super::generation::Generation;
use super::life::{Attached, HeldPort, Machine, Notice, Phases, Shared};
use super::ram::{Extent, Ram};
use super::{Config, Error, OnSystemEvent};
use crate::arch::native::{Entry, boot, layout};
use crate::console::{InputPort, OnMarker, Output};
use crate::devices::virtio::mem::Mem;
use crate::devices::virtio::mmio::{self, Transport};
use crate::devices::virtio::{Device, Signals};
use crate::hypervisor::{self, Hypervisor, Kick, PsciBy, Trigger, Vcpu, Vm, VmPlan};
use crate::kernel::Image;
use crate::memory::GuestRam;
use crate::slots::{SlotId, SlotMap};
use crate::standstill::Standstill;
use crate::vcpu::{self, Buses, Counters, Member, Power};

/// What a processor's thread needs; it is on no deep call path.
const STACK: usize = 256 * 1024;
/// A processor is made in microseconds; an emulated host takes milliseconds.
const READY: Duration = Duration::from_secs(30);

impl Machine {
    /// Builds a machine. Its guest stands still until [`Machine::resume`].
    ///
    /// The kernel is loaded while the hypervisor makes machine and processors, since neither needs
    /// the other before the tables are written.
    pub fn build<H: Hypervisor>(hypervisor: &H, mut config: Config) -> Result<Self, Error> {
        let begun = Instant::now();
        config.check()?;
        let kernel = Image::open("kernel", &config.kernel)?;
        let initrd = config.initrd.as_deref().map(|path| Image::open("initrd", path)).transpose()?;
        let ram = Ram::new(&config)?;
        let mem = ram.device();
        let extent = Extent::new(&config, mem.as_ref().map(Mem::handle));
        if let Some(mem) = mem {
            config.devices.push((SlotId::new("mem"), Box::new(mem)));
        }
        let plan = VmPlan {
            ram: Arc::clone(&ram.all),
            vcpus: config.vcpus,
            interrupt_controller: true,
            psci: config.psci,
        };

        let (loaded, shell) = thread::scope(|scope| {
            let loader = scope.spawn(|| {
                let loaded = boot::load(&ram.boot, kernel, initrd);
                (loaded, begun.elapsed())
            });
            let shell = Shell::build(hypervisor, &plan);
            let shell = (shell, begun.elapsed());
            let loaded = loader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            (loaded, shell)
        });
        let ((loaded, load), (shell, made)) = (loaded, shell);
        let shell = shell?;
        let (loaded, model) = (loaded?, hypervisor.cpu_model()?);

        let output = Output::new(config.console, config.markers, shell.on_marker())
            .map_err(|source| Error::Host { what: "start the console's thread", source })?;
        let output = Arc::new(output);
        let mut board = board::assemble(&*shell.vm, Arc::clone(&output), shell.on_system_event(), None)?;
        let (slots, devices) =
            attach(&*shell.vm, &ram.all, config.devices, &shell.shared.standstill, &mut board.buses)?;
        let mut seed = [0; 64];
        crate::entropy::fill(&mut seed).map_err(|source| Error::Host { what: "get randomness", source })?;
        let platform = boot::Platform {
            command_line: &config.command_line,
            hardware_ids: &shell.hardware_ids,
            slots: &slots,
            model: &model,
            seed: &seed,
        };
        let entries =
            boot::finish(&ram.boot, &loaded, &platform).map_err(|error| Error::Tables(error.to_string()))?;
        let generation = Generation::new(Arc::clone(&ram.all), board.generation)?;
        let parts = Parts {
            buses: board.buses,
            console: board.console,
            output,
            power: board.power,
            generation,
            memory: extent,
            ram: ram.all,
            devices,
        };
        let mut machine = shell.start(parts, entries)?;
        machine.phases = Phases { hypervisor: made, load, build: begun.elapsed() };
        Ok(machine)
    }
}

/// What a machine is made of beside its processors.
struct Parts {
    buses: Buses,
    console: Arc<dyn InputPort>,
    output: Arc<Output>,
    power: Option<Wire>,
    generation: Generation,
    memory: Extent,
    ram: Arc<GuestRam>,
    devices: Vec<Attached>,
}

/// Gives each virtio device its slot, its wire and its doorbells.
fn attach<V: Vm>(
    vm: &V,
    ram: &Arc<GuestRam>,
    devices: Vec<(SlotId, Box<dyn Device>)>,
    standstill: &Arc<Standstill>,
    buses: &mut Buses,
) -> Result<(SlotMap, Vec<Attached>), Error> {
    let mut slots = SlotMap::new(layout::VIRTIO);
    let mut attached = Vec::new();
    for (id, device) in devices {
        let slot = slots.add(id.clone())?;
        let signals = Signals::new(vm.irq_line(slot.line, Trigger::Edge)?);
        let kind = device.kind();
        let transport = Transport::new(device, Arc::clone(ram), signals, Arc::clone(standstill))
            .map_err(|source| Error::Transport { id: id.clone(), source })?;
        for (index, doorbell) in (0..).zip(transport.doorbells()) {
            vm.doorbell(slot.base + mmio::QUEUE_NOTIFY, index, doorbell)?;
        }
        attached.push(Attached { id: id.clone(), kind, counters: Arc::clone(transport.counters()) });
        buses.memory.insert(id.as_str(), slot.base, slot.len, Arc::new(transport))?;
    }
    Ok((slots, attached))
}

/// A machine without devices or guest: memory, interrupt controller, and processors whose threads
/// wait to be told where to begin.
struct Shell<V> {
    vm: Arc<V>,
    shared: Arc<Shared>,
    hardware_ids: Vec<u64>,
    psci: PsciBy,
    processors: Vec<Processor>,
}

struct Processor {
    start: Sender<Start>,
    started: Receiver<Result<(), hypervisor::Error>>,
    thread: JoinHandle<()>,
    counters: Arc<Counters>,
}

struct Start {
    buses: Arc<Buses>,
    power: Option<Arc<Power>>,
    entry: Option<Entry>,
}

/// What a processor's thread reports when its processor exists.
struct Born {
    kicker: Arc<dyn Kick>,
    hardware_id: u64,
}

impl<V: Vm> Shell<V> {
    fn build<H: Hypervisor<Vm = V>>(hypervisor: &H, plan: &VmPlan) -> Result<Self, Error> {
        let vm = Arc::new(hypervisor.create_vm(plan)?);
        let shared = Arc::new(Shared::new()?);
        let mut processors = Vec::new();
        let mut births = Vec::new();
        for id in 0..plan.vcpus {
            let (processor, birth) = spawn(id, &vm, &shared)?;
            processors.push(processor);
            births.push((id, birth));
        }
        let mut hardware_ids = Vec::new();
        for (id, birth) in births {
            let born = birth.recv_timeout(READY).map_err(|_| Error::Thread(id))??;
            shared.add_kicker(born.kicker);
            hardware_ids.push(born.hardware_id);
        }
        vm.seal()?;
        Ok(Self { vm, shared, hardware_ids, psci: plan.psci, processors })
    }

    /// For devices, which must not keep the machine that keeps them.
    fn on_system_event(&self) -> OnSystemEvent {
        let shared: Weak<Shared> = Arc::downgrade(&self.shared);
        Arc::new(move |event| {
            if let Some(shared) = shared.upgrade() {
                shared.system_event(event);
            }
        })
    }

    /// For the console, likewise.
    fn on_marker(&self) -> OnMarker {
        let shared: Weak<Shared> = Arc::downgrade(&self.shared);
        Box::new(move |marker| {
            if let Some(shared) = shared.upgrade() {
                shared.notify(&Notice::Marker(marker));
            }
        })
    }

    fn start(self, parts: Parts, entries: Vec<Option<Entry>>) -> Result<Machine, Error> {
        let console = Arc::new(HeldPort {
            port: parts.console,
            standstill: Arc::clone(&self.shared.standstill),
            offering: Mutex::new(()),
        });
        let buses = Arc::new(parts.buses);
        let power = board::power(self.psci, &self.hardware_ids, &parts.ram).map(Arc::new);
        let (mut threads, mut counters, mut waits) = (Vec::new(), Vec::new(), Vec::new());
        for ((id, processor), entry) in (0..).zip(self.processors).zip(entries) {
            let start = Start { buses: Arc::clone(&buses), power: power.clone(), entry };
            processor.start.send(start).map_err(|_| Error::Thread(id))?;
            waits.push((id, processor.started));
            threads.push(processor.thread);
            counters.push(processor.counters);
        }
        let machine = Machine {
            shared: self.shared,
            threads,
            counters,
            console,
            output: parts.output,
            power: parts.power,
            generation: parts.generation,
            memory: parts.memory,
            ram: parts.ram,
            devices: parts.devices,
            phases: Phases::default(),
            _vm: Box::new(self.vm),
        };
        // From here on an error drops the machine, which stops its threads.
        for (id, started) in waits {
            match started.recv_timeout(READY) {
                Ok(result) => result?,
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    return Err(Error::Thread(id));
                }
            }
        }
        Ok(machine)
    }
}

type Birth = Receiver<Result<Born, hypervisor::Error>>;

fn spawn<V: Vm>(id: u32, vm: &Arc<V>, shared: &Arc<Shared>) -> Result<(Processor, Birth), Error> {
    let (birth, births) = channel();
    let (start, starts) = channel();
    let (started_tx, started) = channel();
    let counters = Arc::new(Counters::default());
    let thread = {
        let (vm, shared, counters) = (Arc::clone(vm), Arc::clone(shared), Arc::clone(&counters));
        let member = Member::join(shared.standstill.epoch());
        thread::Builder::new()
            .name(format!("vcpu{id}"))
            .stack_size(STACK)
            .spawn(move || {
                let Some(mut vcpu) = be_born(id, &*vm, &birth) else { return };
                // Whoever builds gave up: there is nothing to run.
                let Ok(Start { buses, power, entry }) = starts.recv() else { return };
                let entered = entry.map_or(Ok(()), |entry| vcpu.enter_at(&entry));
                let ready = entered.is_ok();
                if started_tx.send(entered).is_err() || !ready {
                    return;
                }
                let ended = vcpu::run(&mut vcpu, &buses, power.as_deref(), &member, &counters);
                // What it means for the machine is told by its outcome.
                log::debug!("vcpu {id}: {ended:?}");
                shared.ended(id, ended);
            })
            .map_err(|source| Error::Host { what: "start a processor's thread", source })?
    };
    Ok((Processor { start, started, thread, counters }, births))
}

fn be_born<V: Vm>(id: u32, vm: &V, birth: &Sender<Result<Born, hypervisor::Error>>) -> Option<V::Vcpu> {
    let made = vm.create_vcpu(id).and_then(|vcpu| {
        let born = Born { kicker: vcpu.kicker(), hardware_id: vcpu.hardware_id()? };
        Ok((vcpu, born))
    });
    let (vcpu, born) = match made {
        Ok((vcpu, born)) => (Some(vcpu), Ok(born)),
        Err(error) => (None, Err(error)),
    };
    birth.send(born).ok().and(vcpu)
}

/// The loader fills the RAM that the hypervisor maps meanwhile; both only need to share it.
const _: fn() = || {
    fn shared<T: Sync>() {}
    shared::<GuestRam>();
};
