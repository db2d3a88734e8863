//! A network behind a unix socket: a process of the host's that takes and gives Ethernet frames. On a stream, as passt
//! has it, each frame is behind its length, four bytes, the highest first; on a datagram socket, as gvproxy has it, a
//! datagram is a frame.
//!
//! No header of virtio's crosses it. What a driver has left to the device is done here as far as it is one packet's:
//! its checksum. Large packets are not cut up; who has the guest's driver turn that off loses none.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{Shutdown, SockType, UnixAddr, getpeername, getsockopt, shutdown, sockopt};
use nix::unistd::{read, write};

use super::super::scatter::Scatter;
use super::cable::Moved;
use super::checksum;
use super::tap::HEADER;

/// No frame is larger: an IP packet has 65535 bytes, and before it are Ethernet's header and a VLAN's.
const FRAME_MAX: usize = 65535 + 18;
/// No frame is smaller than its header.
const FRAME_MIN: usize = 14;
/// Bytes of a frame's length on a stream.
const LENGTH: usize = 4;
/// One frame in any case, and many of usual size.
const INBOX: usize = 2 * (LENGTH + FRAME_MAX);

/// VIRTIO_NET_HDR_F_NEEDS_CSUM.
const NEEDS_CSUM: u8 = 1;

/// How a socket keeps frames apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// By their lengths.
    Stream,
    /// Each is a datagram.
    Datagram,
}

/// The descriptor that was handed in is no end of a network.
#[derive(Debug, thiserror::Error)]
#[error("the descriptor {fd} for the network is no connected unix socket for streams or datagrams: {why}")]
pub struct Error {
    /// Its number.
    fd: i32,
    /// What it is, or what the system said.
    why: String,
}

/// A connected socket.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    kind: Kind,
    state: Mutex<State>,
}

/// What is on its way. It is the connection's, not a driver's: another one that comes goes on where a frame was cut.
#[derive(Debug)]
struct State {
    /// Of what was read, `inbox[start..end]` has not been handed over.
    inbox: Box<[u8]>,
    start: usize,
    end: usize,
    /// What was taken from the driver, and how much of it was written.
    outbox: Vec<u8>,
    written: usize,
    /// A large packet was dropped, and said so.
    has_warned: bool,
    is_gone: bool,
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Socket {
    /// From a descriptor that is connected.
    pub fn new(fd: OwnedFd) -> Result<Self, Error> {
        let number = fd.as_raw_fd();
        let wrong = |why: String| Error { fd: number, why };
        let failed = |errno: Errno| wrong(errno.desc().into());
        let kind = match getsockopt(&fd, sockopt::SockType).map_err(failed)? {
            SockType::Stream => Kind::Stream,
            SockType::Datagram => Kind::Datagram,
            other => return Err(wrong(format!("it is for {other:?}"))),
        };
        // Fails for whatever is of another family, or not connected.
        getpeername::<UnixAddr>(number).map_err(failed)?;
        fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(failed)?;
        let inbox = vec![0; INBOX].into_boxed_slice();
        let outbox = Vec::with_capacity(LENGTH + FRAME_MAX);
        let state = State { inbox, start: 0, end: 0, outbox, written: 0, has_warned: false, is_gone: false };
        Ok(Self { fd, kind, state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a packet of the driver's, if all that was taken before is written.
    pub fn send(&self, packet: &Scatter) -> Moved {
        let mut guard = self.state();
        let state = &mut *guard;
        if !self.flush_of(state) {
            return Moved::NotNow;
        }
        let bytes = packet.bytes() as usize;
        let header = usize::from(HEADER);
        let Some(len) = bytes.checked_sub(header).filter(|len| (FRAME_MIN..=FRAME_MAX).contains(len)) else {
            return Moved::Refused;
        };
        let prefix = if self.kind == Kind::Stream { LENGTH } else { 0 };
        // Copied once, so that what is looked at is what is sent, whatever the guest does to it meanwhile.
        let mut head = [0; HEADER as usize];
        packet.get(0, &mut head);
        state.outbox.resize(prefix + len, 0);
        packet.get(header, &mut state.outbox[prefix..]);
        // No longer than FRAME_MAX.
        state.outbox[..prefix].copy_from_slice(&(len as u32).to_be_bytes()[..prefix]);
        let moved = if finish(head, &mut state.outbox[prefix..], &mut state.has_warned) {
            self.write_out(state, bytes)
        } else {
            Moved::Refused
        };
        if moved != Moved::Bytes(bytes) {
            state.outbox.clear();
        }
        moved
    }

    fn write_out(&self, state: &mut State, bytes: usize) -> Moved {
        state.written = 0;
        match write(&self.fd, &state.outbox) {
            Ok(written) => {
                state.written = written;
                Moved::Bytes(bytes)
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Moved::NotNow,
            // It may take others; not all systems have a full socket say so.
            Err(Errno::EMSGSIZE | Errno::ENOBUFS) if self.kind == Kind::Datagram => Moved::Refused,
            Err(errno) => {
                self.give_up(state, format!("the other end of its socket takes no frame: {}", errno.desc()))
            }
        }
    }

    /// Writes what was taken. False when some of it has to wait.
    pub fn flush(&self) -> bool {
        self.flush_of(&mut self.state())
    }

    fn flush_of(&self, state: &mut State) -> bool {
        // A datagram is written whole.
        while self.kind == Kind::Stream && state.written < state.outbox.len() {
            match write(&self.fd, &state.outbox[state.written..]) {
                Ok(written) => state.written += written,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return false,
                // What is read, or the next frame, tells that it is gone.
                Err(_) => break,
            }
        }
        state.outbox.clear();
        state.written = 0;
        true
    }

    /// Whether a whole frame has been read and not been handed over.
    pub fn holds_frame(&self) -> bool {
        let state = self.state();
        state.frame_len().is_some_and(|len| len > FRAME_MAX || state.end - state.start >= LENGTH + len)
    }

    /// Puts the next frame into `room`, behind a header that says nothing of it.
    pub fn receive(&self, room: &Scatter) -> Moved {
        let mut state = self.state();
        if state.is_gone {
            return Moved::Gone("its socket is closed".into());
        }
        match self.kind {
            Kind::Stream => self.receive_from_stream(&mut state, room),
            Kind::Datagram => match read(&self.fd, &mut state.inbox[..=FRAME_MAX]) {
                Ok(len) => hand_over(&state.inbox[..len], room),
                Err(Errno::EAGAIN | Errno::EINTR) => Moved::NotNow,
                Err(errno) => {
                    self.give_up(&mut state, format!("the other end of its socket is gone: {}", errno.desc()))
                }
            },
        }
    }

    /// Reads at most once, so that who sends byte by byte gets no more of this thread than others.
    fn receive_from_stream(&self, state: &mut State, room: &Scatter) -> Moved {
        for has_read in [false, true] {
            match state.frame_len() {
                Some(len) if len > FRAME_MAX => {
                    return self.give_up(
                        state,
                        format!("a frame of {len} bytes was announced, and none has more than {FRAME_MAX}"),
                    );
                }
                Some(len) if state.end - state.start >= LENGTH + len => {
                    let at = state.start + LENGTH;
                    state.start = at + len;
                    return hand_over(&state.inbox[at..at + len], room);
                }
                _ if has_read => break,
                _ => {}
            }
            let (start, end) = (state.start, state.end);
            if state.inbox.len() - start < LENGTH + FRAME_MAX || start == end {
                state.inbox.copy_within(start..end, 0);
                (state.start, state.end) = (0, end - start);
            }
            let end = state.end;
            match read(&self.fd, &mut state.inbox[end..]) {
                Ok(0) if state.start == state.end => {
                    return self.give_up(state, "the other end of its socket was closed");
                }
                Ok(0) => {
                    return self
                        .give_up(state, "the other end of its socket was closed in the middle of a frame");
                }
                Ok(len) => state.end += len,
                Err(Errno::EAGAIN | Errno::EINTR) => return Moved::NotNow,
                Err(errno) => {
                    let why = format!("the other end of its socket is gone: {}", errno.desc());
                    return self.give_up(state, why);
                }
            }
        }
        Moved::NotNow
    }

    /// Nothing comes through it any more, and the other side is to know.
    fn give_up(&self, state: &mut State, why: impl Into<std::borrow::Cow<'static, str>>) -> Moved {
        state.is_gone = true;
        // It may be closed already.
        let _ = shutdown(self.fd.as_raw_fd(), Shutdown::Both);
        Moved::Gone(why.into())
    }
}

impl State {
    /// The length that the next frame says that it has.
    fn frame_len(&self) -> Option<usize> {
        let (length, _) = self.inbox[self.start..self.end].split_first_chunk::<LENGTH>()?;
        Some(u32::from_be_bytes(*length) as usize)
    }
}

fn hand_over(frame: &[u8], room: &Scatter) -> Moved {
    let header = usize::from(HEADER);
    let bytes = header + frame.len();
    if !(FRAME_MIN..=FRAME_MAX).contains(&frame.len()) || bytes as u64 > room.bytes() {
        return Moved::Refused;
    }
    room.put(0, &[0; HEADER as usize]);
    room.put(header, frame);
    Moved::Bytes(bytes)
}

/// Does what the header says that is left to do. False when that cannot be.
fn finish(head: [u8; HEADER as usize], frame: &mut [u8], has_warned: &mut bool) -> bool {
    let [flags, gso_type, _, _, _, _, start_low, start_high, offset_low, offset_high, ..] = head;
    if gso_type != 0 {
        if !std::mem::replace(has_warned, true) {
            log::warn!(
                "net: a packet of the guest's was to be cut up, which a socket does not do; such ones are dropped \
                 (in the guest: ethtool -K INTERFACE tx-tcp-segmentation off tx-tcp6-segmentation off)"
            );
        }
        return false;
    }
    let start = u16::from_le_bytes([start_low, start_high]);
    let offset = u16::from_le_bytes([offset_low, offset_high]);
    flags & NEEDS_CSUM == 0 || checksum::complete(frame, start, offset)
}
