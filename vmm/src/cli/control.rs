//! `--control`: where it is, and what ends with the process.

use std::fs;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::anyhow;

/// What the command line says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Control {
    /// Listens at a path.
    Path(PathBuf),
    /// Speaks with whoever holds the other end.
    Fd(RawFd),
}

impl Control {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        match text.strip_prefix("fd:") {
            None if !text.is_empty() => Ok(Self::Path(text.into())),
            Some(number) => match number.parse() {
                Ok(fd) if fd > 2 => Ok(Self::Fd(fd)),
                _ => Err(format!("fd:{number} is no descriptor to be driven by: give a number above 2")),
            },
            None => Err("an empty path is no control socket: give PATH or fd:N".into()),
        }
    }
}

/// An open control socket; its path goes with it.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) listener: Option<UnixListener>,
    pub(super) owner: Option<UnixStream>,
    path: Option<PathBuf>,
}

impl Open {
    pub(super) fn at(control: &Control) -> anyhow::Result<Self> {
        match control {
            Control::Path(path) => {
                let listener = listen(path)?;
                Ok(Self { listener: Some(listener), owner: None, path: Some(path.clone()) })
            }
            Control::Fd(fd) => {
                let owner = inherited(*fd)?;
                Ok(Self { listener: None, owner: Some(owner), path: None })
            }
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // Whoever removed it before us did no harm.
            let _ = fs::remove_file(path);
        }
    }
}

fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    UnixListener::bind(path).map_err(|error| {
        let path = path.display();
        anyhow!(
            "cannot listen on {path}: {error}; give a path in a directory that is there, where no file is yet"
        )
    })
}

fn inherited(fd: RawFd) -> anyhow::Result<UnixStream> {
    let unfit = |error: io::Error| {
        anyhow!("cannot be driven by fd {fd}: {error}; it must be a connected unix stream socket")
    };
    // SAFETY: fcntl with F_GETFD takes numbers only and changes nothing.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(unfit(io::Error::last_os_error()));
    }
    // SAFETY: it is open, and it is ours alone: whoever started this process gave the number for this
    // use, and this is called once, before this process has opened anything of its own.
    let socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    socket.peer_addr().map_err(unfit)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_it_is() {
        for (text, control) in [
            ("/run/x", Some(Control::Path("/run/x".into()))),
            ("fd:7", Some(Control::Fd(7))),
            ("fd:2", None),
            ("fd:x", None),
            ("fd:", None),
            ("", None),
        ] {
            assert_eq!(Control::parse(text).ok(), control, "{text:?}");
        }
    }
}
