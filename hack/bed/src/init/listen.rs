//! Where requests come from: the tool's TCP connections in a host, vsock connections in a guest.

use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, listen, socket};
use testbed::PORT;

/// A connected stream socket of any family: all that is used of this type are plain socket calls.
pub type Stream = UnixStream;

pub enum Listener {
    Tcp(TcpListener),
    Vsock(OwnedFd),
}

impl Listener {
    pub fn tcp() -> Result<Self> {
        TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).map(Self::Tcp).context("listening for the tool")
    }

    pub fn vsock() -> Result<Self> {
        let fd = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
            .context("making a vsock socket")?;
        bind(fd.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, u32::from(PORT)))
            .context("binding the vsock port")?;
        listen(&fd, Backlog::new(64)?)?;
        Ok(Self::Vsock(fd))
    }

    pub fn accept(&self) -> Result<Stream> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                Ok(OwnedFd::from(stream).into())
            }
            Self::Vsock(listener) => {
                // SAFETY: accept4 takes null for the peer's address, which nobody needs.
                let fd = Errno::result(unsafe {
                    libc::accept4(
                        listener.as_raw_fd(),
                        std::ptr::null_mut(),
                        std::ptr::null_mut(),
                        libc::SOCK_CLOEXEC,
                    )
                })?;
                // SAFETY: accept4 returned a descriptor that is ours alone.
                Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
            }
        }
    }
}
