//! The agent in the machine, each call with its deadline.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use agent_api::agent::{
    ConfigureRequest, ContainerRequest, CreateContainerRequest, Empty, Event, EventsRequest, ExecRequest,
    Exit, HelloRequest, HelloResponse, HoldRequest, Input, News, Output, ProcessRequest, ResizePtyRequest,
    SetHostnameRequest, SetNetworkRequest, SetOnlineCpusRequest, SignalRequest, StatsResponse, Stdio,
    TellRequest, UpdateRequest, WatchedRequest,
};
use agent_api::stdio::{Answer, Header, Stream, attach};
use agent_api::{AgentClient, MOST_WATCHED, RPC_PORT, STDIO_PORT, VERSION, dial};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::{Context, with_timeout};

use crate::deadlines;
use crate::error::{Attempt, Error, Result};

/// A connection to the agent of a machine.
#[derive(Clone)]
pub struct Guest {
    client: AgentClient,
    socket: PathBuf,
    /// A container that the agent knows by another name.
    renamed: Option<Arc<Renamed>>,
}

#[derive(Debug)]
struct Renamed {
    id: String,
    guest_id: String,
}

/// What is added to a guest's number of a process. The host's are below 2^22, so none can be taken for one of the guest's
/// by whoever kills what he is told, or shows it, as `docker top` does.
const OF_GUEST: u32 = 1_000_000_000;

/// The number by which clients know a process of the guest that does not stand for its container.
fn number_for_clients(pid: u32) -> u32 {
    OF_GUEST.saturating_add(pid)
}

fn within(time: Duration) -> Context {
    with_timeout(i64::try_from(time.as_nanos()).unwrap_or(i64::MAX))
}

impl Guest {
    /// To the agent that serves behind the machine's vsock socket, or does so within that time.
    pub async fn connect(socket: PathBuf, within: Duration) -> Result<Self> {
        let stream = dial_within(&socket, RPC_PORT, within).await?;
        let client = AgentClient::new(Client::new(Socket::new(stream)));
        let guest = Self { client, socket, renamed: None };
        let hello = guest.hello().await?;
        if hello.version == VERSION {
            Ok(guest)
        } else {
            let theirs = hello.version;
            Err(Error::precondition(format!(
                "the agent in the machine speaks version {theirs} of the protocol, this shim {VERSION}; install shim and guest of one release"
            )))
        }
    }

    /// The same, whose agent knows the container `id` as `guest_id`, as it has known it before it was saved.
    #[must_use]
    pub fn knowing(&self, id: &str, guest_id: &str) -> Self {
        let renamed =
            (id != guest_id).then(|| Arc::new(Renamed { id: id.to_owned(), guest_id: guest_id.to_owned() }));
        Self { renamed, ..self.clone() }
    }

    /// What the agent calls a container.
    pub fn name(&self, id: &str) -> String {
        match &self.renamed {
            Some(renamed) if renamed.id == id => renamed.guest_id.clone(),
            _ => id.to_owned(),
        }
    }

    fn process(&self, id: &str, exec: &str) -> ProcessRequest {
        ProcessRequest { id: self.name(id), exec_id: exec.to_owned(), ..ProcessRequest::default() }
    }

    fn container(&self, id: &str) -> ContainerRequest {
        ContainerRequest { id: self.name(id), ..ContainerRequest::default() }
    }

    async fn hello(&self) -> Result<HelloResponse> {
        let request = HelloRequest { version: VERSION, ..HelloRequest::default() };
        Ok(self.client.hello(within(deadlines::AGENT_CALL), &request).await?)
    }

    /// Sets what is the machine's.
    pub async fn configure(&self, request: &ConfigureRequest) -> Result<()> {
        Ok(self.client.configure(within(deadlines::AGENT_CALL), request).await.map(drop)?)
    }

    /// Makes the network what is asked for.
    pub async fn set_network(&self, request: &SetNetworkRequest) -> Result<()> {
        Ok(self.client.set_network(within(deadlines::AGENT_CALL), request).await.map(drop)?)
    }

    /// How many processors run.
    pub async fn set_online_cpus(&self, count: u32) -> Result<()> {
        let request = SetOnlineCpusRequest { count, ..SetOnlineCpusRequest::default() };
        let running = self.client.set_online_cpus(within(deadlines::AGENT_CALL), &request).await?.count;
        if running == count {
            return Ok(());
        }
        Err(Error::unknown(format!("of {count} processors of the machine {running} run")))
    }

    /// Makes a container.
    pub async fn create(&self, id: &str, guest: Vec<u8>, stdio: Stdio) -> Result<()> {
        let request = CreateContainerRequest {
            id: self.name(id),
            guest,
            stdio: Some(stdio).into(),
            ..CreateContainerRequest::default()
        };
        Ok(self.client.create_container(within(deadlines::AGENT_WORK), &request).await.map(drop)?)
    }

    /// Announces a process.
    pub async fn exec(&self, id: &str, exec: &str, process: Vec<u8>, stdio: Stdio) -> Result<()> {
        let request = ExecRequest {
            id: self.name(id),
            exec_id: exec.to_owned(),
            process,
            stdio: Some(stdio).into(),
            ..ExecRequest::default()
        };
        Ok(self.client.exec(within(deadlines::AGENT_CALL), &request).await.map(drop)?)
    }

    /// Starts a process. Returns its [number](number_for_clients).
    pub async fn start(&self, id: &str, exec: &str) -> Result<u32> {
        let started = self.client.start(within(deadlines::AGENT_WORK), &self.process(id, exec)).await?;
        Ok(number_for_clients(started.pid))
    }

    /// Sends a signal.
    pub async fn signal(&self, id: &str, exec: &str, signal: u32, all: bool) -> Result<()> {
        let request = SignalRequest {
            id: self.name(id),
            exec_id: exec.to_owned(),
            signal,
            all,
            ..SignalRequest::default()
        };
        Ok(self.client.signal(within(deadlines::AGENT_CALL), &request).await.map(drop)?)
    }

    /// Removes a process.
    pub async fn delete(&self, id: &str, exec: &str) -> Result<Exit> {
        Ok(self.client.delete(within(deadlines::AGENT_DELETE), &self.process(id, exec)).await?)
    }

    /// The processes of a container, by their [numbers](number_for_clients), each with the exec that it is of; if the guest
    /// tells at once.
    pub async fn glance_at_pids(&self, id: &str) -> Result<Vec<(u32, String)>> {
        let request = self.container(id);
        let call = self.client.pids(within(deadlines::AGENT_GLANCE), &request);
        let answer = timeout(deadlines::AGENT_GLANCE, call);
        let pids = answer.await.map_err(|_| Error::deadline("the guest is busy"))??.pids;
        Ok(pids.into_iter().map(|pid| (number_for_clients(pid.pid), pid.exec_id)).collect())
    }

    /// Sets the size of a terminal.
    pub async fn resize_pty(&self, id: &str, exec: &str, width: u32, height: u32) -> Result<()> {
        let request = ResizePtyRequest {
            id: self.name(id),
            exec_id: exec.to_owned(),
            width,
            height,
            ..ResizePtyRequest::default()
        };
        Ok(self.client.resize_pty(within(deadlines::AGENT_CALL), &request).await.map(drop)?)
    }

    /// Lets a container stand still.
    pub async fn pause(&self, id: &str) -> Result<()> {
        Ok(self.client.pause(within(deadlines::AGENT_CALL), &self.container(id)).await.map(drop)?)
    }

    /// Lets it go on.
    pub async fn resume(&self, id: &str) -> Result<()> {
        Ok(self.client.resume(within(deadlines::AGENT_CALL), &self.container(id)).await.map(drop)?)
    }

    /// Changes its limits.
    pub async fn update(&self, id: &str, resources: Vec<u8>) -> Result<()> {
        let request = UpdateRequest { id: self.name(id), resources, ..UpdateRequest::default() };
        Ok(self.client.update(within(deadlines::AGENT_CALL), &request).await.map(drop)?)
    }

    /// What it uses.
    pub async fn stats(&self, id: &str) -> Result<StatsResponse> {
        Ok(self.client.stats(within(deadlines::AGENT_CALL), &self.container(id)).await?)
    }

    /// What has happened after the event of that number. Waits for something to happen. Statuses and `Others`,
    /// which a missed deadline is, are of the call; any other error is of the connection, which does not come back.
    pub async fn events(&self, after: u64) -> ttrpc::Result<Vec<Event>> {
        let timeout_ms = deadlines::AGENT_EVENTS.as_millis() as u32;
        let request = EventsRequest { after, timeout_ms, ..EventsRequest::default() };
        let time = deadlines::AGENT_EVENTS + deadlines::AGENT_CALL;
        let mut events = self.client.events(within(time), &request).await?.events;
        if let Some(renamed) = &self.renamed {
            for event in events.iter_mut().filter(|event| event.id == renamed.guest_id) {
                event.id.clone_from(&renamed.id);
            }
        }
        Ok(events)
    }

    /// What processes of the machine watch, with its version, as soon as that is not `known`: places of the shared tree. Errors
    /// are as those of [`Self::events`].
    pub async fn watched(&self, known: u64) -> ttrpc::Result<(u64, Vec<PathBuf>)> {
        let timeout_ms = deadlines::AGENT_EVENTS.as_millis() as u32;
        let request = WatchedRequest { known, timeout_ms, ..WatchedRequest::default() };
        let time = deadlines::AGENT_EVENTS + deadlines::AGENT_CALL;
        let answer = self.client.watched(within(time), &request).await?;
        let places = answer.places.into_iter().take(MOST_WATCHED);
        Ok((answer.version, places.map(|place| OsString::from_vec(place).into()).collect()))
    }

    /// Tells those who watch of what has happened.
    pub async fn tell(&self, news: Vec<News>) -> Result<()> {
        let request = TellRequest { news, ..TellRequest::default() };
        Ok(self.client.tell(within(deadlines::AGENT_CALL), &request).await.map(drop)?)
    }

    /// Asks for the machine's end.
    pub async fn power_off(&self) -> Result<()> {
        Ok(self.client.power_off(within(deadlines::POWER_OFF), &Empty::default()).await.map(drop)?)
    }

    /// Begins to hold the streams of a container that stands still.
    pub async fn begin_hold(&self, id: &str) -> Result<()> {
        let request = HoldRequest { id: self.name(id), ..HoldRequest::default() };
        Ok(self.client.hold(within(deadlines::AGENT_CALL), &request).await.map(drop)?)
    }

    /// Returns when all of these inputs have arrived, and what the streams have sent: nothing more comes until they are
    /// released.
    pub async fn hold(&self, id: &str, inputs: Vec<Input>) -> Result<Vec<Output>> {
        let request = HoldRequest { id: self.name(id), inputs, all: true, ..HoldRequest::default() };
        Ok(self.client.hold(within(deadlines::AGENT_WORK), &request).await?.outputs)
    }

    /// Lets the streams go on.
    pub async fn release(&self, id: &str) -> Result<()> {
        Ok(self.client.release(within(deadlines::AGENT_CALL), &self.container(id)).await.map(drop)?)
    }

    /// Gives a container its name.
    pub async fn set_hostname(&self, id: &str, hostname: &str) -> Result<()> {
        let request = SetHostnameRequest {
            id: self.name(id),
            hostname: hostname.to_owned(),
            ..SetHostnameRequest::default()
        };
        Ok(self.client.set_hostname(within(deadlines::AGENT_CALL), &request).await.map(drop)?)
    }

    /// The TCP ports on which somebody in a container listens.
    pub async fn listening(&self, id: &str) -> Result<Vec<u16>> {
        let ports = self.client.listening(within(deadlines::AGENT_CALL), &self.container(id)).await?.ports;
        Ok(ports.into_iter().filter_map(|port| u16::try_from(port).ok()).collect())
    }

    /// A process's stream; none, if it has ended already. As long as it is being announced, the agent may not know the process
    /// yet.
    pub async fn stream(
        &self,
        id: &str,
        exec: &str,
        stream: Stream,
        announcing: &AtomicBool,
    ) -> Result<Option<UnixStream>> {
        let header = Header { id: self.name(id), exec_id: exec.to_owned(), stream };
        let what = format!("connecting {stream:?} of process {id} {exec}");
        let mut again = deadlines::ANNOUNCED_AGAIN;
        loop {
            let early = announcing.load(Ordering::Acquire);
            // The agent may be making the process meanwhile, on a machine that has little time.
            let mut connection = dial_within(&self.socket, STDIO_PORT, deadlines::AGENT_CALL)
                .await
                .map_err(|error| error.context(&what))?;
            return match timeout(deadlines::AGENT_CALL, attach(&mut connection, &header)).await {
                Ok(Ok(Answer::Attached)) => Ok(Some(connection)),
                Ok(Ok(Answer::Ended)) => Ok(None),
                Ok(Ok(Answer::NoProcess)) if early => {
                    sleep(again).await;
                    again = (again * 2).min(deadlines::ANNOUNCED_AGAIN_MOST);
                    continue;
                }
                Ok(Ok(answer)) => Err(Error::unknown(format!("{what}: the agent says {answer:?}"))),
                Ok(Err(error)) => Err(error).attempt(what),
                Err(_) => {
                    Err(Error::deadline(format!("{what}: no answer within {:?}", deadlines::AGENT_CALL)))
                }
            };
        }
    }
}

/// Prepares the agent of a machine to be saved. It is asked nothing else, and the connection is gone then.
pub async fn settle(socket: &std::path::Path) -> Result<()> {
    let stream = dial_within(socket, RPC_PORT, deadlines::DIAL).await?;
    let client = AgentClient::new(Client::new(Socket::new(stream)));
    Ok(client.settle(within(deadlines::AGENT_WORK), &Empty::default()).await.map(drop)?)
}

async fn dial_within(socket: &std::path::Path, port: u32, within: Duration) -> Result<UnixStream> {
    match timeout(within, dial::dial(socket, port)).await {
        Ok(stream) => stream.attempt("reaching the agent of the machine"),
        Err(_) => Err(Error::deadline(format!("the agent of the machine was not reached within {within:?}"))),
    }
}
