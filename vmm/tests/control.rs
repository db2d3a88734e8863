//! The control socket of a machine, driven by its own client and by clients that do not behave. Any KVM
//! will do; without one the tests say so and pass.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)] // clippy takes only test functions, not their helpers, for tests

#[path = "machine/code.rs"]
mod code;

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm::console::Marker;
use vmm::control::{
    Client, ClientError, Event, Hello, Message, Options, Outcome, Prepared, Receiver, Refusal, RefusalKind,
    Reply, Request, Server, Stats, Status, frame, send,
};
use vmm::hypervisor::PsciBy;
use vmm::hypervisor::kvm::{DEVICE, Kvm};
use vmm::machine::{Config, Machine};

const SOON: Duration = Duration::from_secs(30);

struct Bed {
    machine: Arc<Machine>,
    server: Option<Server>,
    path: PathBuf,
    owner: Option<UnixStream>,
}

impl Drop for Bed {
    fn drop(&mut self) {
        for path in [&self.path, &self.path.with_extension("kernel")] {
            let _ = fs::remove_file(path);
        }
    }
}

fn bed(name: &str, parts: &[&[u8]]) -> Option<Bed> {
    let (mut bed, server) = prepared(name, parts)?;
    bed.server = Some(server.start().unwrap());
    Some(bed)
}

fn prepared(name: &str, parts: &[&[u8]]) -> Option<(Bed, Prepared)> {
    let kvm = Kvm::open(DEVICE.as_ref()).inspect_err(|error| eprintln!("not tested: {error}")).ok()?;
    let path = std::env::temp_dir().join(format!("vmm-control-{}-{name}", std::process::id()));
    let kernel = path.with_extension("kernel");
    fs::write(&kernel, code::kernel(&parts.concat())).unwrap();
    let config = Config {
        kernel,
        initrd: None,
        command_line: String::new(),
        memory: 64 << 20,
        memory_max: None,
        vcpus: 2,
        console: Box::new(io::sink()),
        markers: vec![Marker { id: 5, text: b"hi".to_vec() }],
        psci: PsciBy::default(),
        devices: vec![],
    };
    let machine = Arc::new(Machine::build(&kvm, config).unwrap());
    let listener = UnixListener::bind(&path).unwrap();
    let (owner, theirs) = UnixStream::pair().unwrap();
    let options = Options { listener: Some(listener), owner: Some(theirs), ..Options::default() };
    let server = Server::prepare(&machine, options).unwrap();
    Some((Bed { machine, server: None, path, owner: Some(owner) }, server))
}

impl Bed {
    fn client(&self) -> Client {
        Client::connect(&self.path, SOON).unwrap()
    }
}

fn call(client: &mut Client, request: Request) -> Result<Reply, Refusal> {
    match client.call(request, &[], SOON) {
        Ok(reply) => Ok(reply),
        Err(ClientError::Refused(refusal)) => Err(refusal),
        Err(other) => panic!("{other}"),
    }
}

fn status(client: &mut Client) -> Status {
    match call(client, Request::State).unwrap() {
        Reply::State { status, .. } => status,
        other => panic!("{other:?}"),
    }
}

fn stats(client: &mut Client) -> Stats {
    match call(client, Request::Stats).unwrap() {
        Reply::Stats(stats) => *stats,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_begins_a_machine_comes_before_what_its_clients_want() {
    let Some((mut bed, server)) = prepared("begin", &[code::HI, code::DOTS]) else { return };
    let path = bed.path.clone();
    let eager = std::thread::spawn(move || {
        let mut client = Client::connect(&path, SOON).unwrap();
        call(&mut client, Request::Pause { within_ms: 10_000 }).unwrap();
        client.welcome().status
    });
    std::thread::sleep(Duration::from_millis(100));
    assert!(!eager.is_finished(), "it was answered by a server that had not been started");
    bed.machine.resume().unwrap();
    bed.server = Some(server.start().unwrap());
    assert_eq!(eager.join().unwrap(), Status::Running);
    assert_eq!(bed.machine.status().to_string(), "paused");
}

#[test]
fn a_machine_is_driven_from_first_to_last() {
    let Some(bed) = bed("drive", &[code::HI, code::DOTS]) else { return };
    let (mut client, mut watcher) = (bed.client(), bed.client());
    assert_eq!(client.welcome().status, Status::Paused);
    assert_eq!(client.welcome().pid, std::process::id());
    call(&mut watcher, Request::Events).unwrap();
    assert_eq!(status(&mut client), Status::Paused);
    call(&mut client, Request::Resume).unwrap();
    assert_eq!(watcher.event(SOON).unwrap(), Some(Event::Status(Status::Running)));
    assert_eq!(watcher.event(SOON).unwrap(), Some(Event::Marker(5)));
    for _ in 0..20 {
        call(&mut client, Request::Pause { within_ms: 10_000 }).unwrap();
        let Reply::Look(look) = call(&mut client, Request::Look).unwrap() else { panic!() };
        assert_eq!((look.processors.len(), look.devices.len()), (2, 0), "{look}");
        assert!(look.processors.iter().all(|registers| registers.contains("=0x")), "{look}");
        let before = stats(&mut client);
        std::thread::sleep(Duration::from_millis(2));
        let after = stats(&mut client);
        assert_eq!((before.vcpus, before.console), (after.vcpus, after.console), "it stands still");
        call(&mut client, Request::Resume).unwrap();
        assert_eq!(watcher.event(SOON).unwrap(), Some(Event::Status(Status::Paused)));
        assert_eq!(watcher.event(SOON).unwrap(), Some(Event::Status(Status::Running)));
    }
    assert_eq!(call(&mut client, Request::Look).unwrap_err().kind, RefusalKind::State, "it runs");
    let stats = stats(&mut client);
    assert_eq!(stats.vcpus.len(), 2);
    assert!(stats.console.bytes > 3);
    let ram = stats.ram;
    assert_eq!([ram.boot, ram.max, ram.requested, ram.actual], [64 << 20; 4]);
    let memory = stats.memory.unwrap();
    assert_eq!(memory.guest, 64 << 20);
    assert!(memory.guest_resident > 0 && memory.guest_resident < memory.guest, "{memory:?}");
    assert!(memory.monitor_private > 0, "{memory:?}");
    for (request, kind) in [
        (Request::Resize { memory: Some(1 << 30), vcpus: None }, RefusalKind::Invalid),
        (Request::Resize { memory: None, vcpus: Some(4) }, RefusalKind::Unsupported),
        (Request::Resize { memory: None, vcpus: None }, RefusalKind::Invalid),
        (Request::AttachTap { slot: "net.0".into(), vhost: false }, RefusalKind::Invalid),
        (Request::ConsoleAttach { replay: false }, RefusalKind::Invalid),
        (Request::Kill, RefusalKind::Unsupported),
    ] {
        assert_eq!(call(&mut client, request.clone()).unwrap_err().kind, kind, "{request:?}");
    }
    call(&mut client, Request::Stop).unwrap();
    assert!(matches!(watcher.event(SOON).unwrap(), Some(Event::Ended(Outcome::Stopped))));
    assert!(matches!(client.event(SOON).unwrap(), Some(Event::Ended(_))), "everybody hears of the end");
    assert_eq!(
        call(&mut client, Request::State).unwrap(),
        Reply::State { status: Status::Ended, outcome: Some(Outcome::Stopped) }
    );
    assert_eq!(call(&mut client, Request::Resume).unwrap_err().kind, RefusalKind::State);
}

#[test]
fn the_console_is_read_and_joined() {
    let Some(bed) = bed("console", &[code::HI, code::DOTS]) else { return };
    let mut client = bed.client();
    call(&mut client, Request::Resume).unwrap();
    let deadline = Instant::now() + SOON;
    loop {
        let Reply::Log { text, written } = call(&mut client, Request::ConsoleLog).unwrap() else { panic!() };
        if text.starts_with("hi\n..") {
            assert!(written >= text.len() as u64);
            break;
        }
        // The back-log forgets; it is read soon enough.
        assert!(Instant::now() < deadline && !text.starts_with('.'), "{text}");
    }
    call(&mut client, Request::Pause { within_ms: 10_000 }).unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    client.call(Request::ConsoleAttach { replay: true }, &[theirs.as_fd()], SOON).unwrap();
    drop(theirs);
    ours.set_read_timeout(Some(SOON)).unwrap();
    ours.write_all(b"typed").unwrap();
    let mut start = [0; 2];
    ours.read_exact(&mut start).unwrap();
    call(&mut client, Request::Resume).unwrap();
    for _ in 0..10 {
        ours.read_exact(&mut [0; 100]).unwrap();
    }
    let file = fs::File::open("/dev/null").unwrap();
    let refused = client.call(Request::ConsoleAttach { replay: true }, &[file.as_fd()], SOON);
    assert!(matches!(refused, Err(ClientError::Refused(_))), "{refused:?}");
    drop(bed);
    while ours.read(&mut [0; 4096]).unwrap() > 0 {}
}

#[test]
fn the_owner_s_end_is_the_machine_s() {
    let Some(mut bed) = bed("owner", &[code::HI, code::DOTS]) else { return };
    let mut owner = Client::over(bed.owner.take().unwrap(), SOON).unwrap();
    call(&mut owner, Request::Resume).unwrap();
    drop(bed.client());
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(status(&mut owner), Status::Running, "others come and go");
    drop(owner);
    assert!(matches!(bed.machine.wait_for(SOON), Some(vmm::machine::Outcome::Stopped)));
}

#[test]
fn clients_that_do_not_behave_harm_nobody() {
    let Some(bed) = bed("rude", &[code::HI, code::DOTS]) else { return };
    let mut good = bed.client();
    call(&mut good, Request::Resume).unwrap();

    // One asks and asks and does not read.
    let mut deaf = UnixStream::connect(&bed.path).unwrap();
    deaf.write_all(&frame(&Hello { versions: vec![1, 99] }, 0).unwrap()).unwrap();
    deaf.set_nonblocking(true).unwrap();
    let request = frame(&serde_json::json!({"id": 1, "request": "console_log"}), 0).unwrap();
    let mut sent = 0;
    while sent < 1 << 20 {
        match deaf.write(&request) {
            Ok(count) => sent += count,
            Err(_) => break,
        }
    }
    // Others send what is none.
    let garbage: Vec<Vec<u8>> = vec![
        vec![0xff; 64],
        frame(&"what", 0).unwrap(),
        frame(&Hello { versions: vec![99] }, 0).unwrap(),
        [frame(&Hello { versions: vec![1] }, 0).unwrap(), frame(&serde_json::json!({"id": 1}), 0).unwrap()]
            .concat(),
    ];
    for bytes in garbage {
        let socket = UnixStream::connect(&bed.path).unwrap();
        (&socket).write_all(&bytes).unwrap();
        let mut receiver = Receiver::default();
        let mut last = None;
        loop {
            while let Ok(Some(frame)) = receiver.take_frame() {
                last = Some(serde_json::from_slice::<Message>(&frame.payload).unwrap());
            }
            std::thread::sleep(Duration::from_millis(1));
            if receiver.read(socket.as_fd()).is_err() {
                break;
            }
        }
        assert!(matches!(last, Some(Message::Goodbye(_))), "{last:?}");
    }
    // More descriptors than any request takes.
    let flood = UnixStream::connect(&bed.path).unwrap();
    let null = fs::File::open("/dev/null").unwrap();
    send(flood.as_fd(), b"12345678", &[null.as_fd(); 64]).unwrap();
    // And more clients than there is room for.
    let crowd: Vec<_> = (0..20).map(|_| UnixStream::connect(&bed.path).unwrap()).collect();

    for _ in 0..10 {
        let start = Instant::now();
        call(&mut good, Request::Pause { within_ms: 10_000 }).unwrap();
        call(&mut good, Request::Resume).unwrap();
        assert!(start.elapsed() < Duration::from_secs(5));
    }
    drop(crowd);
    drop(deaf);
    let deadline = Instant::now() + SOON;
    while Client::connect(&bed.path, Duration::from_millis(500)).is_err() {
        assert!(Instant::now() < deadline, "there is room again");
    }
    assert_eq!(status(&mut good), Status::Running);
}
