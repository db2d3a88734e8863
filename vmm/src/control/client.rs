//! The side of whoever drives a machine.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use serde::de::DeserializeOwned;

use super::frame::{self, Receiver};
use super::{Answer, Call, Event, Hello, Message, Refusal, Reply, Request, VERSIONS, Welcome};
use crate::snapshot::Form;

/// How long a monitor may take to answer what it does at once.
const ANSWER: Duration = Duration::from_secs(10);
/// Events that are kept until they are asked for; the oldest go first.
const EVENTS_MAX: usize = 1024;

/// A request came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens.
    #[error("cannot reach a machine at {}: {source}; is its monitor running?", path.display())]
    Connect {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The connection is of no use any more.
    #[error(transparent)]
    Frame(#[from] frame::Error),
    /// The monitor speaks no version that we do, or did not understand us.
    #[error("the monitor ended the conversation: {0}")]
    Goodbye(Refusal),
    /// It said something that has no place there.
    #[error("the monitor answered out of turn: {0}")]
    OutOfTurn(String),
    /// The monitor is silent.
    #[error("the monitor did not answer {what} within {within:?}")]
    Deadline {
        /// What it was asked.
        what: String,
        /// The deadline.
        within: Duration,
    },
    /// The monitor refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// A connection to a machine. One request at a time; blocking, with a deadline for each.
#[derive(Debug)]
pub struct Client {
    socket: UnixStream,
    receiver: Receiver,
    events: VecDeque<Event>,
    welcome: Welcome,
    next_id: u64,
}

impl Client {
    /// To the machine whose socket is at `path`.
    pub fn connect(path: &Path, within: Duration) -> Result<Self, Error> {
        let socket =
            UnixStream::connect(path).map_err(|source| Error::Connect { path: path.to_owned(), source })?;
        Self::over(socket, within)
    }

    /// Over a socket that is connected already, such as one end of a pair.
    pub fn over(socket: UnixStream, within: Duration) -> Result<Self, Error> {
        let until = Instant::now() + within;
        let mut receiver = Receiver::default();
        let hello = frame::frame(&Hello { versions: VERSIONS.to_vec() }, 0)?;
        let late = |()| Error::Deadline { what: "the hello".into(), within };
        send_all(&socket, &hello, &[], until)?.map_err(late)?;
        match receive(&socket, &mut receiver, until)?.ok_or(()).map_err(late)? {
            Message::Welcome(welcome) => {
                Ok(Self { socket, receiver, events: VecDeque::new(), welcome, next_id: 1 })
            }
            Message::Goodbye(refusal) => Err(Error::Goodbye(refusal)),
            other => Err(Error::OutOfTurn(format!("{other:?} to the hello"))),
        }
    }

    /// What the monitor said of itself.
    pub fn welcome(&self) -> &Welcome {
        &self.welcome
    }

    /// Asks for something, passing descriptors along, and waits for the answer.
    ///
    /// After a deadline of this call the answer may still come, to nobody: the connection stays in order.
    pub fn call(
        &mut self,
        request: Request,
        fds: &[BorrowedFd<'_>],
        within: Duration,
    ) -> Result<Reply, Error> {
        let until = Instant::now() + within;
        let what = format!("{request:?}");
        let call = Call { id: self.next_id, request };
        self.next_id += 1;
        let bytes = frame::frame(&call, fds.len())?;
        let late = |()| Error::Deadline { what: what.clone(), within };
        send_all(&self.socket, &bytes, fds, until)?.map_err(late)?;
        loop {
            match receive(&self.socket, &mut self.receiver, until)?.ok_or(()).map_err(late)? {
                Message::Reply(Answer { id, result }) if id == call.id => return Ok(result?),
                // To a call that was given up.
                Message::Reply(Answer { id, .. }) if id < call.id => {}
                Message::Event(event) => self.keep(event),
                Message::Goodbye(refusal) => return Err(Error::Goodbye(refusal)),
                other => return Err(Error::OutOfTurn(format!("{other:?} to {what}"))),
            }
        }
    }

    /// Makes the guest stand still, unless that takes longer than `within`.
    pub fn pause(&mut self, within: Duration) -> Result<(), Error> {
        let within_ms = u64::try_from(within.as_millis()).unwrap_or(u64::MAX);
        self.call(Request::Pause { within_ms }, &[], within + ANSWER).map(drop)
    }

    /// Lets the guest go on.
    pub fn resume(&mut self) -> Result<(), Error> {
        self.call(Request::Resume, &[], ANSWER).map(drop)
    }

    /// Ends the guest.
    pub fn stop(&mut self) -> Result<(), Error> {
        self.call(Request::Stop, &[], ANSWER).map(drop)
    }

    /// Has the machine, which is paused, written into two empty files, the second in that form. Says how many bytes the
    /// RAM has, and how many are in pages that are not all zeroes.
    pub fn snapshot(
        &mut self,
        state: BorrowedFd<'_>,
        memory: BorrowedFd<'_>,
        form: Form,
        within: Duration,
    ) -> Result<(u64, u64), Error> {
        let request = Request::Snapshot { packed: form == Form::Packed, over: form == Form::Over };
        match self.call(request, &[state, memory], within)? {
            Reply::Snapshot { memory, data } => Ok((memory, data)),
            other => Err(Error::OutOfTurn(format!("{other:?} to a snapshot"))),
        }
    }

    fn keep(&mut self, event: Event) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// The next event, or none within that time. After [`Request::Events`].
    pub fn event(&mut self, within: Duration) -> Result<Option<Event>, Error> {
        let until = Instant::now() + within;
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            match receive(&self.socket, &mut self.receiver, until)? {
                None => return Ok(None),
                Some(Message::Event(event)) => return Ok(Some(event)),
                // To a call that was given up.
                Some(Message::Reply(_)) => {}
                Some(Message::Goodbye(refusal)) => return Err(Error::Goodbye(refusal)),
                Some(other) => return Err(Error::OutOfTurn(format!("{other:?} as an event"))),
            }
        }
    }
}

/// For those who poll: when it can be read, [`Client::event`] has something.
impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// `Ok(Err(()))` is the deadline.
type Timely<T> = Result<Result<T, ()>, Error>;

fn send_all(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>], until: Instant) -> Timely<()> {
    let (mut rest, mut fds) = (bytes, fds);
    while !rest.is_empty() {
        if !frame::wait(socket, PollFlags::POLLOUT, until).map_err(frame::Error::Socket)? {
            return Ok(Err(()));
        }
        let sent = frame::send(socket.as_fd(), rest, fds).map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => frame::Error::Closed,
            _ => frame::Error::Socket(error),
        })?;
        if sent > 0 {
            // They have gone with the first bytes.
            fds = &[];
        }
        rest = &rest[sent..];
    }
    Ok(Ok(()))
}

fn receive<T: DeserializeOwned>(
    socket: &UnixStream,
    receiver: &mut Receiver,
    until: Instant,
) -> Result<Option<T>, Error> {
    loop {
        if let Some(received) = receiver.take_frame()? {
            let _: Vec<OwnedFd> = received.fds;
            let message = serde_json::from_slice(&received.payload).map_err(frame::Error::Payload)?;
            return Ok(Some(message));
        }
        if !frame::wait(socket, PollFlags::POLLIN, until).map_err(frame::Error::Socket)? {
            return Ok(None);
        }
        receiver.read(socket.as_fd())?;
    }
}
