//! `supermachine-vmm run`: a machine by hand.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::{fs, thread};

use anyhow::{anyhow, bail};
use lexopt::prelude::*;
use nix::sys::signal::{SigSet, Signal};
use vmm::console::{InputPort, feed};
use vmm::devices::virtio::Device;
use vmm::devices::virtio::balloon::Balloon;
use vmm::devices::virtio::block::Block;
use vmm::devices::virtio::rng::Rng;
use vmm::devices::virtio::vsock::{SOCKET, Vsock};
use vmm::machine::{Config, Machine, Outcome};

use vmm::slots::SlotId;

use super::Usage;

/// What every guest is told, before what the caller adds.
#[cfg(target_arch = "x86_64")]
const COMMAND_LINE: &str = "console=ttyS0 panic=-1 reboot=a pci=off";
#[cfg(target_arch = "aarch64")]
const COMMAND_LINE: &str = "console=ttyAMA0 panic=-1";

const MEMORY: u64 = 256 << 20;

/// The guest's context id, which nobody but the guest sees.
const GUEST_CID: u64 = 3;

/// Exit codes by which a caller tells how the guest ended.
const RESET: u8 = 3;
const PANIC: u8 = 4;
const CRASH: u8 = 5;
const STOPPED: u8 = 6;

struct Options {
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    append: String,
    memory: u64,
    memory_max: Option<u64>,
    vcpus: u32,
    console: Console,
    vsock: Option<PathBuf>,
    blocks: Vec<(PathBuf, bool)>,
    shares: Vec<Share>,
    taps: Vec<(String, usize)>,
}

/// A directory of the host that the guest mounts by its tag.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Share {
    tag: String,
    directory: PathBuf,
    read_only: bool,
}

impl Share {
    fn parse(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((tag, rest)) if !tag.is_empty() && !rest.is_empty() => {
                let (directory, read_only) = read_only(rest);
                Ok(Self { tag: tag.into(), directory, read_only })
            }
            _ => Err(format!("{text} is no share: give TAG=DIR or TAG=DIR:ro")),
        }
    }
}

/// Where the serial port leads.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Console {
    Stdio,
    File(PathBuf),
    Unix(PathBuf),
    None,
}

impl Console {
    fn parse(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "none" => Ok(Self::None),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => Err(format!("{text} is no console: give stdio, none, file:PATH or unix:PATH")),
        }
    }
}

/// A path, and whether `:ro` behind it says to leave it as it is.
fn read_only(text: &str) -> (PathBuf, bool) {
    match text.strip_suffix(":ro") {
        Some(path) => (path.into(), true),
        None => (text.into(), false),
    }
}

/// The name of a tap, and how many queues of it, one where `:N` behind it does not say so.
fn queues(text: &str) -> Result<(String, usize), String> {
    let (name, queues) = text.split_once(':').unwrap_or((text, "1"));
    match queues.parse() {
        Ok(queues) if !name.is_empty() => Ok((name.into(), queues)),
        _ => Err(format!("{text} is no tap: give NAME, or NAME:N for N queues of it")),
    }
}

/// A size like 512M or 2G, in bytes.
fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.strip_suffix(['K', 'M', 'G']) {
        Some(digits) => {
            let shift = match text.as_bytes().last() {
                Some(b'K') => 10,
                Some(b'M') => 20,
                _ => 30,
            };
            (digits, shift)
        }
        None => (text, 0),
    };
    let number: Option<u64> = digits.parse().ok();
    number
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| format!("{text} is no size: give a number, with K, M or G behind it if you like"))
}

fn parse(mut args: lexopt::Parser) -> Result<Options, Usage> {
    let (mut kernel, mut initrd, mut append) = (None, None, String::new());
    let (mut memory, mut vcpus, mut console) = (MEMORY, 1, Console::Stdio);
    let (mut vsock, mut blocks, mut shares) = (None, Vec::new(), Vec::new());
    let (mut taps, mut memory_max) = (Vec::new(), None);
    while let Some(arg) = args.next()? {
        match arg {
            Long("kernel") => kernel = Some(args.value()?.into()),
            Long("initrd") => initrd = Some(args.value()?.into()),
            Long("append") => append = args.value()?.string()?,
            Long("memory") => memory = size(&args.value()?.string()?)?,
            Long("memory-max") => memory_max = Some(size(&args.value()?.string()?)?),
            Long("cpus") => vcpus = args.value()?.parse()?,
            Long("console") => console = Console::parse(&args.value()?.string()?)?,
            Long("block") => blocks.push(read_only(&args.value()?.string()?)),
            Long("share") => shares.push(Share::parse(&args.value()?.string()?)?),
            Long("tap") => taps.push(queues(&args.value()?.string()?)?),
            Long("vsock") => vsock = Some(args.value()?.into()),
            other => return Err(other.unexpected()),
        }
    }
    let kernel = kernel.ok_or("--kernel is missing")?;
    Ok(Options { kernel, initrd, append, memory, memory_max, vcpus, console, vsock, blocks, shares, taps })
}

pub(super) fn main(args: lexopt::Parser) -> Result<ExitCode, Usage> {
    let options = parse(args)?;
    Ok(match run(options) {
        Ok(outcome) => {
            if !matches!(outcome, Outcome::PowerOff) {
                eprintln!("supermachine-vmm: {outcome}");
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
fn build(_config: Config) -> anyhow::Result<Machine> {
    bail!("this build has no hypervisor for this system; use a Linux host with KVM")
}

#[cfg(target_os = "linux")]
fn build(config: Config) -> anyhow::Result<Machine> {
    use vmm::hypervisor::check;
    use vmm::hypervisor::kvm::{DEVICE, Kvm};

    let built = Kvm::open(DEVICE.as_ref())
        .map_err(anyhow::Error::from)
        .and_then(|kvm| Ok(Machine::build(&kvm, config)?));
    built.or_else(|error| {
        // Whoever gets here has a host that cannot, or a wrong option; the check knows which.
        let report = check::host(&check::Host::default());
        if report.usable() {
            Err(error)
        } else {
            bail!("{error}; {}; see supermachine-vmm check", report.verdict())
        }
    })
}

type Sink = Box<dyn Write + Send>;
type Source = Box<dyn io::Read + Send>;

fn open(console: &Console) -> anyhow::Result<(Sink, Option<Source>)> {
    Ok(match console {
        Console::Stdio => (Box::new(io::stdout()), Some(Box::new(io::stdin()))),
        Console::None => (Box::new(io::sink()), None),
        Console::File(path) => {
            let file = fs::File::create(path)
                .map_err(|error| anyhow!("cannot create the console's file {}: {error}", path.display()))?;
            (Box::new(file), None)
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

fn devices(options: &Options) -> anyhow::Result<Vec<(SlotId, Box<dyn Device>)>> {
    let mut devices: Vec<(SlotId, Box<dyn Device>)> = vec![
        (SlotId::new("rng"), Box::new(Rng::default())),
        (SlotId::new("balloon"), Box::new(Balloon::default())),
    ];
    if let Some(directory) = &options.vsock {
        let vsock = Vsock::new(GUEST_CID, directory).map_err(|error| {
            let directory = directory.display();
            anyhow!(
                "cannot listen on {directory}/{SOCKET}: {error}; give a directory that has no such file yet"
            )
        })?;
        devices.push((SlotId::new("vsock"), Box::new(vsock)));
    }
    for (index, (path, read_only)) in options.blocks.iter().enumerate() {
        let block = Block::open(path, *read_only)?;
        devices.push((SlotId::new(format!("block.{index}")), Box::new(block)));
    }
    for share in &options.shares {
        devices.push((SlotId::new(format!("fs.{}", share.tag)), self::share(share, options.vcpus)?));
    }
    for (index, (name, queues)) in options.taps.iter().enumerate() {
        devices.push((SlotId::new(format!("net.{index}")), tap(name, *queues)?));
    }
    Ok(devices)
}

#[cfg(target_os = "linux")]
fn tap(name: &str, queues: usize) -> anyhow::Result<Box<dyn Device>> {
    use vmm::devices::virtio::limit::Limits;
    use vmm::devices::virtio::net::{self, Net};

    let taps = net::tap::open(name, queues)?;
    let mut mac = [0; 6];
    vmm::entropy::fill(&mut mac).map_err(|error| anyhow!("no randomness for an address: {error}"))?;
    // One machine's, and given by nobody.
    mac[0] = mac[0] & !1 | 2;
    let mtu = Some(net::tap::mtu(name)?);
    let (rx, tx) = (Limits::default(), Limits::default());
    let net = Net::new(net::Config { pairs: queues, taps, mac, mtu, rx, tx })?;
    Ok(Box::new(net))
}

#[cfg(not(target_os = "linux"))]
fn tap(name: &str, queues: usize) -> anyhow::Result<Box<dyn Device>> {
    bail!("cannot use the tap {name} with {queues} queue(s): this system has none")
}

#[cfg(all(target_os = "linux", feature = "fs"))]
fn share(share: &Share, vcpus: u32) -> anyhow::Result<Box<dyn Device>> {
    use vmm::devices::virtio::fs::Fs;
    use vmm::devices::virtio::fs::passthrough::{Cache, Passthrough};

    let server = Passthrough::open(&share.directory, share.read_only, Cache::Auto)?;
    // A machine has at most 32.
    Ok(Box::new(Fs::new(&share.tag, vcpus as u16, Arc::new(server))?))
}

#[cfg(not(all(target_os = "linux", feature = "fs")))]
fn share(share: &Share, _vcpus: u32) -> anyhow::Result<Box<dyn Device>> {
    bail!(
        "cannot share {} as {}{}: this build has no file server (feature fs)",
        share.directory.display(),
        share.tag,
        if share.read_only { " read-only" } else { "" }
    )
}

fn run(options: Options) -> anyhow::Result<Outcome> {
    let signals = mask_signals()?;
    let (sink, source) = open(&options.console)?;
    let devices = devices(&options)?;
    let machine = build(Config {
        kernel: options.kernel,
        initrd: options.initrd,
        command_line: [COMMAND_LINE, &options.append].join(" ").trim_end().to_owned(),
        memory: options.memory,
        memory_max: options.memory_max,
        vcpus: options.vcpus,
        console: sink,
        markers: Vec::new(),
        devices,
    })?;
    if let Some(source) = source {
        listen(source, machine.console())
            .map_err(|error| anyhow!("cannot start a thread for the console's input: {error}"))?;
    }
    let machine = Arc::new(machine);
    heed(signals, &machine).map_err(|error| anyhow!("cannot start a thread for signals: {error}"))?;
    machine.resume()?;
    Ok(machine.wait())
}

/// The signals that end a machine, kept from every thread that is started after this.
fn mask_signals() -> anyhow::Result<SigSet> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block().map_err(|error| anyhow!("cannot mask signals: {error}"))?;
    Ok(signals)
}

/// SIGTERM presses the power button, where there is one; when that is not enough, or not possible,
/// and on SIGINT, the machine is stopped. Not joined: the thread ends with the process.
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
fn listen(mut source: Source, port: Arc<dyn InputPort>) -> io::Result<()> {
    thread::Builder::new()
        .name("stdin".into())
        .spawn(move || {
            if let Err(error) = feed(&mut source, &*port) {
                log::warn!("the console's input failed: {error}");
            }
        })
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", Some(0)),
            ("4096", Some(4096)),
            ("64K", Some(64 << 10)),
            ("512M", Some(512 << 20)),
            ("8G", Some(8 << 30)),
            ("", None),
            ("M", None),
            ("-1M", None),
            ("1T", None),
            ("99999999999G", None),
        ] {
            assert_eq!(size(text).ok(), bytes, "{text:?}");
        }
    }

    #[test]
    fn shares() {
        let share = |tag: &str, directory: &str, read_only| {
            Some(Share { tag: tag.into(), directory: directory.into(), read_only })
        };
        for (text, expected) in [
            ("root=/srv", share("root", "/srv", false)),
            ("root=/srv:ro", share("root", "/srv", true)),
            ("a=b=c", share("a", "b=c", false)),
            ("/srv", None),
            ("=x", None),
            ("x=", None),
        ] {
            assert_eq!(Share::parse(text).ok(), expected, "{text:?}");
        }
    }

    #[test]
    fn taps() {
        for (text, expected) in [
            ("tap0", Some(("tap0", 1))),
            ("tap0:4", Some(("tap0", 4))),
            ("tap0:", None),
            ("tap0:x", None),
            (":2", None),
            ("", None),
        ] {
            let expected = expected.map(|(name, queues)| (name.to_owned(), queues));
            assert_eq!(queues(text).ok(), expected, "{text:?}");
        }
    }

    #[test]
    fn consoles() {
        for (text, console) in [
            ("stdio", Some(Console::Stdio)),
            ("none", Some(Console::None)),
            ("file:/a:b", Some(Console::File("/a:b".into()))),
            ("unix:s", Some(Console::Unix("s".into()))),
            ("file:", None),
            ("tcp:1", None),
            ("", None),
        ] {
            assert_eq!(Console::parse(text).ok(), console, "{text:?}");
        }
    }

    #[test]
    fn a_kernel_there_must_be() {
        let parse = |args: &[&str]| parse(lexopt::Parser::from_args(args));
        assert!(parse(&[]).is_err());
        assert!(parse(&["--kernel", "k", "--cpus", "x"]).is_err());
        assert!(parse(&["--kernel", "k", "extra"]).is_err());
        let options = parse(&["--kernel", "k", "--cpus", "4", "--memory=1G"]).unwrap();
        assert_eq!((options.vcpus, options.memory), (4, 1 << 30));
    }
}
