//! What a port is connected with: a queue of a tap, or a socket behind which somebody has a network. It takes packets
//! as drivers have them, behind their header, and hands them over so.

use std::borrow::Cow;
use std::ffi::c_uint;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;

use super::super::scatter::Scatter;
use super::socket::Socket;
use super::tap::{self, Tap};

/// One end of it.
#[derive(Debug)]
pub enum Cable {
    /// The kernel has the other one, and finishes what it is given, such as large packets.
    Tap(Tap),
    /// Frames go through it as they are on a wire.
    Socket(Socket),
}

/// What became of a packet that was offered, or of the wish for one.
#[derive(Debug, PartialEq, Eq)]
pub enum Moved {
    /// So many bytes, with the header.
    Bytes(usize),
    /// Later.
    NotNow,
    /// Not this one.
    Refused,
    /// None any more, and why.
    Gone(Cow<'static, str>),
}

impl Cable {
    /// Takes the packet, all of it.
    pub fn send(&self, packet: &mut Scatter) -> Moved {
        match self {
            Self::Tap(tap) => of_tap(packet.write_to(tap.as_fd())),
            Self::Socket(socket) => socket.send(packet),
        }
    }

    /// Fills `room` with a packet.
    pub fn receive(&self, room: &mut Scatter) -> Moved {
        match self {
            Self::Tap(tap) => of_tap(room.read_from(tap.as_fd())),
            Self::Socket(socket) => socket.receive(room),
        }
    }

    /// Moves on what was taken and is still here. False when some has to wait until it can be written.
    pub fn flush(&self) -> bool {
        match self {
            Self::Tap(_) => true,
            Self::Socket(socket) => socket.flush(),
        }
    }

    /// Whether there is a packet here already, which no poll would tell of.
    pub fn holds_packet(&self) -> bool {
        match self {
            Self::Tap(_) => false,
            Self::Socket(socket) => socket.holds_frame(),
        }
    }

    /// Says what the driver takes: TUN_F_CSUM and the like. Who is behind a socket sends nothing that is unfinished.
    pub fn set_offload(&self, offload: c_uint) -> Result<(), tap::Error> {
        match self {
            Self::Tap(tap) => tap.set_offload(offload),
            Self::Socket(_) => Ok(()),
        }
    }

    /// Takes it into the tap or out of it, if it is one of several queues.
    pub fn attach(&self, attached: bool) -> Result<(), tap::Error> {
        match self {
            Self::Tap(tap) => tap.attach(attached),
            Self::Socket(_) => Ok(()),
        }
    }
}

impl AsFd for Cable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tap(tap) => tap.as_fd(),
            Self::Socket(socket) => socket.as_fd(),
        }
    }
}

fn of_tap(result: io::Result<usize>) -> Moved {
    match result {
        Ok(bytes) => Moved::Bytes(bytes),
        Err(error) => match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EAGAIN | Errno::EINTR) => Moved::NotNow,
            Some(Errno::EBADFD | Errno::ENODEV) => Moved::Gone(tap::GONE.into()),
            // Such as a header that makes no sense, or an interface that is down.
            _ => Moved::Refused,
        },
    }
}
