//! Programs that the kernel runs for the processes of a cgroup. They are a few comparisons each, so they are assembled here.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result};
use nix::errno::Errno;

/// An instruction, as the kernel has it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    /// What it does.
    pub code: u8,
    /// The one that it is done to, and above it the other one.
    pub registers: u8,
    /// How far, from a register's address or from the next instruction.
    pub offset: i16,
    /// A number.
    pub immediate: i32,
}

/// `to = *(u32 *)(from + offset)`
pub const LOAD_WORD: u8 = 0x61;
/// `*(u32 *)(to + offset) = from`
pub const STORE_WORD: u8 = 0x63;
/// `to = from`
pub const MOVE: u8 = 0xbf;
/// `to = immediate`
pub const MOVE_NUMBER: u8 = 0xb7;
/// `to &= immediate`
pub const AND_NUMBER: u8 = 0x57;
/// `to >>= immediate`
pub const SHIFT_RIGHT: u8 = 0x77;
/// Goes on `offset` further if `to` is not `immediate`.
pub const JUMP_UNLESS: u8 = 0x55;
/// The same of the lower 32 bits.
pub const JUMP_UNLESS_WORD: u8 = 0x56;
/// Goes on `offset` further if `to` is `immediate`.
pub const JUMP_IF: u8 = 0x15;
/// Ends with what is in register 0.
pub const EXIT: u8 = 0x95;

/// One instruction.
pub fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: u32) -> Instruction {
    Instruction { code, registers: to | from << 4, offset, immediate: immediate.cast_signed() }
}

/// When a program is run, and what it decides on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A device is opened or made.
    Device,
    /// A socket is connected to a v4 address.
    Connect4,
    /// A v4 datagram is sent somewhere.
    Send4,
    /// A v4 datagram was received from somewhere.
    Receive4,
    /// Somebody asks whom a v4 socket is connected to.
    PeerName4,
}

impl Kind {
    /// `BPF_PROG_TYPE_*`, and which of its places (`BPF_CGROUP_*`).
    fn numbers(self) -> (u32, u32) {
        const CGROUP_DEVICE: u32 = 15;
        const CGROUP_SOCK_ADDR: u32 = 18;
        match self {
            Self::Device => (CGROUP_DEVICE, 6),
            Self::Connect4 => (CGROUP_SOCK_ADDR, 10),
            Self::Send4 => (CGROUP_SOCK_ADDR, 14),
            Self::Receive4 => (CGROUP_SOCK_ADDR, 19),
            Self::PeerName4 => (CGROUP_SOCK_ADDR, 29),
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
    pub fn load(kind: Kind, program: &[Instruction]) -> Result<Self> {
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
            count: u32::try_from(program.len())?,
            instructions: program.as_ptr() as u64,
            license: c"Apache-2.0".as_ptr() as u64,
            place,
            ..Load::default()
        };
        let try_once = || {
            // SAFETY: the kernel reads the structure, the program and the licence, which outlive the call.
            Errno::result(unsafe {
                libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const load, size_of::<Load>())
            })
        };
        // The kernel stops looking at a program when a signal comes, of which each exit of a process is one.
        let tries = (1..LOADS).map(|_| try_once()).find(|tried| *tried != Err(Errno::EAGAIN));
        let fd = tries.unwrap_or_else(try_once)?;
        Ok(Self { fd: owned(fd)?, kind })
    }

    /// `bpf(BPF_PROG_ATTACH)`: lays it on a cgroup, where it stays, in the place of `before`.
    pub fn attach(&self, cgroup: &Path, before: Option<&Self>) -> Result<()> {
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
        let directory = File::open(cgroup).context("opening the cgroup")?;
        let attach = Attach {
            target: directory.as_raw_fd(),
            program: self.fd.as_raw_fd(),
            place: self.kind.numbers().1,
            flags: if before.is_some() { ALLOW_MULTI | REPLACE } else { ALLOW_MULTI },
            replaces: before.map_or(0, |before| before.fd.as_raw_fd()),
        };
        // SAFETY: the kernel reads the structure, which outlives the call.
        let done =
            unsafe { libc::syscall(libc::SYS_bpf, PROG_ATTACH, &raw const attach, size_of::<Attach>()) };
        Errno::result(done)?;
        Ok(())
    }

    /// `bpf(BPF_LINK_CREATE)`: lays it on a cgroup until what is returned is closed.
    pub fn link(&self, cgroup: &Path) -> Result<OwnedFd> {
        #[repr(C)]
        struct Link {
            program: i32,
            target: i32,
            place: u32,
            flags: u32,
        }
        const LINK_CREATE: libc::c_long = 28;
        let directory = File::open(cgroup).context("opening the cgroup")?;
        let link = Link {
            program: self.fd.as_raw_fd(),
            target: directory.as_raw_fd(),
            place: self.kind.numbers().1,
            flags: 0,
        };
        // SAFETY: the kernel reads the structure, which outlives the call.
        let fd = unsafe { libc::syscall(libc::SYS_bpf, LINK_CREATE, &raw const link, size_of::<Link>()) };
        owned(Errno::result(fd)?)
    }
}

fn owned(fd: libc::c_long) -> Result<OwnedFd> {
    // SAFETY: the kernel has just made it, and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd)?) })
}
