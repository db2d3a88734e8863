//! A monitor: the process of one machine, and what it is told on its command line.
//!
//! It belongs to whoever holds the other end of its control socket, which is this process alone: it ends when that
//! does, however that ends.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use agent_api::{NEWS_GROUP, READY_PORT};
use log::warn;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sched::{CloneFlags, unshare};
use runtime_spec::layout::BINDS_TAG;
use runtime_spec::plan::{Block, DRIVES};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::UnixListener;
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::time::timeout;
use ttrpc::Code;
use vmm::control::{Client as Control, Look, Reply, Request};

use super::drives::path_of;
use super::net;
use crate::deadlines;
use crate::error::{Attempt, Error, Result};
use crate::process::Process;
use crate::template::key::SHARES;

/// Lines of the monitor's that are kept for an error.
const LINES: usize = 20;
/// As much of the console as is shown when something fails.
const CONSOLE_TAIL: usize = 1500;
/// The descriptors that the monitor inherits.
const CONTROL_FD: i32 = 3;
const NETNS_FD: i32 = 4;

/// What a guest begins with.
#[derive(Debug, Clone)]
pub enum Origin {
    /// A kernel.
    Boot(Boot),
    /// The snapshot in a directory.
    Snapshot(PathBuf),
}

/// A machine that boots.
#[derive(Debug, Clone)]
pub struct Boot {
    /// The kernel's file.
    pub kernel: PathBuf,
    /// The initrd's file.
    pub initrd: PathBuf,
    /// What the kernel is told.
    pub append: String,
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of memory that it can be given, if it can.
    pub memory_max: Option<u64>,
    /// Processors.
    pub cpus: u32,
}

/// A monitor to be started.
pub struct Start<'a> {
    /// The machine's directory: [`places`] are there.
    pub directory: &'a Path,
    /// What its guest begins with.
    pub origin: Origin,
    /// The disks that are in its drives from the beginning, in their order.
    pub blocks: &'a [Block],
    /// The network namespace that it is in; without, one of its own.
    pub network: Option<OwnedFd>,
    /// The cgroup that it is in; without, that of this process.
    pub cgroup: Option<&'a Path>,
}

/// The places in a machine's directory.
pub mod places {
    /// What it shares.
    pub const TREE: &str = "tree";
    /// Its sockets.
    pub const VSOCK: &str = "vsock";
    /// Over it the monitor's root is built.
    pub const JAIL: &str = "jail";
    /// What its console showed.
    pub const CONSOLE: &str = "console";
}

/// A monitor that was started.
pub struct Monitor {
    directory: PathBuf,
    process: Process,
    ended: watch::Receiver<Option<Ended>>,
    said: Arc<Mutex<VecDeque<String>>>,
    /// Held: the monitor is gone when all of it is dropped.
    control: Arc<Mutex<Option<Control>>>,
}

/// How a monitor ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// In words.
    pub how: String,
    /// Somebody has killed it.
    pub killed: bool,
}

impl Ended {
    fn of(status: std::io::Result<ExitStatus>) -> Self {
        use std::os::unix::process::ExitStatusExt;
        match status {
            Ok(status) => Self { how: status.to_string(), killed: status.signal() == Some(libc::SIGKILL) },
            Err(error) => Self { how: error.to_string(), killed: false },
        }
    }
}

/// Makes a machine's places, and listens where its agent rings.
pub fn prepare(directory: &Path) -> Result<UnixListener> {
    let vsock = directory.join(places::VSOCK);
    // Of another attempt.
    if let Err(error) = fs::remove_dir_all(&vsock)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(error).attempt(format_args!("removing {}", vsock.display()));
    }
    for place in [vsock.clone(), directory.join(places::JAIL)] {
        fs::create_dir_all(&place).attempt(format_args!("making {}", place.display()))?;
    }
    let ring = vsock.join(format!("vsock_{READY_PORT}"));
    UnixListener::bind(&ring).attempt(format_args!("listening on {}", ring.display()))
}

/// The monitor that came with this shim.
pub fn monitor_path() -> PathBuf {
    const NAME: &str = "supermachine-vmm";
    let beside = std::env::current_exe().ok().map(|own| own.with_file_name(NAME));
    beside.filter(|path| path.is_file()).unwrap_or_else(|| Path::new("/usr/bin").join(NAME))
}

impl Monitor {
    /// Starts one. The first thing to do is to note its process.
    pub fn start(start: &Start<'_>) -> Result<(Self, Greeting)> {
        let (ours, theirs) = StdStream::pair().attempt("making a control socket")?;
        let mut child = spawn(start, &theirs)?;
        drop(theirs);
        let process = Process::of(child.id().unwrap_or_default()).attempt("looking at the monitor")?;
        let said = Arc::new(Mutex::new(VecDeque::new()));
        let (stderr, lines) = (child.stderr.take(), said.clone());
        let listening = tokio::spawn(async move {
            if let Some(stderr) = stderr {
                listen(stderr, &lines).await;
            }
        });
        let (tell, ended) = watch::channel(None);
        tokio::spawn(async move {
            let status = child.wait().await;
            // Its last words.
            let _ = timeout(deadlines::LAST_WORDS / 2, listening).await;
            tell.send_replace(Some(Ended::of(status)));
        });
        let directory = start.directory.to_owned();
        let control = Arc::new(Mutex::new(None));
        Ok((Self { directory, process, ended, said, control: control.clone() }, Greeting(ours, control)))
    }

    /// Its process.
    pub fn process(&self) -> Process {
        self.process
    }

    /// The unix socket by which the guest's ports are reached.
    pub fn vsock(&self) -> PathBuf {
        self.directory.join(places::VSOCK).join("vsock")
    }

    /// Returns when it has ended, and how.
    pub async fn ended(&self) -> Ended {
        let mut ended = self.ended.clone();
        let how = ended.wait_for(Option::is_some).await.ok().and_then(|how| how.clone());
        how.unwrap_or_else(|| Ended { how: "unknown".to_owned(), killed: false })
    }

    /// Returns when it has ended; also when it is not held any more.
    pub fn watch(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut ended = self.ended.clone();
        async move {
            let _ = ended.wait_for(Option::is_some).await;
        }
    }

    /// Whether it has ended, and how.
    pub fn has_ended(&self) -> Option<Ended> {
        self.ended.borrow().clone()
    }

    /// For whoever asks something of it on another thread.
    pub async fn ask<T: Send + 'static>(
        &self,
        what: &'static str,
        ask: impl FnOnce(&mut Control) -> std::result::Result<T, vmm::control::ClientError> + Send + 'static,
    ) -> Result<T> {
        let control = self.control.clone();
        let asking = move || {
            let mut control = control.lock().unwrap_or_else(PoisonError::into_inner);
            let control =
                control.as_mut().ok_or_else(|| Error::precondition("the monitor has not answered yet"))?;
            ask(control).map_err(|error| Error::unknown(format!("{what}: {error}")))
        };
        tokio::task::spawn_blocking(asking).await.map_err(Error::unknown)?
    }

    /// Lets `work` go on for as long as it may and the monitor lives.
    pub async fn while_alive<T>(
        &self,
        what: &str,
        within: std::time::Duration,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let mut over = self.ended.clone();
        let done = tokio::select! {
            done = timeout(within, work) => done
                .unwrap_or_else(|_| Err(Error::deadline(format!("{what} took longer than {within:?}")))),
            _ = over.wait_for(Option::is_some) => Err(Error::unknown(format!("{what}: the machine ended"))),
        };
        if done.is_err() {
            // Its socket may close before it has been heard out, and it ends with the socket.
            let _ = timeout(deadlines::LAST_WORDS, over.wait_for(Option::is_some)).await;
        }
        done.map_err(|error| self.explain(error))
    }

    /// An error with what monitor and guest said last.
    pub fn explain(&self, error: Error) -> Error {
        let mut text = error.text;
        if let Some(ended) = &*self.ended.borrow() {
            text = format!("{text}; the monitor's end: {}", ended.how);
        }
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if !said.is_empty() {
            let said: Vec<_> = said.iter().cloned().collect();
            text = format!("{text}; the monitor said: {}", said.join("; "));
        }
        if let Ok(console) = fs::read(self.directory.join(places::CONSOLE)) {
            let tail = &console[console.len().saturating_sub(CONSOLE_TAIL)..];
            let tail = String::from_utf8_lossy(tail);
            if !tail.trim().is_empty() {
                text = format!("{text}; the guest's console ends with: {}", tail.trim());
            }
        }
        Error { code: error.code, text }
    }

    /// An error, with where a guest stands that should have gone on by now, if that is what it is.
    pub async fn stuck(&self, error: Error) -> Error {
        if error.code != Code::DEADLINE_EXCEEDED || self.has_ended().is_some() {
            return error;
        }
        // Twice, which tells one that stands from one that is late.
        let look = |control: &mut Control| {
            let mut look = || {
                control.pause(deadlines::STANDSTILL)?;
                let look = control.call(Request::Look, &[], deadlines::MONITOR_CALL)?;
                control.resume()?;
                Ok::<_, vmm::control::ClientError>(look)
            };
            let first = look()?;
            std::thread::sleep(deadlines::LOOK_AGAIN);
            Ok((first, look()?))
        };
        match self.ask("looking at a machine that does not go on", look).await {
            Ok((Reply::Look(first), Reply::Look(second))) => {
                let pid = self.process.pid;
                warn!(
                    "a machine that does not go on, monitor {pid}:\n{first}\nand a moment later:\n{second}"
                );
                let (first, second) = (brief(&first), processors(&second));
                let text =
                    format!("{}; its guest stands at {first}, and a moment later at {second}", error.text);
                Error { code: error.code, text }
            }
            Ok(other) => Error { text: format!("{}; the monitor answered {other:?}", error.text), ..error },
            Err(why) => Error { text: format!("{}; {}", error.text, why.text), ..error },
        }
    }

    /// Ends it where it is.
    pub async fn kill(&self) {
        let process = self.process;
        let killed = tokio::task::spawn_blocking(move || process.kill(deadlines::KILLED)).await;
        if let Ok(Err(error)) = killed {
            warn!("killing the monitor: {error}");
        }
    }
}

/// The control socket of a monitor that has not said anything yet.
pub struct Greeting(StdStream, Arc<Mutex<Option<Control>>>);

impl Greeting {
    /// Waits for it.
    pub async fn heard(self) -> Result<()> {
        let Self(socket, control) = self;
        let greeted = tokio::task::spawn_blocking(|| Control::over(socket, deadlines::MONITOR_HELLO)).await;
        let greeted = greeted.map_err(Error::unknown)?;
        let greeted = greeted.map_err(|error| Error::unknown(format!("the monitor: {error}")))?;
        control.lock().unwrap_or_else(PoisonError::into_inner).replace(greeted);
        Ok(())
    }
}

/// Logs what the monitor says, and keeps its last lines.
async fn listen(stderr: impl tokio::io::AsyncRead + Unpin, said: &Mutex<VecDeque<String>>) {
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        warn!("monitor: {line}");
        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.len() == LINES {
            said.pop_front();
        }
        said.push_back(line);
    }
}

fn spawn(start: &Start<'_>, control: &StdStream) -> Result<Child> {
    let program = monitor_path();
    let mut command = Command::new(&program);
    command.args(arguments(start)?);
    command.env_clear().current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    // Beyond the numbers that they shall have, so that neither takes the other's place.
    let mut inherited = vec![(above(control)?, CONTROL_FD)];
    if let Some(network) = &start.network {
        inherited.push((above(network)?, NETNS_FD));
    }
    let alone = start.network.is_none();
    // SAFETY: after the fork there are only system calls that take numbers.
    unsafe {
        command.pre_exec(move || {
            if alone {
                unshare(CloneFlags::CLONE_NEWNET)?;
            }
            for (from, to) in &inherited {
                if libc::dup2(from.as_raw_fd(), *to) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    command.kill_on_drop(true);
    command.spawn().attempt(format_args!("starting {}", program.display()))
}

fn arguments(start: &Start<'_>) -> Result<Vec<OsString>> {
    let place = |prefix: &str, place: &str, suffix: &str| {
        let mut argument = OsString::from(prefix);
        argument.push(start.directory.join(place));
        argument.push(suffix);
        argument
    };
    let mut words: Vec<OsString> = vec!["run".into()];
    let mut option = |name: &str, value: OsString| words.extend([name.into(), value]);
    option("--control", format!("fd:{CONTROL_FD}").into());
    option("--jail", place("", places::JAIL, ""));
    if start.network.is_some() {
        option("--netns", format!("fd:{NETNS_FD}").into());
    }
    if let Some(cgroup) = start.cgroup {
        option("--cgroup", cgroup.into());
    }
    for (tag, cache) in SHARES {
        // Of what others do the guest is told in those, that they are shared for.
        let news = if tag == BINDS_TAG { format!(":news={NEWS_GROUP}") } else { String::new() };
        option("--share", place(&format!("{tag}="), places::TREE, &format!(":cache={cache}{news}")));
    }
    for index in 0..DRIVES {
        let disk = start.blocks.get(index).map_or_else(|| Ok("none".into()), drive_argument)?;
        option("--drive", disk);
    }
    for slot in 0..net::SLOTS {
        let (pairs, mac) = (net::slot_pairs(slot), net::slot_mac(slot));
        option("--tap", format!("none:{pairs},mac={mac}").into());
    }
    option("--vsock", place("", places::VSOCK, ""));
    option("--console", place("file:", places::CONSOLE, ""));
    match &start.origin {
        Origin::Boot(boot) => {
            option("--kernel", boot.kernel.clone().into());
            option("--initrd", boot.initrd.clone().into());
            option("--append", boot.append.clone().into());
            option("--memory", boot.memory.to_string().into());
            if let Some(most) = boot.memory_max {
                option("--memory-max", most.to_string().into());
            }
            option("--cpus", boot.cpus.to_string().into());
        }
        Origin::Snapshot(directory) => option("--restore", directory.clone().into()),
    }
    Ok(words)
}

fn above(fd: &impl AsFd) -> Result<OwnedFd> {
    let copy = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(10)).attempt("duplicating a descriptor")?;
    // SAFETY: the call has just made this descriptor, for nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// With all options, so that none is looked for in the path.
fn drive_argument(block: &Block) -> Result<OsString> {
    let mut argument = path_of(block)?.into_os_string();
    argument.push(format!(":serial={}:{}", block.serial, if block.readonly { "ro" } else { "rw" }));
    Ok(argument)
}

/// On one line: of each processor its first two registers, and the devices.
fn brief(look: &Look) -> String {
    let devices = look.devices.iter().map(ToString::to_string);
    std::iter::once(processors(look)).chain(devices).collect::<Vec<_>>().join("; ")
}

fn processors(look: &Look) -> String {
    let first = |registers: &String| registers.split(' ').take(2).collect::<Vec<_>>().join(" ");
    let all = look.processors.iter().enumerate().map(|(id, all)| format!("vcpu {id} {}", first(all)));
    all.collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use runtime_spec::plan::BlockSource;
    use vmm::control::{QueueSight, Sight};

    use super::*;

    #[test]
    fn where_a_machine_stands_fits_an_error() {
        let queue = |index, offered| QueueSight { index, offered, taken: 3, given: 2 };
        let vsock = Sight {
            id: "vsock".into(),
            status: 15,
            unheard: 1,
            queues: vec![queue(0, Some(4)), queue(2, None)],
        };
        let processors = ["pc=0x1 pstate=0x2 x0=0x3", "pc=0x4"].map(String::from).to_vec();
        assert_eq!(
            brief(&Look { processors, devices: vec![vsock] }),
            "vcpu 0 pc=0x1 pstate=0x2; vcpu 1 pc=0x4; vsock status 0xf, unheard 0x1, queue 0 4/3/2, queue 2 ?/3/2"
        );
    }

    #[test]
    fn disks_whatever_their_paths() {
        for (path, readonly, argument) in [
            ("/a.img", false, "/a.img:serial=c0b1:rw"),
            ("/a.img", true, "/a.img:serial=c0b1:ro"),
            ("/a b:ro", false, "/a b:ro:serial=c0b1:rw"),
        ] {
            let source = BlockSource::Path(path.into());
            let block = Block { serial: "c0b1".to_owned(), source, readonly };
            assert_eq!(drive_argument(&block).unwrap(), argument);
        }
    }

    #[test]
    fn a_restored_machine_has_the_devices_of_one_that_boots_and_the_rest_from_its_snapshot() {
        let line = |origin| {
            let start =
                Start { directory: Path::new("/m"), origin, blocks: &[], network: None, cgroup: None };
            let words = arguments(&start).unwrap();
            words.iter().map(|word| word.to_str().unwrap().to_owned()).collect::<Vec<_>>().join(" ")
        };
        let boot = Boot {
            kernel: "/k".into(),
            initrd: "/i".into(),
            append: "quiet".into(),
            memory: 5,
            memory_max: Some(7),
            cpus: 3,
        };
        let drives = ["--drive none"; DRIVES].join(" ");
        let devices = "run --control fd:3 --jail /m/jail --share containers=/m/tree:cache=auto \
                       --share binds=/m/tree:cache=fresh:news=1936523264 DRIVES --tap none:4,mac=02:73:6d:00:00:01 \
                       --tap none:1,mac=02:73:6d:00:00:02 --tap none:1,mac=02:73:6d:00:00:03 \
                       --tap none:1,mac=02:73:6d:00:00:04 --tap none:1,mac=02:73:6d:00:00:05 \
                       --vsock /m/vsock --console file:/m/console".replace("DRIVES", &drives);
        let booted = "--kernel /k --initrd /i --append quiet --memory 5 --memory-max 7 --cpus 3";
        assert_eq!(line(Origin::Boot(boot)), format!("{devices} {booted}"));
        assert_eq!(line(Origin::Snapshot("/t".into())), format!("{devices} --restore /t"));
    }
}
