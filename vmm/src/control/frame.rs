//! Frames on a stream, and the descriptors that travel with them.
//!
//! A frame is eight bytes, little endian: the length of the payload (32 bits) and the number of
//! descriptors that belong to it (32 bits); then the payload. Descriptors are sent along with the first
//! bytes of their frame, so they are there when the header is.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// The most bytes of a payload.
pub const FRAME_MAX: usize = 512 * 1024;
/// The most descriptors of a frame.
pub const FDS_MAX: usize = 16;

const HEADER: usize = 8;
const READ: usize = 4096;

#[cfg(target_os = "linux")]
const FLAGS: MsgFlags = MsgFlags::MSG_DONTWAIT.union(MsgFlags::MSG_CMSG_CLOEXEC);
#[cfg(not(target_os = "linux"))]
const FLAGS: MsgFlags = MsgFlags::MSG_DONTWAIT;

#[cfg(target_os = "linux")]
const SEND_FLAGS: MsgFlags = MsgFlags::MSG_DONTWAIT.union(MsgFlags::MSG_NOSIGNAL);
#[cfg(not(target_os = "linux"))]
const SEND_FLAGS: MsgFlags = MsgFlags::MSG_DONTWAIT;

/// What came is no frame, or none may come any more.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is too long.
    #[error("a frame of {0} bytes: at most {FRAME_MAX} are taken")]
    Length(usize),
    /// Too many descriptors, or fewer than the header says.
    #[error("a frame with {said} descriptors, of which {came} came: at most {FDS_MAX} are taken")]
    Descriptors {
        /// What the header says.
        said: usize,
        /// What was there.
        came: usize,
    },
    /// The payload is not what is expected there.
    #[error("a frame that makes no sense: {0}")]
    Payload(#[from] serde_json::Error),
    /// The stream ended, in the middle of a frame or between two.
    #[error("the other side hung up")]
    Closed,
    /// The socket failed.
    #[error("the control socket failed: {0}")]
    Socket(#[from] io::Error),
}

/// A message as a frame.
pub fn frame(message: &impl serde::Serialize, fds: usize) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; HEADER];
    serde_json::to_writer(&mut bytes, message)?;
    let len = bytes.len() - HEADER;
    if len > FRAME_MAX {
        return Err(Error::Length(len));
    }
    if fds > FDS_MAX {
        return Err(Error::Descriptors { said: fds, came: fds });
    }
    // Both are far below 32 bits.
    bytes[..4].copy_from_slice(&(len as u32).to_le_bytes());
    bytes[4..HEADER].copy_from_slice(&(fds as u32).to_le_bytes());
    Ok(bytes)
}

/// Sends what the socket takes at once, and the descriptors with it; says how many bytes that were.
/// Never waits.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, SEND_FLAGS, None) {
            Ok(count) => return Ok(count),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Ok(0),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// A frame that came.
#[derive(Debug)]
pub struct Received {
    /// Its payload.
    pub payload: Vec<u8>,
    /// Its descriptors.
    pub fds: Vec<OwnedFd>,
}

/// Puts a stream back together.
#[derive(Debug, Default)]
pub struct Receiver {
    bytes: Vec<u8>,
    fds: VecDeque<OwnedFd>,
}

impl Receiver {
    /// Takes what is there. Never waits; nothing being there is no error.
    pub fn read(&mut self, socket: BorrowedFd<'_>) -> Result<(), Error> {
        let mut buffer = [0; READ];
        let mut control = nix::cmsg_space!([RawFd; FDS_MAX]);
        let (count, truncated) = loop {
            let mut space = [IoSliceMut::new(&mut buffer)];
            match recvmsg::<()>(socket.as_raw_fd(), &mut space, Some(&mut control), FLAGS) {
                Ok(message) => {
                    let mut truncated = message.flags.contains(MsgFlags::MSG_CTRUNC);
                    match message.cmsgs() {
                        Ok(messages) => messages.for_each(|message| self.keep_fds(&message)),
                        Err(_) => truncated = true,
                    }
                    break (message.bytes, truncated);
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::ECONNRESET) => return Err(Error::Closed),
                Err(errno) => return Err(Error::Socket(errno.into())),
            }
        };
        if truncated || self.fds.len() > FDS_MAX {
            return Err(Error::Descriptors { said: FDS_MAX + 1, came: self.fds.len() });
        }
        if count == 0 {
            return Err(Error::Closed);
        }
        self.bytes.extend_from_slice(&buffer[..count]);
        Ok(())
    }

    fn keep_fds(&mut self, message: &ControlMessageOwned) {
        if let ControlMessageOwned::ScmRights(fds) = message {
            for fd in fds {
                // SAFETY: the kernel has just made this descriptor for us; nobody else knows of it.
                let fd = unsafe { OwnedFd::from_raw_fd(*fd) };
                #[cfg(not(target_os = "linux"))]
                let _ = nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC));
                self.fds.push_back(fd);
            }
        }
    }

    /// The next whole frame.
    pub fn take_frame(&mut self) -> Result<Option<Received>, Error> {
        let Some((header, rest)) = self.bytes.split_first_chunk::<HEADER>() else { return Ok(None) };
        let word = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]) as usize
        };
        let (len, said) = (word(0), word(4));
        if len > FRAME_MAX {
            return Err(Error::Length(len));
        }
        if said > FDS_MAX || said > self.fds.len() {
            return Err(Error::Descriptors { said, came: self.fds.len() });
        }
        if rest.len() < len {
            return Ok(None);
        }
        let payload = rest[..len].to_vec();
        self.bytes.drain(..HEADER + len);
        let fds = self.fds.drain(..said).collect();
        Ok(Some(Received { payload, fds }))
    }

    /// Whether a frame has begun and not ended.
    pub fn is_amid(&self) -> bool {
        !self.bytes.is_empty()
    }
}

/// Waits until the socket can be read, or written, or `until`. False when the time is up.
pub(super) fn wait(
    socket: impl AsFd,
    flags: nix::poll::PollFlags,
    until: std::time::Instant,
) -> io::Result<bool> {
    use nix::poll::{PollFd, PollTimeout, poll};
    loop {
        let left = until.saturating_duration_since(std::time::Instant::now());
        // Rounded up, so that the last round does not spin.
        let timeout =
            PollTimeout::try_from(left + std::time::Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(socket.as_fd(), flags)], timeout) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, SeekFrom, Write};
    use std::os::unix::net::UnixStream;

    use proptest::prelude::*;

    use super::*;
    use crate::control::{Call, Request};

    fn receiver(bytes: &[u8]) -> Receiver {
        Receiver { bytes: bytes.to_vec(), fds: VecDeque::new() }
    }

    #[test]
    fn a_frame_comes_out_as_it_went_in_however_it_is_cut() {
        let call = Call { id: 3, request: Request::Pause { within_ms: 1000 } };
        let bytes = [frame(&call, 0).unwrap(), frame(&call, 0).unwrap()].concat();
        for cut in 1..bytes.len() {
            let mut receiver = Receiver::default();
            let mut got = Vec::new();
            for piece in bytes.chunks(cut) {
                receiver.bytes.extend_from_slice(piece);
                while let Some(frame) = receiver.take_frame().unwrap() {
                    got.push(serde_json::from_slice::<Call>(&frame.payload).unwrap());
                }
            }
            assert_eq!(got, [call.clone(), call.clone()], "in pieces of {cut}");
            assert!(!receiver.is_amid());
        }
    }

    #[test]
    fn descriptors_arrive_with_their_frame_and_no_others_do() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let path = std::env::temp_dir().join(format!("vmm-frame-{}", std::process::id()));
        let mut file =
            std::fs::File::options().create(true).truncate(true).read(true).write(true).open(&path).unwrap();
        file.write_all(b"passed").unwrap();
        for (fds, said) in [(1, 1), (0, 0), (2, 2)] {
            let bytes = frame(&"x", said).unwrap();
            assert_eq!(send(ours.as_fd(), &bytes, &vec![file.as_fd(); fds]).unwrap(), bytes.len());
        }
        let mut receiver = Receiver::default();
        for expected in [1, 0, 2] {
            let received = loop {
                if let Some(received) = receiver.take_frame().unwrap() {
                    break received;
                }
                receiver.read(theirs.as_fd()).unwrap();
            };
            assert_eq!(received.fds.len(), expected);
            for fd in received.fds {
                let mut copy = std::fs::File::from(fd);
                copy.seek(SeekFrom::Start(0)).unwrap();
                let mut text = String::new();
                copy.read_to_string(&mut text).unwrap();
                assert_eq!(text, "passed");
            }
        }
        std::fs::remove_file(path).unwrap();

        // A header that promises more than came, and a flood of descriptors.
        let bytes = frame(&"x", 1).unwrap();
        send(ours.as_fd(), &bytes, &[]).unwrap();
        receiver.read(theirs.as_fd()).unwrap();
        assert!(matches!(receiver.take_frame(), Err(Error::Descriptors { said: 1, came: 0 })));
        let mut receiver = Receiver::default();
        send(ours.as_fd(), b"x", &[file.as_fd(); 2 * FDS_MAX]).unwrap();
        assert!(matches!(receiver.read(theirs.as_fd()), Err(Error::Descriptors { .. })));
        drop(ours);
        assert!(matches!(receiver.read(theirs.as_fd()), Err(Error::Closed)));
    }

    #[test]
    fn what_is_too_much_is_refused_before_it_is_kept() {
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&(FRAME_MAX as u32 + 1).to_le_bytes());
        assert!(matches!(receiver(&header).take_frame(), Err(Error::Length(_))));
        header = [0xff; HEADER];
        assert!(matches!(receiver(&header).take_frame(), Err(Error::Length(_))));
        header = [0, 0, 0, 0, 0xff, 0, 0, 0];
        assert!(matches!(receiver(&header).take_frame(), Err(Error::Descriptors { .. })));
        assert!(matches!(frame(&"x".repeat(FRAME_MAX), 0), Err(Error::Length(_))));
        assert!(matches!(frame(&"x", FDS_MAX + 1), Err(Error::Descriptors { .. })));
    }

    proptest! {
        #[test]
        fn no_bytes_upset_the_decoder(bytes in proptest::collection::vec(any::<u8>(), 0..64), cut in 1usize..16) {
            let mut receiver = Receiver::default();
            for piece in bytes.chunks(cut) {
                receiver.bytes.extend_from_slice(piece);
                loop {
                    match receiver.take_frame() {
                        Ok(Some(received)) => {
                            let _ = serde_json::from_slice::<Call>(&received.payload);
                        }
                        Ok(None) => break,
                        Err(_) => return Ok(()),
                    }
                }
            }
        }

        #[test]
        fn no_payload_upsets_the_messages(text in r#"[\{\}\[\]",:a-z0-9_]{0,80}"#) {
            let _ = serde_json::from_str::<Call>(&text);
            let _ = serde_json::from_str::<super::super::Message>(&text);
        }
    }
}
