//! The protocol's calls: each is unpacked, done elsewhere, and packed. Every one is here, since what is left out
//! would be answered with "not found".

use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use agent_api::agent::{
    ConfigureRequest, ContainerRequest, CreateContainerRequest, CreateContainerResponse, Empty,
    EventsRequest, EventsResponse, ExecRequest, Exit, HelloRequest, HelloResponse, HoldRequest, HoldResponse,
    ListeningResponse, Pid, PidsResponse, ProcessRequest, ResizePtyRequest, SetHostnameRequest,
    SetNetworkRequest, SetOnlineCpusRequest, SetOnlineCpusResponse, SignalRequest, StartResponse,
    StateResponse, StatsResponse, Status, TellRequest, UpdateRequest, WatchedRequest, WatchedResponse,
};
use agent_api::{VERSION, agent_ttrpc};
use anyhow::Context;
use async_trait::async_trait;
use protobuf::MessageField;
use ttrpc::asynchronous::TtrpcContext;
use ttrpc::{Code, get_status};

use super::{Agent, Failure, Outcome, names, ports};
use crate::machine::{self, settings};
use crate::process::Life;
use crate::stats;

/// An answer may take as long as nothing happens, but somebody who is gone is forgotten.
const LONGEST_POLL: Duration = Duration::from_secs(3600);
/// For the answer to leave before the machine is off.
const BEFORE_OFF: Duration = Duration::from_millis(50);

pub(super) struct Rpc {
    pub(super) agent: Arc<Agent>,
    pub(super) ready_after: Duration,
    /// Whether the kernel's pool has had entropy that no other machine has.
    pub(super) seeded: AtomicBool,
}

fn packed<T>(outcome: Outcome<T>) -> ttrpc::Result<T> {
    outcome.map_err(|failure| ttrpc::Error::RpcStatus(get_status(failure.code, failure.text)))
}

fn empty(outcome: Outcome<()>) -> ttrpc::Result<Empty> {
    packed(outcome.map(|()| Empty::default()))
}

#[async_trait]
impl agent_ttrpc::Agent for Rpc {
    async fn hello(&self, _: &TtrpcContext, _: HelloRequest) -> ttrpc::Result<HelloResponse> {
        packed(self.introduce())
    }

    async fn configure(&self, _: &TtrpcContext, request: ConfigureRequest) -> ttrpc::Result<Empty> {
        let configured = configure(&request).map_err(Failure::from);
        if configured.is_ok() && !request.entropy.is_empty() {
            self.seeded.store(true, Ordering::Relaxed);
        }
        empty(configured)
    }

    async fn set_network(&self, _: &TtrpcContext, request: SetNetworkRequest) -> ttrpc::Result<Empty> {
        let agent = Arc::clone(&self.agent);
        // One after the other, also when whoever asked is gone.
        empty(finish(async move { Ok(agent.set_network(request).await?) }).await)
    }

    async fn settle(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        let done = tokio::task::spawn_blocking(settings::settle).await;
        empty(done.context("settling").and_then(|done| done).map_err(Failure::from))
    }

    async fn set_online_cpus(
        &self,
        _: &TtrpcContext,
        request: SetOnlineCpusRequest,
    ) -> ttrpc::Result<SetOnlineCpusResponse> {
        let agent = Arc::clone(&self.agent);
        // Processors come and go slowly.
        let done = tokio::task::spawn_blocking(move || agent.set_online_cpus(request.count)).await;
        let count = done.context("setting processors").and_then(|done| done).map_err(Failure::from);
        packed(count.map(|count| SetOnlineCpusResponse { count, ..SetOnlineCpusResponse::default() }))
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        // What is begun is ended, also if the shim hangs up meanwhile.
        let agent = Arc::clone(&self.agent);
        let made = finish(async move {
            agent.create(&request.id, &request.guest, request.stdio.unwrap_or_default()).await
        });
        packed(made.await.map(|pid| CreateContainerResponse { pid, ..CreateContainerResponse::default() }))
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecRequest) -> ttrpc::Result<Empty> {
        let stdio = request.stdio.unwrap_or_default();
        empty(self.agent.exec(&request.id, &request.exec_id, &request.process, stdio))
    }

    async fn start(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<StartResponse> {
        let agent = Arc::clone(&self.agent);
        let started = finish(async move { agent.start(&request.id, &request.exec_id).await });
        packed(started.await.map(|pid| StartResponse { pid, ..StartResponse::default() }))
    }

    async fn signal(&self, _: &TtrpcContext, request: SignalRequest) -> ttrpc::Result<Empty> {
        empty(self.agent.signal(&request.id, &request.exec_id, request.signal, request.all))
    }

    async fn wait(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<Exit> {
        let process = packed(self.agent.process(&request.id, &request.exec_id))?;
        Ok(process.exited().await)
    }

    async fn state(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<StateResponse> {
        packed(self.state_of(&request))
    }

    async fn delete(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<Exit> {
        let agent = Arc::clone(&self.agent);
        packed(finish(async move { agent.delete(&request.id, &request.exec_id).await }).await)
    }

    async fn pids(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<PidsResponse> {
        packed(self.pids_of(&request))
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        empty(self.resize(&request))
    }

    async fn pause(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        empty(self.set_paused(&request.id, true).await)
    }

    async fn resume(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        empty(self.set_paused(&request.id, false).await)
    }

    async fn hold(&self, _: &TtrpcContext, request: HoldRequest) -> ttrpc::Result<HoldResponse> {
        packed(self.agent.hold(&request).await)
    }

    async fn release(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        empty(self.agent.release(&request.id))
    }

    async fn set_hostname(&self, _: &TtrpcContext, request: SetHostnameRequest) -> ttrpc::Result<Empty> {
        let pid = packed(self.running(&request.id))?;
        let done = tokio::task::spawn_blocking(move || names::set(pid, &request.hostname)).await;
        empty(done.context("naming the container").and_then(|done| done).map_err(Failure::from))
    }

    async fn listening(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<ListeningResponse> {
        let pid = packed(self.running(&request.id))?;
        let ports = packed(ports::listening(pid).map_err(Failure::from))?;
        Ok(ListeningResponse { ports, ..ListeningResponse::default() })
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateRequest) -> ttrpc::Result<Empty> {
        let container = packed(self.agent.container(&request.id))?;
        let resources =
            serde_json::from_slice(&request.resources).map_err(|error| super::invalid("resources", &error));
        empty(container.update(packed(resources)?).await.map_err(Failure::from))
    }

    async fn stats(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<StatsResponse> {
        let container = packed(self.agent.container(&request.id))?;
        packed(stats::of(&container.cgroup).map_err(Failure::from))
    }

    async fn events(&self, _: &TtrpcContext, request: EventsRequest) -> ttrpc::Result<EventsResponse> {
        let wait = Duration::from_millis(request.timeout_ms.into()).min(LONGEST_POLL);
        let events = self.agent.events.after(request.after, wait).await;
        Ok(EventsResponse { events, ..EventsResponse::default() })
    }

    async fn watched(&self, _: &TtrpcContext, request: WatchedRequest) -> ttrpc::Result<WatchedResponse> {
        let wait = Duration::from_millis(request.timeout_ms.into()).min(LONGEST_POLL);
        let (version, places) = self.agent.watches.after(request.known, wait).await;
        let places = places.into_iter().map(|place| place.into_os_string().into_vec()).collect();
        Ok(WatchedResponse { version, places, ..WatchedResponse::default() })
    }

    async fn tell(&self, _: &TtrpcContext, request: TellRequest) -> ttrpc::Result<Empty> {
        let watches = Arc::clone(&self.agent.watches);
        let done = tokio::task::spawn_blocking(move || watches.tell(&request.news)).await;
        let done = done.map_err(anyhow::Error::from).flatten().context("telling of changed files");
        empty(done.map_err(Failure::from))
    }

    async fn power_off(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        let done = tokio::task::spawn_blocking(machine::wind_up).await;
        tokio::spawn(async {
            tokio::time::sleep(BEFORE_OFF).await;
            machine::power_off();
        });
        empty(done.context("winding up").map_err(Failure::from))
    }
}

impl Rpc {
    fn introduce(&self) -> Outcome<HelloResponse> {
        let name = nix::sys::utsname::uname().context("asking for the kernel's name")?;
        let boot_id = if self.seeded.load(Ordering::Relaxed) {
            std::fs::read_to_string("/proc/sys/kernel/random/boot_id").context("reading boot_id")?
        } else {
            String::new()
        };
        Ok(HelloResponse {
            version: VERSION,
            agent: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: name.release().to_string_lossy().into_owned(),
            architecture: name.machine().to_string_lossy().into_owned(),
            boot_id: boot_id.trim().to_owned(),
            ready_after: i64::try_from(self.ready_after.as_nanos()).unwrap_or(i64::MAX),
            ..HelloResponse::default()
        })
    }

    fn state_of(&self, request: &ProcessRequest) -> Outcome<StateResponse> {
        let container = self.agent.container(&request.id)?;
        let process = self.agent.process(&request.id, &request.exec_id)?;
        let (status, pid, exit) = match process.life() {
            Life::Announced | Life::Starting => (Status::CREATED, 0, None),
            Life::Created(pid) => (Status::CREATED, pid, None),
            Life::Running(pid) if container.is_paused() => (Status::PAUSED, pid, None),
            Life::Running(pid) => (Status::RUNNING, pid, None),
            Life::Exited(exit) => (Status::EXITED, exit.pid.cast_signed(), Some(exit)),
        };
        Ok(StateResponse {
            status: status.into(),
            pid: pid.cast_unsigned(),
            exit: exit.map_or_else(MessageField::none, MessageField::some),
            streams_open: process.lines().any(|line| !line.has_ended()),
            ..StateResponse::default()
        })
    }

    fn pids_of(&self, request: &ContainerRequest) -> Outcome<PidsResponse> {
        let container = self.agent.container(&request.id)?;
        let execs = container.execs();
        let of = |pid: u32| {
            let exec = execs.iter().find(|exec| exec.pid() == Some(pid.cast_signed()));
            let exec_id = exec.map(|exec| exec.exec_id.clone()).unwrap_or_default();
            Pid { pid, exec_id, ..Pid::default() }
        };
        let pids = container.cgroup.pids()?.into_iter().map(of).collect();
        Ok(PidsResponse { pids, ..PidsResponse::default() })
    }

    fn resize(&self, request: &ResizePtyRequest) -> Outcome<()> {
        let process = self.agent.process(&request.id, &request.exec_id)?;
        if !process.stdio.terminal {
            return Err(Failure::new(Code::FAILED_PRECONDITION, "the process has no terminal"));
        }
        let number = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
        Ok(process.resize((number(request.width), number(request.height)))?)
    }

    /// The process of a container that has one.
    fn running(&self, id: &str) -> Outcome<i32> {
        match self.agent.container(id)?.init.life() {
            Life::Created(pid) | Life::Running(pid) => Ok(pid),
            _ => Err(Failure::new(Code::FAILED_PRECONDITION, "the container does not run")),
        }
    }

    async fn set_paused(&self, id: &str, paused: bool) -> Outcome<()> {
        let container = self.agent.container(id)?;
        match container.init.life() {
            Life::Created(_) | Life::Running(_) => Ok(container.pause(paused).await?),
            _ => Err(Failure::new(Code::FAILED_PRECONDITION, "the container does not run")),
        }
    }
}

/// Does it in a task of its own, so that it does not end with the connection that asked for it.
async fn finish<T: Send + 'static>(work: impl Future<Output = Outcome<T>> + Send + 'static) -> Outcome<T> {
    tokio::spawn(work).await.unwrap_or_else(|error| Err(Failure::new(Code::INTERNAL, error.to_string())))
}

fn configure(request: &ConfigureRequest) -> anyhow::Result<()> {
    if request.realtime != 0 {
        settings::set_time(request.realtime)?;
    }
    if !request.entropy.is_empty() {
        settings::add_entropy(&request.entropy)?;
    }
    if !request.hostname.is_empty() {
        settings::set_hostname(&request.hostname)?;
    }
    for (name, value) in &request.sysctls {
        settings::set_sysctl(name, value)?;
    }
    Ok(())
}
