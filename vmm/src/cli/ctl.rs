//! `supermachine-vmm ctl`: drives a machine by its control socket, for people.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{anyhow, bail};
use lexopt::prelude::*;
use vmm::control::{Client, ClientError, Event, FrameError, Outcome, Reply, Request, Status};
use vmm::devices::virtio::block;
use vmm::snapshot::{self, Form};

use super::disks::Disk;
use super::options::size;
use super::terminal::{Keys, Raw};
use super::{Usage, WITHIN};

const PAUSE: u64 = 5000;
/// How long all RAM of the largest machine may take to be written.
const SNAPSHOT: Duration = Duration::from_secs(600);

#[derive(Debug, PartialEq, Eq)]
enum Command {
    Call(Request),
    Console,
    Events,
    /// Into a new directory, over the snapshot in another one, if that is wanted.
    Snapshot(PathBuf, Option<PathBuf>),
    /// A slot, and what is to be plugged into it.
    Tap(String, Tap),
    /// A slot, and where the network is.
    Nic(String, String),
    /// A drive, and what is to be put in.
    Disk(String, Disk),
}

#[derive(Debug, PartialEq, Eq)]
struct Tap {
    name: String,
    queues: usize,
    /// The host's kernel moves the packets.
    vhost: bool,
}

impl Tap {
    fn parse(text: &str) -> Result<Self, String> {
        let (tap, vhost) = text.strip_suffix(",vhost").map_or((text, false), |tap| (tap, true));
        let (name, queues) = tap.split_once(':').unwrap_or((tap, "1"));
        match queues.parse() {
            Ok(queues) if !name.contains(',') => Ok(Self { name: name.into(), queues, vhost }),
            _ => Err(format!("{text} is no tap: give NAME or NAME:N, and ,vhost behind it")),
        }
    }
}

fn parse(mut args: lexopt::Parser) -> Result<(PathBuf, Command), Usage> {
    let path = args.value().map_err(|_| "the path of a control socket is missing")?.into();
    let command = args.value().map_err(|_| "a command for the machine is missing")?.string()?;
    let command = match command.as_str() {
        "state" => Command::Call(Request::State),
        "stats" => Command::Call(Request::Stats),
        "pause" => {
            let within_ms = match args.next()? {
                None => PAUSE,
                Some(Value(value)) => value.parse()?,
                Some(other) => return Err(other.unexpected()),
            };
            Command::Call(Request::Pause { within_ms })
        }
        "resume" => Command::Call(Request::Resume),
        "button" => Command::Call(Request::PowerButton),
        "reset" => Command::Call(Request::Reset),
        "stop" => Command::Call(Request::Stop),
        "kill" => Command::Call(Request::Kill),
        "log" => Command::Call(Request::ConsoleLog),
        "look" => Command::Call(Request::Look),
        "resize" => {
            let (mut memory, mut vcpus) = (None, None);
            while let Some(arg) = args.next()? {
                match arg {
                    Long("memory") => memory = Some(size(&args.value()?.string()?)?),
                    Long("cpus") => vcpus = Some(args.value()?.parse()?),
                    other => return Err(other.unexpected()),
                }
            }
            Command::Call(Request::Resize { memory, vcpus })
        }
        "tap" => {
            let slot = args.value().map_err(|_| "the network slot is missing")?.string()?;
            let tap = args.value().map_err(|_| "the name of the tap is missing")?.string()?;
            Command::Tap(slot, Tap::parse(&tap)?)
        }
        "nic" => {
            let slot = args.value().map_err(|_| "the network slot is missing")?.string()?;
            let address = args.value().map_err(|_| "stream:PATH or datagram:PATH is missing")?.string()?;
            Command::Nic(slot, address)
        }
        "disk" => {
            let drive = args.value().map_err(|_| "the drive is missing")?.string()?;
            let disk = args.value().map_err(|_| "the file of the disk is missing")?.string()?;
            Command::Disk(drive, Disk::parse(&disk)?)
        }
        "eject" => {
            let drive = args.value().map_err(|_| "the drive is missing")?.string()?;
            Command::Call(Request::EjectDisk { drive })
        }
        "snapshot" => {
            let directory = args.value().map_err(|_| "the directory of the snapshot is missing")?.into();
            let over = match args.next()? {
                None => None,
                Some(Long("over")) => Some(args.value()?.into()),
                Some(other) => return Err(other.unexpected()),
            };
            Command::Snapshot(directory, over)
        }
        "console" => Command::Console,
        "events" => Command::Events,
        other => return Err(format!("{other} is nothing that a machine can be told").into()),
    };
    match args.next()? {
        None => Ok((path, command)),
        Some(other) => Err(other.unexpected()),
    }
}

pub(super) fn main(args: lexopt::Parser) -> Result<ExitCode, Usage> {
    let (path, command) = parse(args)?;
    let done =
        Client::connect(&path, WITHIN).map_err(anyhow::Error::from).and_then(|mut client| match command {
            Command::Call(request) => call(&mut client, request),
            Command::Console => console(&mut client),
            Command::Events => events(&mut client),
            Command::Snapshot(directory, over) => snapshot(&mut client, &directory, over.as_deref()),
            Command::Tap(slot, wanted) => tap(&mut client, slot, &wanted),
            Command::Nic(slot, address) => nic(&mut client, slot, &address),
            Command::Disk(drive, wanted) => disk(&mut client, drive, &wanted),
        });
    Ok(match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("supermachine-vmm: {error}");
            ExitCode::FAILURE
        }
    })
}

fn call(client: &mut Client, request: Request) -> anyhow::Result<()> {
    let within = match &request {
        Request::Pause { within_ms } => WITHIN + Duration::from_millis(*within_ms),
        _ => WITHIN,
    };
    let kills = request == Request::Kill;
    let reply = match client.call(request, &[], within) {
        // It does not live to answer.
        Err(ClientError::Frame(FrameError::Closed)) if kills => return Ok(()),
        other => other?,
    };
    let mut out = io::stdout().lock();
    match reply {
        Reply::Done => {}
        Reply::State { status, outcome } => writeln!(out, "{}", describe(status, outcome.as_ref()))?,
        Reply::Stats(stats) => writeln!(out, "{}", serde_json::to_string_pretty(&stats)?)?,
        Reply::Look(look) => write!(out, "{look}")?,
        Reply::Snapshot { memory, data } => writeln!(out, "{data} of {memory} bytes of RAM")?,
        Reply::Log { text, .. } => out.write_all(text.as_bytes())?,
    }
    Ok(())
}

/// A guest that runs stands still for as long as it takes, and goes on whatever comes of it.
fn snapshot(client: &mut Client, directory: &Path, over: Option<&Path>) -> anyhow::Result<()> {
    let state = client.call(Request::State, &[], WITHIN)?;
    let runs = matches!(state, Reply::State { status: Status::Running, .. });
    if runs {
        client.pause(Duration::from_millis(PAUSE))?;
    }
    let mut write = |state: &File, memory: &File, form| {
        client.snapshot(state.as_fd(), memory.as_fd(), form, SNAPSHOT).map_err(anyhow::Error::from)
    };
    let made = match over {
        None => snapshot::make(directory, |state, memory| write(state, memory, Form::Sparse)),
        Some(below) => {
            snapshot::make_over(directory, below, |state, memory| write(state, memory, Form::Over))
        }
    };
    if runs {
        client.resume()?;
    }
    let (memory, data) = made?;
    println!("{data} of {memory} bytes of RAM");
    Ok(())
}

/// Without a serial number the guest is told its name, as of other disks.
fn disk(client: &mut Client, drive: String, wanted: &Disk) -> anyhow::Result<()> {
    let file = block::open(&wanted.path, wanted.read_only)?;
    let request = Request::InsertDisk { drive, serial: wanted.name(), read_only: wanted.read_only };
    client.call(request, &[file.as_fd()], WITHIN)?;
    Ok(())
}

#[cfg(target_os = "linux")]
fn tap(client: &mut Client, slot: String, wanted: &Tap) -> anyhow::Result<()> {
    let mut all = vmm::devices::virtio::net::tap::open(&wanted.name, wanted.queues)?;
    if wanted.vhost {
        all.extend(super::net::open_vhost(wanted.queues)?);
    }
    let fds: Vec<BorrowedFd<'_>> = all.iter().map(AsFd::as_fd).collect();
    client.call(Request::AttachTap { slot, vhost: wanted.vhost }, &fds, WITHIN)?;
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn tap(_client: &mut Client, slot: String, wanted: &Tap) -> anyhow::Result<()> {
    let Tap { name, queues, vhost: _ } = wanted;
    bail!("cannot give {slot} {queues} queue(s) of the tap {name}: this system has no taps")
}

#[cfg(target_os = "linux")]
fn nic(client: &mut Client, slot: String, address: &str) -> anyhow::Result<()> {
    use vmm::devices::virtio::net::dial::Address;

    let address: Address = address.parse().map_err(|error: String| anyhow!(error))?;
    let socket = address.connect(None, WITHIN)?;
    client.call(Request::AttachSocket { slot }, &[socket.as_fd()], WITHIN)?;
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn nic(_client: &mut Client, slot: String, address: &str) -> anyhow::Result<()> {
    bail!("cannot connect {slot} with {address}: this system has no network devices yet")
}

fn describe(status: Status, outcome: Option<&Outcome>) -> String {
    match (status, outcome) {
        (Status::Running, _) => "running".into(),
        (Status::Paused, _) => "paused".into(),
        (Status::Ended, None) => "over".into(),
        (Status::Ended, Some(outcome)) => {
            let how = match outcome {
                Outcome::PowerOff => "the guest turned itself off".into(),
                Outcome::Reset => "the guest asked for a reset".into(),
                Outcome::GuestPanic => "the guest's kernel panicked".into(),
                Outcome::Stopped => "it was stopped".into(),
                Outcome::Crash(crash) => format!("vcpu {} crashed: {}", crash.vcpu, crash.reason),
                Outcome::Failed(why) => format!("the hypervisor failed: {why}"),
            };
            format!("over: {how}")
        }
    }
}

fn events(client: &mut Client) -> anyhow::Result<()> {
    client.call(Request::Events, &[], WITHIN)?;
    let mut out = io::stdout().lock();
    loop {
        if let Some(event) = client.event(Duration::from_secs(3600))? {
            writeln!(out, "{}", serde_json::to_string(&event)?)?;
            if matches!(event, Event::Ended(_)) {
                return Ok(());
            }
        }
    }
}

fn console(client: &mut Client) -> anyhow::Result<()> {
    let (mut ours, theirs) =
        UnixStream::pair().map_err(|error| anyhow!("cannot make a socket pair: {error}"))?;
    let fds: [BorrowedFd<'_>; 1] = [theirs.as_fd()];
    client.call(Request::ConsoleAttach { replay: true }, &fds, WITHIN)?;
    drop(theirs);
    // Given back when this returns.
    let _raw = Raw::of_stdin().map_err(|error| anyhow!("cannot set up the terminal: {error}"))?;
    let (mut input, leave) = (ours.try_clone()?, ours.try_clone()?);
    // Not joined: it may sit in a read for ever, and ends with the process.
    thread::spawn(move || {
        let on_escape = || {
            let _ = leave.shutdown(Shutdown::Both);
        };
        let mut keys = Keys { source: io::stdin(), on_escape, ended: false };
        // The machine may be gone, or the person: either way there is nobody to tell.
        let _ = io::copy(&mut keys, &mut input);
    });
    let mut out = io::stdout().lock();
    let mut buffer = [0; 4096];
    loop {
        match ours.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => {
                out.write_all(&buffer[..count])?;
                out.flush()?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => bail!("the console's socket failed: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands() {
        let parse = |args: &[&str]| parse(lexopt::Parser::from_args(args)).map(|(_, command)| command).ok();
        let tap = |name: &str, queues, vhost| {
            Command::Tap("net.0".into(), Tap { name: name.into(), queues, vhost })
        };
        for (args, command) in [
            (&["/s", "state"][..], Some(Command::Call(Request::State))),
            (&["/s", "pause"], Some(Command::Call(Request::Pause { within_ms: PAUSE }))),
            (&["/s", "pause", "10"], Some(Command::Call(Request::Pause { within_ms: 10 }))),
            (
                &["/s", "resize", "--memory", "1G", "--cpus=2"],
                Some(Command::Call(Request::Resize { memory: Some(1 << 30), vcpus: Some(2) })),
            ),
            (&["/s", "console"], Some(Command::Console)),
            (&["/s", "events"], Some(Command::Events)),
            (&["/s", "tap", "net.0", "t:2"], Some(tap("t", 2, false))),
            (&["/s", "tap", "net.0", "t"], Some(tap("t", 1, false))),
            (&["/s", "tap", "net.0", "t,vhost"], Some(tap("t", 1, true))),
            (&["/s", "tap", "net.0", "t:2,vhost"], Some(tap("t", 2, true))),
            (&["/s", "tap", "net.0", "t,vhosts"], None),
            (&["/s", "snapshot", "d"], Some(Command::Snapshot("d".into(), None))),
            (&["/s", "snapshot", "d", "--over", "b"], Some(Command::Snapshot("d".into(), Some("b".into())))),
            (&["/s", "snapshot", "d", "b"], None),
            (&["/s", "snapshot"], None),
            (&["/s", "reset"], Some(Command::Call(Request::Reset))),
            (&["/s", "nic", "net.0", "stream:/n"], Some(Command::Nic("net.0".into(), "stream:/n".into()))),
            (&["/s", "nic", "net.0"], None),
            (&["/s", "tap", "net.0"], None),
            (
                &["/s", "disk", "drive.0", "/a.img:ro:serial=a"],
                Some(Command::Disk("drive.0".into(), Disk::parse("/a.img:ro:serial=a").unwrap())),
            ),
            (&["/s", "disk", "drive.0"], None),
            (&["/s", "disk", "drive.0", ":ro"], None),
            (
                &["/s", "eject", "drive.0"],
                Some(Command::Call(Request::EjectDisk { drive: "drive.0".into() })),
            ),
            (&["/s", "eject"], None),
            (&["/s", "tap", "net.0", "t:x"], None),
            (&["/s", "state", "now"], None),
            (&["/s", "pause", "x"], None),
            (&["/s", "fly"], None),
            (&["/s"], None),
            (&[], None),
        ] {
            assert_eq!(parse(args), command, "{args:?}");
        }
    }
}
