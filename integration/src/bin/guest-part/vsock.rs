//! Streams in the guest.

use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;

use anyhow::{Context, Result};
use integration::pattern;
use integration::streams::{Ask, answer, ask, taken};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept, bind, connect, listen, socket,
};

/// The host, to a guest.
const HOST: u32 = 2;
const ANYBODY: u32 = u32::MAX;

fn stream() -> Result<OwnedFd> {
    socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
        .context("making a vsock socket")
}

/// Answers every stream to `port`, for ever.
pub fn serve(port: u32) -> Result<()> {
    let listener = stream()?;
    bind(listener.as_raw_fd(), &VsockAddr::new(ANYBODY, port)).context("binding the port")?;
    listen(&listener, Backlog::new(1024)?).context("listening")?;
    println!("listening");
    std::io::stdout().flush()?;
    loop {
        let fd = accept(listener.as_raw_fd()).context("accepting")?;
        // SAFETY: accept returned a descriptor that is ours alone.
        let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
        thread::spawn(move || {
            if let Err(error) = answer(&stream) {
                eprintln!("guest-part: answering: {error}");
            }
        });
    }
}

/// Sends `length` bytes of the pattern `seed` to `port` of the host.
pub fn call(port: u32, seed: u64, length: u64) -> Result<()> {
    let fd = stream()?;
    connect(fd.as_raw_fd(), &VsockAddr::new(HOST, port)).context("connecting to the host")?;
    let stream = UnixStream::from(fd);
    ask(&stream, Ask::Take, seed, length)?;
    pattern::send(&stream, seed, length).context("sending")?;
    taken(&stream).context("waiting for the host's verdict")
}
