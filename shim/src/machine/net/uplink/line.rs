//! A connection with who has a network, of which only the end is heard here: what comes through it is the monitor's.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::time::sleep;
use vmm::devices::virtio::net::Kind;
use vmm::devices::virtio::net::dial::Address;

use crate::deadlines;

/// Hears of the end of a connection.
#[derive(Debug)]
pub enum Line {
    /// The same connection as the monitor's, which ends at either end.
    Stream(OwnedFd),
    /// It has ended when another socket is where that one was.
    Datagram {
        /// Where.
        path: PathBuf,
        /// Which.
        known: Option<(u64, u64)>,
    },
}

/// Which socket is at `path`.
fn at(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

impl Line {
    /// Of a connection with `address`.
    pub fn of(socket: &OwnedFd, address: &Address) -> io::Result<Self> {
        Ok(match address.kind {
            Kind::Stream => Self::Stream(socket.try_clone()?),
            Kind::Datagram => Self::Datagram { path: address.path.clone(), known: at(&address.path) },
        })
    }

    /// Returns when it has ended, or a little later: to wait for the end of a stream would be to wake for each of its frames, too, and
    /// nothing tells that who is at the other end of datagrams has gone.
    pub async fn lost(&self) {
        while !self.is_lost() {
            sleep(deadlines::UPLINK_LOOK).await;
        }
    }

    /// Whether it has ended.
    pub fn is_lost(&self) -> bool {
        match self {
            Self::Stream(socket) => {
                // That nothing more comes is told though nothing is asked for.
                let mut fds = [PollFd::new(socket.as_fd(), PollFlags::empty())];
                poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
            }
            Self::Datagram { path, known } => {
                let now = at(path);
                now.is_some() && now != *known
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    use super::*;

    /// A path for a socket, which goes with this.
    struct Place(PathBuf);

    impl Place {
        fn new(name: &str) -> Self {
            Self(std::env::temp_dir().join(format!("line-{name}-{}", std::process::id())))
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = fs::remove_file(&self.0);
        }
    }

    #[test]
    fn a_stream_ends_with_either_end_and_not_with_what_comes() {
        for ends_there in [true, false] {
            let place = Place::new("stream");
            let address = Address { kind: Kind::Stream, path: place.0.clone() };
            let listener = UnixListener::bind(&address.path).unwrap();
            let mut here = UnixStream::connect(&address.path).unwrap();
            let (mut there, _) = listener.accept().unwrap();
            let line = Line::of(&here.try_clone().unwrap().into(), &address).unwrap();
            there.write_all(b"frame").unwrap();
            assert!(!line.is_lost());
            let mut frame = [0; 5];
            here.read_exact(&mut frame).unwrap();
            assert!(!line.is_lost());
            if ends_there {
                drop(there);
            } else {
                here.shutdown(std::net::Shutdown::Both).unwrap();
            }
            assert!(line.is_lost());
        }
    }

    #[test]
    fn datagrams_end_when_another_listens() {
        let place = Place::new("datagram");
        let address = Address { kind: Kind::Datagram, path: place.0.clone() };
        let _first = UnixDatagram::bind(&address.path).unwrap();
        let socket: OwnedFd = UnixDatagram::unbound().unwrap().into();
        let line = Line::of(&socket, &address).unwrap();
        assert!(!line.is_lost());
        fs::remove_file(&address.path).unwrap();
        assert!(!line.is_lost());
        // The first is there still, so the second is another one.
        let _second = UnixDatagram::bind(&address.path).unwrap();
        assert!(line.is_lost());
    }
}
