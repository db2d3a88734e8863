//! The machine's side: one thread that polls all clients, and one that does what takes time.
//!
//! The polling thread waits for nobody: sockets are never waited for one by one, and what a client does
//! not read is kept up to a bound. A client has one request under way and is not read before it is
//! answered; others, who may want to stop the machine, are.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver as Results, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::frame::{self, Receiver};
use super::work::{Job, Worker};
use super::{Answer, Call, Event, Hello, Message, Refusal, RefusalKind, Reply, Request, VERSIONS, Welcome};
use crate::devices::virtio::block::Drive;
use crate::event::Event as Wake;
use crate::machine::{Machine, Notice};

/// More at a time are turned away.
const CLIENTS_MAX: usize = 8;
/// How long half a frame may be under way, a reply stay unread, or a new client be silent.
const PATIENCE: Duration = Duration::from_secs(10);
/// What may wait to be read by a client before events are dropped.
const EVENTS_OUT_MAX: usize = 64 * 1024;
/// Notices that may wait for the thread.
const NOTICES_MAX: usize = 1024;
/// How long the end of the server waits for clients to read their last messages.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The server cannot be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot start the control socket: {0}")]
pub struct Error(#[from] io::Error);

/// What a network device can be connected with.
#[derive(Debug)]
pub enum Cable {
    /// A descriptor for each queue of a tap, and of vhost-net as many or none.
    Taps {
        /// Of the tap.
        taps: Vec<OwnedFd>,
        /// Of vhost-net.
        vhost: Vec<OwnedFd>,
    },
    /// A connected unix socket.
    Socket(OwnedFd),
}

impl Cable {
    /// How many queues of a device it has work for: the first ones, one for each direction.
    pub(super) fn queues(&self) -> usize {
        match self {
            Self::Taps { taps, .. } => taps.len() * 2,
            Self::Socket(_) => 2,
        }
    }
}

/// What puts a cable into the network slot of this name.
pub type OnCable = Box<dyn Fn(&str, Cable) -> Result<(), Refusal> + Send>;

/// Who may drive the machine, and what only the caller can do for them.
#[derive(Default)]
pub struct Options {
    /// Where clients come in. Whoever can connect can drive.
    pub listener: Option<UnixListener>,
    /// The one to whom the machine belongs: when this connection ends, so does the machine.
    pub owner: Option<UnixStream>,
    /// Ends the process; without it a kill is refused.
    pub on_kill: Option<Box<dyn Fn() + Send>>,
    /// Plugs in a cable; without it that is refused.
    pub on_cable: Option<OnCable>,
    /// Drives of the machine, by their names.
    pub drives: Vec<(String, Drive)>,
    /// The directory of the snapshot that the machine was restored from, if it was.
    pub origin: Option<PathBuf>,
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("listener", &self.listener)
            .field("owner", &self.owner)
            .field("drives", &self.drives)
            .field("origin", &self.origin)
            .finish_non_exhaustive()
    }
}

/// Serves the control socket of one machine. Dropping it says goodbye to everybody.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    wake: Wake,
    notices: Mutex<Notices>,
    closing: AtomicBool,
}

#[derive(Debug, Default)]
struct Notices {
    queue: VecDeque<Notice>,
    lost: u64,
}

impl Shared {
    /// Called from any thread, also a processor's.
    fn note(&self, notice: &Notice) {
        let mut notices = self.notices.lock().unwrap_or_else(PoisonError::into_inner);
        if notices.queue.len() < NOTICES_MAX || matches!(notice, Notice::Ended(_)) {
            notices.queue.push_back(notice.clone());
        } else {
            notices.lost += 1;
        }
        drop(notices);
        self.wake.set();
    }
}

/// A server that hears of everything that happens to the machine, and answers nobody yet: what begins the machine
/// comes before what clients want of it.
pub struct Prepared(Service);

impl fmt::Debug for Prepared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Prepared").finish_non_exhaustive()
    }
}

impl Prepared {
    /// Starts serving.
    pub fn start(self) -> Result<Server, Error> {
        let shared = Arc::clone(&self.0.shared);
        let service = self.0;
        let thread = thread::Builder::new()
            .name("control".into())
            .stack_size(256 * 1024)
            .spawn(move || service.serve())?;
        Ok(Server { shared, thread: Some(thread) })
    }
}

impl Server {
    /// Has all that serving takes. The machine does not live longer because of it.
    pub fn prepare(machine: &Arc<Machine>, options: Options) -> Result<Prepared, Error> {
        let shared = Arc::new(Shared {
            wake: Wake::new()?,
            notices: Mutex::default(),
            closing: AtomicBool::new(false),
        });
        if let Some(listener) = &options.listener {
            listener.set_nonblocking(true)?;
        }
        let (jobs, work) = mpsc::sync_channel(CLIENTS_MAX + 1);
        let (done, results) = mpsc::channel();
        let worker = Worker {
            machine: Arc::downgrade(machine),
            started: Instant::now(),
            on_cable: options.on_cable,
            drives: options.drives,
            origin: options.origin,
            readers: Arc::default(),
        };
        let waker = Arc::clone(&shared);
        // Not joined: it may be waiting for a deadline of the machine, and ends after that.
        thread::Builder::new().name("control-work".into()).stack_size(256 * 1024).spawn(move || {
            while let Ok((token, id, job)) = work.recv() {
                let answer = Answer { id, result: worker.perform(job) };
                if done.send((token, answer)).is_err() {
                    return;
                }
                waker.wake.set();
            }
        })?;
        let mut service = Service {
            machine: Arc::downgrade(machine),
            shared: Arc::clone(&shared),
            listener: options.listener,
            on_kill: options.on_kill,
            clients: Vec::new(),
            next_token: 1,
            jobs,
            results,
        };
        if let Some(owner) = options.owner {
            service.admit(owner, true)?;
        }
        let observing = Arc::clone(&shared);
        machine.observe(Box::new(move |notice| observing.note(notice)));
        Ok(Prepared(service))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::SeqCst);
        self.shared.wake.set();
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by itself.
            let _ = thread.join();
        }
    }
}

/// One client.
struct Peer {
    token: u64,
    socket: UnixStream,
    receiver: Receiver,
    out: Vec<u8>,
    /// Since when it owes us something: the hello, the rest of a frame, or reading.
    owes: Option<Instant>,
    is_owner: bool,
    is_welcome: bool,
    is_busy: bool,
    hears_events: bool,
    lost: u64,
    /// To be hung up on when `out` is read.
    is_leaving: bool,
    is_over: bool,
}

impl Peer {
    fn say(&mut self, message: &Message) {
        match frame::frame(message, 0) {
            Ok(bytes) => self.out.extend_from_slice(&bytes),
            // Nothing that this side says comes near the cap.
            Err(error) => log::error!("control: {error}"),
        }
    }

    fn say_event(&mut self, event: &Event) {
        if self.out.len() > EVENTS_OUT_MAX && !matches!(event, Event::Ended(_)) {
            self.lost += 1;
            return;
        }
        if self.lost > 0 {
            let lost = std::mem::take(&mut self.lost);
            self.say(&Message::Event(Event::Lost(lost)));
        }
        self.say(&Message::Event(event.clone()));
    }

    fn goodbye(&mut self, kind: RefusalKind, why: String) {
        self.say(&Message::Goodbye(Refusal { kind, why }));
        self.is_leaving = true;
    }

    fn flush(&mut self) {
        while !self.out.is_empty() {
            match frame::send(self.socket.as_fd(), &self.out, &[]) {
                Ok(0) => break,
                Ok(count) => {
                    self.out.drain(..count);
                    self.owes = None;
                }
                Err(_) => self.out.clear(),
            }
        }
        self.is_over |= self.is_leaving && self.out.is_empty();
    }

    /// Looks at the clock: one who owes for too long is cut off.
    fn look_at(&mut self, now: Instant) {
        let amid = self.receiver.is_amid() && !self.is_busy;
        if self.is_welcome && !amid && self.out.is_empty() {
            self.owes = None;
        } else if *self.owes.get_or_insert(now) + PATIENCE < now {
            log::warn!("control: a client that does not keep up is cut off");
            self.is_over = true;
        }
    }

    /// Takes what has come.
    fn hear(&mut self) {
        match self.receiver.read(self.socket.as_fd()) {
            Ok(()) => {}
            Err(frame::Error::Closed | frame::Error::Socket(_)) => self.is_over = true,
            Err(error) => self.goodbye(RefusalKind::Invalid, error.to_string()),
        }
    }

    /// The next thing that it wants.
    fn next(&mut self) -> Option<Wish> {
        if self.is_busy || self.is_leaving || self.is_over {
            return None;
        }
        let wish = match self.receiver.take_frame() {
            Ok(None) => return None,
            Ok(Some(received)) if self.is_welcome => {
                serde_json::from_slice(&received.payload).map(|call| Wish::Call(call, received.fds))
            }
            Ok(Some(received)) => serde_json::from_slice(&received.payload).map(Wish::Hello),
            Err(error) => {
                self.goodbye(RefusalKind::Invalid, error.to_string());
                return None;
            }
        };
        wish.map_err(|error| {
            let why = format!("a message that this monitor does not understand: {error}");
            self.goodbye(RefusalKind::Invalid, why);
        })
        .ok()
    }

    fn greet(&mut self, hello: &Hello, status: super::Status) {
        let Some(version) = VERSIONS.iter().rev().find(|version| hello.versions.contains(version)) else {
            let why =
                format!("this monitor speaks versions {VERSIONS:?} of the protocol; use a client of its age");
            return self.goodbye(RefusalKind::Unsupported, why);
        };
        self.is_welcome = true;
        self.say(&Message::Welcome(Welcome {
            version: *version,
            monitor: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            status,
        }));
    }
}

enum Wish {
    Hello(Hello),
    Call(Call, Vec<OwnedFd>),
}

struct Service {
    machine: Weak<Machine>,
    shared: Arc<Shared>,
    listener: Option<UnixListener>,
    on_kill: Option<Box<dyn Fn() + Send>>,
    clients: Vec<Peer>,
    next_token: u64,
    jobs: SyncSender<(u64, u64, Job)>,
    results: Results<(u64, Answer)>,
}

impl Service {
    fn serve(mut self) {
        let mut closing: Option<Instant> = None;
        loop {
            let now = Instant::now();
            self.results();
            self.wishes();
            self.notices();
            for peer in &mut self.clients {
                peer.flush();
                peer.look_at(now);
            }
            self.sweep();
            if self.shared.closing.load(Ordering::SeqCst) {
                let until = *closing.get_or_insert(now + LAST_WORDS);
                if now >= until || self.clients.iter().all(|peer| peer.out.is_empty()) {
                    return;
                }
            }
            if let Err(error) = self.wait() {
                log::error!("control: {error}; nobody drives this machine any more");
                return;
            }
        }
    }

    /// Lets those go that are over.
    fn sweep(&mut self) {
        let orphaned = self.clients.iter().any(|peer| peer.is_over && peer.is_owner);
        self.clients.retain(|peer| !peer.is_over);
        if orphaned && let Some(machine) = self.machine.upgrade() {
            log::warn!("control: the owner has gone, and the machine goes with it");
            machine.stop();
        }
    }

    /// Waits until something can be done, and hears who speaks.
    fn wait(&mut self) -> io::Result<()> {
        let full = self.clients.len() >= CLIENTS_MAX;
        let is_owed = self.clients.iter().any(|peer| peer.owes.is_some());
        let closing = self.shared.closing.load(Ordering::SeqCst);
        let mut fds = vec![PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN)];
        for peer in &self.clients {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, !peer.is_busy && !peer.is_leaving);
            flags.set(PollFlags::POLLOUT, !peer.out.is_empty());
            fds.push(PollFd::new(peer.socket.as_fd(), flags));
        }
        if let Some(listener) = self.listener.as_ref().filter(|_| !full) {
            fds.push(PollFd::new(listener.as_fd(), PollFlags::POLLIN));
        }
        let timeout = match (closing, is_owed) {
            (true, _) => PollTimeout::from(50u8),
            (_, true) => PollTimeout::from(1000u16),
            _ => PollTimeout::NONE,
        };
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
        let happened = |at: usize| fds.get(at).and_then(PollFd::revents).unwrap_or(PollFlags::empty());
        let flags: Vec<PollFlags> = (0..fds.len()).map(happened).collect();
        drop(fds);
        self.shared.wake.take();
        for (peer, flags) in self.clients.iter_mut().zip(&flags[1..]) {
            if flags.contains(PollFlags::POLLIN) {
                peer.hear();
            } else if flags.intersects(PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL) {
                peer.is_over = true;
            }
        }
        let accepts = flags.get(1 + self.clients.len()).is_some_and(|flags| !flags.is_empty());
        if accepts && let Some(listener) = &self.listener {
            match listener.accept() {
                Ok((socket, _)) => self.admit(socket, false)?,
                Err(error) => log::debug!("control: accept: {error}"),
            }
        }
        Ok(())
    }

    fn admit(&mut self, socket: UnixStream, is_owner: bool) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        self.clients.push(Peer {
            token: self.next_token,
            socket,
            receiver: Receiver::default(),
            out: Vec::new(),
            owes: None,
            is_owner,
            is_welcome: false,
            is_busy: false,
            hears_events: false,
            lost: 0,
            is_leaving: false,
            is_over: false,
        });
        self.next_token += 1;
        Ok(())
    }

    fn results(&mut self) {
        while let Ok((token, answer)) = self.results.try_recv() {
            if let Some(peer) = self.clients.iter_mut().find(|peer| peer.token == token) {
                peer.is_busy = false;
                peer.say(&Message::Reply(answer));
            }
        }
    }

    fn notices(&mut self) {
        let Notices { queue, lost } =
            std::mem::take(&mut *self.shared.notices.lock().unwrap_or_else(PoisonError::into_inner));
        for peer in self.clients.iter_mut().filter(|peer| peer.is_welcome) {
            if peer.hears_events {
                peer.lost += lost;
            }
            for event in queue.iter().map(Event::from) {
                if peer.hears_events || matches!(event, Event::Ended(_)) {
                    peer.say_event(&event);
                }
            }
        }
    }

    fn wishes(&mut self) {
        let machine = self.machine.upgrade();
        let status = super::Status::of(machine.as_deref());
        for index in 0..self.clients.len() {
            while let Some(wish) = self.clients[index].next() {
                match wish {
                    Wish::Hello(hello) => self.clients[index].greet(&hello, status),
                    Wish::Call(call, fds) => self.answer(index, call, fds, machine.as_deref()),
                }
            }
        }
    }

    /// Answers at once, or has it done.
    fn answer(&mut self, index: usize, call: Call, fds: Vec<OwnedFd>, machine: Option<&Machine>) {
        let peer = &mut self.clients[index];
        let result = match call.request {
            Request::State => Ok(Reply::state(machine)),
            Request::Stop => {
                if let Some(machine) = machine {
                    machine.stop();
                }
                Ok(Reply::Done)
            }
            Request::Kill => match &self.on_kill {
                Some(kill) => {
                    kill();
                    Ok(Reply::Done)
                }
                None => Err(Refusal::new(
                    RefusalKind::Unsupported,
                    "cannot kill the monitor of this machine, which has other work too; stop the machine",
                )),
            },
            Request::Events => {
                peer.hears_events = true;
                Ok(Reply::Done)
            }
            request => match self.jobs.try_send((peer.token, call.id, Job { request, fds })) {
                Ok(()) => {
                    peer.is_busy = true;
                    return;
                }
                Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => Err(Refusal::new(
                    RefusalKind::Failed,
                    "the monitor has too many requests to do; try again when one is answered",
                )),
            },
        };
        peer.say(&Message::Reply(Answer { id: call.id, result }));
    }
}
