//! A machine with the product's kernel and initrd, driven in the place of the shim: containers are directories in the
//! shared tree, the calls are those of the protocol, and streams are connections.

mod container;
mod rootfs;

use std::cell::Cell;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agent_api::agent::{
    Event, EventsRequest, Exit, HelloRequest, HelloResponse, ProcessRequest, ResizePtyRequest, SignalRequest,
    StateResponse,
};
use agent_api::stdio::{Answer, Header, Stream};
use agent_api::{AgentClient, RPC_PORT, STDIO_PORT, VERSION};
use anyhow::{Context, Result, anyhow, bail, ensure};
use tokio::runtime::Runtime;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;

use crate::guest::{Boot, Guest, Initrd};
use crate::wait::{Attempt, until};

pub use container::{Container, Output, Process, Streams, config};

/// For a call that has little to do. Emulated twice, little takes its time.
pub const CALL: Duration = Duration::from_secs(60);

/// A machine whose agent answers.
pub struct Machine {
    guest: Guest,
    share: PathBuf,
    runtime: Runtime,
    client: AgentClient,
    /// What the agent said of itself.
    pub hello: HelloResponse,
    seen: Cell<u64>,
}

impl Machine {
    /// Boots `boot` with the initrd in `parts` and a shared tree in `scratch`, and waits until the agent answers.
    pub fn up(boot: Boot, guest_parts: &Path, scratch: &Path, within: Duration) -> Result<Self> {
        let share = scratch.join("tree");
        fs::create_dir(&share).with_context(|| format!("creating {}", share.display()))?;
        let mut guest = boot
            .share("containers", &share, false)
            .share("binds", &share, false)
            .start(&Initrd::of_product(guest_parts))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let socket = guest.sockets().join("vsock");
        let ends = Instant::now() + within;
        let answered = until("the agent to answer", within, || {
            if let Err(error) = guest.expect_alive() {
                return Attempt::Done(Err(error));
            }
            match runtime.block_on(greet(&socket, ends)) {
                Ok(answered) => Attempt::Done(Ok(answered)),
                Err(error) => Attempt::Pending(format!("{error:#}")),
            }
        });
        let (client, hello) = match answered {
            Ok(answered) => answered?,
            Err(late) => bail!("{late}; the guest said last: {}", guest.console()),
        };
        Ok(Self { guest, share, runtime, client, hello, seen: Cell::new(0) })
    }

    /// The shared tree.
    pub fn share(&self) -> &Path {
        &self.share
    }

    /// Since the monitor was started.
    pub fn age(&self) -> Duration {
        self.guest.age()
    }

    /// The monitor and what the guest printed.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// Makes a call.
    pub fn call<'a, T, F>(
        &'a self,
        call: impl FnOnce(&'a AgentClient, ttrpc::context::Context) -> F,
    ) -> Result<T>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        self.call_within(CALL, call)
    }

    /// Makes a call that may take `within`.
    pub fn call_within<'a, T, F>(
        &'a self,
        within: Duration,
        call: impl FnOnce(&'a AgentClient, ttrpc::context::Context) -> F,
    ) -> Result<T>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        let context = ttrpc::context::with_duration(within);
        self.runtime.block_on(call(&self.client, context)).map_err(told)
    }

    /// The events that are new, at the latest after `within`.
    pub fn events(&self, within: Duration) -> Result<Vec<Event>> {
        let mut request = EventsRequest::new();
        request.after = self.seen.get();
        request.timeout_ms = u32::try_from(within.as_millis())?;
        let answer =
            self.call_within(within + CALL, async |client, context| client.events(context, &request).await)?;
        for event in &answer.events {
            ensure!(
                event.sequence == self.seen.get() + 1,
                "event {} came after {}",
                event.sequence,
                self.seen.get()
            );
            self.seen.set(event.sequence);
        }
        Ok(answer.events)
    }

    /// Waits for the end of a process.
    pub fn wait(&self, id: &str, exec_id: &str, within: Duration) -> Result<Exit> {
        let request = process(id, exec_id);
        self.call_within(within, async |client, context| client.wait(context, &request).await)
            .with_context(|| format!("waiting for {id} {exec_id}"))
    }

    /// Sends a signal to a process.
    pub fn signal(&self, id: &str, exec_id: &str, signal: u32) -> Result<()> {
        let mut request = SignalRequest::new();
        (request.id, request.exec_id, request.signal) = (id.to_owned(), exec_id.to_owned(), signal);
        self.call(async |client, context| client.signal(context, &request).await).map(drop)
    }

    /// Starts a process.
    pub fn start(&self, id: &str, exec_id: &str) -> Result<()> {
        let request = process(id, exec_id);
        self.call(async |client, context| client.start(context, &request).await).map(drop)
    }

    /// Says how large a process's terminal is: columns and rows.
    pub fn resize(&self, id: &str, exec_id: &str, (width, height): (u32, u32)) -> Result<()> {
        let mut request = ResizePtyRequest::new();
        (request.id, request.exec_id, request.width, request.height) =
            (id.to_owned(), exec_id.to_owned(), width, height);
        self.call(async |client, context| client.resize_pty(context, &request).await).map(drop)
    }

    /// What a process is doing.
    pub fn state(&self, id: &str, exec_id: &str) -> Result<StateResponse> {
        let request = process(id, exec_id);
        self.call(async |client, context| client.state(context, &request).await)
    }

    /// Removes a process, or a container.
    pub fn delete(&self, id: &str, exec_id: &str) -> Result<Exit> {
        let request = process(id, exec_id);
        self.call(async |client, context| client.delete(context, &request).await)
    }

    /// A connection that is a stream of a process.
    pub fn attach(&self, id: &str, exec_id: &str, stream: Stream) -> Result<UnixStream> {
        let mut connection = self.guest.connect(u16::try_from(STDIO_PORT)?)?;
        connection.set_read_timeout(Some(CALL))?;
        let header = Header { id: id.to_owned(), exec_id: exec_id.to_owned(), stream };
        connection.write_all(&header.encode().context("a header that cannot be")?)?;
        let mut answer = [0];
        connection.read_exact(&mut answer).context("waiting for the stream's answer")?;
        let answer = Answer::from_byte(answer[0]);
        ensure!(answer == Some(Answer::Attached), "{header:?} was answered with {answer:?}");
        connection.set_read_timeout(None)?;
        Ok(connection)
    }

    /// Turns the machine off, and expects that nobody had to complain.
    pub fn ends_well(self) -> Result<()> {
        let empty = agent_api::agent::Empty::new();
        self.call(async |client, context| client.power_off(context, &empty).await)?;
        let console = self.guest.console();
        let done = self.guest.wait()?.expect_code(0)?;
        ensure!(done.stderr.is_empty(), "the monitor complained of something: {}", done.err());
        ensure!(
            !console.contains("supermachine-agent: error"),
            "the agent complained of something: {console}"
        );
        Ok(())
    }
}

fn process(id: &str, exec_id: &str) -> ProcessRequest {
    let mut request = ProcessRequest::new();
    (request.id, request.exec_id) = (id.to_owned(), exec_id.to_owned());
    request
}

/// A status as `CODE: text`.
fn told(error: ttrpc::Error) -> anyhow::Error {
    match error {
        ttrpc::Error::RpcStatus(status) => anyhow!("{:?}: {}", status.code(), status.message()),
        other => anyhow!(other),
    }
}

async fn greet(socket: &Path, ends: Instant) -> Result<(AgentClient, HelloResponse)> {
    let left = ends.saturating_duration_since(Instant::now()).min(Duration::from_secs(5));
    let stream = tokio::time::timeout(left, agent_api::dial::dial(socket, RPC_PORT)).await??;
    let client = AgentClient::new(Client::new(Socket::new(stream)));
    let mut request = HelloRequest::new();
    request.version = VERSION;
    let hello = client.hello(ttrpc::context::with_duration(left), &request).await.map_err(told)?;
    ensure!(hello.version == VERSION, "the agent speaks version {}", hello.version);
    Ok((client, hello))
}
