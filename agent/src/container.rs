//! A container: its processes, its cgroup, and what was made for it.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_api::agent::Exit;
use anyhow::{Context, Result};
use bpf::Program;
use nix::sys::signal::Signal;
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxResources, LinuxSeccomp, Spec};
use runtime_spec::layout;
use runtime_spec::plan::{Guest, GuestDevice};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::cgroup::Cgroup;
use crate::devices;
use crate::events::{Events, now};
use crate::helper::client::{Helpers, Made};
use crate::helper::{Create, Join, Request, mounted};
use crate::machine::disks;
use crate::process::{Life, Process};
use crate::sockets::{Forwarded, forward};
use crate::watches;

/// Where bundles are, for libcontainer.
pub const BUNDLES: &str = "/run/supermachine/bundles";
/// Where libcontainer keeps what it knows.
pub const STATES: &str = "/run/supermachine/states";

/// For a container's mounts, hooks and making.
const CREATE_DEADLINE: Duration = Duration::from_secs(120);
const JOIN_DEADLINE: Duration = Duration::from_secs(60);
/// For what the host's file server is asked to.
const UNMOUNT_DEADLINE: Duration = Duration::from_secs(30);
const START_DEADLINE: Duration = Duration::from_secs(10);
/// For processes beside a container's own to be gone before its own exit is told.
const LAST_DEADLINE: Duration = Duration::from_secs(5);

/// A container.
pub struct Container {
    /// Its name.
    pub id: String,
    /// Its control group.
    pub cgroup: Cgroup,
    /// Its own process.
    pub init: Arc<Process>,
    seccomp: Option<LinuxSeccomp>,
    mounts: Vec<PathBuf>,
    /// Serial numbers of its disks.
    disks: Vec<String>,
    inner: Mutex<Inner>,
    events: Arc<Events>,
}

#[derive(Default)]
struct Inner {
    execs: HashMap<String, Arc<Process>>,
    sockets: Vec<Forwarded>,
    paused: bool,
    /// The program that guards devices.
    devices: Option<Program>,
    disks: Vec<devices::Rule>,
    /// As many processes killed as the shim was told of.
    kills: u64,
}

impl Container {
    /// One of which nothing is there yet.
    pub fn new(guest: &Guest, init: Arc<Process>, events: Arc<Events>) -> Self {
        Self {
            id: init.id.clone(),
            cgroup: Cgroup::of(&init.id),
            seccomp: seccomp_of(&guest.spec),
            mounts: mounted(&guest.mounts),
            disks: guest.disks(),
            init,
            inner: Mutex::default(),
            events,
        }
    }

    /// Makes it, up to its process, which waits to be started. What fails is to be removed.
    pub async fn create(self: &Arc<Self>, helpers: &Helpers, guest: Box<Guest>) -> Result<i32> {
        self.cgroup.create()?;
        let resources = guest.spec.linux().as_ref().and_then(|linux| linux.resources().clone());
        let resources = resources.unwrap_or_default();
        let (disks, devices) = (self.disks.clone(), guest.devices.clone());
        let rules = tokio::task::spawn_blocking(move || {
            disks::take_up(&disks).context("taking up disks")?;
            disk_rules(&devices)
        });
        self.inner().disks = rules.await.context("looking for disks")??;
        self.guard_devices(resources.devices().as_deref().unwrap_or_default())?;
        self.limit(resources).await?;
        for socket in &guest.sockets {
            let forwarded = forward(socket)?;
            self.inner().sockets.push(forwarded);
        }
        let streams = self.init.open_streams()?;
        let request = Request::Create(Box::new(Create {
            id: self.id.clone(),
            guest,
            bundle: self.bundle(),
            states: STATES.into(),
            cgroup: self.cgroup.name(),
            size: self.init.size(),
        }));
        let made = helpers.make(&request, streams, CREATE_DEADLINE).await?;
        let pid = made.pid;
        self.publish_namespaces(pid)?;
        self.adopt(Arc::clone(&self.init), made, Life::Created(pid))?;
        Ok(pid)
    }

    /// Lets its own process run the program.
    pub async fn start_init(&self) -> Result<()> {
        let path = Path::new(STATES).join(&self.id).join("notify.sock");
        let tell = async {
            let mut socket =
                UnixStream::connect(&path).await.context("the container's process does not wait")?;
            socket.write_all(b"start container").await.context("starting the container's process")
        };
        timeout(START_DEADLINE, tell).await.context("starting the container's process")?
    }

    /// Makes a process that was announced.
    pub async fn start_exec(
        self: &Arc<Self>,
        helpers: &Helpers,
        exec: &Arc<Process>,
        process: oci_spec::runtime::Process,
    ) -> Result<i32> {
        let pid = self.init.pid().context("cannot exec in a stopped container")?;
        let streams = exec.open_streams()?;
        let request = Request::Join(Box::new(Join {
            pid,
            process,
            seccomp: self.seccomp.clone(),
            cgroup: self.cgroup.path().to_owned(),
            size: exec.size(),
        }));
        let made = helpers.make(&request, streams, JOIN_DEADLINE).await?;
        let pid = made.pid;
        self.adopt(Arc::clone(exec), made, Life::Running(pid))?;
        Ok(pid)
    }

    /// Waits for the end of a process that was made, in a task of its own.
    fn adopt(self: &Arc<Self>, process: Arc<Process>, made: Made, life: Life) -> Result<()> {
        if let Some(terminal) = made.terminal {
            process.set_terminal(terminal)?;
        }
        let _ = process.advance(&Life::Starting, life);
        let container = Arc::clone(self);
        tokio::spawn(async move {
            let status = made.end.await.unwrap_or(255);
            let exit = Exit { status, exited_at: now(), pid: made.pid.cast_unsigned(), ..Exit::default() };
            if process.exec_id.is_empty() {
                container.end().await;
            }
            // What killed it is told before that it is dead.
            container.look_at_memory();
            process.exit(exit.clone());
            container.events.exited(&process.id, &process.exec_id, exit);
        });
        Ok(())
    }

    /// Its own process has exited: nothing of it lives on, and the exits of all others come before.
    async fn end(&self) {
        let _ = fs::remove_dir_all(self.namespaces());
        if let Err(error) = self.cgroup.kill() {
            log::error!("{}: {error:#}", self.id);
        }
        let execs: Vec<_> = self.inner().execs.values().cloned().collect();
        let all = async {
            for exec in execs {
                if matches!(exec.life(), Life::Running(_)) {
                    exec.exited().await;
                }
            }
        };
        let _ = timeout(LAST_DEADLINE, all).await;
    }

    /// Announces a process; none, if there is one of that name.
    pub fn announce(&self, exec: Arc<Process>) -> Option<()> {
        let mut inner = self.inner();
        if inner.execs.contains_key(&exec.exec_id) {
            return None;
        }
        inner.execs.insert(exec.exec_id.clone(), exec);
        Some(())
    }

    /// A process of it.
    pub fn process(&self, exec_id: &str) -> Option<Arc<Process>> {
        if exec_id.is_empty() {
            return Some(Arc::clone(&self.init));
        }
        self.inner().execs.get(exec_id).cloned()
    }

    /// How many processes beside its own there are.
    pub fn execs(&self) -> Vec<Arc<Process>> {
        self.inner().execs.values().cloned().collect()
    }

    /// Forgets a process.
    pub fn forget(&self, exec_id: &str) {
        self.inner().execs.remove(exec_id);
    }

    fn guard_devices(&self, spec: &[LinuxDeviceCgroup]) -> Result<()> {
        let mut inner = self.inner();
        let rules = devices::rules(spec, &inner.disks);
        let program = devices::lay(&rules, self.cgroup.path(), inner.devices.as_ref())?;
        inner.devices = Some(program);
        Ok(())
    }

    /// Changes what it is limited to.
    pub async fn update(&self, resources: LinuxResources) -> Result<()> {
        if let Some(rules) = resources.devices() {
            self.guard_devices(rules)?;
        }
        self.limit(resources).await
    }

    async fn limit(&self, resources: LinuxResources) -> Result<()> {
        let cgroup = self.cgroup.clone();
        // Memory that is taken away has to be freed first.
        tokio::task::spawn_blocking(move || cgroup.limit(&resources)).await.context("setting limits")?
    }

    /// Stops or goes on.
    pub async fn pause(&self, paused: bool) -> Result<()> {
        self.cgroup.freeze(paused).await?;
        self.inner().paused = paused;
        Ok(())
    }

    /// Whether it stands still.
    pub fn is_paused(&self) -> bool {
        self.inner().paused
    }

    /// Sends a signal to all of its processes.
    pub fn signal_all(&self, signal: i32) -> Result<()> {
        if signal == Signal::SIGKILL as i32 {
            return self.cgroup.kill();
        }
        for pid in self.cgroup.pids()? {
            // SAFETY: the call takes two numbers.
            unsafe { libc::kill(pid.cast_signed(), signal) };
        }
        Ok(())
    }

    /// Tells of processes that the kernel has killed for their memory since the last look.
    pub fn look_at_memory(&self) {
        let Some(kills) = self.cgroup.keyed("memory.events", "oom_kill") else { return };
        let mut inner = self.inner();
        if kills > inner.kills {
            inner.kills = kills;
            drop(inner);
            self.events.out_of_memory(&self.id, kills);
        }
    }

    /// Removes all that there is of it. Goes on as far as it can, and returns the first that failed.
    pub async fn remove(&self, helpers: &Helpers, shm: Option<PathBuf>) -> Result<()> {
        let execs: Vec<_> = self.inner().execs.drain().map(|(_, exec)| exec).collect();
        let cgroup = self.cgroup.remove().await;
        for process in execs.iter().chain([&self.init]) {
            process.end_streams();
        }
        self.inner().sockets.clear();
        watches::leave(&self.id);
        let mut places = self.mounts.clone();
        places.extend(shm);
        let unmounted = if places.is_empty() {
            Ok(())
        } else {
            helpers.run(&Request::Unmount(places), UNMOUNT_DEADLINE).await
        };
        for directory in [
            self.namespaces(),
            self.bundle(),
            Path::new(STATES).join(&self.id),
            Path::new(layout::GUEST_SOCKETS).join(&self.id),
        ] {
            let _ = fs::remove_dir_all(directory);
        }
        if !self.disks.is_empty() {
            let disks = self.disks.clone();
            // The host finds them in use then, and leaves them where they are.
            let let_go = tokio::task::spawn_blocking(move || disks::let_go(&disks)).await;
            if let Err(error) = let_go.map_err(anyhow::Error::from).flatten() {
                log::warn!("{}: letting go of disks: {error:#}", self.id);
            }
        }
        if unmounted.is_ok() && !self.mounts.is_empty() {
            let _ = remove_empty(&Path::new(layout::GUEST_CONTAINERS).join(&self.id));
        }
        cgroup.and(unmounted)
    }

    /// Its namespaces are found by others of its pod, for as long as it lives.
    fn publish_namespaces(&self, pid: i32) -> Result<()> {
        let directory = self.namespaces();
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory).context("publishing the container's namespaces")?;
        for kind in ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"] {
            symlink(format!("/proc/{pid}/ns/{kind}"), directory.join(kind))
                .context("publishing the container's namespaces")?;
        }
        Ok(())
    }

    fn namespaces(&self) -> PathBuf {
        Path::new(layout::GUEST_NAMESPACES).join(&self.id)
    }

    fn bundle(&self) -> PathBuf {
        Path::new(BUNDLES).join(&self.id)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn disk_rules(asked: &[GuestDevice]) -> Result<Vec<devices::Rule>> {
    let rule = |device: &GuestDevice| {
        let disk = disks::find(&device.serial)?;
        devices::Rule::disk(disk.major, disk.minor, &device.access)
    };
    asked.iter().map(rule).collect()
}

fn seccomp_of(spec: &Spec) -> Option<LinuxSeccomp> {
    spec.linux().as_ref()?.seccomp().clone()
}

/// Removes directories that have nothing in them: what is mounted there still is not to be emptied.
fn remove_empty(path: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_empty(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}
