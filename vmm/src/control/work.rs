//! What takes time, or touches the machine more than a flag: done one by one, on a thread of its own.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::{GuestMemory, GuestMemoryRegion, MemoryRegionAddress};

use super::server::{Cable, OnCable};
use super::{
    Console, Crash, Device, Event, Exits, Look, Memory, Outcome, QueueSight, Ram, Refusal, RefusalKind,
    Reply, Request, Sight, Stats, Status, stats,
};
use crate::console::feed;
use crate::devices::virtio::block::{Drive, Medium, SERIAL_MAX};
use crate::machine::{self, Machine, Notice};
use crate::memory::GuestRam;
use crate::snapshot::{Form, Snapshot};

/// No pause is waited for longer.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// How long somebody at the console may leave it unread before they are let go.
const CONSOLE_PATIENCE: Duration = Duration::from_secs(5);
/// People who type at the same time.
const READERS_MAX: usize = 8;

/// A request with its descriptors.
pub(super) struct Job {
    pub(super) request: Request,
    pub(super) fds: Vec<OwnedFd>,
}

pub(super) struct Worker {
    pub(super) machine: Weak<Machine>,
    pub(super) started: Instant,
    pub(super) on_cable: Option<OnCable>,
    pub(super) drives: Vec<(String, Drive)>,
    pub(super) origin: Option<PathBuf>,
    pub(super) readers: Arc<AtomicUsize>,
}

impl Worker {
    pub(super) fn perform(&self, job: Job) -> Result<Reply, Refusal> {
        let machine = self.machine.upgrade().ok_or_else(|| {
            Refusal::new(RefusalKind::State, "the machine is over; its monitor is about to end")
        })?;
        match job.request {
            Request::Pause { within_ms } => {
                Ok(machine.pause(Duration::from_millis(within_ms).min(PAUSE_MAX))?).map(|()| Reply::Done)
            }
            Request::Resume => Ok(machine.resume()?).map(|()| Reply::Done),
            Request::PowerButton => Ok(machine.press_power_button()?).map(|()| Reply::Done),
            Request::Resize { memory: None, vcpus: None } => Err(Refusal::new(
                RefusalKind::Invalid,
                "cannot resize the machine to nothing: name memory or vcpus",
            )),
            Request::Resize { vcpus: Some(_), .. } => Err(Refusal::new(
                RefusalKind::Unsupported,
                "cannot change the number of processors: a machine keeps those it was built with; its guest \
                 turns them on and off (/sys/devices/system/cpu/cpuN/online)",
            )),
            Request::Resize { memory: Some(bytes), vcpus: None } => {
                Ok(machine.resize_memory(bytes)?).map(|()| Reply::Done)
            }
            Request::Snapshot { packed, over } => match (packed, over) {
                (false, false) => snapshot(&machine, job.fds, Form::Sparse),
                (true, false) => snapshot(&machine, job.fds, Form::Packed),
                (false, true) => snapshot(&machine, job.fds, Form::Over),
                (true, true) => Err(Refusal::new(
                    RefusalKind::Invalid,
                    "cannot write a snapshot that is packed and over another one: what is carried has all of it",
                )),
            },
            Request::Reset => {
                let directory = self.origin.as_ref().ok_or(machine::Error::Booted("reset"))?;
                let snapshot = Snapshot::open(directory).map_err(machine::Error::from)?;
                Ok(machine.reset(&snapshot)?).map(|()| Reply::Done)
            }
            Request::RecordUse => {
                let file = File::from(one(job.fds, "the file to write")?);
                check_empty(&file, "write down what the machine uses")?;
                if machine.record_use(&file)? {
                    Ok(Reply::Done)
                } else {
                    Err(Refusal::new(
                        RefusalKind::State,
                        "the machine has written to too much of its memory for a hint",
                    ))
                }
            }
            Request::Look => Ok(Reply::Look(look(machine.look()?))),
            Request::Stats => Ok(Reply::Stats(Box::new(self.stats(&machine)))),
            Request::AttachTap { .. } if job.fds.is_empty() => Err(Refusal::new(
                RefusalKind::Invalid,
                "no descriptor came with the request: it takes one for each queue of the tap",
            )),
            Request::AttachTap { slot, vhost } => {
                let mut taps = job.fds;
                // Whoever gave an odd number is told what is missing by the device.
                let vhost = if vhost { taps.split_off(taps.len().div_ceil(2)) } else { Vec::new() };
                self.plug(&machine, &slot, Cable::Taps { taps, vhost })
            }
            Request::AttachSocket { slot } => {
                self.plug(&machine, &slot, Cable::Socket(one(job.fds, "the connected socket")?))
            }
            Request::InsertDisk { drive, serial, read_only } => {
                let file = File::from(one(job.fds, "the disk")?);
                self.insert(&machine, &drive, &serial, file, read_only)
            }
            Request::EjectDisk { drive } => {
                let ejected = self.drive(&drive)?.eject();
                let why = |error| unplaced(format!("cannot take the disk out of {drive}: {error}"));
                ejected.map(|_| Reply::Done).map_err(why)
            }
            Request::ConsoleLog => {
                let output = machine.console_output();
                let text = String::from_utf8_lossy(&output.backlog()).into_owned();
                Ok(Reply::Log { text, written: output.stats().bytes })
            }
            Request::ConsoleAttach { replay } => self.attach(&machine, one(job.fds, "the socket")?, replay),
            // Not work: answered where they came in.
            Request::State | Request::Stop | Request::Kill | Request::Events => Ok(Reply::Done),
        }
    }

    fn plug(&self, machine: &Machine, slot: &str, cable: Cable) -> Result<Reply, Refusal> {
        let queues = cable.queues();
        match &self.on_cable {
            Some(plug) => plug(slot, cable)?,
            None => {
                return Err(Refusal::new(
                    RefusalKind::Unsupported,
                    "cannot plug in a cable: this machine was built without network devices",
                ));
            }
        }
        // Without that it is only slower.
        if let Err(error) = machine.engage(slot, queues) {
            log::warn!("{slot}: {error}");
        }
        Ok(Reply::Done)
    }

    fn drive(&self, name: &str) -> Result<&Drive, Refusal> {
        let found = self.drives.iter().find(|(drive, _)| drive == name);
        found.map(|(_, drive)| drive).ok_or_else(|| {
            let count = self.drives.len();
            let why =
                format!("there is no drive {name}: this machine has {count}, drive.0 is the first --drive");
            Refusal::new(RefusalKind::Invalid, why)
        })
    }

    fn insert(
        &self,
        machine: &Machine,
        name: &str,
        serial: &str,
        file: File,
        read_only: bool,
    ) -> Result<Reply, Refusal> {
        let drive = self.drive(name)?;
        let invalid = |why: String| Refusal::new(RefusalKind::Invalid, why);
        if serial.is_empty() || serial.len() > SERIAL_MAX {
            return Err(invalid(format!(
                "a serial number of {} bytes: it has 1 to {SERIAL_MAX}",
                serial.len()
            )));
        }
        let medium = Medium::of(file, serial.as_ref(), read_only);
        let medium = medium.map_err(|error| invalid(error.to_string()))?.named(serial);
        let inserted = drive.insert(medium);
        inserted.map_err(|error| unplaced(format!("cannot put the disk {serial} into {name}: {error}")))?;
        if let Err(error) = machine.engage(name, usize::MAX) {
            log::warn!("{name}: {error}");
        }
        Ok(Reply::Done)
    }

    fn stats(&self, machine: &Machine) -> Stats {
        let console = machine.console_stats();
        let exits = |counts: crate::vcpu::Counts| Exits {
            memory: counts.memory,
            ports: counts.ports,
            calls: counts.calls,
            kicks: counts.kicks,
            unclaimed: counts.unclaimed,
        };
        let device = |device: machine::DeviceCounts| Device {
            id: device.id.as_str().into(),
            kind: device.kind,
            requests: device.counts.requests,
            written: device.counts.written,
            interrupts: device.counts.interrupts,
            resets: device.counts.resets,
        };
        let machine::MemoryStatus { boot, max, requested, actual } = machine.memory();
        Stats {
            uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            vcpus: machine.counts().into_iter().map(exits).collect(),
            devices: machine.device_counts().into_iter().map(device).collect(),
            console: Console { bytes: console.bytes, dropped: console.dropped },
            ram: Ram { boot, max, requested, actual },
            memory: Self::memory(machine.ram()),
        }
    }

    fn memory(ram: &GuestRam) -> Option<Memory> {
        let text = fs::read_to_string("/proc/self/smaps")
            .inspect_err(|error| log::debug!("control: cannot read smaps: {error}"))
            .ok()?;
        let ranges: Vec<_> = ram
            .iter()
            .filter_map(|region| {
                let start = region.get_host_address(MemoryRegionAddress(0)).ok()? as u64;
                Some(start..start + region.len())
            })
            .collect();
        Some(stats::memory(&text, &ranges))
    }

    /// Joins a socket to the console. What the client writes goes to the guest as fast as it takes it.
    fn attach(&self, machine: &Machine, socket: OwnedFd, replay: bool) -> Result<Reply, Refusal> {
        let socket = UnixStream::from(socket);
        let unfit = |error: io::Error| {
            Refusal::new(
                RefusalKind::Invalid,
                format!(
                    "cannot join this descriptor to the console: {error}; it must be a connected unix stream socket"
                ),
            )
        };
        // Fails for whatever is no socket.
        socket.peer_addr().and(socket.set_nonblocking(false)).map_err(unfit)?;
        socket.set_write_timeout(Some(CONSOLE_PATIENCE)).map_err(unfit)?;
        let mut source = socket.try_clone().map_err(unfit)?;
        let failed = |error: io::Error| {
            Refusal::new(RefusalKind::Failed, format!("cannot attach to the console: {error}"))
        };
        if self.readers.fetch_add(1, Ordering::SeqCst) >= READERS_MAX {
            self.readers.fetch_sub(1, Ordering::SeqCst);
            return Err(failed(io::Error::other(format!("{READERS_MAX} are attached already"))));
        }
        let (port, readers) = (machine.console(), Arc::clone(&self.readers));
        let reader =
            thread::Builder::new().name("console-in".into()).stack_size(128 * 1024).spawn(move || {
                if let Err(error) = feed(&mut source, &*port) {
                    log::debug!("control: the console's input: {error}");
                }
                readers.fetch_sub(1, Ordering::SeqCst);
            });
        if let Err(error) = reader {
            self.readers.fetch_sub(1, Ordering::SeqCst);
            return Err(failed(error));
        }
        // When the attaching fails, the sink goes, and the reader with it.
        machine.console_output().attach(Attached(socket), replay).map_err(failed)?;
        Ok(Reply::Done)
    }
}

/// The console's way to somebody. When it goes, both directions end.
struct Attached(UnixStream);

impl Write for Attached {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // The other side may have been faster.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

fn look(look: machine::Look) -> Look {
    let devices = look.devices.into_iter().map(|(id, sight)| {
        let queues = sight.queues.into_iter().map(|queue| QueueSight {
            index: queue.index,
            offered: queue.offered,
            taken: queue.taken,
            given: queue.given,
        });
        Sight {
            id: id.as_str().into(),
            status: sight.status,
            unheard: sight.unheard,
            queues: queues.collect(),
        }
    });
    Look { processors: look.processors.iter().map(ToString::to_string).collect(), devices: devices.collect() }
}

/// Writes the machine into two files that somebody has opened.
fn snapshot(machine: &Machine, fds: Vec<OwnedFd>, form: Form) -> Result<Reply, Refusal> {
    let invalid = |why: String| Refusal::new(RefusalKind::Invalid, format!("cannot write a snapshot: {why}"));
    let files = <[OwnedFd; 2]>::try_from(fds).map(|fds| fds.map(File::from)).map_err(|fds| {
        invalid(format!(
            "{} descriptors came with the request; it takes the state's and the RAM's",
            fds.len()
        ))
    })?;
    for file in &files {
        check_empty(file, "write a snapshot")?;
    }
    let [state, memory] = &files;
    let header = machine.snapshot(state, memory, form)?;
    Ok(Reply::Snapshot { memory: header.memory_len, data: header.memory_data })
}

/// Only files: whatever else is written to may keep who writes waiting.
fn check_empty(file: &File, what: &str) -> Result<(), Refusal> {
    let why = match file.metadata() {
        Ok(meta) if meta.is_file() && meta.len() == 0 => return Ok(()),
        Ok(_) => "it is written into an empty file".to_owned(),
        Err(error) => error.to_string(),
    };
    Err(Refusal::new(RefusalKind::Invalid, format!("cannot {what}: {why}")))
}

fn one(fds: Vec<OwnedFd>, what: &str) -> Result<OwnedFd, Refusal> {
    let count = fds.len();
    let mut fds = fds.into_iter();
    match (fds.next(), fds.next()) {
        (Some(fd), None) => Ok(fd),
        _ => Err(Refusal::new(
            RefusalKind::Invalid,
            format!("{count} descriptors came with the request: it takes one, {what}"),
        )),
    }
}

/// The drive's state does not allow it.
fn unplaced(why: String) -> Refusal {
    Refusal::new(RefusalKind::State, why)
}

impl Refusal {
    /// With a reason.
    pub fn new(kind: RefusalKind, why: impl Into<String>) -> Self {
        Self { kind, why: why.into() }
    }
}

impl From<machine::Error> for Refusal {
    fn from(error: machine::Error) -> Self {
        let kind = match &error {
            machine::Error::Order { .. } => RefusalKind::State,
            machine::Error::Pause { .. } => RefusalKind::Deadline,
            machine::Error::NoButton | machine::Error::Booted(_) => RefusalKind::Unsupported,
            machine::Error::Memory { .. } | machine::Error::Origin => RefusalKind::Invalid,
            _ => RefusalKind::Failed,
        };
        Self::new(kind, error.to_string())
    }
}

impl Status {
    pub(super) fn of(machine: Option<&Machine>) -> Self {
        machine.map_or(Self::Ended, |machine| machine.status().into())
    }
}

impl From<machine::Status> for Status {
    fn from(status: machine::Status) -> Self {
        match status {
            machine::Status::Running => Self::Running,
            machine::Status::Paused => Self::Paused,
            machine::Status::Ended => Self::Ended,
        }
    }
}

impl Reply {
    pub(super) fn state(machine: Option<&Machine>) -> Self {
        let outcome = machine.and_then(|machine| machine.wait_for(Duration::ZERO));
        Self::State { status: Status::of(machine), outcome: outcome.as_ref().map(Outcome::from) }
    }
}

impl From<&machine::Outcome> for Outcome {
    fn from(outcome: &machine::Outcome) -> Self {
        match outcome {
            machine::Outcome::PowerOff => Self::PowerOff,
            machine::Outcome::Reset => Self::Reset,
            machine::Outcome::GuestPanic => Self::GuestPanic,
            machine::Outcome::Crash(crash) => Self::Crash(Crash {
                vcpu: crash.vcpu,
                reason: crash.reason.clone(),
                registers: crash.registers.as_ref().map(ToString::to_string),
            }),
            machine::Outcome::Stopped => Self::Stopped,
            machine::Outcome::Failed(why) => Self::Failed(why.clone()),
        }
    }
}

impl From<&Notice> for Event {
    fn from(notice: &Notice) -> Self {
        match notice {
            Notice::Status(status) => Self::Status((*status).into()),
            Notice::Marker(id) => Self::Marker(*id),
            Notice::Ended(outcome) => Self::Ended(outcome.into()),
        }
    }
}
