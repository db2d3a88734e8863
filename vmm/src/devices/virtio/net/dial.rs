//! Connects to who has a network behind a unix socket.

use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, bind, connect, setsockopt, socket, sockopt,
};
use nix::unistd::write;

use super::socket::Kind;

/// By which gvproxy and vmnet-helper learn of a client: they answer to where their first datagram came from.
const GREETING: &[u8] = b"VFKT";
/// What may wait in a datagram socket. Some systems begin with less than one large frame.
const ROOM: usize = 1 << 20;
/// Between two looks at a queue that is full.
const AGAIN: Duration = Duration::from_millis(10);

/// Where a network is: `stream:PATH` or `datagram:PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// How its frames are kept apart.
    pub kind: Kind,
    /// Its socket.
    pub path: PathBuf,
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let kind = match text.split_once(':') {
            Some(("stream", path)) if !path.is_empty() => Some((Kind::Stream, path)),
            Some(("datagram", path)) if !path.is_empty() => Some((Kind::Datagram, path)),
            _ => None,
        };
        let found = kind.map(|(kind, path)| Self { kind, path: path.into() });
        found.ok_or_else(|| format!("{text} is no network: give stream:PATH or datagram:PATH"))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Stream => "stream",
            Kind::Datagram => "datagram",
        };
        write!(f, "{kind}:{}", self.path.display())
    }
}

/// Nobody was reached.
#[derive(Debug, thiserror::Error)]
#[error("cannot connect the network to {address}: {why}")]
pub struct Error {
    address: Address,
    why: String,
}

impl Address {
    /// Connects to it. Who answers a datagram needs a path of the client's own, where nothing is yet: `own`; without one,
    /// Linux gives it a name of its network namespace.
    pub fn connect(&self, own: Option<&Path>, within: Duration) -> Result<OwnedFd, Error> {
        let until = Instant::now() + within;
        let failed = |why: String| Error { address: self.clone(), why };
        let call = |name: &'static str| move |errno: Errno| failed(format!("{name}: {}", errno.desc()));
        let peer =
            UnixAddr::new(&self.path).map_err(|_| failed("the path is too long for a socket's".into()))?;
        let kind = match self.kind {
            Kind::Stream => SockType::Stream,
            Kind::Datagram => SockType::Datagram,
        };
        let fd = socket(AddressFamily::Unix, kind, SockFlag::empty(), None).map_err(call("socket"))?;
        fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(call("F_SETFD"))?;
        fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(call("F_SETFL"))?;
        if self.kind == Kind::Datagram {
            let named = own_name(own).and_then(|name| bind(fd.as_raw_fd(), &name));
            named.map_err(|errno| {
                let own = own.map_or("a name".into(), |path| path.display().to_string());
                failed(format!("binding {own} for its answers: {}", errno.desc()))
            })?;
            // What the system gives by itself may do.
            let _ = setsockopt(&fd, sockopt::SndBuf, &ROOM);
            let _ = setsockopt(&fd, sockopt::RcvBuf, &ROOM);
        }
        patiently(until, || connect(fd.as_raw_fd(), &peer)).map_err(|errno| failed(self.why(errno)))?;
        if self.kind == Kind::Datagram {
            patiently(until, || write(&fd, GREETING)).map_err(|errno| failed(self.why(errno)))?;
        }
        Ok(fd)
    }

    /// What is wrong with the path, and what to do.
    fn why(&self, errno: Errno) -> String {
        let start = match self.kind {
            Kind::Stream => {
                "start who listens on it before, like passt --socket PATH or gvproxy -listen-qemu unix://PATH"
            }
            Kind::Datagram => "start who listens on it before, like gvproxy -listen-vfkit unixgram://PATH",
        };
        let is_socket = self.path.metadata().is_ok_and(|metadata| metadata.file_type().is_socket());
        match errno {
            Errno::ENOENT | Errno::ENOTDIR => format!("there is no such path; {start}"),
            Errno::ECONNREFUSED if is_socket => format!("nobody listens on it; {start}"),
            Errno::ECONNREFUSED => format!("it is no socket; {start}"),
            Errno::EPROTOTYPE => {
                let other = match self.kind {
                    Kind::Stream => "datagram",
                    Kind::Datagram => "stream",
                };
                format!("it is a socket of another kind; write {other}:{}", self.path.display())
            }
            Errno::EACCES | Errno::EPERM => "no permission; let this user write to it".into(),
            Errno::EAGAIN => {
                "it takes no more clients; end one, or give each machine a socket of its own".into()
            }
            errno => errno.desc().into(),
        }
    }
}

fn own_name(own: Option<&Path>) -> nix::Result<UnixAddr> {
    match own {
        Some(path) => UnixAddr::new(path),
        #[cfg(target_os = "linux")]
        None => Ok(UnixAddr::new_unnamed()),
        #[cfg(not(target_os = "linux"))]
        None => Err(Errno::EDESTADDRREQ),
    }
}

/// Tries until it is no queue that is in the way.
fn patiently<T>(until: Instant, mut attempt: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match attempt() {
            Err(Errno::EAGAIN | Errno::EINTR) if Instant::now() < until => thread::sleep(AGAIN),
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    use super::*;

    const WITHIN: Duration = Duration::from_millis(50);

    /// A directory that goes at the end.
    struct Place(PathBuf);

    impl Place {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("vmm-dial-{name}-{}", std::process::id()));
            fs::create_dir(&path).unwrap();
            Self(path)
        }

        fn address(&self, kind: Kind, name: &str) -> Address {
            Address { kind, path: self.0.join(name) }
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    fn addresses() {
        for text in ["stream:/a:b", "datagram:x"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for text in ["", "stream", "stream:", "datagram:", "unix:/a", "/a"] {
            assert!(text.parse::<Address>().unwrap_err().contains("give stream:PATH"), "{text}");
        }
    }

    #[test]
    fn who_listens_is_connected_with() {
        let place = Place::new("all");
        let stream = place.address(Kind::Stream, "s");
        let listener = UnixListener::bind(&stream.path).unwrap();
        let mut here = UnixStream::from(stream.connect(None, WITHIN).unwrap());
        here.write_all(&[1]).unwrap();
        drop(listener.accept().unwrap());

        let datagram = place.address(Kind::Datagram, "d");
        let there = UnixDatagram::bind(&datagram.path).unwrap();
        for own in [Some(place.0.join("own")), None] {
            let here = UnixDatagram::from(datagram.connect(own.as_deref(), WITHIN).unwrap());
            here.set_nonblocking(false).unwrap();
            let mut buffer = [0; 8];
            let (len, from) = there.recv_from(&mut buffer).unwrap();
            assert_eq!(&buffer[..len], b"VFKT");
            assert_eq!(from.as_pathname(), own.as_deref());
            there.send_to_addr(&[5], &from).unwrap();
            assert_eq!(here.recv(&mut buffer).unwrap(), 1);
        }
    }

    #[test]
    fn what_is_in_the_way_is_named_with_its_mend() {
        let place = Place::new("wrong");
        fs::write(place.0.join("file"), "").unwrap();
        drop(UnixListener::bind(place.0.join("left")).unwrap());
        let _stream = UnixListener::bind(place.0.join("stream")).unwrap();
        let _datagram = UnixDatagram::bind(place.0.join("datagram")).unwrap();
        let long = "x".repeat(200);
        for (kind, name, word) in [
            (Kind::Stream, "gone", "passt --socket"),
            (Kind::Datagram, "gone", "gvproxy"),
            (Kind::Stream, "gone/x", "no such path"),
            (Kind::Stream, "file", "it is no socket"),
            (Kind::Datagram, "file", "it is no socket"),
            (Kind::Stream, "left", "nobody listens"),
            (Kind::Stream, "datagram", "write datagram:"),
            (Kind::Datagram, "stream", "write stream:"),
            (Kind::Stream, &long, "too long"),
        ] {
            let address = place.address(kind, name);
            let error = address.connect(None, WITHIN).unwrap_err().to_string();
            assert!(error.contains(word) && error.contains(&address.to_string()), "{error}");
        }
        let taken = place.0.join("file");
        let error = place.address(Kind::Datagram, "datagram").connect(Some(&taken), WITHIN).unwrap_err();
        assert!(error.to_string().contains("for its answers"), "{error}");
    }

    #[test]
    fn who_does_not_accept_is_waited_for_so_long_and_no_longer() {
        let place = Place::new("full");
        let address = place.address(Kind::Stream, "s");
        let _listener = UnixListener::bind(&address.path).unwrap();
        let mut clients = Vec::new();
        let error = loop {
            match address.connect(None, WITHIN) {
                Ok(client) => clients.push(client),
                Err(error) => break error,
            }
            assert!(clients.len() < 10_000);
        };
        assert!(error.to_string().contains("no more clients"), "{error}");
    }
}
