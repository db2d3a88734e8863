//! Where output goes.

use std::fs::File;
use std::io::{Result, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;

/// A pipe or a file.
#[derive(Debug)]
pub(super) struct Sink(Kind);

#[derive(Debug)]
enum Kind {
    Pipe {
        to: pipe::Sender,
        /// The reading end, so that there always is one.
        _held: Option<OwnedFd>,
    },
    File(Arc<File>),
    Nowhere,
}

impl Sink {
    pub(super) fn pipe(to: pipe::Sender, held: Option<OwnedFd>) -> Self {
        Self(Kind::Pipe { to, _held: held })
    }

    pub(super) fn file(file: File) -> Self {
        Self(Kind::File(Arc::new(file)))
    }

    /// What is written there is dropped.
    pub(super) fn nowhere() -> Self {
        Self(Kind::Nowhere)
    }

    /// Writes the first `length` bytes of the buffer, which it takes and gives back, as a file is written to by
    /// another thread.
    pub(super) async fn write(&mut self, buffer: Vec<u8>, length: usize) -> (Vec<u8>, Result<()>) {
        match &mut self.0 {
            Kind::Nowhere => (buffer, Ok(())),
            Kind::Pipe { to, .. } => {
                let done = to.write_all(&buffer[..length]).await;
                (buffer, done)
            }
            Kind::File(file) => {
                let file = file.clone();
                let writing = tokio::task::spawn_blocking(move || {
                    let done = (&*file).write_all(&buffer[..length]);
                    (buffer, done)
                });
                writing.await.unwrap_or_else(|error| (vec![0; length], Err(std::io::Error::other(error))))
            }
        }
    }
}
