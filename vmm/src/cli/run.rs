//! `supermachine-vmm run`: a machine by hand.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, thread};

use anyhow::anyhow;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use vmm::console::{Marker, Tail, feed};
use vmm::control::{Options as ControlOptions, Prepared, Server};
use vmm::devices::virtio::Device;
use vmm::devices::virtio::balloon::Balloon;
use vmm::devices::virtio::block::Block;
use vmm::devices::virtio::rng::Rng;
use vmm::devices::virtio::vsock::{SOCKET, Vsock};
use vmm::machine::{self, Config, Machine, Notice, Outcome, Phases, Restore};
use vmm::slots::SlotId;
use vmm::snapshot::Snapshot;

use super::Usage;
use super::control;
use super::disks::Drives;
use super::jail;
use super::log as lines;
use super::options::{Console, Options, Origin, Share, parse};
use super::terminal::{Keys, Pty, Raw};
use super::{heap, net};

/// The guest's context id, which nobody but the guest sees.
const GUEST_CID: u64 = 3;

/// So large a console's file becomes: a guest fills no disk of the host's.
const CONSOLE_FILE: usize = 1 << 20;

/// Exit codes by which a caller tells how the guest ended.
const RESET: u8 = 3;
const PANIC: u8 = 4;
const CRASH: u8 = 5;
const STOPPED: u8 = 6;
const KILLED: u8 = 137;

pub(super) fn main(args: lexopt::Parser) -> Result<ExitCode, Usage> {
    let begun = Instant::now();
    let options = parse(args)?;
    lines::start(options.log);
    heap::give_back();
    let jailed = options.jail.is_some();
    Ok(match run(options, begun) {
        Ok(outcome) => {
            match outcome {
                Outcome::PowerOff => {}
                Outcome::Crash(_) | Outcome::Failed(_) => {
                    eprintln!("supermachine-vmm: {outcome}{}", blame(jailed));
                }
                _ => eprintln!("supermachine-vmm: {outcome}"),
            }
            match outcome {
                Outcome::PowerOff => ExitCode::SUCCESS,
                Outcome::Reset => ExitCode::from(RESET),
                Outcome::GuestPanic => ExitCode::from(PANIC),
                Outcome::Crash(_) => ExitCode::from(CRASH),
                Outcome::Stopped => ExitCode::from(STOPPED),
                Outcome::Failed(_) => ExitCode::FAILURE,
            }
        }
        Err(error) => {
            eprintln!("supermachine-vmm: {error}");
            ExitCode::FAILURE
        }
    })
}

#[cfg(not(target_os = "linux"))]
fn build(_jailed: bool, _begin: Begin) -> anyhow::Result<Machine> {
    anyhow::bail!("this build has no hypervisor for this system; use a Linux host with KVM")
}

#[cfg(target_os = "linux")]
fn build(jailed: bool, begin: Begin) -> anyhow::Result<Machine> {
    use vmm::hypervisor::kvm::{DEVICE, Kvm};

    let built = Kvm::open(DEVICE.as_ref()).map_err(anyhow::Error::from).and_then(|kvm| {
        Ok(match begin {
            Begin::Boot(config) => Machine::build(&kvm, *config)?,
            Begin::Restore(restore) => Machine::restore(&kvm, *restore)?,
        })
    });
    // Whoever gets here has a host that cannot, or a wrong option; the check knows which.
    built.map_err(|error| anyhow!("{error}{}", blame(jailed)))
}

/// What the check of the host says, if that may be the cause.
#[cfg(target_os = "linux")]
fn blame(jailed: bool) -> String {
    use vmm::hypervisor::check;

    // It has nothing to look at in a jail.
    if jailed {
        return String::new();
    }
    let report = check::host(&check::Host::default());
    if report.usable() {
        String::new()
    } else {
        format!("; {}; see supermachine-vmm check", report.verdict())
    }
}

#[cfg(not(target_os = "linux"))]
fn blame(_jailed: bool) -> String {
    String::new()
}

/// A machine that boots, or one that goes on.
enum Begin {
    Boot(Box<Config>),
    Restore(Box<Restore>),
}

type Sink = Box<dyn Write + Send>;
type Source = Box<dyn io::Read + Send>;

fn open(console: &Console) -> anyhow::Result<(Sink, Option<Source>)> {
    Ok(match console {
        Console::Stdio => (Box::new(io::stdout()), Some(Box::new(io::stdin()))),
        Console::Pty => {
            let failed = |error| anyhow!("cannot make a pseudo-terminal for the console: {error}");
            let Pty { ours, path, theirs } = Pty::open().map_err(failed)?;
            eprintln!("supermachine-vmm: the console is at {}", path.display());
            let source = ours.try_clone().map_err(failed)?;
            (Box::new(ours), Some(Box::new(Held { source, _other: theirs })))
        }
        Console::None => (Box::new(io::sink()), None),
        Console::File(path) => {
            let file = console_file(path).map_err(|error| {
                anyhow!(
                    "cannot create the console's file {}: {error}; give a path in a directory that is there",
                    path.display()
                )
            })?;
            (file, None)
        }
        Console::Unix(path) => {
            let stream = UnixStream::connect(path).map_err(|error| {
                anyhow!(
                    "cannot connect the console to {}: {error}; somebody must listen there",
                    path.display()
                )
            })?;
            let source = stream
                .try_clone()
                .map_err(|error| anyhow!("cannot duplicate the console's socket: {error}"))?;
            (Box::new(stream), Some(Box::new(source)))
        }
    })
}

/// A device or a pipe takes all of it and keeps nothing.
fn console_file(path: &Path) -> io::Result<Sink> {
    if path.metadata().is_ok_and(|meta| !meta.is_file()) {
        return Ok(Box::new(fs::OpenOptions::new().write(true).open(path)?));
    }
    Ok(Box::new(Tail::create(path, CONSOLE_FILE)?))
}

/// A source, and what must stay open beside it.
struct Held {
    source: fs::File,
    _other: OwnedFd,
}

impl io::Read for Held {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.source.read(buffer)
    }
}

fn devices(options: &Options, vcpus: u32) -> anyhow::Result<Vec<(SlotId, Box<dyn Device>)>> {
    let mut devices: Vec<(SlotId, Box<dyn Device>)> = vec![
        (SlotId::new("rng"), Box::new(Rng::default())),
        (SlotId::new("balloon"), Box::new(Balloon::default())),
    ];
    if let Some(directory) = &options.vsock {
        let vsock = Vsock::new(GUEST_CID, directory).map_err(|error| {
            let directory = directory.display();
            anyhow!(
                "cannot listen on {directory}/{SOCKET}: {error}; give a directory that is there and has no such file yet"
            )
        })?;
        devices.push((SlotId::new("vsock"), Box::new(vsock)));
    }
    for (index, disk) in options.disks.iter().enumerate() {
        devices.push((SlotId::new(format!("block.{index}")), Box::new(Block::new(disk.medium()?))));
    }
    for share in &options.shares {
        devices.push((SlotId::new(format!("fs.{}", share.tag)), self::share(share, vcpus)?));
    }
    Ok(devices)
}

#[cfg(all(target_os = "linux", feature = "fs"))]
fn share(share: &Share, vcpus: u32) -> anyhow::Result<Box<dyn Device>> {
    use vmm::devices::virtio::fs::Fs;
    use vmm::devices::virtio::fs::passthrough::Passthrough;

    let server = Passthrough::open(&share.directory, share.read_only, share.cache)?;
    let server = match share.news {
        Some(news) => server.with_news(news),
        None => server,
    };
    // A machine has at most 32.
    Ok(Box::new(Fs::new(&share.tag, vcpus as u16, Arc::new(server))?))
}

#[cfg(not(all(target_os = "linux", feature = "fs")))]
fn share(share: &Share, _vcpus: u32) -> anyhow::Result<Box<dyn Device>> {
    anyhow::bail!(
        "cannot share {} as {}{}: this build has no file server (feature fs)",
        share.directory.display(),
        share.tag,
        if share.read_only { " read-only" } else { "" }
    )
}

fn run(mut options: Options, begun: Instant) -> anyhow::Result<Outcome> {
    let signals = mask_signals()?;
    // Before anything is opened here.
    jail::close_inherited(&options)?;
    let (sink, source) = open(&options.console)?;
    let netns = jail::join(&options)?;
    let mut network = net::Network::open(&options.taps)?;
    // The jail has no room for that.
    raise_file_limit().map_err(|error| anyhow!("cannot raise the limit of open files: {error}"))?;
    jail::enter(&mut options, netns)?;
    let control = options.control.as_ref().map(control::Open::at).transpose()?;
    let markers = markers(&options.markers);
    let mut drives = Drives::open(&options.drives)?;
    let mut fit = |vcpus| {
        let mut devices = devices(&options, vcpus)?;
        drives.add_to(&mut devices);
        network.add_to(&mut devices);
        anyhow::Ok(devices)
    };
    let begin = match &options.origin {
        Origin::Boot(boot) => Begin::Boot(Box::new(Config {
            kernel: boot.kernel.clone(),
            initrd: boot.initrd.clone(),
            command_line: boot.command_line(),
            memory: boot.memory,
            memory_max: boot.memory_max,
            vcpus: boot.vcpus,
            console: sink,
            markers,
            psci: boot.psci,
            devices: fit(boot.vcpus)?,
        })),
        Origin::Snapshot(directory) => {
            let snapshot = Snapshot::open(directory)?;
            let devices = fit(snapshot.header.vcpus)?;
            Begin::Restore(Box::new(Restore { snapshot, console: sink, markers, devices }))
        }
    };
    let prepared = begun.elapsed();
    let machine = build(options.jail.is_some(), begin)?;
    let machine = Arc::new(machine);
    let raw = match options.console {
        Console::Stdio => Raw::of_stdin().map_err(|error| anyhow!("cannot set up the terminal: {error}"))?,
        _ => None,
    };
    if let Some(source) = source {
        listen(source, &machine, raw.is_some())
            .map_err(|error| anyhow!("cannot start a thread for the console's input: {error}"))?;
    }
    heed(signals, &machine).map_err(|error| anyhow!("cannot start a thread for signals: {error}"))?;
    say_markers(&machine, options.markers);
    // Before anybody is answered, so that who drives a machine knows that it is held.
    if options.jail.is_some() {
        jail::filter()?;
    }
    let origin = match options.origin {
        Origin::Boot(_) => None,
        Origin::Snapshot(directory) => Some(directory),
    };
    let control =
        control.map(|control| drive(&machine, control, network, drives, raw.clone(), origin)).transpose()?;
    say_phases(begun, prepared, machine.phases());
    // Before anybody is answered: a machine that a client paused or stopped must not be made to run by this.
    if !options.paused {
        set_going(&machine)?;
    }
    let _control = control.map(|(server, open)| anyhow::Ok((server.start()?, open))).transpose()?;
    Ok(machine.wait())
}

/// Lets the guest run, if no signal has ended the machine meanwhile, which is no failure.
fn set_going(machine: &Machine) -> Result<(), machine::Error> {
    match machine.resume() {
        Err(machine::Error::Order { status: machine::Status::Ended, .. }) => Ok(()),
        result => result,
    }
}

/// How long each part of the start took, for benchmarks and the curious.
fn say_phases(begun: Instant, prepared: Duration, phases: Phases) {
    log::info!(
        "phases in us: at={} prepare={} hypervisor={} load={} build={} start={}",
        monotonic(begun).as_micros(),
        prepared.as_micros(),
        phases.hypervisor.as_micros(),
        phases.load.as_micros(),
        phases.build.as_micros(),
        begun.elapsed().as_micros(),
    );
}

/// When `begun` was, by the clock that counts from the host's boot: for those who know when they started this.
fn monotonic(begun: Instant) -> Duration {
    let now =
        nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    now.saturating_sub(begun.elapsed())
}

/// More descriptors than any machine has use for.
const FILES: u64 = 1 << 20;

/// A file server keeps one file open for each that a guest knows: as many as the host lets it, which for root is
/// more than root was given.
fn raise_file_limit() -> nix::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let most = fs::read_to_string("/proc/sys/fs/nr_open").ok().and_then(|text| text.trim().parse().ok());
    let most = most.unwrap_or(hard).min(FILES).max(hard);
    setrlimit(Resource::RLIMIT_NOFILE, most, most).or_else(|_| setrlimit(Resource::RLIMIT_NOFILE, hard, hard))
}

/// What serves the control socket, from its start for as long as it lives.
fn drive(
    machine: &Arc<Machine>,
    mut control: control::Open,
    network: net::Network,
    drives: Drives,
    raw: Option<Raw>,
    origin: Option<PathBuf>,
) -> anyhow::Result<(Prepared, control::Open)> {
    let on_kill = move || {
        if let Some(raw) = &raw {
            raw.restore();
        }
        std::process::exit(KILLED.into());
    };
    let options = ControlOptions {
        listener: control.listener.take(),
        owner: control.owner.take(),
        on_kill: Some(Box::new(on_kill)),
        on_cable: Some(network.on_cable()),
        drives: drives.slots(),
        origin,
    };
    Ok((Server::prepare(machine, options)?, control))
}

fn markers(texts: &[Vec<u8>]) -> Vec<Marker> {
    (0..).zip(texts).map(|(id, text)| Marker { id, text: text.clone() }).collect()
}

/// Says so on stderr when a marker was seen. It is the guest's word.
fn say_markers(machine: &Machine, texts: Vec<Vec<u8>>) {
    if texts.is_empty() {
        return;
    }
    machine.observe(Box::new(move |notice| {
        if let Notice::Marker(id) = notice
            && let Some(text) = texts.get(*id as usize)
        {
            eprintln!("supermachine-vmm: the console says {:?}", String::from_utf8_lossy(text));
        }
    }));
}

/// The signals that end a machine, kept from every thread that is started after this.
fn mask_signals() -> anyhow::Result<SigSet> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGHUP);
    signals.thread_block().map_err(|error| anyhow!("cannot mask signals: {error}"))?;
    Ok(signals)
}

/// SIGTERM presses the power button, where there is one; when that is not enough, or not possible,
/// and on SIGINT and SIGHUP, the machine is stopped. Not joined: the thread ends with the process.
fn heed(signals: SigSet, machine: &Arc<Machine>) -> io::Result<()> {
    let machine = Arc::downgrade(machine);
    let mut pressed = false;
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            while let (Ok(signal), Some(machine)) = (signals.wait(), machine.upgrade()) {
                if signal == Signal::SIGTERM && !pressed && machine.press_power_button().is_ok() {
                    pressed = true;
                } else {
                    machine.stop();
                }
            }
        })
        .map(drop)
}

/// Not joined: it may sit in a read for ever, and ends with the process.
fn listen(source: Source, machine: &Arc<Machine>, is_terminal: bool) -> io::Result<()> {
    let (port, weak) = (machine.console(), Arc::downgrade(machine));
    let on_escape = move || {
        if let Some(machine) = weak.upgrade() {
            machine.stop();
        }
    };
    let mut source: Source =
        if is_terminal { Box::new(Keys { source, on_escape, ended: false }) } else { source };
    thread::Builder::new()
        .name("stdin".into())
        .spawn(move || {
            if let Err(error) = feed(&mut source, &*port) {
                log::warn!("the console's input failed: {error}");
            }
        })
        .map(drop)
}
