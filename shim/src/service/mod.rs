//! What a shim does, a method for each call of containerd's, without the transport.
//!
//! Here is what a client asks of tasks that are there; `create` and `assemble` make them, by what `origin` finds, in a
//! machine of their own or one that they `share`, `remove` takes them away, `watch` hears from the machine, `save` writes them down, and `warm` keeps them for others to start from.

mod assemble;
mod create;
mod origin;
mod remove;
mod save;
mod share;
mod warm;
mod watch;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use containerd_shim_protos::api::{
    ExecProcessRequest, PidsResponse, ProcessInfo, StateResponse, Status, UpdateTaskRequest,
};
use containerd_shim_protos::shim::oci::ProcessDetails;
use log::{info, warn};
use oci_spec::runtime::Spec;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use runtime_spec::plan::Block;
use tokio::sync::{Notify, RwLock, watch as channel};

use crate::cgroup;
use crate::error::{Error, Result};
use crate::guest::Guest;
use crate::holder::Holder;
use crate::hooks::Run;
use crate::journal::Journal;
use crate::ledger::{Exit, Io, Ledger, Phase, View};
use crate::machine::Machine;
use crate::paths::Paths;
use crate::stdio::{Opened, Streams};
use crate::time::timestamp;
use crate::timeline::Timeline;

pub use create::NewContainer;

/// A shim: the containers of one machine.
pub struct Shim {
    paths: Paths,
    ledger: Ledger,
    containers: Mutex<HashMap<String, Arc<Container>>>,
    machine: Mutex<Option<Arc<Machine>>>,
    /// How many containers there have been.
    ordinal: AtomicU32,
    /// There have been containers that share the machine without being a pod.
    shared: AtomicBool,
    /// Held by whoever asks something of the guest: not while it is written down.
    changes: RwLock<()>,
    leave: channel::Sender<bool>,
    /// Somebody has been taken away, or was not after all.
    left: Notify,
    /// When the shim was started, until its first container has noted it.
    born: Born,
}

/// A moment that one may take.
struct Born(Mutex<Option<i64>>);

impl Born {
    fn take(&self) -> Option<i64> {
        lock(&self.0).take()
    }
}

/// What a container does until it is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begins {
    /// Its process waits.
    Anew,
    /// It was restored, and its process waits, while its streams are held.
    Held,
    /// It was restored, and stands still.
    Still,
}

/// A container that is there.
pub struct Container {
    id: String,
    /// The agent of its machine.
    guest: Guest,
    /// How it is started.
    begins: Begins,
    /// Somebody has run other processes in it, or changed its limits.
    touched: AtomicBool,
    /// What it waits for, to be kept for others.
    warming: Mutex<Option<warm::Warming>>,
    /// Why it cannot be written down, if so.
    stays: Option<&'static str>,
    /// Its disks, which are in drives of its machine's.
    disks: Vec<Block>,
    /// Memory by which its machine has grown for it.
    room: u64,
    /// What its execs take from it.
    spec: Spec,
    /// For its logging processes.
    environment: Vec<(String, String)>,
    poststart: Option<Run>,
    cgroup: Option<PathBuf>,
    /// Of all its processes that the guest knows: also of those that it had when it was written down, of which no client
    /// knows in one that is restored.
    streams: Mutex<HashMap<String, Arc<Streams>>>,
    journal: Option<Arc<Journal>>,
    holder: Mutex<Option<Holder>>,
    leaving: Mutex<Leaving>,
}

/// Whether a container is being taken away.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Leaving {
    #[default]
    No,
    /// Others are there after it.
    Before,
    /// When all others are gone that leave, the machine goes with it.
    Last,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Container {
    fn streams(&self, exec: &str) -> Option<Arc<Streams>> {
        lock(&self.streams).get(exec).cloned()
    }
}

impl Shim {
    /// Without containers. `leave` becomes true when the shim shall end.
    pub fn new(paths: Paths, ledger: Ledger, leave: channel::Sender<bool>) -> Self {
        Self {
            paths,
            ledger,
            containers: Mutex::default(),
            machine: Mutex::default(),
            ordinal: AtomicU32::new(0),
            shared: AtomicBool::new(false),
            changes: RwLock::new(()),
            leave,
            left: Notify::new(),
            born: Born(Mutex::new(None)),
        }
    }

    /// It was started at this time, in nanoseconds since the epoch.
    #[must_use]
    pub fn born_at(self, time: i64) -> Self {
        lock(&self.born.0).replace(time);
        self
    }

    fn container(&self, id: &str) -> Result<Arc<Container>> {
        lock(&self.containers)
            .get(id)
            .cloned()
            .ok_or_else(|| Error::not_found(format!("no such container {id}: not found")))
    }

    fn machine(&self) -> Option<Arc<Machine>> {
        lock(&self.machine).clone()
    }

    /// `State`
    pub fn state(&self, id: &str, exec: &str) -> Result<StateResponse> {
        let View { phase, pid, exit, io, bundle } = self.ledger.view(id, exec)?;
        let status = match phase {
            Phase::Making | Phase::Created | Phase::Starting => Status::CREATED,
            Phase::Running => Status::RUNNING,
            Phase::Paused => Status::PAUSED,
            Phase::Exited | Phase::Deleting => Status::STOPPED,
        };
        let exit = exit.unwrap_or_default();
        Ok(StateResponse {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            bundle,
            pid,
            status: status.into(),
            stdin: io.stdin,
            stdout: io.stdout,
            stderr: io.stderr,
            terminal: io.terminal,
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..StateResponse::default()
        })
    }

    /// `Start`. Returns the process's number.
    pub async fn start(self: &Arc<Self>, id: &str, exec: &str) -> Result<u32> {
        let changing = self.changes.read().await;
        self.ledger.starting(id, exec)?;
        let timeline = Timeline::of(&self.directory(id));
        let _start = exec.is_empty().then(|| timeline.phase("start"));
        let started = async {
            let container = self.container(id)?;
            // Some clients attach networks between Create and Start.
            if exec.is_empty()
                && let Some(machine) = self.machine()
            {
                let _network = timeline.phase("network");
                machine.bring_network(false).await?;
            }
            if exec.is_empty() && container.begins != Begins::Anew {
                container.guest.release(id).await?;
            }
            let pid = if exec.is_empty() && container.begins == Begins::Still {
                container.guest.resume(id).await?;
                0
            } else {
                container.guest.start(id, exec).await?
            };
            Ok::<_, Error>((container, pid))
        };
        let (container, pid) = started.await.inspect_err(|_| self.ledger.not_started(id, exec))?;
        let pid = self.ledger.started(id, exec, pid)?;
        if exec.is_empty()
            && let Some(machine) = self.machine()
        {
            // Once for each template, and before anybody saves the machine, which takes longer than a client of this should wait.
            machine.record_use().await;
        }
        drop(changing);
        if exec.is_empty() {
            self.warm_up(&container);
        }
        if exec.is_empty()
            && let Some(run) = container.poststart.clone()
        {
            let _ = tokio::task::spawn_blocking(move || run.all_despite_errors()).await;
        }
        Ok(pid)
    }

    /// `Pids`: at once, also when the guest is busy. The first is the task's own; others
    /// have numbers that stand for the guest's.
    pub async fn pids(&self, id: &str) -> Result<PidsResponse> {
        let view = self.ledger.view(id, "")?;
        let execs = self.ledger.execs(id)?;
        let mut processes = vec![ProcessInfo { pid: view.pid, ..ProcessInfo::default() }];
        let mut known = Vec::new();
        if view.phase == Phase::Running
            && let Ok(container) = self.container(id)
        {
            match container.guest.glance_at_pids(id).await {
                Ok(pids) => known = pids,
                Err(error) => info!("asking for the processes of {id}: {error}"),
            }
        }
        let first = known.iter().map(|(pid, _)| *pid).min();
        known.retain(|(pid, exec)| Some(*pid) != first || !exec.is_empty());
        if first.is_none() {
            known.extend(execs.into_iter().filter(|(_, pid)| *pid != 0).map(|(exec, pid)| (pid, exec)));
        }
        for (pid, exec_id) in known {
            processes.push(ProcessInfo { pid, info: details(exec_id)?, ..ProcessInfo::default() });
        }
        Ok(PidsResponse { processes, ..PidsResponse::default() })
    }

    /// `Pause` (`true`) and `Resume`.
    pub async fn pause(&self, id: &str, pause: bool) -> Result<()> {
        let _changing = self.changes.read().await;
        self.ledger.may_pause(id, pause)?;
        let container = self.container(id)?;
        if pause {
            container.guest.pause(id).await?;
        } else {
            container.guest.resume(id).await?;
        }
        self.ledger.paused(id, pause)
    }

    /// `Kill`
    pub async fn kill(&self, id: &str, exec: &str, signal: u32, all: bool) -> Result<()> {
        let _changing = self.changes.read().await;
        let finished = || Error::not_found("process already finished: not found");
        match self.ledger.view(id, exec)?.phase {
            Phase::Exited | Phase::Deleting => return Err(finished()),
            Phase::Created if !exec.is_empty() => {
                return Err(Error::precondition("process not created"));
            }
            _ => {}
        }
        let container = self.container(id)?;
        let exec = if all { "" } else { exec };
        match container.guest.signal(id, exec, signal, all).await {
            Err(error) if error.code == ttrpc::Code::NOT_FOUND => Err(finished()),
            // Its exits are on their way.
            Err(_) if self.machine().is_some_and(|machine| machine.is_over()) => Err(finished()),
            other => other,
        }
    }

    /// `Exec`
    pub async fn exec(&self, request: ExecProcessRequest) -> Result<()> {
        let _changing = self.changes.read().await;
        let (id, exec) = (request.id, request.exec_id);
        let container = self.container(&id)?;
        if self.ledger.view(&id, &exec).is_ok() {
            return Err(Error::already_exists(format!("id {exec} already exists in container {id}")));
        }
        if self.ledger.view(&id, "")?.phase == Phase::Paused {
            return Err(Error::precondition("cannot exec in a paused state: resume the container first"));
        }
        container.touched.store(true, Ordering::Relaxed);
        let (process, notes) = runtime_spec::read::process(&request.spec.value)?;
        let (process, more) = runtime_spec::exec(&process, &container.spec, request.terminal)?;
        for note in notes.iter().chain(&more) {
            info!("{id} {exec}: {}: {}", note.path, note.text);
        }
        let process = serde_json::to_vec(&process).map_err(Error::unknown)?;
        let io = Io {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        let opened = Opened::open(&io, &container.environment).await?;
        let announcing = container.guest.exec(&id, &exec, process, opened.announce());
        let joined = opened.join_while(&container.guest, &id, &exec, announcing).await?;
        let added = joined.and_then(|streams| {
            self.ledger.exec_added(&id, &exec, io)?;
            Ok(streams)
        });
        match added {
            Ok(streams) => {
                lock(&container.streams).insert(exec, Arc::new(streams));
                Ok(())
            }
            Err(error) => {
                if let Err(error) = container.guest.delete(&id, &exec).await {
                    warn!("removing exec {exec} of {id}, which failed: {error}");
                }
                Err(error)
            }
        }
    }

    /// `ResizePty`. Clients do not look whether there is a terminal.
    pub async fn resize_pty(&self, id: &str, exec: &str, width: u32, height: u32) -> Result<()> {
        let _changing = self.changes.read().await;
        if !self.ledger.view(id, exec)?.io.terminal {
            return Ok(());
        }
        self.container(id)?.guest.resize_pty(id, exec, width, height).await
    }

    /// `CloseIO`
    pub fn close_io(&self, id: &str, exec: &str, stdin: bool) -> Result<()> {
        self.ledger.view(id, exec)?;
        if stdin && let Some(streams) = self.container(id)?.streams(exec) {
            streams.close_input();
        }
        Ok(())
    }

    /// `Update`
    pub async fn update(&self, request: UpdateTaskRequest) -> Result<()> {
        let _changing = self.changes.read().await;
        let id = request.id;
        if matches!(self.ledger.view(&id, "")?.phase, Phase::Exited | Phase::Deleting) {
            return Err(Error::precondition("cannot update a container that has ended"));
        }
        let container = self.container(&id)?;
        container.touched.store(true, Ordering::Relaxed);
        let (resources, notes) = runtime_spec::read::resources(&request.resources.value)?;
        let update = runtime_spec::update(&resources)?;
        for note in notes.iter().chain(&update.notes) {
            info!("{id}: {}: {}", note.path, note.text);
        }
        let guest = serde_json::to_vec(&update.guest).map_err(Error::unknown)?;
        container.guest.update(&id, guest).await?;
        if let Some(path) = &container.cgroup {
            cgroup::limit(path, &update.host);
            if self.shared.load(Ordering::Relaxed) {
                cgroup::lift(path);
            }
        }
        Ok(())
    }

    /// `Wait`. There may be many.
    pub async fn wait(&self, id: &str, exec: &str) -> Result<Exit> {
        let mut waiter = self.ledger.waiter(id, exec)?;
        let exit = waiter.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        // Without one the container was not made after all.
        exit.ok_or_else(|| Error::not_found(format!("no such container {id}: not found")))
    }

    /// `Stats`
    pub async fn stats(&self, id: &str) -> Result<Any> {
        let _changing = self.changes.read().await;
        self.ledger.view(id, "")?;
        let stats = self.container(id)?.guest.stats(id).await?;
        Ok(Any { type_url: stats.type_url, value: stats.value, ..Any::default() })
    }

    /// `Connect`. Returns the task's number.
    pub fn connect(&self, id: &str) -> Result<u32> {
        Ok(self.ledger.view(id, "")?.pid)
    }

    /// `Shutdown`: nothing, as long as there are containers.
    pub fn shutdown(&self) {
        if self.ledger.is_empty() {
            self.leave.send_replace(true);
        }
    }

    /// No more events come: what is published so far is all.
    pub fn close(&self) {
        self.ledger.close();
    }

    /// The directory in which a container's things are noted.
    fn directory(&self, id: &str) -> PathBuf {
        self.paths.task(id)
    }
}

fn details(exec_id: String) -> Result<MessageField<Any>> {
    if exec_id.is_empty() {
        return Ok(MessageField::none());
    }
    let details = ProcessDetails { exec_id, ..ProcessDetails::default() };
    let value = details.write_to_bytes().map_err(Error::unknown)?;
    Ok(MessageField::some(Any {
        type_url: "containerd.runc.v1.ProcessDetails".into(),
        value,
        ..Any::default()
    }))
}

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;
