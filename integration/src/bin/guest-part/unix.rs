//! Unix sockets that somebody else listens at.

use std::os::unix::net::UnixStream;

use anyhow::{Context, Result};
use integration::pattern;
use integration::streams::{Ask, ask, taken};

/// Sends `length` bytes of the pattern `seed` to whoever listens at `path`.
pub fn call(path: &str, seed: u64, length: u64) -> Result<()> {
    let stream = UnixStream::connect(path).with_context(|| format!("connecting to {path}"))?;
    ask(&stream, Ask::Take, seed, length)?;
    pattern::send(&stream, seed, length).context("sending")?;
    taken(&stream).context("waiting for the verdict")
}
