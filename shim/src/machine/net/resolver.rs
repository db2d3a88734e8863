//! Resolvers that are on a loopback address of the namespace, as docker has one on 127.0.0.11: who asks one in the guest
//! asks the agent, which asks here.
//!
//! Which there are is what containers are told, in the files that they have as `/etc/resolv.conf`. The guest can have those
//! asked and no others.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpStream as StdTcpStream, UdpSocket as StdUdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use agent_api::RESOLVER_PORT;
use agent_api::resolver::{DNS_PORT, Header, Transport, read_message, write_message};
use log::debug;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpStream, UdpSocket, UnixListener, UnixStream};
use tokio::sync::{OnceCell, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::blocking::blocking;
use crate::deadlines;
use crate::error::{Attempt, Error, Result};
use crate::machine::monitor::Monitor;

use super::within;

/// Of a file, far more than names a few resolvers.
const LONGEST_FILE: u64 = 64 << 10;
/// Resolvers that are looked at; who asks for names tries three.
const MOST: usize = 8;
/// Questions of a machine.
const AT_ONCE: usize = 64;
const LONGEST_ANSWER: usize = 65535;
const CONNECTING: &str = "connecting to a resolver in the network namespace";

/// The resolvers of a machine's containers.
#[derive(Debug, Default)]
pub struct Resolvers {
    files: Mutex<BTreeSet<PathBuf>>,
    allowed: Arc<Mutex<BTreeSet<Ipv4Addr>>>,
    listens: OnceCell<()>,
}

impl Resolvers {
    /// Looks into this file, too, from now on.
    pub fn named_in(&self, file: &Path) {
        self.files.lock().unwrap_or_else(PoisonError::into_inner).insert(file.to_owned());
    }

    /// Those that there are by now, for the agent; who is asked for them by the agent is then here.
    pub async fn look(&self, monitor: &Monitor, namespace: &OwnedFd) -> Result<Vec<String>> {
        let files = self.files.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if files.is_empty() {
            return Ok(Vec::new());
        }
        let found = blocking("looking for resolvers", move || Ok(named_in(&files))).await?;
        self.allowed.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&found);
        if !found.is_empty() {
            let listening = async { self.listen(monitor, namespace) };
            self.listens.get_or_try_init(|| listening).await?;
        }
        Ok(found.iter().map(ToString::to_string).collect())
    }

    fn listen(&self, monitor: &Monitor, namespace: &OwnedFd) -> Result<()> {
        let path = monitor.vsock().with_file_name(format!("vsock_{RESOLVER_PORT}"));
        let listener = UnixListener::bind(&path).attempt(format_args!("listening on {}", path.display()))?;
        let namespace = namespace.try_clone().attempt("duplicating a descriptor")?;
        let (allowed, ended) = (self.allowed.clone(), monitor.watch());
        tokio::spawn(async move {
            tokio::select! {
                () = serve(listener, Arc::new(namespace), allowed) => {}
                () = ended => {}
            }
        });
        Ok(())
    }
}

/// A file that is not there, or no file, names none.
fn named_in(files: &BTreeSet<PathBuf>) -> BTreeSet<Ipv4Addr> {
    let read = |path: &PathBuf| {
        // Whoever has put something else there is not waited for.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).ok()?;
        file.metadata().ok().filter(std::fs::Metadata::is_file)?;
        let mut text = Vec::new();
        file.take(LONGEST_FILE).read_to_end(&mut text).ok()?;
        Some(String::from_utf8_lossy(&text).into_owned())
    };
    let found: BTreeSet<_> = files.iter().filter_map(read).flat_map(|text| on_loopback(&text)).collect();
    found.into_iter().take(MOST).collect()
}

/// The resolvers on loopback addresses that a resolv.conf names.
fn on_loopback(text: &str) -> Vec<Ipv4Addr> {
    let address = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let is_one = words.next() == Some("nameserver");
        words.next().filter(|_| is_one)?.parse::<Ipv4Addr>().ok()
    };
    text.lines().filter_map(address).filter(Ipv4Addr::is_loopback).collect()
}

async fn serve(listener: UnixListener, namespace: Arc<OwnedFd>, allowed: Arc<Mutex<BTreeSet<Ipv4Addr>>>) {
    let room = Arc::new(Semaphore::new(AT_ONCE));
    // Tasks of questions end with this one.
    let mut asked = JoinSet::new();
    loop {
        let Ok(place) = room.clone().acquire_owned().await else { return };
        while asked.try_join_next().is_some() {}
        let Ok((guest, _)) = listener.accept().await else { return };
        let (namespace, allowed) = (namespace.clone(), allowed.clone());
        asked.spawn(async move {
            if let Err(error) = answer(guest, &namespace, &allowed).await {
                debug!("a question for a name: {error}");
            }
            drop(place);
        });
    }
}

async fn answer(
    mut guest: UnixStream,
    namespace: &OwnedFd,
    allowed: &Mutex<BTreeSet<Ipv4Addr>>,
) -> Result<()> {
    let what = "a question of the guest's";
    let header = timeout(deadlines::ANSWER, Header::read(&mut guest)).await;
    let header = header.map_err(|_| Error::deadline(format!("{what} did not come")))?.attempt(what)?;
    let resolver = header.resolver;
    if !allowed.lock().unwrap_or_else(PoisonError::into_inner).contains(&resolver) {
        return Err(Error::precondition(format!("no container has the resolver {resolver}")));
    }
    match header.transport {
        Transport::Udp => {
            let asking = async {
                let question = read_message(&mut guest).await.attempt(what)?;
                let socket = ask_by_udp(namespace, (resolver, DNS_PORT).into()).await?;
                socket.send(&question).await.attempt(format_args!("asking {resolver}"))?;
                let mut answer = vec![0; LONGEST_ANSWER];
                let length =
                    socket.recv(&mut answer).await.attempt(format_args!("an answer of {resolver}"))?;
                write_message(&mut guest, &answer[..length]).await.attempt("answering the guest")
            };
            let late = |_| Error::deadline(format!("{resolver} did not answer"));
            timeout(deadlines::ANSWER, asking).await.map_err(late)?
        }
        Transport::Tcp => {
            let mut stream = ask_by_tcp(namespace, (resolver, DNS_PORT).into()).await?;
            copy_bidirectional(&mut guest, &mut stream).await.attempt(format_args!("asking {resolver}"))?;
            Ok(())
        }
    }
}

async fn ask_by_udp(namespace: &OwnedFd, resolver: SocketAddr) -> Result<UdpSocket> {
    let opening = move || {
        let socket = StdUdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        socket.connect(resolver)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    };
    let socket = within(namespace, CONNECTING, opening).await?;
    UdpSocket::from_std(socket).attempt("asking a resolver")
}

async fn ask_by_tcp(namespace: &OwnedFd, resolver: SocketAddr) -> Result<TcpStream> {
    let opening = move || {
        let stream = StdTcpStream::connect_timeout(&resolver, deadlines::ANSWER)?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    };
    let stream = within(namespace, CONNECTING, opening).await?;
    TcpStream::from_std(stream).attempt("asking a resolver")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolvers_are_found_in_a_file() {
        for (text, expected) in [
            ("nameserver 127.0.0.11\noptions ndots:0\n", &["127.0.0.11"][..]),
            ("# nameserver 127.0.0.1\n;nameserver 127.0.0.2\nnameserver\nnameservers 127.0.0.3", &[]),
            ("nameserver 8.8.8.8\nnameserver\t127.0.0.53 # local\nnameserver ::1", &["127.0.0.53"]),
            ("", &[]),
        ] {
            let found: Vec<_> = on_loopback(text).iter().map(ToString::to_string).collect();
            assert_eq!(found, expected, "{text:?}");
        }
    }

    #[test]
    fn what_is_no_file_is_left_alone() {
        let directory = std::env::temp_dir().join(format!("resolv-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let [fifo, many, gone] = ["fifo", "many", "gone"].map(|name| directory.join(name));
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
        let lines: Vec<_> = (1..=20).map(|number| format!("nameserver 127.0.1.{number}")).collect();
        std::fs::write(&many, lines.join("\n")).unwrap();
        let found = named_in(&[directory.clone(), fifo, gone, many].into());
        std::fs::remove_dir_all(&directory).unwrap();
        assert_eq!(found.len(), MOST);
    }

    #[tokio::test]
    async fn only_what_containers_are_told_of_is_asked() {
        let namespace = rtnl::current_namespace().unwrap();
        let allowed = Mutex::new(BTreeSet::from([Ipv4Addr::LOCALHOST]));
        for (sent, why) in [
            (&b"U\x7f\0\0\x02"[..], "no container has the resolver 127.0.0.2"),
            (b"T\x08\x08\x08\x08", "no container has the resolver 8.8.8.8"),
            (b"X\x7f\0\0\x01", "no transport"),
            (b"U\x7f", "a question of the guest's"),
        ] {
            let (mut guest, here) = UnixStream::pair().unwrap();
            tokio::io::AsyncWriteExt::write_all(&mut guest, sent).await.unwrap();
            drop(guest);
            let error = answer(here, &namespace, &allowed).await.unwrap_err();
            assert!(error.text.contains(why), "{sent:?}: {}", error.text);
        }
    }
}
