//! What the shim asks for. The calls of the protocol are translated in [`rpc`]; what they mean is here and in what is
//! called from here.

mod forward;
mod hold;
mod names;
mod ports;
mod rpc;
mod stdio;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_api::agent::{Exit, SetNetworkRequest, Stdio};
use agent_api::{
    FORWARD_PORT, READY_LINE, READY_PORT, RPC_PORT, STDIO_PORT, STREAMS_DEADLINE, create_agent, is_id,
};
use anyhow::{Context, Error, Result};
use runtime_spec::plan::Guest;
use tokio::time::timeout;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};
use ttrpc::Code;

use crate::boot::Booted;
use crate::container::Container;
use crate::events::Events;
use crate::helper::Request;
use crate::helper::client::Helpers;
use crate::machine::dhcp::Leases;
use crate::machine::disks;
use crate::machine::modules::Modules;
use crate::machine::network::Devices;
use crate::machine::resolvers::Resolvers;
use crate::machine::settings;
use crate::oom::Watcher;
use crate::process::{Life, Process};
use crate::reaper::Reaper;
use crate::watches::Watches;

/// Containers and processes beside them, of a machine.
const MOST_CONTAINERS: usize = 1024;
const MOST_EXECS: usize = 1024;
/// Threads for what may take its time in the kernel.
const THREADS: usize = 4;
/// For the host's file server to answer.
const SHARE_DEADLINE: Duration = Duration::from_secs(30);

/// What has gone wrong, as the shim is to tell it.
#[derive(Debug)]
pub struct Failure {
    code: Code,
    text: String,
}

impl Failure {
    fn new(code: Code, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::new(Code::UNKNOWN, format!("{error:#}"))
    }
}

type Outcome<T> = std::result::Result<T, Failure>;

/// The agent.
pub struct Agent {
    containers: Mutex<HashMap<String, Arc<Container>>>,
    /// Processes that are announced and not made: what they are to run.
    announced: Mutex<HashMap<(String, String), oci_spec::runtime::Process>>,
    /// Who uses which shared memory.
    shm: Mutex<HashMap<PathBuf, Vec<String>>>,
    provided: tokio::sync::Mutex<Provided>,
    /// Held while the network is set up.
    devices: Arc<Mutex<Devices>>,
    resolvers: Mutex<Resolvers>,
    leases: tokio::sync::Mutex<Leases>,
    events: Arc<Events>,
    watches: Arc<Watches>,
    helpers: Helpers,
    watcher: Watcher,
}

/// What containers find, of what is not there from the beginning: a machine that is saved before its first container
/// has no file system whose other side is the host's.
struct Provided {
    modules: Modules,
    share: bool,
}

/// Serves the shim. Returns when it cannot any more.
pub fn serve(booted: Booted) -> Error {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(THREADS).build();
    match runtime {
        Ok(runtime) => runtime.block_on(run(booted)).map_or_else(|error| error, |never| match never {}),
        Err(error) => Error::new(error).context("making the runtime"),
    }
}

async fn run(booted: Booted) -> Result<std::convert::Infallible> {
    let agent = Arc::new(Agent {
        containers: Mutex::default(),
        announced: Mutex::default(),
        shm: Mutex::default(),
        provided: tokio::sync::Mutex::new(Provided { modules: booted.modules, share: false }),
        devices: Arc::new(Mutex::new(booted.devices)),
        resolvers: Mutex::default(),
        leases: tokio::sync::Mutex::default(),
        events: Arc::default(),
        watches: Arc::default(),
        helpers: Helpers::new(Reaper::start()?),
        watcher: Watcher::start()?,
    });
    if let Err(error) = agent.helpers.get_ready().await {
        // Each is then made when it is needed.
        log::warn!("{error:#}");
    }
    let streams = listen(STDIO_PORT)?;
    let forwarded = listen(FORWARD_PORT)?;
    let calls = listen(RPC_PORT)?;
    let ready_after = crate::boot::uptime();
    let seeded = AtomicBool::new(false);
    let service = create_agent(Arc::new(rpc::Rpc { agent: Arc::clone(&agent), ready_after, seeded }));
    let mut server =
        ttrpc::asynchronous::Server::new().register_service(service).add_listener(stdio::from_host(calls));
    server.start().await.context("serving")?;
    tokio::spawn(stdio::serve(Arc::clone(&agent), streams));
    tokio::spawn(forward::serve(forwarded));
    if let Some(trace) = booted.trace {
        tokio::spawn(Arc::clone(&agent.watches).follow(trace));
    }
    eprintln!("{READY_LINE}");
    // A host that is not waiting to hear it refuses.
    drop(VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, READY_PORT)).await);
    std::future::pending().await
}

fn listen(port: u32) -> Result<VsockListener> {
    VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
        .with_context(|| format!("listening on vsock port {port}"))
}

impl Agent {
    async fn set_network(&self, request: SetNetworkRequest) -> Result<()> {
        self.resolvers.lock().unwrap_or_else(PoisonError::into_inner).set(&request.resolvers)?;
        let mut leases = self.leases.lock().await;
        let leased = Leases::wanted(&request.interfaces)?;
        leases.end_others(&leased).await?;
        let devices = Arc::clone(&self.devices);
        let setting = move || devices.lock().unwrap_or_else(PoisonError::into_inner).set(&request);
        tokio::task::spawn_blocking(setting).await??;
        leases.begin(leased).await
    }

    /// Returns how many processors run then. The network's queues follow.
    fn set_online_cpus(&self, count: u32) -> Result<u32> {
        let count = settings::set_online_cpus(count)?;
        self.devices.lock().unwrap_or_else(PoisonError::into_inner).use_queues()?;
        Ok(count)
    }

    async fn create(&self, id: &str, guest: &[u8], stdio: Stdio) -> Outcome<u32> {
        check_id(id)?;
        let guest: Box<Guest> = serde_json::from_slice(guest).map_err(|error| invalid("guest", &error))?;
        self.check_room()?;
        let terminal = guest.spec.process().as_ref().is_some_and(|process| process.terminal() == Some(true));
        if terminal != stdio.terminal {
            return Err(Failure::new(
                Code::INVALID_ARGUMENT,
                "the spec and the streams differ about a terminal",
            ));
        }
        let init = Arc::new(Process::new(id, "", stdio));
        let _ = init.advance(&Life::Announced, Life::Starting);
        let container = Arc::new(Container::new(&guest, init, Arc::clone(&self.events)));
        {
            let mut containers = self.containers();
            if containers.contains_key(id) {
                return Err(Failure::new(Code::ALREADY_EXISTS, format!("container {id}: already exists")));
            }
            if containers.len() >= MOST_CONTAINERS {
                return Err(Failure::new(Code::RESOURCE_EXHAUSTED, "the machine has too many containers"));
            }
            containers.insert(id.to_owned(), Arc::clone(&container));
        }
        if let Some(shm) = &guest.shm {
            self.shm().entry(shm.path.clone()).or_default().push(id.to_owned());
        }
        match self.make(&container, guest).await {
            Ok(pid) => Ok(pid.cast_unsigned()),
            Err(error) => {
                if let Err(also) = self.remove(&container).await {
                    log::error!("removing {id}, which was not made: {also:#}");
                }
                self.containers().remove(id);
                Err(error.into())
            }
        }
    }

    async fn make(&self, container: &Arc<Container>, guest: Box<Guest>) -> Result<i32> {
        self.provide(&guest).await?;
        for (name, value) in &guest.sysctls {
            crate::machine::settings::set_sysctl(name, value)?;
        }
        if let Some(name) = &guest.hostname {
            crate::machine::settings::set_hostname(name)?;
        }
        let pid = container.create(&self.helpers, guest).await?;
        self.watcher.watch(container)?;
        Ok(pid)
    }

    /// The share and the file systems that a container's mounts are made of. Whoever comes first mounts and loads.
    async fn provide(&self, guest: &Guest) -> Result<()> {
        let mut provided = self.provided.lock().await;
        for mount in &guest.mounts {
            provided.modules.need(&mount.typ)?;
        }
        if !guest.disks().is_empty() {
            disks::need_driver(&mut provided.modules)?;
        }
        if !provided.share {
            self.helpers.run(&Request::Share, SHARE_DEADLINE).await?;
            provided.share = true;
        }
        Ok(())
    }

    fn exec(&self, id: &str, exec_id: &str, process: &[u8], stdio: Stdio) -> Outcome<()> {
        check_id(exec_id)?;
        let container = self.container(id)?;
        let mut process: oci_spec::runtime::Process =
            serde_json::from_slice(process).map_err(|error| invalid("process", &error))?;
        process.set_terminal(Some(stdio.terminal));
        self.check_room()?;
        if container.execs().len() >= MOST_EXECS {
            return Err(Failure::new(
                Code::RESOURCE_EXHAUSTED,
                "the container has too many processes beside its own",
            ));
        }
        if matches!(container.init.life(), Life::Exited(_)) {
            return Err(Failure::new(Code::FAILED_PRECONDITION, "cannot exec in a stopped container"));
        }
        let exec = Arc::new(Process::new(id, exec_id, stdio));
        container
            .announce(exec)
            .ok_or_else(|| Failure::new(Code::ALREADY_EXISTS, format!("exec {exec_id}: already exists")))?;
        self.announced().insert((id.to_owned(), exec_id.to_owned()), process);
        Ok(())
    }

    async fn start(&self, id: &str, exec_id: &str) -> Outcome<u32> {
        let container = self.container(id)?;
        let process = self.process(id, exec_id)?;
        let wrong = |life: &Life| {
            let state = match life {
                Life::Exited(_) => "stopped",
                Life::Running(_) => "running",
                _ => "being started",
            };
            Failure::new(Code::FAILED_PRECONDITION, format!("cannot start a process that is {state}"))
        };
        if !matches!(process.life(), Life::Announced | Life::Created(_)) {
            return Err(wrong(&process.life()));
        }
        let attached = async {
            for line in process.lines() {
                line.attachment().await;
            }
        };
        if timeout(STREAMS_DEADLINE, attached).await.is_err() {
            let text = "not all streams of the process were connected in time";
            return Err(Failure::new(Code::DEADLINE_EXCEEDED, text));
        }
        if exec_id.is_empty() {
            let Life::Created(pid) = process.life() else { return Err(wrong(&process.life())) };
            process.advance(&Life::Created(pid), Life::Running(pid)).map_err(|life| wrong(&life))?;
            container.start_init().await?;
            return Ok(pid.cast_unsigned());
        }
        if container.init.pid().is_none() {
            return Err(Failure::new(Code::FAILED_PRECONDITION, "cannot exec in a stopped container"));
        }
        process.advance(&Life::Announced, Life::Starting).map_err(|life| wrong(&life))?;
        let spec = self.announced().remove(&(id.to_owned(), exec_id.to_owned()));
        let spec = spec.context("the process is not announced")?;
        match container.start_exec(&self.helpers, &process, spec).await {
            Ok(pid) => Ok(pid.cast_unsigned()),
            Err(error) => {
                process.exit(Exit { status: 255, ..Exit::default() });
                process.end_streams();
                Err(error.into())
            }
        }
    }

    fn signal(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Outcome<()> {
        let container = self.container(id)?;
        let signal = i32::try_from(signal).ok().filter(|signal| (0..=64).contains(signal));
        let signal = signal.ok_or_else(|| Failure::new(Code::INVALID_ARGUMENT, "there is no such signal"))?;
        let process = self.process(id, exec_id)?;
        let finished = || Failure::new(Code::NOT_FOUND, "process already finished: not found");
        if all && exec_id.is_empty() {
            if matches!(process.life(), Life::Exited(_))
                && container.cgroup.pids().is_ok_and(|pids| pids.is_empty())
            {
                return Err(finished());
            }
            return Ok(container.signal_all(signal)?);
        }
        match process.life() {
            Life::Announced | Life::Starting => {
                Err(Failure::new(Code::FAILED_PRECONDITION, "process not created"))
            }
            Life::Exited(_) => Err(finished()),
            Life::Created(pid) | Life::Running(pid) => {
                // SAFETY: the call takes two numbers. The process is ours, and its end is not waited for yet.
                if unsafe { libc::kill(pid, signal) } == 0 { Ok(()) } else { Err(finished()) }
            }
        }
    }

    async fn delete(&self, id: &str, exec_id: &str) -> Outcome<Exit> {
        let container = self.container(id)?;
        let process = self.process(id, exec_id)?;
        let running = || Failure::new(Code::FAILED_PRECONDITION, "cannot delete a running process");
        let exit = match process.life() {
            Life::Exited(exit) => exit,
            Life::Announced => Exit::default(),
            Life::Created(_) if exec_id.is_empty() => {
                container.cgroup.kill()?;
                process.exited().await
            }
            Life::Created(_) | Life::Starting | Life::Running(_) => return Err(running()),
        };
        if exec_id.is_empty() {
            self.remove(&container).await?;
            self.containers().remove(id);
            self.announced().retain(|(of, _), _| of != id);
        } else {
            process.end_streams();
            container.forget(exec_id);
            self.announced().remove(&(id.to_owned(), exec_id.to_owned()));
        }
        Ok(exit)
    }

    async fn remove(&self, container: &Container) -> Result<()> {
        let unused = {
            let mut shm = self.shm();
            shm.values_mut().for_each(|users| users.retain(|user| *user != container.id));
            let unused = shm.iter().find(|(_, users)| users.is_empty()).map(|(path, _)| path.clone());
            unused.inspect(|path| {
                shm.remove(path);
            })
        };
        container.remove(&self.helpers, unused).await
    }

    fn container(&self, id: &str) -> Outcome<Arc<Container>> {
        let found = self.containers().get(id).cloned();
        found.ok_or_else(|| Failure::new(Code::NOT_FOUND, format!("no such container: {id}: not found")))
    }

    fn process(&self, id: &str, exec_id: &str) -> Outcome<Arc<Process>> {
        let found = self.container(id)?.process(exec_id);
        found.ok_or_else(|| {
            Failure::new(Code::NOT_FOUND, format!("process does not exist {exec_id}: not found"))
        })
    }

    fn check_room(&self) -> Outcome<()> {
        if self.events.is_full() {
            return Err(Failure::new(Code::RESOURCE_EXHAUSTED, "nobody takes this machine's events"));
        }
        Ok(())
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn announced(&self) -> MutexGuard<'_, HashMap<(String, String), oci_spec::runtime::Process>> {
        self.announced.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shm(&self) -> MutexGuard<'_, HashMap<PathBuf, Vec<String>>> {
        self.shm.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn check_id(id: &str) -> Outcome<()> {
    if is_id(id) { Ok(()) } else { Err(Failure::new(Code::INVALID_ARGUMENT, format!("{id:?} is not an id"))) }
}

fn invalid(what: &str, error: &serde_json::Error) -> Failure {
    Failure::new(Code::INVALID_ARGUMENT, format!("reading {what}: {error}"))
}
