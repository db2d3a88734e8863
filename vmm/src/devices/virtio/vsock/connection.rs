//! One stream between a guest's port and a socket of the host, with the credit of both directions.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::unix::net::UnixStream;

use super::packet::{Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, STREAM, op};

/// What the guest may have under way to a host that does not read.
pub const BUF_ALLOC: u32 = 256 * 1024;

/// Room for the greeting, of which the guest's credit does not know.
const GREETING_MAX: usize = 32;

/// The two ports by which a stream is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// The host's end.
    pub host: u32,
    /// The guest's end.
    pub guest: u32,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host:{} guest:{}", self.host, self.guest)
    }
}

/// What has to be told to the guest; data comes last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Pending {
    request: bool,
    response: bool,
    credit: bool,
    shutdown: u32,
}

/// The guest broke the protocol, or the host's socket broke: the stream is reset, for this reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Reset(pub Cow<'static, str>);

impl Reset {
    /// Nothing of the moment is in the reason.
    pub const fn because(why: &'static str) -> Self {
        Self(Cow::Borrowed(why))
    }
}

impl From<io::Error> for Reset {
    fn from(error: io::Error) -> Self {
        Self(format!("the host's socket: {error}").into())
    }
}

/// Hands a socket a piece. None when it takes nothing now.
fn write(mut stream: &UnixStream, piece: &[u8]) -> Result<Option<usize>, Reset> {
    loop {
        match stream.write(piece) {
            Ok(0) => return Err(Reset::because("the host's socket takes nothing")),
            Ok(count) => return Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// One stream.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    established: bool,
    pending: Pending,
    /// Bytes from the guest that the host's socket has not taken.
    backlog: VecDeque<u8>,
    // Credit of the guest's direction.
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    reported: Wrapping<u32>,
    // Credit of the host's direction.
    peer_alloc: u32,
    peer_forwarded: Wrapping<u32>,
    sent: Wrapping<u32>,
    /// Which directions each side has closed, as flags of a shutdown.
    guest_closed: u32,
    host_closed: u32,
    /// The host's socket must hear that the guest sends no more.
    write_closed: bool,
    /// A line for the host before any data of the guest: the answer to its handshake.
    greeting: Option<String>,
}

impl Connection {
    /// The guest wants a stream and the host has one.
    pub fn from_guest(stream: UnixStream, request: &Header) -> Self {
        let mut connection = Self::new(stream);
        connection.established = true;
        connection.pending.response = true;
        connection.credit(request);
        connection
    }

    /// The host wants a stream, and hears `greeting` when the guest takes it.
    pub fn from_host(stream: UnixStream, greeting: String) -> Self {
        let mut connection = Self::new(stream);
        connection.pending.request = true;
        connection.greeting = Some(greeting);
        connection
    }

    fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            established: false,
            pending: Pending::default(),
            backlog: VecDeque::new(),
            received: Wrapping(0),
            forwarded: Wrapping(0),
            reported: Wrapping(0),
            peer_alloc: 0,
            peer_forwarded: Wrapping(0),
            sent: Wrapping(0),
            guest_closed: 0,
            host_closed: 0,
            write_closed: false,
            greeting: None,
        }
    }

    /// The host's socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    fn credit(&mut self, header: &Header) {
        self.peer_alloc = header.buf_alloc;
        self.peer_forwarded = Wrapping(header.fwd_cnt);
    }

    /// How much more the guest has room for.
    fn room(&self) -> u32 {
        // A guest that claims to have forwarded what it was never sent gets nothing.
        self.peer_alloc.saturating_sub((self.sent - self.peer_forwarded).0)
    }

    /// Whether the host's socket should be watched for input.
    pub fn wants_input(&self) -> bool {
        self.established
            && self.host_closed & SHUTDOWN_SEND == 0
            && self.guest_closed & SHUTDOWN_RECEIVE == 0
            && self.room() > 0
    }

    /// Whether the host's socket should be watched for room.
    pub fn wants_output(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Whether the host's socket should be watched for its other end going away.
    pub fn wants_hang_up(&self) -> bool {
        self.host_closed == SHUTDOWN_SEND
    }

    /// Whether the guest should hear something that does not depend on the host's socket.
    pub fn has_pending(&self) -> bool {
        self.pending != Pending::default()
    }

    /// Both sides have said all: nothing is left but to forget the stream.
    pub fn is_over(&self) -> bool {
        let closed = self.guest_closed == SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
        closed && self.backlog.is_empty()
    }

    /// Takes a packet of the guest, with its data.
    pub fn take(&mut self, header: &Header, data: &[u8]) -> Result<(), Reset> {
        self.credit(header);
        match header.op {
            op::RESPONSE if !self.established => {
                self.established = true;
                if let Some(greeting) = self.greeting.take() {
                    self.keep(greeting.as_bytes());
                    // The guest's count does not know of it.
                    self.forwarded -= Wrapping(greeting.len() as u32);
                    self.reported = self.forwarded;
                    self.flush()?;
                }
                Ok(())
            }
            op::RW if self.established && self.guest_closed & SHUTDOWN_SEND == 0 => self.data(data),
            op::CREDIT_UPDATE => Ok(()),
            op::CREDIT_REQUEST => {
                self.pending.credit = true;
                Ok(())
            }
            op::SHUTDOWN => {
                self.guest_closed |= header.flags & (SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
                self.flush()
            }
            other => Err(Reset(format!("the guest's operation {other} makes no sense now").into())),
        }
    }

    fn data(&mut self, data: &[u8]) -> Result<(), Reset> {
        // The credit that was given bounds what may be kept.
        if data.len() > (BUF_ALLOC as usize + GREETING_MAX).saturating_sub(self.backlog.len()) {
            return Err(Reset::because("the guest sent more than it was given credit for"));
        }
        self.received += Wrapping(data.len() as u32);
        let mut taken = 0;
        while self.backlog.is_empty() && taken < data.len() {
            let Some(count) = write(&self.stream, &data[taken..])? else { break };
            self.forwarded += Wrapping(count as u32);
            taken += count;
        }
        self.keep(&data[taken..]);
        self.flush()
    }

    /// Keeps what the host's socket does not take now. All room is asked for at once: it is larger than what the allocator gives
    /// back late, and costs nothing before it is used.
    fn keep(&mut self, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        if self.backlog.capacity() == 0 {
            self.backlog.reserve_exact(BUF_ALLOC as usize + GREETING_MAX);
        }
        self.backlog.extend(data);
    }

    /// Hands the host what its socket takes.
    pub fn flush(&mut self) -> Result<(), Reset> {
        while !self.backlog.is_empty() {
            let Some(count) = write(&self.stream, self.backlog.as_slices().0)? else { break };
            self.backlog.drain(..count);
            self.forwarded += Wrapping(count as u32);
        }
        if self.backlog.is_empty() {
            self.backlog = VecDeque::new();
        }
        // The guest hears of its room before half of it is gone.
        if (self.forwarded - self.reported).0 >= BUF_ALLOC / 2 && self.established {
            self.pending.credit = true;
        }
        if self.backlog.is_empty() && self.guest_closed & SHUTDOWN_SEND != 0 && !self.write_closed {
            self.write_closed = true;
            // It fails when the host's end is gone, which is as closed as can be.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Ok(())
    }

    /// The host's end is gone: no more in either direction.
    pub fn hang_up(&mut self) {
        let all = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
        self.pending.shutdown |= all & !self.host_closed;
        self.host_closed = all;
        self.backlog = VecDeque::new();
    }

    fn header(&mut self, key: Key, op: u16) -> Header {
        self.reported = self.forwarded;
        self.pending.credit = false;
        Header {
            src_port: key.host,
            dst_port: key.guest,
            kind: STREAM,
            op,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.forwarded.0,
            ..Header::default()
        }
    }

    /// The next thing the guest should hear besides data.
    pub fn next_pending(&mut self, key: Key) -> Option<Header> {
        if std::mem::take(&mut self.pending.request) {
            return Some(self.header(key, op::REQUEST));
        }
        if std::mem::take(&mut self.pending.response) {
            return Some(self.header(key, op::RESPONSE));
        }
        if self.pending.credit {
            return Some(self.header(key, op::CREDIT_UPDATE));
        }
        let flags = std::mem::take(&mut self.pending.shutdown);
        (flags != 0).then(|| Header { flags, ..self.header(key, op::SHUTDOWN) })
    }

    /// Reads from the host's socket what the guest has room for, at most a buffer full. None when
    /// there is nothing to read now.
    pub fn next_data(&mut self, key: Key, buffer: &mut [u8]) -> Result<Option<(Header, usize)>, Reset> {
        if !self.wants_input() {
            return Ok(None);
        }
        let room = buffer.len().min(self.room() as usize);
        match self.stream.read(&mut buffer[..room]) {
            Ok(0) => {
                self.host_closed |= SHUTDOWN_SEND;
                self.pending.shutdown |= SHUTDOWN_SEND;
                Ok(None)
            }
            Ok(count) => {
                self.sent += Wrapping(count as u32);
                let header = Header { len: count as u32, ..self.header(key, op::RW) };
                Ok(Some((header, count)))
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(error.into()),
            },
        }
    }
}
