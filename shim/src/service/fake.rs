//! An agent that does what a test says, behind a socket like a monitor's.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent_api::agent::event::What;
use agent_api::agent::{
    ConfigureRequest, ContainerRequest, CreateContainerRequest, CreateContainerResponse, Empty, Event,
    EventsRequest, EventsResponse, ExecRequest, Exit, HelloRequest, HelloResponse, Oom, Pid, PidsResponse,
    ProcessRequest, ResizePtyRequest, SetNetworkRequest, SetOnlineCpusRequest, SetOnlineCpusResponse,
    SignalRequest, StartResponse, StateResponse, StatsResponse, TellRequest, UpdateRequest, WatchedRequest,
    WatchedResponse,
};
use agent_api::stdio::{Answer, Header, Stream};
use agent_api::{Agent, RPC_PORT, create_agent};
use async_trait::async_trait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;
use tokio::time::sleep;
use ttrpc::r#async::{Server, TtrpcContext};

use crate::error::Error;

type Key = (String, String, Stream);

#[derive(Default)]
struct State {
    calls: Vec<String>,
    events: Vec<Event>,
    streams: HashMap<Key, UnixStream>,
    fail_start: Option<Error>,
    fail_exec: Option<Error>,
    /// Processes that it knows of, beside a container's own.
    execs: HashSet<String>,
    /// How long it takes to hear of another.
    hard_of_hearing: Duration,
    busy: bool,
    hung_up: Arc<Notify>,
}

#[derive(Clone, Default)]
pub(super) struct FakeAgent(Arc<Mutex<State>>);

impl FakeAgent {
    /// Serves in `directory`. Returns the machine's socket.
    pub(super) async fn serve(&self, directory: &Path) -> (PathBuf, Server) {
        let (socket, inner) = (directory.join("vsock"), directory.join("rpc"));
        let mut server = Server::new()
            .bind(&format!("unix://{}", inner.display()))
            .unwrap()
            .register_service(create_agent(Arc::new(self.clone())));
        server.start().await.unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        let agent = self.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (agent, inner) = (agent.clone(), inner.clone());
                tokio::spawn(async move { agent.connected(stream, &inner).await });
            }
        });
        (socket, server)
    }

    async fn connected(&self, mut stream: UnixStream, rpc: &Path) {
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            line.push(stream.read_u8().await.unwrap());
        }
        stream.write_all(b"OK 1\n").await.unwrap();
        if line == format!("CONNECT {RPC_PORT}\n").as_bytes() {
            let mut rpc = UnixStream::connect(rpc).await.unwrap();
            let hung_up = self.0.lock().unwrap().hung_up.clone();
            tokio::select! {
                _ = tokio::io::copy_bidirectional(&mut stream, &mut rpc) => {}
                () = hung_up.notified() => {}
            }
            return;
        }
        let Header { id, exec_id, stream: which } = Header::read(&mut stream).await.unwrap().unwrap();
        if !exec_id.is_empty() && !self.0.lock().unwrap().execs.contains(&exec_id) {
            stream.write_u8(Answer::NoProcess.byte()).await.unwrap();
            return;
        }
        stream.write_u8(Answer::Attached.byte()).await.unwrap();
        self.0.lock().unwrap().streams.insert((id, exec_id, which), stream);
    }

    pub(super) async fn stream(&self, id: &str, exec: &str, which: Stream) -> UnixStream {
        loop {
            let found = self.0.lock().unwrap().streams.remove(&(id.to_owned(), exec.to_owned(), which));
            match found {
                Some(stream) => return stream,
                None => sleep(Duration::from_millis(5)).await,
            }
        }
    }

    fn event(&self, id: &str, exec: &str, what: What) {
        let mut state = self.0.lock().unwrap();
        let sequence = state.events.len() as u64 + 1;
        let (id, exec_id) = (id.to_owned(), exec.to_owned());
        state.events.push(Event { sequence, id, exec_id, what: Some(what), ..Event::default() });
    }

    pub(super) fn exit(&self, id: &str, exec: &str, status: u32) {
        self.event(id, exec, What::Exit(Exit { status, exited_at: 5, ..Exit::default() }));
    }

    pub(super) fn oom(&self, id: &str) {
        self.event(id, "", What::Oom(Oom::default()));
    }

    pub(super) fn fail_exec(&self, error: Error) {
        self.0.lock().unwrap().fail_exec = Some(error);
    }

    pub(super) fn hear_late(&self, by: Duration) {
        self.0.lock().unwrap().hard_of_hearing = by;
    }

    pub(super) fn fail_start(&self, error: Error) {
        self.0.lock().unwrap().fail_start = Some(error);
    }

    pub(super) fn busy(&self) {
        self.0.lock().unwrap().busy = true;
    }

    /// The connection to it is lost.
    pub(super) fn hang_up(&self) {
        self.0.lock().unwrap().hung_up.notify_one();
    }

    pub(super) fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().calls)
    }

    fn called(&self, call: String) {
        self.0.lock().unwrap().calls.push(call);
    }
}

#[async_trait]
impl Agent for FakeAgent {
    async fn hello(&self, _: &TtrpcContext, request: HelloRequest) -> ttrpc::Result<HelloResponse> {
        Ok(HelloResponse { version: request.version, ..HelloResponse::default() })
    }

    async fn configure(&self, _: &TtrpcContext, _: ConfigureRequest) -> ttrpc::Result<Empty> {
        Ok(Empty::default())
    }

    async fn set_network(&self, _: &TtrpcContext, _: SetNetworkRequest) -> ttrpc::Result<Empty> {
        Ok(Empty::default())
    }

    async fn settle(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.called("settle".to_owned());
        Ok(Empty::default())
    }

    async fn set_online_cpus(
        &self,
        _: &TtrpcContext,
        request: SetOnlineCpusRequest,
    ) -> ttrpc::Result<SetOnlineCpusResponse> {
        self.called(format!("processors {}", request.count));
        Ok(SetOnlineCpusResponse { count: request.count, ..SetOnlineCpusResponse::default() })
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        self.called(format!("create {}", request.id));
        Ok(CreateContainerResponse { pid: 100, ..CreateContainerResponse::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecRequest) -> ttrpc::Result<Empty> {
        self.called(format!("exec {}", request.exec_id));
        let (failure, late) = {
            let mut state = self.0.lock().unwrap();
            (state.fail_exec.take(), state.hard_of_hearing)
        };
        sleep(late).await;
        if let Some(error) = failure {
            return Err(error.into());
        }
        self.0.lock().unwrap().execs.insert(request.exec_id);
        Ok(Empty::default())
    }

    async fn start(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<StartResponse> {
        self.called(format!("start {}", request.exec_id));
        let failure = self.0.lock().unwrap().fail_start.take();
        match failure {
            Some(error) => Err(error.into()),
            None => Ok(StartResponse { pid: 101, ..StartResponse::default() }),
        }
    }

    async fn signal(&self, _: &TtrpcContext, request: SignalRequest) -> ttrpc::Result<Empty> {
        self.called(format!("signal {:?} {} {}", request.exec_id, request.signal, request.all));
        Ok(Empty::default())
    }

    async fn wait(&self, _: &TtrpcContext, _: ProcessRequest) -> ttrpc::Result<Exit> {
        Err(Error::unimplemented("the shim does not ask").into())
    }

    async fn state(&self, _: &TtrpcContext, _: ProcessRequest) -> ttrpc::Result<StateResponse> {
        Err(Error::unimplemented("the shim does not ask").into())
    }

    async fn delete(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<Exit> {
        self.called(format!("delete {}", request.exec_id));
        self.0.lock().unwrap().streams.clear();
        Ok(Exit::default())
    }

    async fn pids(&self, _: &TtrpcContext, _: ContainerRequest) -> ttrpc::Result<PidsResponse> {
        if self.0.lock().unwrap().busy {
            sleep(Duration::from_secs(60)).await;
        }
        let pid = |pid, exec_id: &str| Pid { pid, exec_id: exec_id.to_owned(), ..Pid::default() };
        Ok(PidsResponse { pids: vec![pid(100, ""), pid(105, "e"), pid(106, "")], ..PidsResponse::default() })
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        self.called(format!("resize {} {}", request.width, request.height));
        Ok(Empty::default())
    }

    async fn pause(&self, _: &TtrpcContext, _: ContainerRequest) -> ttrpc::Result<Empty> {
        self.called("pause".to_owned());
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, _: ContainerRequest) -> ttrpc::Result<Empty> {
        self.called("resume".to_owned());
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateRequest) -> ttrpc::Result<Empty> {
        self.called(format!("update {}", String::from_utf8_lossy(&request.resources)));
        Ok(Empty::default())
    }

    async fn stats(&self, _: &TtrpcContext, _: ContainerRequest) -> ttrpc::Result<StatsResponse> {
        let type_url = agent_api::METRICS_TYPE.to_owned();
        Ok(StatsResponse { type_url, value: vec![1, 2], ..StatsResponse::default() })
    }

    async fn events(&self, _: &TtrpcContext, request: EventsRequest) -> ttrpc::Result<EventsResponse> {
        loop {
            let after = usize::try_from(request.after).unwrap();
            let events = self.0.lock().unwrap().events.get(after..).unwrap_or_default().to_vec();
            if !events.is_empty() {
                return Ok(EventsResponse { events, ..EventsResponse::default() });
            }
            sleep(Duration::from_millis(5)).await;
        }
    }

    async fn watched(&self, _: &TtrpcContext, _: WatchedRequest) -> ttrpc::Result<WatchedResponse> {
        std::future::pending().await
    }

    async fn tell(&self, _: &TtrpcContext, _: TellRequest) -> ttrpc::Result<Empty> {
        Ok(Empty::default())
    }

    async fn power_off(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        Ok(Empty::default())
    }
}
