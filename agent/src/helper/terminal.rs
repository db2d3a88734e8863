//! Terminals of containers: a pair made of the container's own `/dev/pts`, whose master goes to the agent.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::pty::Winsize;
use nix::sys::stat::Mode;
use nix::sys::statfs::{FsType, fstatfs};

/// `DEVPTS_SUPER_MAGIC` of the kernel's interface.
const DEVPTS: FsType = FsType(0x1cd1);

nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, Winsize);
nix::ioctl_write_ptr_bad!(unlock, libc::TIOCSPTLCK, libc::c_int);

/// A terminal: the agent's end, and the process's.
pub struct Pair {
    pub master: OwnedFd,
    pub slave: OwnedFd,
}

/// Makes one in the file system that this process sees.
pub fn open_pair() -> Result<Pair> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = open("/dev/pts/ptmx", flags, Mode::empty())
        .or_else(|_| open("/dev/ptmx", flags, Mode::empty()))
        .context("opening the container's ptmx")?;
    // A container may have put anything there.
    if fstatfs(&master).context("looking at ptmx")?.filesystem_type() != DEVPTS {
        bail!("the container's ptmx is not one");
    }
    // SAFETY: the descriptor is open, and the argument an integer that the kernel reads.
    unsafe { unlock(master.as_raw_fd(), &raw const ZERO) }.context("unlocking a terminal")?;
    // SAFETY: the call takes numbers and gives a new descriptor.
    let slave = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags.bits()) };
    let slave = Errno::result(slave).context("opening a terminal")?;
    // SAFETY: the kernel has just made it, and nobody else knows its number.
    Ok(Pair { master, slave: unsafe { OwnedFd::from_raw_fd(slave) } })
}

static ZERO: libc::c_int = 0;

/// Makes it the terminal of this session.
pub fn control(slave: RawFd) -> Result<()> {
    // SAFETY: the call takes numbers.
    Errno::result(unsafe { libc::ioctl(slave, libc::TIOCSCTTY, 0) }).context("taking the terminal")?;
    Ok(())
}

/// Says how large it is: columns and rows.
pub fn resize(terminal: impl AsFd, (columns, rows): (u16, u16)) -> nix::Result<()> {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the descriptor is open, and the argument a size that the kernel reads.
    unsafe { set_window_size(terminal.as_fd().as_raw_fd(), &raw const size) }.map(drop)
}
