//! A machine: its monitor, and the way from nothing to an agent that serves.
//!
//! The monitor belongs to whoever holds the other end of its control socket, which is this process alone: it ends
//! when the shim does, however that ends.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};

use agent_api::READY_PORT;
use agent_api::agent::ConfigureRequest;
use log::{info, warn};
use nix::fcntl::{FcntlArg, fcntl};
use runtime_spec::layout::{BINDS_TAG, SHARE_TAG};
use runtime_spec::plan::{self, Block, BlockSource, Socket};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::time::timeout;
use ttrpc::Code;
use vmm::control::Client as Control;

use crate::deadlines;
use crate::error::{Attempt, Error, Result};
use crate::guest::Guest;
use crate::host;
use crate::journal::{Journal, Made};
use crate::paths::Paths;
use crate::process::Process;
use crate::time;
use crate::timeline::Timeline;

/// Where the guest's kernel and initrd are installed.
const INSTALLED: &str = "/usr/share/supermachine/guest";
const KERNEL: &str = if cfg!(target_arch = "aarch64") { "Image" } else { "vmlinux" };
const INITRD: &str = "supermachine.cpio";
/// Lines of the monitor's that are kept for an error.
const LINES: usize = 20;
/// As much of the console as is shown when a boot fails.
const CONSOLE_TAIL: usize = 1500;
/// The descriptors that the monitor inherits.
const CONTROL_FD: i32 = 3;
const NETNS_FD: i32 = 4;

/// What a machine is made of.
pub struct Recipe<'a> {
    /// Where its things are.
    pub paths: &'a Paths,
    /// The plan for it.
    pub machine: &'a plan::Machine,
    /// Its disks.
    pub blocks: &'a [Block],
    /// The network namespace that it is in.
    pub network: OwnedFd,
    /// The cgroup that it is in.
    pub cgroup: Option<&'a Path>,
    /// How gladly the kernel kills it.
    pub oom_score_adj: Option<i32>,
    /// Where the phases of the boot are written.
    pub timeline: &'a Timeline,
}

/// A machine whose agent serves.
pub struct Machine {
    /// The agent.
    pub guest: Guest,
    /// What was made for it.
    pub journal: Arc<Journal>,
    paths: Paths,
    monitor: Process,
    ended: watch::Receiver<Option<String>>,
    said: Arc<Mutex<VecDeque<String>>>,
    // Held: the machine is gone when it is dropped.
    _control: Control,
}

impl Machine {
    /// Boots one. What it takes is written into `journal` first.
    pub async fn boot(journal: Arc<Journal>, recipe: Recipe<'_>) -> Result<Self> {
        let begun = std::time::Instant::now();
        let starts = recipe.timeline.phase("monitor");
        let paths = recipe.paths.clone();
        let ready = prepare(&paths)?;
        let (ours, theirs) = StdStream::pair().attempt("making a control socket")?;
        let mut child = spawn(&recipe, &theirs)?;
        drop(theirs);
        let pid = child.id().unwrap_or_default();
        let monitor = Process::of(pid).attempt("looking at the monitor")?;
        journal.note(Made::Process(monitor)).attempt("writing the journal")?;
        if let Some(score) = recipe.oom_score_adj
            && let Err(error) = fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string())
        {
            warn!("setting the monitor's oom_score_adj to {score}: {error}");
        }
        let said = Arc::new(Mutex::new(VecDeque::new()));
        let stderr = child.stderr.take();
        let lines = said.clone();
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
            let how = status.map_or_else(|error| error.to_string(), |status| status.to_string());
            tell.send_replace(Some(how));
        });
        let monitor_up = control(ours);
        let guest = async {
            let control = monitor_up.await?;
            drop(starts);
            let kernel = recipe.timeline.phase("kernel");
            ready.accept().await.attempt("waiting for the agent of the machine")?;
            drop(kernel);
            let _agent = recipe.timeline.phase("agent");
            let guest = Guest::connect(paths.vsock().join("vsock")).await?;
            guest.configure(&first_configuration()).await?;
            Ok::<_, Error>((control, guest))
        };
        let mut over = ended.clone();
        let booted = tokio::select! {
            booted = timeout(deadlines::BOOT, guest) => booted
                .unwrap_or_else(|_| Err(Error::deadline(format!("the machine did not boot within {:?}", deadlines::BOOT)))),
            _ = over.wait_for(Option::is_some) => Err(Error::unknown("the machine ended while it booted")),
        };
        let (control, guest) = match booted {
            Ok(booted) => booted,
            Err(error) => {
                // Its socket may close before it has been heard out, and it ends with the socket.
                let _ = timeout(deadlines::LAST_WORDS, over.wait_for(Option::is_some)).await;
                return Err(explain(error, &paths, &ended, &said));
            }
        };
        info!("machine of monitor {pid} booted in {:?}", begun.elapsed());
        Ok(Self { guest, journal, paths, monitor, ended, said, _control: control })
    }

    /// An error of a call: with what monitor and guest said last, if the call did not reach the agent.
    pub fn explain(&self, error: Error) -> Error {
        match error.code {
            Code::UNAVAILABLE | Code::DEADLINE_EXCEEDED => {
                explain(error, &self.paths, &self.ended, &self.said)
            }
            _ => error,
        }
    }

    /// Its monitor.
    pub fn monitor(&self) -> Process {
        self.monitor
    }

    /// Returns when it is over, and how it ended.
    pub async fn ended(&self) -> String {
        let mut ended = self.ended.clone();
        let how = ended.wait_for(Option::is_some).await.ok().and_then(|how| how.clone());
        how.unwrap_or_else(|| "unknown".to_owned())
    }

    /// Whether it is over.
    pub fn is_over(&self) -> bool {
        self.ended.borrow().is_some()
    }

    /// Lets its guest write what is to be written, and ends it.
    pub async fn stop(&self) {
        if !self.is_over() {
            let gently = async {
                match self.guest.power_off().await {
                    Ok(()) => drop(self.ended().await),
                    Err(error) => warn!("asking the machine to turn itself off: {error}"),
                }
            };
            if timeout(deadlines::POWER_OFF, gently).await.is_err() {
                warn!("the machine did not turn itself off within {:?}", deadlines::POWER_OFF);
            }
        }
        if !self.is_over() {
            let monitor = self.monitor;
            let killed = tokio::task::spawn_blocking(move || monitor.kill(deadlines::KILLED)).await;
            if let Ok(Err(error)) = killed {
                warn!("killing the monitor: {error}");
            }
        }
    }

    /// Joins ports of the guest to unix sockets of the host, as long as the machine runs.
    pub fn forward(&self, sockets: &[Socket]) -> Result<()> {
        for socket in sockets {
            let path = self.paths.vsock().join(format!("vsock_{}", socket.port));
            let listener =
                UnixListener::bind(&path).attempt(format_args!("listening on {}", path.display()))?;
            let (target, mut ended) = (socket.source.clone(), self.ended.clone());
            tokio::spawn(async move {
                tokio::select! {
                    () = forward(listener, &target) => {}
                    _ = ended.wait_for(Option::is_some) => {}
                }
            });
        }
        Ok(())
    }
}

async fn forward(listener: UnixListener, target: &Path) {
    while let Ok((mut guest, _)) = listener.accept().await {
        let target = target.to_owned();
        tokio::spawn(async move {
            let joined = async {
                let mut host = UnixStream::connect(&target).await?;
                tokio::io::copy_bidirectional(&mut guest, &mut host).await
            };
            if let Err(error) = joined.await {
                info!("forwarding to {}: {error}", target.display());
            }
        });
    }
}

/// The directories, and the socket at which the agent rings.
fn prepare(paths: &Paths) -> Result<UnixListener> {
    for directory in [paths.vsock(), paths.machine().join("jail")] {
        fs::create_dir_all(&directory).attempt(format_args!("making {}", directory.display()))?;
    }
    let ring = paths.vsock().join(format!("vsock_{READY_PORT}"));
    UnixListener::bind(&ring).attempt(format_args!("listening on {}", ring.display()))
}

/// A configured path, or where the package has it.
fn guest_file(configured: Option<&PathBuf>, name: &str) -> Result<PathBuf> {
    let path = configured.cloned().unwrap_or_else(|| Path::new(INSTALLED).join(name));
    if path.is_file() {
        return Ok(path);
    }
    let (path, what) = (path.display(), if name == INITRD { "initrd" } else { "kernel" });
    Err(Error::precondition(format!(
        "the guest's {what} is not at {path}; install it there, or set vm.{what}"
    )))
}

/// Kernel and initrd as configured: what they are, and where or why not.
pub fn guest_files(
    kernel: Option<&PathBuf>,
    initrd: Option<&PathBuf>,
) -> [(&'static str, Result<PathBuf>); 2] {
    [("kernel", guest_file(kernel, KERNEL)), ("initrd", guest_file(initrd, INITRD))]
}

/// The monitor that came with this shim.
pub fn monitor() -> PathBuf {
    const NAME: &str = "supermachine-vmm";
    let beside = std::env::current_exe().ok().map(|own| own.with_file_name(NAME));
    beside.filter(|path| path.is_file()).unwrap_or_else(|| Path::new("/usr/bin").join(NAME))
}

fn spawn(recipe: &Recipe<'_>, control: &StdStream) -> Result<Child> {
    let paths = recipe.paths;
    let size = recipe.machine.size;
    let program = monitor();
    let mut command = Command::new(&program);
    command.arg("run").arg("--control").arg(format!("fd:{CONTROL_FD}"));
    command.arg("--jail").arg(paths.machine().join("jail")).arg("--netns").arg(format!("fd:{NETNS_FD}"));
    if let Some(cgroup) = recipe.cgroup {
        command.arg("--cgroup").arg(cgroup);
    }
    for (tag, cache) in [(SHARE_TAG, "auto"), (BINDS_TAG, "fresh")] {
        let mut share = OsString::from(format!("{tag}="));
        share.push(paths.tree());
        share.push(format!(":cache={cache}"));
        command.arg("--share").arg(share);
    }
    command.arg("--vsock").arg(paths.vsock());
    command.arg("--kernel").arg(guest_file(recipe.machine.kernel.as_ref(), KERNEL)?);
    command.arg("--initrd").arg(guest_file(recipe.machine.initrd.as_ref(), INITRD)?);
    command.arg("--memory").arg(size.memory.to_string()).arg("--cpus").arg(size.cpus.to_string());
    let mut console = OsString::from("file:");
    console.push(paths.machine().join("console"));
    command.arg("--console").arg(console).arg("--append").arg("quiet");
    for block in recipe.blocks {
        command.arg("--block").arg(block_argument(block)?);
    }
    command.env_clear().current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    // Beyond the numbers that they shall have, so that neither takes the other's place.
    let inherited = [(above(control)?, CONTROL_FD), (above(&recipe.network)?, NETNS_FD)];
    // SAFETY: after the fork there are only system calls that take numbers.
    unsafe {
        command.pre_exec(move || {
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

fn above(fd: &impl std::os::fd::AsFd) -> Result<OwnedFd> {
    let copy = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(10)).attempt("duplicating a descriptor")?;
    // SAFETY: the call has just made this descriptor, for nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// With all options, so that none is looked for in the path.
fn block_argument(block: &Block) -> Result<OsString> {
    let path = match &block.source {
        BlockSource::Path(path) => path.clone(),
        BlockSource::Device { major, minor } => host::disk(*major, *minor)?,
    };
    let mut argument = path.into_os_string();
    argument.push(format!(":serial={}:{}", block.serial, if block.readonly { "ro" } else { "rw" }));
    Ok(argument)
}

async fn control(socket: StdStream) -> Result<Control> {
    let greeted = tokio::task::spawn_blocking(|| Control::over(socket, deadlines::MONITOR_HELLO)).await;
    greeted.map_err(Error::unknown)?.map_err(|error| Error::unknown(format!("the monitor: {error}")))
}

fn first_configuration() -> ConfigureRequest {
    let mut entropy = vec![0; 64];
    // SAFETY: the pointer and the length are those of `entropy`.
    let got = unsafe { libc::getrandom(entropy.as_mut_ptr().cast(), entropy.len(), 0) };
    entropy.truncate(usize::try_from(got).unwrap_or(0));
    ConfigureRequest { realtime: time::now(), entropy, ..ConfigureRequest::default() }
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

/// An error with what monitor and guest said last.
fn explain(
    error: Error,
    paths: &Paths,
    ended: &watch::Receiver<Option<String>>,
    said: &Mutex<VecDeque<String>>,
) -> Error {
    let mut text = error.text;
    if let Some(how) = &*ended.borrow() {
        text = format!("{text}; the monitor's end: {how}");
    }
    let said = said.lock().unwrap_or_else(PoisonError::into_inner);
    if !said.is_empty() {
        let said: Vec<_> = said.iter().cloned().collect();
        text = format!("{text}; the monitor said: {}", said.join("; "));
    }
    if let Ok(console) = fs::read(paths.machine().join("console")) {
        let tail = &console[console.len().saturating_sub(CONSOLE_TAIL)..];
        let tail = String::from_utf8_lossy(tail);
        if !tail.trim().is_empty() {
            text = format!("{text}; the guest's console ends with: {}", tail.trim());
        }
    }
    Error { code: error.code, text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_whatever_their_paths() {
        for (path, readonly, argument) in [
            ("/a.img", false, "/a.img:serial=c0b1:rw"),
            ("/a.img", true, "/a.img:serial=c0b1:ro"),
            ("/a b:ro", false, "/a b:ro:serial=c0b1:rw"),
        ] {
            let source = BlockSource::Path(path.into());
            let block = Block { serial: "c0b1".to_owned(), source, readonly };
            assert_eq!(block_argument(&block).unwrap(), argument);
        }
    }
}
