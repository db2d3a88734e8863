//! A machine without devices or guest: memory, interrupt controller, and processors whose threads wait to be told
//! how to begin, and then where their accesses go.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::life::{Attached, Notice, Shared};
use super::{Error, OnSystemEvent};
use crate::arch::native::{Entry, Registers};
use crate::console::OnMarker;
use crate::hypervisor::{self, Hypervisor, Kick, Vcpu, Vm, VmPlan};
use crate::memory::{self, GuestRam};
use crate::snapshot::Snapshot;
use crate::vcpu::{self, Buses, Counters, Desk, Member, Power};

/// What a processor's thread needs; it is on no deep call path.
const STACK: usize = 256 * 1024;
/// A processor is made, or gets its state, in microseconds; an emulated host takes milliseconds.
const READY: Duration = Duration::from_secs(30);

pub(super) type VcpuState<V> = <<V as Vm>::Vcpu as Vcpu>::State;

/// The shell.
pub(super) struct Shell<V: Vm> {
    pub(super) vm: Arc<V>,
    pub(super) shared: Arc<Shared>,
    pub(super) hardware_ids: Vec<u64>,
    processors: Vec<Processor<VcpuState<V>>>,
}

struct Processor<S> {
    begin: Sender<Begin<S>>,
    begun: Receiver<Result<(), hypervisor::Error>>,
    next: Sender<Next>,
    thread: JoinHandle<()>,
    counters: Arc<Counters>,
    desk: Arc<Desk<S>>,
}

/// How a processor begins.
pub(super) enum Begin<S> {
    /// Here, or when somebody in the guest says where.
    Enter(Option<Box<Entry>>),
    /// Where another one stood still.
    Restore(Box<S>),
}

/// Pages of RAM.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pages {
    pub(super) addr: u64,
    pub(super) len: u64,
    /// The guest will write to them.
    pub(super) written: bool,
}

/// What a guest will have use for at once.
pub(super) struct Ahead {
    pub(super) ram: Arc<GuestRam>,
    pub(super) pages: Vec<Pages>,
}

impl Ahead {
    /// Has it all there. What does not work is done when the guest asks for it.
    fn bring(self, vcpu: &mut impl Vcpu) {
        for Pages { addr, len, written } in self.pages {
            // Before it is mapped: that a page is another one later would take it out again.
            let brought = if written { memory::populate(&self.ram, addr, len) } else { Ok(()) };
            let brought = brought.map_err(|error| error.to_string());
            match brought.and_then(|()| vcpu.map_ahead(addr, len).map_err(|error| error.to_string())) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => return log::debug!("pages are not mapped ahead: {error}"),
            }
        }
    }
}

/// What comes after a processor has begun.
enum Next {
    /// By calls of the processor's, in which KVM lets nobody set an interrupt controller: that is what it was by now.
    Bring(Ahead),
    Start(Start),
}

struct Start {
    buses: Arc<Buses>,
    power: Option<Arc<Power>>,
}

/// What a processor's thread reports when its processor exists.
struct Born {
    kicker: Arc<dyn Kick>,
    hardware_id: u64,
}

/// The threads of a machine that was started.
pub(super) struct Crew<V: Vm> {
    pub(super) threads: Vec<JoinHandle<()>>,
    pub(super) counters: Vec<Arc<Counters>>,
    pub(super) desks: Vec<Arc<Desk<VcpuState<V>>>>,
    pub(super) vm: Arc<V>,
    pub(super) shared: Arc<Shared>,
}

impl<V: Vm> Shell<V> {
    /// Makes machine and processors.
    pub(super) fn build<H: Hypervisor<Vm = V>>(hypervisor: &H, plan: &VmPlan) -> Result<Self, Error> {
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
        Ok(Self { vm, shared, hardware_ids, processors })
    }

    /// For devices, which must not keep the machine that keeps them.
    pub(super) fn on_system_event(&self) -> OnSystemEvent {
        let shared: Weak<Shared> = Arc::downgrade(&self.shared);
        Arc::new(move |event| {
            if let Some(shared) = shared.upgrade() {
                shared.system_event(event);
            }
        })
    }

    /// For the console, likewise.
    pub(super) fn on_marker(&self) -> OnMarker {
        let shared: Weak<Shared> = Arc::downgrade(&self.shared);
        Box::new(move |marker| {
            if let Some(shared) = shared.upgrade() {
                shared.notify(&Notice::Marker(marker));
            }
        })
    }

    /// Tells each processor how to begin, all at the same time, and waits until they have.
    pub(super) fn begin(&self, how: impl IntoIterator<Item = Begin<VcpuState<V>>>) -> Result<(), Error> {
        for ((id, processor), how) in (0..).zip(&self.processors).zip(how) {
            processor.begin.send(how).map_err(|_| Error::Thread(id))?;
        }
        for (id, processor) in (0..).zip(&self.processors) {
            processor.begun.recv_timeout(READY).map_err(|_| Error::Thread(id))??;
        }
        Ok(())
    }

    /// Has each processor bring its share of the memory, while the devices are made. They have begun, and the machine around
    /// them is restored.
    pub(super) fn bring(&self, shares: impl IntoIterator<Item = Ahead>) -> Result<(), Error> {
        for ((id, processor), share) in (0..).zip(&self.processors).zip(shares) {
            processor.next.send(Next::Bring(share)).map_err(|_| Error::Thread(id))?;
        }
        Ok(())
    }

    /// Lets the processors follow the epoch. They have begun.
    pub(super) fn start(self, buses: Buses, power: Option<&Arc<Power>>) -> Result<Crew<V>, Error> {
        let buses = Arc::new(buses);
        let mut crew = Crew {
            threads: Vec::new(),
            counters: Vec::new(),
            desks: Vec::new(),
            vm: self.vm,
            shared: self.shared,
        };
        for (id, processor) in (0..).zip(self.processors) {
            let start = Start { buses: Arc::clone(&buses), power: power.cloned() };
            processor.next.send(Next::Start(start)).map_err(|_| Error::Thread(id))?;
            crew.threads.push(processor.thread);
            crew.counters.push(processor.counters);
            crew.desks.push(processor.desk);
        }
        Ok(crew)
    }
}

/// What all of the machine but its RAM and devices is, encoded.
pub(super) struct Encoded {
    pub(super) vcpus: Vec<Vec<u8>>,
    pub(super) vm: Vec<u8>,
}

/// Where a machine's state comes from, and goes to, whatever the hypervisor's types.
pub(super) trait Native: Send + Sync {
    /// The machine stands still.
    fn save(&self) -> Result<Encoded, Error>;

    /// The processors' registers. The machine stands still.
    fn registers(&self) -> Result<Vec<Registers>, Error>;

    /// Has the hypervisor ring the doorbells of a device's first queues, so many at most.
    fn engage(&self, device: &Attached, queues: usize) -> Result<(), Error>;

    /// Reads processors and interrupt controller from a snapshot of the same shape, without touching the machine.
    fn read(&self, snapshot: &Snapshot) -> Result<Rewind<'_>, Error>;
}

/// Has processors and interrupt controller become what was [read](Native::read), on a machine that stands still.
pub(super) type Rewind<'a> = Box<dyn FnOnce() -> Result<(), Error> + 'a>;

/// The processors' desks and their machine.
pub(super) struct Source<V: Vm> {
    pub(super) vm: Arc<V>,
    pub(super) desks: Vec<Arc<Desk<VcpuState<V>>>>,
    pub(super) shared: Arc<Shared>,
}

impl<V: Vm> Native for Source<V> {
    fn save(&self) -> Result<Encoded, Error> {
        let states = self.answers(self.desks.iter().map(|desk| desk.ask()).collect())?;
        let vcpus = states.iter().map(encode).collect::<Result<_, _>>()?;
        Ok(Encoded { vcpus, vm: encode(&self.vm.save()?)? })
    }

    fn registers(&self) -> Result<Vec<Registers>, Error> {
        self.answers(self.desks.iter().map(|desk| desk.look()).collect())
    }

    fn engage(&self, device: &Attached, queues: usize) -> Result<(), Error> {
        device.engage(&*self.vm, queues)
    }

    fn read(&self, snapshot: &Snapshot) -> Result<Rewind<'_>, Error> {
        let (vcpus, vm) = read_native::<V>(snapshot)?;
        Ok(Box::new(move || {
            self.vm.rewind()?;
            let orders = self.desks.iter().zip(vcpus).map(|(desk, state)| desk.put(state)).collect();
            self.answers(orders)?;
            Ok(self.vm.restore(&vm)?)
        }))
    }
}

impl<V: Vm> Source<V> {
    /// What all processors say to the order that was left on their desks.
    fn answers<T>(&self, answers: Vec<Receiver<Result<T, hypervisor::Error>>>) -> Result<Vec<T>, Error> {
        self.shared.standstill.epoch().nudge();
        let all = (0..)
            .zip(answers)
            .map(|(id, answer)| Ok(answer.recv_timeout(READY).map_err(|_| Error::Thread(id))??));
        all.collect()
    }
}

/// Each processor, and the interrupt controller.
pub(super) type States<V> = (Vec<Box<VcpuState<V>>>, <V as Vm>::State);

/// What a snapshot has of them.
pub(super) fn read_native<V: Vm>(snapshot: &Snapshot) -> Result<States<V>, Error> {
    let decoded = |bytes: &Vec<u8>| Ok(Box::new(snapshot.decode(bytes, "a processor")?));
    let vcpus = snapshot.state.vcpus.iter().map(decoded).collect::<Result<_, Error>>()?;
    Ok((vcpus, snapshot.decode(&snapshot.state.vm, "the interrupt controller")?))
}

fn encode(state: &impl serde::Serialize) -> Result<Vec<u8>, Error> {
    postcard::to_stdvec(state).map_err(|error| crate::snapshot::Error::Unfit(error.to_string()).into())
}

type Birth = Receiver<Result<Born, hypervisor::Error>>;

fn spawn<V: Vm>(
    id: u32,
    vm: &Arc<V>,
    shared: &Arc<Shared>,
) -> Result<(Processor<VcpuState<V>>, Birth), Error> {
    let (birth, births) = channel();
    let (begin, begins) = channel();
    let (begun_tx, begun) = channel();
    let (next, nexts) = channel();
    let counters = Arc::new(Counters::default());
    let desk = Arc::new(Desk::default());
    let thread = {
        let (vm, shared) = (Arc::clone(vm), Arc::clone(shared));
        let (counters, desk) = (Arc::clone(&counters), Arc::clone(&desk));
        let member = Member::join(shared.standstill.epoch());
        thread::Builder::new()
            .name(format!("vcpu{id}"))
            .stack_size(STACK)
            .spawn(move || {
                let Some(mut vcpu) = be_born(id, &*vm, &birth) else { return };
                drop(vm);
                // Whoever builds gave up: there is nothing to run.
                let Ok(how) = begins.recv() else { return };
                let done = match how {
                    Begin::Enter(entry) => entry.map_or(Ok(()), |entry| vcpu.enter_at(&entry)),
                    Begin::Restore(state) => vcpu.restore(&state).and_then(|()| vcpu.stood_still()),
                };
                let ready = done.is_ok();
                if begun_tx.send(done).is_err() || !ready {
                    return;
                }
                let Start { buses, power } = loop {
                    match nexts.recv() {
                        Ok(Next::Bring(ahead)) => ahead.bring(&mut vcpu),
                        Ok(Next::Start(start)) => break start,
                        Err(_) => return,
                    }
                };
                let ended = vcpu::run(&mut vcpu, &desk, &buses, power.as_deref(), &member, &counters);
                // What it means for the machine is told by its outcome.
                log::debug!("vcpu {id}: {ended:?}");
                shared.ended(id, ended);
            })
            .map_err(|source| Error::Host { what: "start a processor's thread", source })?
    };
    Ok((Processor { begin, begun, next, thread, counters, desk }, births))
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
