//! Programs that the kernel runs when something is about to happen: of a few comparisons each, so they are assembled by hand.
//! A crate for it would bring a C library and a compiler.
#![cfg(target_os = "linux")]

mod assembly;
mod call;
mod instruction;
mod sockets;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

pub use assembly::Assembly;
pub use instruction::{Instruction, code, instruction, map_address};
pub use sockets::Sockets;

use call::bpf;

/// When a program is run, and what it decides on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A device is opened or made, by a process of a cgroup.
    Device,
    /// A socket of a cgroup's is connected to a v4 address.
    Connect4,
    /// A v4 datagram is sent somewhere.
    Send4,
    /// A v4 datagram was received from somewhere.
    Receive4,
    /// Somebody asks whom a v4 socket is connected to.
    PeerName4,
    /// A frame has come to a network interface.
    Frame,
    /// Somebody connects, or sends a datagram, to a network namespace, and it is to be seen to which socket.
    Lookup,
}

impl Kind {
    /// `BPF_PROG_TYPE_*`, and which of its places (`BPF_CGROUP_*`, `BPF_SK_LOOKUP`) if it has any.
    fn numbers(self) -> (u32, u32) {
        const SCHED_CLS: u32 = 3;
        const CGROUP_DEVICE: u32 = 15;
        const CGROUP_SOCK_ADDR: u32 = 18;
        const SK_LOOKUP: u32 = 30;
        match self {
            Self::Device => (CGROUP_DEVICE, 6),
            Self::Connect4 => (CGROUP_SOCK_ADDR, 10),
            Self::Send4 => (CGROUP_SOCK_ADDR, 14),
            Self::Receive4 => (CGROUP_SOCK_ADDR, 19),
            Self::PeerName4 => (CGROUP_SOCK_ADDR, 29),
            Self::Frame => (SCHED_CLS, 0),
            Self::Lookup => (SK_LOOKUP, 36),
        }
    }
}

/// How often a program is offered to the kernel.
const LOADS: u32 = 20;

/// A program that the kernel has taken.
#[derive(Debug)]
pub struct Program {
    fd: OwnedFd,
    kind: Kind,
}

impl Program {
    /// `bpf(BPF_PROG_LOAD)`.
    pub fn load(kind: Kind, program: &[Instruction]) -> io::Result<Self> {
        #[repr(C)]
        #[derive(Default)]
        struct Load {
            kind: u32,
            count: u32,
            instructions: u64,
            license: u64,
            log_level: u32,
            log_size: u32,
            log: u64,
            kernel_version: u32,
            flags: u32,
            name: [u8; 16],
            interface: u32,
            place: u32,
        }
        const PROG_LOAD: libc::c_long = 5;
        let (number, place) = kind.numbers();
        let load = Load {
            kind: number,
            count: u32::try_from(program.len()).map_err(io::Error::other)?,
            instructions: program.as_ptr() as u64,
            license: c"Apache-2.0".as_ptr() as u64,
            place,
            ..Load::default()
        };
        // SAFETY: besides the structure the kernel reads the program and the licence, which outlive the call.
        let try_once = || unsafe { bpf(PROG_LOAD, &load) };
        // The kernel stops looking at a program when a signal comes, of which each exit of a process is one.
        let interrupted = |tried: &io::Result<i32>| {
            tried.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
        };
        let tried = (1..LOADS).map(|_| try_once()).find(|tried| !interrupted(tried));
        let fd = call::owned(tried.unwrap_or_else(try_once)?);
        Ok(Self { fd, kind })
    }

    /// `bpf(BPF_PROG_ATTACH)`: lays it on a cgroup, where it stays, in the place of `before`.
    pub fn attach(&self, cgroup: impl AsFd, before: Option<&Self>) -> io::Result<()> {
        #[repr(C)]
        struct Attach {
            target: i32,
            program: i32,
            place: u32,
            flags: u32,
            replaces: i32,
        }
        const PROG_ATTACH: libc::c_long = 8;
        const ALLOW_MULTI: u32 = 2;
        const REPLACE: u32 = 4;
        let attach = Attach {
            target: cgroup.as_fd().as_raw_fd(),
            program: self.fd.as_raw_fd(),
            place: self.kind.numbers().1,
            flags: if before.is_some() { ALLOW_MULTI | REPLACE } else { ALLOW_MULTI },
            replaces: before.map_or(0, |before| before.fd.as_raw_fd()),
        };
        // SAFETY: the kernel reads the structure alone.
        unsafe { bpf(PROG_ATTACH, &attach) }.map(drop)
    }

    /// `bpf(BPF_PROG_TEST_RUN)`: what a program of [`Kind::Frame`] says of a frame that nobody has sent.
    pub fn ask(&self, frame: &[u8]) -> io::Result<u32> {
        #[repr(C)]
        #[derive(Default)]
        struct Run {
            program: i32,
            answer: u32,
            length: u32,
            length_after: u32,
            frame: u64,
            frame_after: u64,
            times: u32,
            took: u32,
        }
        const PROG_RUN: libc::c_long = 10;
        let run = Run {
            program: self.fd.as_raw_fd(),
            length: u32::try_from(frame.len()).map_err(io::Error::other)?,
            frame: frame.as_ptr() as u64,
            times: 1,
            ..Run::default()
        };
        let run = std::cell::UnsafeCell::new(run);
        // SAFETY: the kernel reads the frame, which outlives the call, and writes its answer into the structure, which nobody
        // else knows and which says by its type that it is written to; room for the frame afterwards it is given none.
        unsafe { bpf(PROG_RUN, &run) }?;
        Ok(run.into_inner().answer)
    }

    /// `bpf(BPF_LINK_CREATE)`: lays it on a cgroup, or on a network namespace, until what is returned is closed.
    pub fn link(&self, target: impl AsFd) -> io::Result<OwnedFd> {
        #[repr(C)]
        struct Link {
            program: i32,
            target: i32,
            place: u32,
            flags: u32,
        }
        const LINK_CREATE: libc::c_long = 28;
        let link = Link {
            program: self.fd.as_raw_fd(),
            target: target.as_fd().as_raw_fd(),
            place: self.kind.numbers().1,
            flags: 0,
        };
        // SAFETY: the kernel reads the structure alone.
        let fd = unsafe { bpf(LINK_CREATE, &link) }?;
        Ok(call::owned(fd))
    }
}

impl AsFd for Program {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
