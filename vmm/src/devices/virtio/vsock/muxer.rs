//! All streams of one guest, and how new ones come about.
//!
//! The host's side lives in a directory. Whoever connects to `vsock` in it and writes
//! `CONNECT <port>\n` gets a stream to that port of the guest, and `OK <port>\n` when the guest took
//! it; a guest that connects to port N of the host gets a stream to whoever listens on `vsock_N`.
//! Several monitors have this convention, and tools for it exist.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{self, Read};
use std::ops::Bound;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::poll::PollFlags;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use super::connection::{Connection, Key, Reset};
use super::packet::{Header, STREAM, op};

/// The host's context id.
pub const HOST_CID: u64 = 2;
/// More streams are refused.
pub const CONNECTIONS_MAX: usize = 1024;
/// Hosts that have connected but not said where to; the oldest goes when there are more.
const HANDSHAKES_MAX: usize = 64;
/// Refusals that the guest has yet to take. Its packets wait while there are more.
pub const RESETS_MAX: usize = 1024;
/// `CONNECT ` and a port.
const LINE_MAX: usize = 32;
/// Ports given to streams that the host begins: this one and those above.
pub const FIRST_HOST_PORT: u32 = 1 << 30;

/// The streams.
#[derive(Debug)]
pub struct Muxer {
    cid: u64,
    directory: PathBuf,
    connections: BTreeMap<Key, Connection>,
    /// Streams that have, or may have, something for the guest.
    ready: BTreeSet<Key>,
    /// The last stream served: the next comes first.
    cursor: Option<Key>,
    resets: VecDeque<Key>,
    handshakes: VecDeque<Handshake>,
    next_port: u32,
}

#[derive(Debug)]
struct Handshake {
    stream: UnixStream,
    line: Vec<u8>,
}

/// What a descriptor that was waited for belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A stream.
    Connection(Key),
    /// A host that has yet to say where to, by its descriptor's number.
    Handshake(i32),
}

impl Muxer {
    /// Of the guest with that context id. The first stream that the host begins gets `first_port`, of those that
    /// there are for it: a guest that goes on elsewhere must not take a new stream for one that it had.
    pub fn new(cid: u64, directory: &Path, first_port: u32) -> Self {
        Self {
            cid,
            directory: directory.to_owned(),
            connections: BTreeMap::new(),
            ready: BTreeSet::new(),
            cursor: None,
            resets: VecDeque::new(),
            handshakes: VecDeque::new(),
            next_port: first_port.max(FIRST_HOST_PORT),
        }
    }

    /// Whether the guest's packets should wait until it takes some of ours.
    pub fn is_full(&self) -> bool {
        self.resets.len() >= RESETS_MAX
    }

    /// Whether there is, or may be, something for the guest.
    pub fn has_output(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    fn refuse(&mut self, key: Key, why: &Reset) {
        log::debug!("vsock: the stream {key} is reset: {why}");
        self.connections.remove(&key);
        self.ready.remove(&key);
        self.resets.push_back(key);
    }

    /// Takes a packet of the guest, with its data.
    pub fn take(&mut self, header: &Header, data: &[u8]) {
        if header.src_cid != self.cid || header.dst_cid != HOST_CID {
            return;
        }
        let key = Key { host: header.dst_port, guest: header.src_port };
        if header.op == op::RST {
            log::debug!("vsock: the guest resets the stream {key}");
            self.connections.remove(&key);
            self.ready.remove(&key);
            return;
        }
        let taken = match self.connections.get_mut(&key) {
            _ if header.kind != STREAM => Err(Reset::because("it is no stream")),
            Some(connection) => connection.take(header, data),
            None if header.op == op::REQUEST => self.begin(key, header),
            None => Err(Reset::because("there is none")),
        };
        self.settle(key, taken);
    }

    /// What follows from something that happened on a stream.
    fn settle(&mut self, key: Key, result: Result<(), Reset>) {
        let result = result.and_then(|()| match self.connections.get(&key) {
            Some(connection) if connection.is_over() => Err(Reset::because("it is over")),
            Some(connection) => Ok(connection.has_pending()),
            None => Err(Reset::because("there is none")),
        });
        match result {
            Ok(true) => {
                self.ready.insert(key);
            }
            Ok(false) => {}
            Err(why) => self.refuse(key, &why),
        }
    }

    fn begin(&mut self, key: Key, request: &Header) -> Result<(), Reset> {
        if self.connections.len() >= CONNECTIONS_MAX {
            return Err(Reset::because("there are too many"));
        }
        let path = self.directory.join(format!("vsock_{}", key.host));
        let stream =
            dial(&path).map_err(|error| Reset(format!("nobody is at {}: {error}", path.display()).into()))?;
        self.connections.insert(key, Connection::from_guest(stream, request));
        Ok(())
    }

    /// Somebody connected to the host's socket.
    pub fn welcome(&mut self, stream: UnixStream) {
        if stream.set_nonblocking(true).is_err() {
            return;
        }
        if self.handshakes.len() >= HANDSHAKES_MAX {
            self.handshakes.pop_front();
        }
        self.handshakes.push_back(Handshake { stream, line: Vec::new() });
    }

    fn shake(&mut self, fd: i32) {
        let Some(at) = self.handshakes.iter().position(|shake| shake.stream.as_raw_fd() == fd) else {
            return;
        };
        match self.handshakes[at].read() {
            Ok(None) => {}
            Ok(Some(port)) => {
                // It was just found there.
                if let Some(handshake) = self.handshakes.remove(at) {
                    self.offer(handshake.stream, port);
                }
            }
            Err(_) => {
                self.handshakes.remove(at);
            }
        }
    }

    /// Offers the guest a stream. Where there is no room for it, the host finds its socket closed.
    fn offer(&mut self, stream: UnixStream, guest: u32) {
        if self.connections.len() >= CONNECTIONS_MAX {
            return;
        }
        // There are more ports than streams, so this ends.
        let key = loop {
            let key = Key { host: self.next_port, guest };
            self.next_port = self.next_port.wrapping_add(1).max(FIRST_HOST_PORT);
            if !self.connections.contains_key(&key) {
                break key;
            }
        };
        let greeting = format!("OK {}\n", key.host);
        self.connections.insert(key, Connection::from_host(stream, greeting));
        self.ready.insert(key);
    }

    /// All descriptors to wait for. Input is of interest only while the guest `has_room`.
    pub fn watched(&self, has_room: bool) -> Vec<(Source, BorrowedFd<'_>, PollFlags)> {
        let handshakes = self.handshakes.iter().map(|handshake| {
            let fd = handshake.stream.as_fd();
            (Source::Handshake(fd.as_raw_fd()), fd, PollFlags::POLLIN)
        });
        let connections = self.connections.iter().filter_map(|(key, connection)| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, has_room && connection.wants_input() && !self.ready.contains(key));
            flags.set(PollFlags::POLLOUT, connection.wants_output());
            // A socket that is watched for nothing reports a hang-up again and again.
            let watched = !flags.is_empty() || connection.wants_hang_up();
            watched.then(|| (Source::Connection(*key), connection.stream().as_fd(), flags))
        });
        handshakes.chain(connections).collect()
    }

    /// Something happened on a descriptor.
    pub fn happened(&mut self, source: Source, flags: PollFlags) {
        let key = match source {
            Source::Handshake(fd) => return self.shake(fd),
            Source::Connection(key) => key,
        };
        let Some(connection) = self.connections.get_mut(&key) else { return };
        let gone = flags.intersects(PollFlags::POLLHUP | PollFlags::POLLERR);
        let result = if gone && connection.wants_hang_up() {
            connection.hang_up();
            Ok(())
        } else {
            connection.flush()
        };
        if connection.wants_input() && (gone || flags.contains(PollFlags::POLLIN)) {
            self.ready.insert(key);
        }
        self.settle(key, result);
    }

    /// The next packet for the guest, its data in `buffer`.
    pub fn next(&mut self, buffer: &mut [u8]) -> Option<(Header, usize)> {
        if let Some(key) = self.resets.pop_front() {
            let header = Header {
                src_port: key.host,
                dst_port: key.guest,
                kind: STREAM,
                op: op::RST,
                ..Header::default()
            };
            return Some((self.addressed(header), 0));
        }
        while let Some(key) = self.turn() {
            self.cursor = Some(key);
            let Some(connection) = self.connections.get_mut(&key) else {
                self.ready.remove(&key);
                continue;
            };
            if let Some(header) = connection.next_pending(key) {
                return Some((self.addressed(header), 0));
            }
            match connection.next_data(key, buffer) {
                Ok(Some((header, len))) => return Some((self.addressed(header), len)),
                Ok(None) if connection.has_pending() => {}
                Ok(None) => {
                    self.ready.remove(&key);
                }
                Err(why) => {
                    self.refuse(key, &why);
                    return self.next(buffer);
                }
            }
        }
        None
    }

    /// The stream whose turn it is: the first ready one after the last served.
    fn turn(&self) -> Option<Key> {
        let after = self.cursor.map_or(Bound::Unbounded, Bound::Excluded);
        self.ready.range((after, Bound::Unbounded)).next().or_else(|| self.ready.first()).copied()
    }

    fn addressed(&self, header: Header) -> Header {
        Header { src_cid: HOST_CID, dst_cid: self.cid, ..header }
    }
}

impl Handshake {
    /// Reads on; a port once the line is complete. Byte by byte, since what follows is the guest's.
    fn read(&mut self) -> io::Result<Option<u32>> {
        let mut byte = [0];
        loop {
            match self.stream.read(&mut byte) {
                Ok(1) if byte[0] == b'\n' => {
                    return parse(&self.line).map(Some).ok_or_else(|| io::Error::other("no CONNECT <port>"));
                }
                Ok(1) if self.line.len() < LINE_MAX => self.line.push(byte[0]),
                Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?.trim_end_matches('\r');
    line.strip_prefix("CONNECT ")?.parse().ok()
}

/// Connects without waiting: a listener whose backlog is full is as good as none.
fn dial(path: &Path) -> io::Result<UnixStream> {
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(true)?;
    connect(stream.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(stream)
}

#[cfg(test)]
mod tests;
