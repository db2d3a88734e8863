use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use agent_api::stdio::Stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::{sleep, timeout};
use ttrpc::Code;
use ttrpc::r#async::Server;

use super::fake::FakeAgent;
use super::*;
use crate::events::Event;
use crate::ledger::Made;

const PID: u32 = 4711;

struct Bed {
    shim: Arc<Shim>,
    agent: FakeAgent,
    events: UnboundedReceiver<Event>,
    directory: PathBuf,
    _server: Server,
    leaving: channel::Receiver<bool>,
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn container(id: &str, guest: Guest) -> Container {
    Container {
        id: id.into(),
        guest,
        begins: Begins::Anew,
        touched: AtomicBool::new(false),
        warming: Mutex::default(),
        stays: None,
        disks: Vec::new(),
        room: 0,
        spec: Spec::default(),
        environment: Vec::new(),
        poststart: None,
        cgroup: None,
        streams: Mutex::default(),
        journal: None,
        holder: Mutex::default(),
        leaving: Mutex::default(),
    }
}

impl Bed {
    /// A container `c` that was made, with all its streams on FIFOs.
    async fn new(name: &str) -> Self {
        let directory = std::env::temp_dir().join(format!("service-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory).unwrap();
        let agent = FakeAgent::default();
        let (socket, server) = agent.serve(&directory).await;
        let (emit, events) = unbounded_channel();
        let (leave, leaving) = channel::channel(false);
        let paths = Paths::new(&directory, "ns", "c");
        let shim = Arc::new(Shim::new(paths, Ledger::new(emit), leave));
        let guest = Guest::connect(socket, Duration::from_secs(20)).await.unwrap();
        let io = fifos(&directory, "init");
        shim.ledger.reserve("c").unwrap();
        let opened = Opened::open(&io, &[]).await.unwrap();
        let streams = opened.join(&guest, "c", "").await.unwrap();
        let made = Made { bundle: "/b".into(), io, pid: PID, ..Made::default() };
        shim.ledger.made("c", made).unwrap();
        let hearing = shim.clone();
        let heard = guest.clone();
        tokio::spawn(async move { hearing.hear(&heard, &std::sync::atomic::AtomicU64::new(0)).await });
        let container = container("c", guest);
        lock(&container.streams).insert(String::new(), Arc::new(streams));
        shim.insert(container);
        Self { shim, agent, events, directory, _server: server, leaving }
    }

    async fn topics(&mut self, count: usize) -> Vec<String> {
        let mut topics = Vec::new();
        while topics.len() < count {
            let event = timeout(Duration::from_secs(20), self.events.recv()).await.unwrap().unwrap();
            topics.push(event.topic().trim_start_matches("/tasks/").to_owned());
        }
        topics
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    async fn exec(&self, exec: &str) -> Result<()> {
        self.exec_with(exec, false).await
    }

    async fn exec_with(&self, exec: &str, terminal: bool) -> Result<()> {
        let io = fifos(&self.directory, exec);
        let process = serde_json::json!({ "cwd": "/", "args": ["true"], "user": { "uid": 0, "gid": 0 } });
        let spec = Any { value: serde_json::to_vec(&process).unwrap(), ..Any::default() };
        self.shim
            .exec(ExecProcessRequest {
                id: "c".into(),
                exec_id: exec.into(),
                stdin: io.stdin,
                stdout: io.stdout,
                stderr: if terminal { String::new() } else { io.stderr },
                terminal,
                spec: Some(spec).into(),
                ..ExecProcessRequest::default()
            })
            .await
    }
}

fn fifos(directory: &Path, name: &str) -> Io {
    let fifo = |stream: &str| {
        let path = directory.join(format!("{name}-{stream}"));
        let _ = nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU);
        path.display().to_string()
    };
    Io { stdin: fifo("in"), stdout: fifo("out"), stderr: fifo("err"), terminal: false }
}

fn code<T: std::fmt::Debug>(result: Result<T>) -> Code {
    result.unwrap_err().code
}

fn reader(path: &Path) -> File {
    OpenOptions::new().read(true).open(path).unwrap()
}

/// A number's bytes, again and again: whoever loses or swaps one is found out.
fn pattern(length: usize) -> Vec<u8> {
    (0u32..).flat_map(u32::to_le_bytes).take(length).collect()
}

#[tokio::test]
async fn a_life() {
    let mut bed = Bed::new("life").await;
    let shim = bed.shim.clone();
    assert_eq!(shim.state("c", "").unwrap().status, Status::CREATED.into());
    let waiters: Vec<_> = (0..3)
        .map(|_| {
            let shim = shim.clone();
            tokio::spawn(async move { shim.wait("c", "").await })
        })
        .collect();
    assert_eq!(shim.start("c", "").await.unwrap(), PID);
    assert_eq!(code(shim.start("c", "").await), Code::FAILED_PRECONDITION);
    assert_eq!(code(shim.delete("c", "").await), Code::FAILED_PRECONDITION);
    shim.pause("c", true).await.unwrap();
    assert_eq!(shim.state("c", "").unwrap().status, Status::PAUSED.into());
    shim.pause("c", false).await.unwrap();
    shim.kill("c", "", 15, true).await.unwrap();
    assert_eq!(shim.stats("c").await.unwrap().type_url, "io.containerd.cgroups.v2.Metrics");
    bed.agent.oom("c");
    bed.agent.exit("c", "", 137);
    for stream in [Stream::Stdout, Stream::Stderr] {
        drop(bed.agent.stream("c", "", stream).await);
    }
    for waiter in waiters {
        assert_eq!(waiter.await.unwrap().unwrap(), Exit { status: 137, at: 5 });
    }
    assert_eq!(code(shim.kill("c", "", 9, false).await), Code::NOT_FOUND);
    let state = shim.state("c", "").unwrap();
    assert_eq!((state.status, state.exit_status, state.pid), (Status::STOPPED.into(), 137, PID));
    shim.shutdown();
    assert!(!*bed.leaving.borrow());
    let deleted = shim.delete("c", "").await.unwrap();
    assert_eq!((deleted.pid, deleted.exit_status, deleted.exited_at.nanos), (PID, 137, 5));
    for result in [
        shim.delete("c", "").await.map(drop),
        shim.connect("c").map(drop),
        shim.wait("c", "").await.map(drop),
    ] {
        assert_eq!(code(result), Code::NOT_FOUND);
    }
    shim.shutdown();
    assert!(*bed.leaving.borrow());
    assert_eq!(bed.topics(7).await, ["create", "start", "paused", "resumed", "oom", "exit", "delete"]);
    let calls = ["start ", "pause", "resume", "signal \"\" 15 true", "delete "];
    assert_eq!(bed.agent.calls(), calls);
}

#[tokio::test]
async fn execs() {
    let mut bed = Bed::new("execs").await;
    let shim = bed.shim.clone();
    shim.start("c", "").await.unwrap();
    bed.exec("e").await.unwrap();
    assert_eq!(code(bed.exec("e").await), Code::ALREADY_EXISTS);
    assert_eq!(code(shim.kill("c", "e", 9, false).await), Code::FAILED_PRECONDITION);
    assert_eq!(code(shim.start("c", "none").await), Code::NOT_FOUND);
    let missing = Error::unknown("exec: \"x\": executable file not found in $PATH");
    bed.agent.fail_start(missing.clone());
    assert_eq!(shim.start("c", "e").await, Err(missing));
    assert_eq!(shim.start("c", "e").await.unwrap(), 1_000_000_101);
    assert_eq!(code(shim.delete("c", "e").await), Code::FAILED_PRECONDITION);
    bed.agent.exit("c", "", 0);
    drop(bed.agent.stream("c", "", Stream::Stdout).await);
    drop(bed.agent.stream("c", "", Stream::Stderr).await);
    sleep(Duration::from_millis(100)).await;
    assert_eq!(
        shim.state("c", "").unwrap().status,
        Status::RUNNING.into(),
        "the container's own exit is last"
    );
    bed.agent.exit("c", "e", 3);
    drop(bed.agent.stream("c", "e", Stream::Stdout).await);
    drop(bed.agent.stream("c", "e", Stream::Stderr).await);
    assert_eq!(shim.wait("c", "e").await.unwrap().status, 3);
    assert_eq!(shim.wait("c", "").await.unwrap().status, 0);
    let deleted = shim.delete("c", "e").await.unwrap();
    assert_eq!((deleted.pid, deleted.exit_status), (1_000_000_101, 3));
    assert_eq!(code(shim.delete("c", "e").await), Code::NOT_FOUND);
    assert_eq!(code(bed.exec("late").await), Code::FAILED_PRECONDITION);
    shim.delete("c", "").await.unwrap();
    assert_eq!(
        bed.topics(7).await,
        ["create", "start", "exec-added", "exec-started", "exit", "exit", "delete"]
    );
}

#[tokio::test]
async fn streams_of_an_exec_that_the_agent_hears_of_late_are_joined() {
    let bed = Bed::new("late-execs").await;
    bed.shim.start("c", "").await.unwrap();
    // However long it takes: that has a deadline of its own.
    bed.agent.hear_late(Duration::from_secs(3));
    bed.exec("e").await.unwrap();
    for which in [Stream::Stdin, Stream::Stdout, Stream::Stderr] {
        drop(bed.agent.stream("c", "e", which).await);
    }
    // What is refused is said at once, and nothing is joined.
    bed.agent.hear_late(Duration::from_millis(100));
    bed.agent.fail_exec(Error::precondition("there is no room"));
    let refused = timeout(Duration::from_secs(2), bed.exec("f")).await.unwrap();
    assert_eq!(code(refused), Code::FAILED_PRECONDITION);
    let calls = bed.agent.calls();
    assert!(!calls.contains(&"delete f".to_owned()), "what was not announced is removed: {calls:?}");
}

/// Much output, a reader who is slow, and an exit that comes before it is read: not a byte is lost or out of place,
/// and the exit is told after them.
#[tokio::test]
async fn output_is_complete_when_the_exit_is_told() {
    const LENGTH: usize = 5 << 20;
    let mut bed = Bed::new("output").await;
    bed.shim.start("c", "").await.unwrap();
    let mut stdout = bed.agent.stream("c", "", Stream::Stdout).await;
    drop(bed.agent.stream("c", "", Stream::Stderr).await);
    bed.agent.exit("c", "", 0);
    let path = bed.path("init-out");
    let reading = tokio::task::spawn_blocking(move || {
        let (mut file, mut all, mut chunk) = (reader(&path), Vec::<u8>::new(), vec![0u8; 60_000]);
        loop {
            match file.read(&mut chunk).unwrap() {
                0 => return all,
                length => all.extend(&chunk[..length]),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    stdout.write_all(&pattern(LENGTH)).await.unwrap();
    assert_eq!(bed.topics(2).await, ["create", "start"]);
    assert!(bed.events.try_recv().is_err(), "the exit is not told before all is read");
    drop(stdout);
    assert_eq!(bed.topics(1).await, ["exit"]);
    let all = timeout(Duration::from_secs(20), reading).await.unwrap().unwrap();
    assert!(all == pattern(LENGTH), "{} of {LENGTH} bytes, or others", all.len());
}

/// A reader who goes away and comes back misses nothing that was not read before.
#[tokio::test]
async fn clients_detach_and_attach() {
    let bed = Bed::new("attach").await;
    bed.shim.start("c", "").await.unwrap();
    let mut stdout = bed.agent.stream("c", "", Stream::Stdout).await;
    let path = bed.path("init-out");
    for round in 0..3u8 {
        stdout.write_all(&[round; 100]).await.unwrap();
        let path = path.clone();
        let read = move || {
            let mut chunk = [0; 100];
            reader(&path).read_exact(&mut chunk).unwrap();
            chunk
        };
        assert_eq!(tokio::task::spawn_blocking(read).await.unwrap(), [round; 100]);
    }
}

#[tokio::test]
async fn only_close_io_is_the_end_of_input() {
    let bed = Bed::new("input").await;
    bed.shim.start("c", "").await.unwrap();
    let mut stdin = bed.agent.stream("c", "", Stream::Stdin).await;
    let open =
        || OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(bed.path("init-in")).unwrap();
    for text in ["one", "two"] {
        open().write_all(text.as_bytes()).unwrap();
        let mut got = [0; 3];
        stdin.read_exact(&mut got).await.unwrap();
        assert_eq!(got, text.as_bytes());
        // The client has gone, which is no end.
        let more = timeout(Duration::from_millis(50), stdin.read(&mut got)).await;
        assert!(more.is_err(), "{more:?}");
    }
    let mut client = open();
    client.write_all(b"rest").unwrap();
    bed.shim.close_io("c", "", true).unwrap();
    drop(client);
    let mut rest = Vec::new();
    timeout(Duration::from_secs(5), stdin.read_to_end(&mut rest)).await.unwrap().unwrap();
    assert_eq!(rest, b"rest");
}

#[tokio::test]
async fn pids_come_at_once() {
    let bed = Bed::new("pids").await;
    bed.shim.start("c", "").await.unwrap();
    let numbers =
        |answer: PidsResponse| answer.processes.iter().map(|process| process.pid).collect::<Vec<_>>();
    let answer = bed.shim.pids("c").await.unwrap();
    assert_eq!(answer.processes[1].info.type_url, "containerd.runc.v1.ProcessDetails");
    assert_eq!(numbers(answer), [PID, 1_000_000_105, 1_000_000_106]);
    bed.agent.busy();
    let answer = timeout(Duration::from_secs(2), bed.shim.pids("c")).await.unwrap().unwrap();
    assert_eq!(numbers(answer), [PID]);
    assert_eq!(code(bed.shim.pids("other").await), Code::NOT_FOUND);
}

#[tokio::test]
async fn limits_are_changed_in_the_guest() {
    let bed = Bed::new("update").await;
    let value = br#"{"memory":{"limit":1048576}}"#.to_vec();
    let resources = Some(Any { value, ..Any::default() }).into();
    let request = UpdateTaskRequest { id: "c".into(), resources, ..UpdateTaskRequest::default() };
    bed.shim.update(request).await.unwrap();
    let calls = bed.agent.calls();
    assert!(calls[0].starts_with("update") && calls[0].contains("1048576"), "{calls:?}");
    let resources = Some(Any { value: b"{".to_vec(), ..Any::default() }).into();
    let request = UpdateTaskRequest { id: "c".into(), resources, ..UpdateTaskRequest::default() };
    assert_eq!(code(bed.shim.update(request).await), Code::INVALID_ARGUMENT);
}

#[tokio::test]
async fn what_does_not_fit_is_not_asked_of_the_guest() {
    let bed = Bed::new("fit").await;
    let shim = bed.shim.clone();
    shim.start("c", "").await.unwrap();
    bed.exec_with("t", true).await.unwrap();
    for exec in ["", "t"] {
        shim.resize_pty("c", exec, 80, 25).await.unwrap();
    }
    let resized = bed.agent.calls().iter().filter(|call| *call == "resize 80 25").count();
    assert_eq!(resized, 1, "one of them has a terminal");
    shim.pause("c", true).await.unwrap();
    assert_eq!(code(bed.exec("x").await), Code::FAILED_PRECONDITION);
    shim.pause("c", false).await.unwrap();
    bed.exec("x").await.unwrap();
    bed.agent.exit("c", "", 0);
    for stream in [Stream::Stdout, Stream::Stderr] {
        drop(bed.agent.stream("c", "", stream).await);
    }
    shim.wait("c", "").await.unwrap();
    let request = UpdateTaskRequest { id: "c".into(), ..UpdateTaskRequest::default() };
    assert_eq!(code(shim.update(request).await), Code::FAILED_PRECONDITION);
}

#[tokio::test]
async fn whoever_hears_from_an_agent_is_told_when_the_connection_is_lost_and_not_when_a_call_fails() {
    let bed = Bed::new("lost").await;
    let guest = bed.shim.container("c").unwrap().guest.clone();
    let last = std::sync::atomic::AtomicU64::new(0);
    let heard = bed.shim.hear(&guest, &last);
    tokio::pin!(heard);
    bed.agent.busy();
    assert!(timeout(Duration::from_millis(500), &mut heard).await.is_err(), "a busy agent is not a lost one");
    bed.agent.hang_up();
    let error = timeout(Duration::from_secs(5), heard).await.unwrap();
    assert_eq!(error.code, Code::UNAVAILABLE, "{error}");
}

/// A grandchild that holds the stream for ever does not keep the exit back for ever.
#[tokio::test]
async fn a_stream_that_nobody_ends_keeps_no_exit_back() {
    let mut bed = Bed::new("grandchild").await;
    bed.shim.start("c", "").await.unwrap();
    let mut stdout = bed.agent.stream("c", "", Stream::Stdout).await;
    stdout.write_all(b"daemon").await.unwrap();
    bed.agent.exit("c", "", 0);
    assert_eq!(bed.topics(3).await, ["create", "start", "exit"]);
}

#[tokio::test]
async fn of_containers_that_leave_at_a_time_the_last_waits_for_the_others() {
    let bed = Bed::new("leaving").await;
    let shim = bed.shim.clone();
    let first = shim.container("c").unwrap();
    for id in ["d", "e"] {
        shim.insert(container(id, first.guest.clone()));
    }
    let [second, third] = ["d", "e"].map(|id| shim.container(id).unwrap());
    let gone = |id: &str| {
        lock(&shim.containers).remove(id);
        shim.left.notify_waiters();
    };
    assert!(!shim.is_last(&first).await, "two stay");
    assert!(!shim.is_last(&second).await, "one stays");
    let (waiting, waits) = (shim.clone(), third.clone());
    let last = tokio::spawn(async move { waiting.is_last(&waits).await });
    gone("c");
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!last.is_finished(), "one is still leaving");
    gone("d");
    assert!(timeout(Duration::from_secs(20), last).await.unwrap().unwrap());

    // One that was to go and could not be taken away stays, and so the machine does.
    *lock(&second.leaving) = Leaving::Before;
    lock(&shim.containers).insert("d".into(), second.clone());
    let (waiting, waits) = (shim.clone(), third.clone());
    let last = tokio::spawn(async move { waiting.is_last(&waits).await });
    while *lock(&third.leaving) != Leaving::Last {
        tokio::task::yield_now().await;
    }
    *lock(&second.leaving) = Leaving::No;
    shim.left.notify_waiters();
    assert!(!timeout(Duration::from_secs(20), last).await.unwrap().unwrap());
    gone("e");
    assert!(shim.is_last(&second).await, "it is the only one");
}
