//! What every process is doing, as one table says; and the only place that events come from.
//!
//! Calls and news from the guest arrive in any order. The ledger holds back what is too early: an exit that comes
//! before its process's start was answered, and the exit of a container's own process while another of the
//! container's still runs. So clients see Create, Start, Exit, Delete; ExecAdded, ExecStarted, Exit; and the
//! container's own exit last.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use containerd_shim_protos::events::task::{
    TaskCheckpointed, TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM,
    TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::types::mount::Mount;
use protobuf::MessageField;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::events::Event;
use crate::time::timestamp;

/// What a process is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Its container is being made.
    Making,
    /// It waits to be started.
    Created,
    /// It is being started.
    Starting,
    /// It runs.
    Running,
    /// It stands still, with all of its container.
    Paused,
    /// It has exited.
    Exited,
    /// It is being removed.
    Deleting,
}

/// What can happen to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Made,
    Start,
    Started,
    NotStarted,
    Pause,
    Resume,
    Exit,
    Delete,
    NotDeleted,
}

/// What may happen when, and what comes of it. What is not here may not.
const TABLE: &[(Phase, Step, Phase)] = {
    use Phase::{Created, Deleting, Exited, Making, Paused, Running, Starting};
    &[
        (Making, Step::Made, Created),
        (Created, Step::Start, Starting),
        (Created, Step::Exit, Exited),
        (Created, Step::Delete, Deleting),
        (Starting, Step::Started, Running),
        (Starting, Step::NotStarted, Created),
        (Running, Step::Pause, Paused),
        (Running, Step::Exit, Exited),
        (Paused, Step::Resume, Running),
        (Paused, Step::Exit, Exited),
        (Exited, Step::Delete, Deleting),
        (Deleting, Step::NotDeleted, Exited),
    ]
};

fn after(from: Phase, step: Step) -> Option<Phase> {
    TABLE.iter().find(|(phase, what, _)| *phase == from && *what == step).map(|(_, _, to)| *to)
}

/// How a process ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Exit {
    /// As a shell tells it.
    pub status: u32,
    /// Nanoseconds since the epoch; 0 if it never ran.
    pub at: i64,
}

/// The streams that a client asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Io {
    /// What it reads.
    pub stdin: String,
    /// What it writes.
    pub stdout: String,
    /// What it complains to.
    pub stderr: String,
    /// Whether it has a terminal.
    pub terminal: bool,
}

/// A container that was made.
#[derive(Debug, Clone, Default)]
pub struct Made {
    /// Where its config.json lies.
    pub bundle: String,
    /// The mounts of its root.
    pub rootfs: Vec<Mount>,
    /// Its streams.
    pub io: Io,
    /// The host's process that stands for it.
    pub pid: u32,
}

/// What is known of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// What it is doing.
    pub phase: Phase,
    /// Its number; 0 until it has one.
    pub pid: u32,
    /// How it ended, if it has.
    pub exit: Option<Exit>,
    /// Its streams.
    pub io: Io,
    /// Where its container's config.json lies.
    pub bundle: String,
}

struct Process {
    phase: Phase,
    pid: u32,
    io: Io,
    /// Came too early.
    held: Option<Exit>,
    exit: watch::Sender<Option<Exit>>,
}

impl Process {
    fn new(phase: Phase, io: Io) -> Self {
        Self { phase, pid: 0, io, held: None, exit: watch::Sender::new(None) }
    }

    fn step(&mut self, step: Step) -> Result<()> {
        let Some(next) = after(self.phase, step) else { return Err(refusal(self.phase, step)) };
        self.phase = next;
        Ok(())
    }

    fn is_live(&self) -> bool {
        matches!(self.phase, Phase::Starting | Phase::Running | Phase::Paused)
    }
}

/// In the words of runc's shim, which some clients read.
fn refusal(phase: Phase, step: Step) -> Error {
    match (phase, step) {
        (Phase::Making, _) => Error::precondition("process not created"),
        (Phase::Deleting, _) => Error::not_found("container is being deleted: not found"),
        (Phase::Exited, Step::Start) => Error::precondition("cannot start a stopped process"),
        (_, Step::Start) => Error::precondition("cannot start a process that is already started"),
        (Phase::Starting | Phase::Running, Step::Delete) => {
            Error::precondition("cannot delete a running process")
        }
        (Phase::Paused, Step::Delete) => Error::precondition("cannot delete a paused process"),
        (Phase::Paused, Step::Pause) => Error::precondition("cannot pause a paused container"),
        (_, Step::Pause) => Error::precondition("cannot pause a process that does not run"),
        (_, Step::Resume) => Error::precondition("cannot resume a container that is not paused"),
        (phase, step) => Error::precondition(format!("a process that is {phase:?} is not for {step:?}")),
    }
}

struct Task {
    bundle: String,
    init: Process,
    execs: BTreeMap<String, Process>,
}

impl Task {
    fn process(&mut self, exec: &str) -> Result<&mut Process> {
        if exec.is_empty() {
            return Ok(&mut self.init);
        }
        self.execs
            .get_mut(exec)
            .ok_or_else(|| Error::not_found(format!("process {exec} does not exist: not found")))
    }
}

/// All containers of a shim.
pub struct Ledger {
    tasks: Mutex<HashMap<String, Task>>,
    events: Mutex<Option<UnboundedSender<Event>>>,
}

impl Ledger {
    /// Without any, from which events go there.
    pub fn new(events: UnboundedSender<Event>) -> Self {
        Self { tasks: Mutex::default(), events: Mutex::new(Some(events)) }
    }

    fn tasks(&self) -> MutexGuard<'_, HashMap<String, Task>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lock is held while an event is sent, which does not wait: so their order is that of what happened.
    fn emit(&self, event: Event) {
        if let Some(events) = &*self.events.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = events.send(event);
        }
    }

    /// There are no more events: whoever sends them on can end after the last.
    pub fn close(&self) {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn with<T>(&self, id: &str, what: impl FnOnce(&mut Task) -> Result<T>) -> Result<T> {
        let mut tasks = self.tasks();
        let task = tasks
            .get_mut(id)
            .ok_or_else(|| Error::not_found(format!("no such container {id}: not found")))?;
        what(task)
    }

    /// Reserves the id of a container that is about to be made.
    pub fn reserve(&self, id: &str) -> Result<()> {
        let mut tasks = self.tasks();
        if tasks.contains_key(id) {
            return Err(Error::already_exists(format!("container {id} already exists")));
        }
        let init = Process::new(Phase::Making, Io::default());
        tasks.insert(id.to_owned(), Task { bundle: String::new(), init, execs: BTreeMap::new() });
        Ok(())
    }

    /// A container could not be made: the id is free again.
    pub fn forget(&self, id: &str) {
        self.tasks().remove(id);
    }

    /// A container was made.
    pub fn made(&self, id: &str, made: Made) -> Result<()> {
        self.with(id, |task| {
            task.init.step(Step::Made)?;
            task.init.pid = made.pid;
            task.init.io = made.io.clone();
            task.bundle.clone_from(&made.bundle);
            let Io { stdin, stdout, stderr, terminal } = made.io;
            self.emit(Event::Create(TaskCreate {
                container_id: id.to_owned(),
                bundle: made.bundle,
                rootfs: made.rootfs,
                io: MessageField::some(TaskIO { stdin, stdout, stderr, terminal, ..TaskIO::default() }),
                pid: made.pid,
                ..TaskCreate::default()
            }));
            if let Some(exit) = task.init.held.take() {
                self.exit(id, task, "", exit);
            }
            Ok(())
        })
    }

    /// An exec was announced.
    pub fn exec_added(&self, id: &str, exec: &str, io: Io) -> Result<()> {
        self.with(id, |task| {
            match task.init.phase {
                Phase::Making => return Err(refusal(Phase::Making, Step::Start)),
                Phase::Exited | Phase::Deleting => {
                    return Err(Error::precondition("cannot exec in a stopped container"));
                }
                _ => {}
            }
            if task.execs.contains_key(exec) {
                return Err(Error::already_exists(format!("id {exec} already exists in container {id}")));
            }
            task.execs.insert(exec.to_owned(), Process::new(Phase::Created, io));
            self.emit(Event::ExecAdded(TaskExecAdded {
                container_id: id.to_owned(),
                exec_id: exec.to_owned(),
                ..TaskExecAdded::default()
            }));
            Ok(())
        })
    }

    /// A process is about to be started.
    pub fn starting(&self, id: &str, exec: &str) -> Result<()> {
        self.with(id, |task| {
            if !exec.is_empty() && !matches!(task.init.phase, Phase::Running) {
                task.process(exec)?;
                return Err(Error::precondition("cannot start a process in a container that does not run"));
            }
            task.process(exec)?.step(Step::Start)
        })
    }

    /// It was started. Returns its number. That of a container's own process is the host's, which it has already.
    pub fn started(&self, id: &str, exec: &str, pid: u32) -> Result<u32> {
        self.with(id, |task| {
            let process = task.process(exec)?;
            process.step(Step::Started)?;
            let container_id = id.to_owned();
            if exec.is_empty() {
                self.emit(Event::Start(TaskStart { container_id, pid: process.pid, ..TaskStart::default() }));
            } else {
                process.pid = pid;
                let exec_id = exec.to_owned();
                self.emit(Event::ExecStarted(TaskExecStarted {
                    container_id,
                    exec_id,
                    pid,
                    ..TaskExecStarted::default()
                }));
            }
            let pid = process.pid;
            if let Some(exit) = process.held.take() {
                self.exit(id, task, exec, exit);
            }
            Ok(pid)
        })
    }

    /// It could not be started.
    pub fn not_started(&self, id: &str, exec: &str) {
        let _ = self.with(id, |task| {
            let process = task.process(exec)?;
            process.step(Step::NotStarted)?;
            if let Some(exit) = process.held.take() {
                self.exit(id, task, exec, exit);
            }
            // A container's own exit may have waited for this one.
            self.release(id, task);
            Ok(())
        });
    }

    /// A process has exited. Told twice it is the same as once.
    pub fn exited(&self, id: &str, exec: &str, exit: Exit) {
        let _ = self.with(id, |task| {
            self.exit(id, task, exec, exit);
            Ok(())
        });
    }

    fn exit(&self, id: &str, task: &mut Task, exec: &str, exit: Exit) {
        let others = exec.is_empty() && task.execs.values().any(Process::is_live);
        let Ok(process) = task.process(exec) else { return };
        if others || matches!(process.phase, Phase::Making | Phase::Starting) {
            process.held.get_or_insert(exit);
            return;
        }
        if process.step(Step::Exit).is_err() {
            return;
        }
        self.emit(Event::Exit(TaskExit {
            container_id: id.to_owned(),
            id: if exec.is_empty() { id.to_owned() } else { exec.to_owned() },
            pid: process.pid,
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..TaskExit::default()
        }));
        process.exit.send_replace(Some(exit));
        if !exec.is_empty() {
            self.release(id, task);
        }
    }

    /// Lets a container's own exit go that has waited for others.
    fn release(&self, id: &str, task: &mut Task) {
        let ready = task.init.is_live() && task.init.phase != Phase::Starting;
        if ready && let Some(exit) = task.init.held.take() {
            self.exit(id, task, "", exit);
        }
    }

    /// Processes of a container whose exits are missing although its own has come.
    pub fn overdue(&self, id: &str) -> Vec<String> {
        let find = |task: &mut Task| {
            let live = task.execs.iter().filter(|(_, exec)| exec.is_live());
            Ok(if task.init.held.is_some() { live.map(|(id, _)| id.clone()).collect() } else { Vec::new() })
        };
        self.with(id, find).unwrap_or_default()
    }

    /// Every process that has not exited, a container's own after its others: for when their machine is gone.
    pub fn live(&self) -> Vec<(String, String)> {
        let tasks = self.tasks();
        let mut live = Vec::new();
        for (id, task) in tasks.iter() {
            let execs = task.execs.iter().filter(|(_, exec)| exec.is_live());
            live.extend(execs.map(|(exec, _)| (id.clone(), exec.clone())));
            if task.init.is_live() || task.init.phase == Phase::Created {
                live.push((id.clone(), String::new()));
            }
        }
        live
    }

    /// A process of the container was killed because memory ran out.
    pub fn oom(&self, id: &str) {
        let _ = self.with(id, |_| {
            self.emit(Event::Oom(TaskOOM { container_id: id.to_owned(), ..TaskOOM::default() }));
            Ok(())
        });
    }

    /// A container was written down, to that directory.
    pub fn checkpointed(&self, id: &str, directory: &str) -> Result<()> {
        self.with(id, |_| {
            self.emit(Event::Checkpointed(TaskCheckpointed {
                container_id: id.to_owned(),
                checkpoint: directory.to_owned(),
                ..TaskCheckpointed::default()
            }));
            Ok(())
        })
    }

    /// Whether a container could be paused (`true`) or resumed now.
    pub fn may_pause(&self, id: &str, pause: bool) -> Result<()> {
        let step = if pause { Step::Pause } else { Step::Resume };
        self.with(id, |task| match after(task.init.phase, step) {
            Some(_) => Ok(()),
            None => Err(refusal(task.init.phase, step)),
        })
    }

    /// A container stands still (`true`), or goes on.
    pub fn paused(&self, id: &str, pause: bool) -> Result<()> {
        self.with(id, |task| {
            task.init.step(if pause { Step::Pause } else { Step::Resume })?;
            let container_id = id.to_owned();
            self.emit(if pause {
                Event::Paused(TaskPaused { container_id, ..TaskPaused::default() })
            } else {
                Event::Resumed(TaskResumed { container_id, ..TaskResumed::default() })
            });
            Ok(())
        })
    }

    /// A process is about to be removed.
    pub fn deleting(&self, id: &str, exec: &str) -> Result<()> {
        self.with(id, |task| task.process(exec)?.step(Step::Delete))
    }

    /// It could not be removed; it may be tried again.
    pub fn not_deleted(&self, id: &str, exec: &str) {
        let _ = self.with(id, |task| task.process(exec)?.step(Step::NotDeleted));
    }

    /// It is gone. Returns its number and how it ended; those who wait for it learn the same.
    pub fn deleted(&self, id: &str, exec: &str) -> Result<(u32, Exit)> {
        let mut tasks = self.tasks();
        let gone = || Error::not_found(format!("no such container {id}: not found"));
        let task = tasks.get_mut(id).ok_or_else(gone)?;
        let process = task.process(exec)?;
        let exit = process.exit.borrow().unwrap_or_default();
        let pid = process.pid;
        process.exit.send_replace(Some(exit));
        if !exec.is_empty() {
            task.execs.remove(exec);
            return Ok((pid, exit));
        }
        tasks.remove(id);
        self.emit(Event::Delete(TaskDelete {
            container_id: id.to_owned(),
            pid,
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..TaskDelete::default()
        }));
        Ok((pid, exit))
    }

    /// What is known of a process.
    pub fn view(&self, id: &str, exec: &str) -> Result<View> {
        self.with(id, |task| {
            let bundle = task.bundle.clone();
            let process = task.process(exec)?;
            if process.phase == Phase::Making {
                return Err(Error::not_found(format!("container {id} is not created: not found")));
            }
            let (phase, pid, exit, io) =
                (process.phase, process.pid, *process.exit.borrow(), process.io.clone());
            Ok(View { phase, pid, exit, io, bundle })
        })
    }

    /// Becomes `Some` when a process exits.
    pub fn waiter(&self, id: &str, exec: &str) -> Result<watch::Receiver<Option<Exit>>> {
        self.view(id, exec)?;
        self.with(id, |task| Ok(task.process(exec)?.exit.subscribe()))
    }

    /// Execs of a container, with their numbers.
    pub fn execs(&self, id: &str) -> Result<Vec<(String, u32)>> {
        self.with(id, |task| {
            Ok(task.execs.iter().map(|(exec, process)| (exec.clone(), process.pid)).collect())
        })
    }

    /// Whether there is no container.
    pub fn is_empty(&self) -> bool {
        self.tasks().is_empty()
    }
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
