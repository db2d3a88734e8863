//! A machine: the way from nothing to an agent that serves, by a boot or from a template.

pub mod drives;
pub mod monitor;
pub mod net;
mod size;
mod watches;

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use agent_api::agent::ConfigureRequest;
use log::{debug, info, warn};
use runtime_spec::plan::{self, Block, Socket};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Mutex;
use tokio::time::timeout;
use ttrpc::Code;
use vmm::control::Request;
use vmm::snapshot::Form;

use self::drives::Drives;
use self::monitor::{Boot, Monitor, Origin, Start};
use self::net::{Ends, Network, Rules, Uplink};
use self::watches::Watches;
use crate::deadlines;
use crate::error::{Attempt, Error, Result};
use crate::guest::Guest;
use crate::journal::{Journal, Made};
use crate::paths::Paths;
use crate::process::Process;
use crate::template::Template;
use crate::time;
use crate::timeline::Timeline;

pub use monitor::monitor_path;
pub use size::Change;
use size::Growth;

/// Where the guest's kernel and initrd are installed.
const INSTALLED: &str = "/usr/share/supermachine/guest";
const KERNEL: &str = if cfg!(target_arch = "aarch64") { "Image" } else { "vmlinux" };
const INITRD: &str = "supermachine.cpio";
/// In a machine's directory: the name of the template that it runs on.
pub const TEMPLATE: &str = "template";

/// What a machine is made of.
pub struct Recipe<'a> {
    /// Where its things are.
    pub paths: &'a Paths,
    /// The plan for it.
    pub machine: &'a plan::Machine,
    /// The disks that are in its drives from the beginning, in their order.
    pub blocks: &'a [Block],
    /// The network namespace that it is in.
    pub network: &'a OwnedFd,
    /// Where that can be found again, if it is not the machine's own.
    pub network_path: Option<&'a Path>,
    /// What it has of a network besides what is in that.
    pub uplink: Option<&'a plan::Uplink>,
    /// The cgroup that it is in.
    pub cgroup: Option<&'a Path>,
    /// How gladly the kernel kills it.
    pub oom_score_adj: Option<i32>,
    /// Where the phases of its making are written.
    pub timeline: &'a Timeline,
}

impl Recipe<'_> {
    fn network(&self) -> Result<Network> {
        let namespace = self.network.try_clone().attempt("duplicating a descriptor")?;
        let uplink = self.uplink.map(|uplink| Uplink::of(uplink.clone(), &self.paths.machine()));
        let rules = Rules { spoofing: self.machine.spoofing, vhost: self.machine.vhost };
        Network::new(namespace, self.network_path.map(Path::to_owned), rules, uplink)
    }
}

/// A machine whose agent serves.
pub struct Machine {
    /// The agent.
    pub guest: Guest,
    /// What was made for it.
    pub journal: Arc<Journal>,
    /// The last event of its agent's that was heard.
    pub heard: AtomicU64,
    paths: Paths,
    monitor: Monitor,
    network: Network,
    drives: Drives,
    /// Held by whoever changes its size.
    growth: Mutex<Growth>,
    /// What it runs on, which is not pruned as long.
    template: Option<Template>,
}

/// Why a machine was not restored.
#[derive(Debug)]
pub enum NotRestored {
    /// It cannot be, from this template.
    Template(Template, Error),
    /// For a reason that has to do with no template.
    Other(Error),
}

impl Machine {
    /// Boots one. What it takes is written into `journal` first.
    pub async fn boot(journal: Arc<Journal>, recipe: &Recipe<'_>) -> Result<Self> {
        let begun = Instant::now();
        let (machine, paths) = (recipe.machine, recipe.paths);
        let starts = recipe.timeline.phase("monitor");
        let ready = monitor::prepare(&paths.machine())?;
        let origin = Origin::Boot(Boot {
            kernel: guest_file(machine.kernel.as_ref(), KERNEL)?,
            initrd: guest_file(machine.initrd.as_ref(), INITRD)?,
            append: "quiet".to_owned(),
            memory: machine.size.memory,
            memory_max: None,
            cpus: machine.size.cpus,
        });
        let (monitor, greeting) = start(&journal, recipe, origin)?;
        let guest = async {
            greeting.heard().await?;
            drop(starts);
            let kernel = recipe.timeline.phase("kernel");
            ready.accept().await.attempt("waiting for the agent of the machine")?;
            drop(kernel);
            let _agent = recipe.timeline.phase("agent");
            greet(&monitor, deadlines::DIAL).await
        };
        let guest = match monitor.while_alive("booting a machine", deadlines::BOOT, guest).await {
            Ok(guest) => guest,
            Err(error) => return Err(monitor.stuck(error).await),
        };
        info!("machine of monitor {} booted in {:?}", monitor.process().pid, begun.elapsed());
        let (paths, heard) = (paths.clone(), AtomicU64::new(0));
        let (network, drives) = (recipe.network()?, Drives::holding(recipe.blocks));
        let growth = Mutex::new(Growth::new(machine.size.cpus, Change::default()));
        Ok(Self { guest, journal, heard, paths, monitor, network, drives, growth, template: None })
    }

    /// Restores one, which is then to change. What it takes is written into `journal` first.
    pub async fn restore(
        journal: Arc<Journal>,
        recipe: &Recipe<'_>,
        template: Template,
        change: Change,
    ) -> std::result::Result<Self, NotRestored> {
        let begun = Instant::now();
        let paths = recipe.paths;
        let starts = recipe.timeline.phase("monitor");
        let other = NotRestored::Other;
        // It has rung before it was saved.
        drop(monitor::prepare(&paths.machine()).map_err(other)?);
        let note = paths.machine().join(TEMPLATE);
        fs::write(&note, template.key.as_str())
            .attempt(format_args!("writing {}", note.display()))
            .map_err(other)?;
        let origin = Origin::Snapshot(template.directory.clone());
        let (monitor, greeting) = start(&journal, recipe, origin).map_err(other)?;
        let guest = async {
            greeting.heard().await?;
            drop(starts);
            let _restore = recipe.timeline.phase("restore");
            greet(&monitor, deadlines::RESTORE).await
        };
        let network = recipe.network().map_err(other)?;
        match monitor.while_alive("restoring a machine", deadlines::RESTORE, guest).await {
            Ok(guest) => {
                template.worked();
                info!("machine of monitor {} restored in {:?}", monitor.process().pid, begun.elapsed());
                let (paths, heard) = (paths.clone(), AtomicU64::new(0));
                let (drives, template) = (Drives::holding(recipe.blocks), Some(template));
                let growth = Mutex::new(Growth::new(recipe.machine.size.cpus, change));
                Ok(Self { guest, journal, heard, paths, monitor, network, drives, growth, template })
            }
            Err(error) => {
                let error = monitor.stuck(error).await;
                let killed = monitor.has_ended().is_some_and(|ended| ended.killed);
                monitor.kill().await;
                let _ = fs::remove_file(note);
                Err(if killed { NotRestored::Other(error) } else { NotRestored::Template(template, error) })
            }
        }
    }

    /// Gives its guest what is in its network namespace by now, and takes from it what is not there any more. With
    /// `in_any_case` also if it has been told so, as one that comes from elsewhere may have other things.
    pub async fn bring_network(&self, in_any_case: bool) -> Result<()> {
        self.network.bring(self.ends(), in_any_case).await.map_err(|error| self.explain(error))
    }

    /// Puts disks of a container's into its drives, all or none.
    pub async fn insert(&self, disks: &[Block]) -> Result<()> {
        self.drives.insert(&self.monitor, disks).await.map_err(|error| self.explain(error))
    }

    /// Takes out disks of a container that is gone from its guest.
    pub async fn eject(&self, disks: &[Block]) {
        if !self.is_over() {
            self.drives.eject(&self.monitor, disks).await;
        }
    }

    /// How many drives have no disk.
    pub fn free_drives(&self) -> usize {
        self.drives.free()
    }

    /// Has connections to localhost of its network namespace be its guest's.
    pub async fn forward_localhost(&self) -> Result<()> {
        self.network.forward_localhost(&self.monitor).await
    }

    /// From now on nothing is brought.
    pub async fn leave_network(&self) {
        self.network.leave().await;
    }

    /// For what others do in directories that its processes watch.
    pub fn watches(&self) -> Result<Watches> {
        let watches = Watches::new(&self.paths.tree(), self.monitor().pid);
        watches.attempt("opening the tree that the machine shares")
    }

    /// Returns when something has changed in its network namespace since it was brought.
    pub async fn network_changes(&self) -> Result<()> {
        self.network.changes().await
    }

    fn ends(&self) -> Ends<'_> {
        Ends { journal: &self.journal, monitor: &self.monitor, guest: &self.guest }
    }

    /// Has it written into two empty files, while it stands still; `meanwhile` is done first, and takes no longer than
    /// what a container has written may take to copy. It goes on afterwards, unless that is not wanted; also when it could
    /// not be written.
    pub async fn save(
        &self,
        state: &File,
        memory: &File,
        form: Form,
        goes_on: bool,
        meanwhile: impl FnOnce() -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let what = "saving a machine";
        let (state, memory) = (state.try_clone().attempt(what)?, memory.try_clone().attempt(what)?);
        let within = match form {
            Form::Packed => deadlines::CHECKPOINT,
            Form::Sparse | Form::Over => deadlines::SAVE,
        };
        let saving = self.monitor.ask(what, move |control| {
            control.pause(deadlines::STANDSTILL)?;
            let saved = match meanwhile() {
                Ok(()) => control.snapshot(state.as_fd(), memory.as_fd(), form, within).map(Ok),
                Err(error) => Ok(Err(error)),
            };
            if goes_on || !matches!(saved, Ok(Ok(_))) {
                control.resume()?;
            }
            saved
        });
        // Longer than each of the three calls waits, so that the machine goes on before that is told.
        let all = deadlines::STANDSTILL + deadlines::UPPER + within + 3 * deadlines::MONITOR_CALL;
        let (length, written) = self.monitor.while_alive(what, all, saving).await??;
        info!("a machine of {length} bytes is saved in {written}");
        Ok(())
    }

    /// Leaves a hint beside its template of what a machine that goes on from there uses first, if nobody has.
    pub async fn record_use(&self) {
        let Some(template) = &self.template else { return };
        let what = "asking what a machine has used of its memory";
        let recorded = async {
            let Some(hint) = template.new_hint().attempt(what)? else { return Ok(()) };
            let ask = move |control: &mut vmm::control::Client| {
                control.call(Request::RecordUse, &[hint.file.as_fd()], deadlines::MONITOR_CALL)?;
                Ok(hint.keep())
            };
            self.monitor.ask(what, ask).await?.attempt(what)
        };
        let recorded: Result<()> = recorded.await;
        if let Err(error) = recorded {
            // Machines wait for each page then, as the first one did.
            debug!("what machines use first is not known: {error}");
        }
    }

    /// Ends it where it is.
    pub async fn kill(&self) {
        self.monitor.kill().await;
    }

    /// An error of a call: with what monitor and guest said last, if the call did not reach the agent.
    pub fn explain(&self, error: Error) -> Error {
        match error.code {
            Code::UNAVAILABLE | Code::DEADLINE_EXCEEDED => self.monitor.explain(error),
            _ => error,
        }
    }

    /// Where the snapshot is, or was, that it was restored from, if it was.
    pub fn snapshot(&self) -> Option<&Path> {
        self.template.as_ref().map(|template| template.directory.as_path())
    }

    /// Its monitor.
    pub fn monitor(&self) -> Process {
        self.monitor.process()
    }

    /// Returns when it is over, and how it ended.
    pub async fn ended(&self) -> String {
        self.monitor.ended().await.how
    }

    /// Whether it is over, or will be in a moment, as one is whose monitor has just been killed.
    pub async fn is_ending(&self) -> bool {
        timeout(deadlines::LAST_WORDS, self.ended()).await.is_ok()
    }

    /// Whether it is over.
    pub fn is_over(&self) -> bool {
        self.monitor.has_ended().is_some()
    }

    /// Lets its guest write what is to be written, and ends it.
    pub async fn stop(&self) {
        if !self.is_over() {
            let gently = async {
                match self.guest.power_off().await {
                    // It has nothing to do but to turn itself off, which takes a kernel longer than this.
                    Ok(()) => self.monitor.kill().await,
                    Err(error) => warn!("asking the machine to turn itself off: {error}"),
                }
            };
            if timeout(deadlines::POWER_OFF, gently).await.is_err() {
                warn!("the machine did not turn itself off within {:?}", deadlines::POWER_OFF);
            }
        }
        if !self.is_over() {
            self.monitor.kill().await;
        }
    }

    /// A container of it has this file as its `/etc/resolv.conf`.
    pub fn resolves_by(&self, file: &Path) {
        self.network.resolvers.named_in(file);
    }

    /// Joins ports of the guest to unix sockets of the host, as long as the machine runs.
    pub fn forward(self: &Arc<Self>, sockets: &[Socket]) -> Result<()> {
        for socket in sockets {
            let path = self.paths.vsock().join(format!("vsock_{}", socket.port));
            let listener =
                UnixListener::bind(&path).attempt(format_args!("listening on {}", path.display()))?;
            let (target, ended) = (socket.source.clone(), self.monitor.watch());
            tokio::spawn(async move {
                tokio::select! {
                    () = forward(listener, &target) => {}
                    () = ended => {}
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

fn start(journal: &Journal, recipe: &Recipe<'_>, origin: Origin) -> Result<(Monitor, monitor::Greeting)> {
    let directory = recipe.paths.machine();
    let network = recipe.network.try_clone().attempt("duplicating a descriptor")?;
    let started = Monitor::start(&Start {
        directory: &directory,
        origin,
        blocks: recipe.blocks,
        network: Some(network),
        cgroup: recipe.cgroup,
    })?;
    let process = started.0.process();
    journal.note(Made::Process(process)).attempt("writing the journal")?;
    if let Some(score) = recipe.oom_score_adj
        && let Err(error) = fs::write(format!("/proc/{}/oom_score_adj", process.pid), score.to_string())
    {
        warn!("setting the monitor's oom_score_adj to {score}: {error}");
    }
    Ok(started)
}

/// Finds the agent, and tells it what no other machine is told.
async fn greet(monitor: &Monitor, within: Duration) -> Result<Guest> {
    let guest = Guest::connect(monitor.vsock(), within).await?;
    guest.configure(&first_configuration()).await?;
    Ok(guest)
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

fn first_configuration() -> ConfigureRequest {
    let mut entropy = vec![0; 64];
    // SAFETY: the pointer and the length are those of `entropy`.
    let got = unsafe { libc::getrandom(entropy.as_mut_ptr().cast(), entropy.len(), 0) };
    entropy.truncate(usize::try_from(got).unwrap_or(0));
    ConfigureRequest { realtime: time::now(), entropy, ..ConfigureRequest::default() }
}
