//! Localhost of a machine's network namespace is the guest's: whoever connects to a port of 127.0.0.1 or ::1 there speaks with
//! who listens on that port of the guest, as those do who forward a port to a pod.
//!
//! One socket of each version takes connections to all ports: a program of the kernel's chooses it for them. So nothing has
//! to be known of the ports before somebody connects.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener as StdTcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use agent_api::forward::{CONNECTED, Header};
use agent_api::{FORWARD_PORT, dial};
use bpf::code::{
    ADD_NUMBER, CALL, EXIT, JUMP, JUMP_IF, JUMP_UNLESS, JUMP_UNLESS_WORD, LOAD_WORD, MOVE, MOVE_NUMBER,
    STORE_WORD,
};
use bpf::{Assembly, Instruction, Kind, Program, Sockets, instruction, map_address};
use log::debug;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::blocking::blocking;
use crate::deadlines;
use crate::error::{Attempt, Error, Result};

/// Connections to a machine at a time; others wait.
const AT_ONCE: usize = 1024;
/// After a failure that is not about one connection.
const PAUSE: Duration = Duration::from_millis(100);

/// What takes the connections, until it is dropped.
#[derive(Debug)]
pub struct Localhost {
    listeners: Vec<TcpListener>,
    _link: OwnedFd,
}

impl Localhost {
    /// Of a namespace. None, if it has no localhost yet, because `lo` is off.
    pub async fn take(namespace: OwnedFd) -> Result<Option<Self>> {
        let what = "taking connections to localhost of the network namespace";
        let taking = move || rtnl::within(namespace.as_fd(), || take(&namespace)).attempt(what);
        let Some((sockets, link)) = blocking(what, taking).await? else { return Ok(None) };
        let listeners = sockets.into_iter().map(TcpListener::from_std).collect::<io::Result<_>>();
        Ok(Some(Self { listeners: listeners.attempt(what)?, _link: link }))
    }

    /// Passes them on to the guest behind the machine's vsock socket, for ever.
    pub async fn serve(self, vsock: PathBuf) {
        let (room, vsock) = (Arc::new(Semaphore::new(AT_ONCE)), Arc::new(vsock));
        let mut all = JoinSet::new();
        for listener in self.listeners {
            let (room, vsock) = (room.clone(), vsock.clone());
            all.spawn(async move {
                // Tasks of connections end with this one.
                let mut connections = JoinSet::new();
                loop {
                    let Ok(place) = room.clone().acquire_owned().await else { return };
                    while connections.try_join_next().is_some() {}
                    let Ok((stream, _)) = listener.accept().await else {
                        sleep(PAUSE).await;
                        continue;
                    };
                    let vsock = vsock.clone();
                    connections.spawn(async move {
                        if let Err(error) = pass_on(stream, &vsock).await {
                            debug!("a connection to localhost: {error}");
                        }
                        drop(place);
                    });
                }
            });
        }
        while all.join_next().await.is_some() {}
    }
}

/// Sockets for all ports, in the namespace of this thread.
fn take(namespace: &OwnedFd) -> io::Result<Option<(Vec<StdTcpListener>, OwnedFd)>> {
    let sockets = match StdTcpListener::bind((Ipv4Addr::LOCALHOST, 0)) {
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => return Ok(None),
        v4 => {
            // A host may do without v6.
            let v6 = StdTcpListener::bind((Ipv6Addr::LOCALHOST, 0));
            [Some(v4?), v6.ok()].into_iter().flatten().collect::<Vec<_>>()
        }
    };
    let choice = Sockets::new(2)?;
    for (key, socket) in (0..).zip(&sockets) {
        socket.set_nonblocking(true)?;
        choice.put(key, socket)?;
    }
    let link = Program::load(Kind::Lookup, &compile(&choice)?)?.link(namespace)?;
    Ok(Some((sockets, link)))
}

async fn pass_on(mut stream: TcpStream, vsock: &Path) -> Result<()> {
    let at = stream.local_addr().attempt("asking for a connection's port")?;
    let header = Header { is_v6: at.is_ipv6(), port: at.port() };
    let dialling = async {
        let mut guest = dial::dial(vsock, FORWARD_PORT).await?;
        guest.write_all(&header.encode()).await?;
        let answer = guest.read_u8().await?;
        io::Result::Ok((guest, answer))
    };
    let dialled = timeout(deadlines::FORWARD, dialling).await;
    match dialled
        .map_err(|_| Error::deadline("the guest does not answer"))
        .and_then(|dialled| dialled.attempt(format_args!("connecting to port {} of the guest", at.port())))
    {
        Ok((mut guest, CONNECTED)) => {
            copy_bidirectional(&mut stream, &mut guest).await.attempt("passing on").map(drop)
        }
        other => {
            // As nobody has listened, the connection is reset.
            stream.set_zero_linger().attempt("resetting a connection")?;
            other.map(drop)
        }
    }
}

/// What the program is asked with (`struct bpf_sk_lookup`): addresses are as they are on the wire.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_V4: i16 = 40;
const LOCAL_V6: [i16; 4] = [44, 48, 52, 56];
/// Functions of the kernel's.
const MAP_LOOKUP: u32 = 1;
const RELEASE: u32 = 86;
const ASSIGN: u32 = 124;
/// Registers: the answer, arguments, and what stays over a call.
const ANSWER: u8 = 0;
const FIRST: u8 = 1;
const SECOND: u8 = 2;
const THIRD: u8 = 3;
const QUESTION: u8 = 6;
const SOCKET: u8 = 7;
const STACK: u8 = 10;

/// Places of the program.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    V4,
    Choice,
    End,
}

/// For a TCP connection to 127.0.0.1 the socket 0, to ::1 the socket 1, and for all else what the kernel finds.
fn compile(choice: &Sockets) -> io::Result<Vec<Instruction>> {
    use Place::{Choice, End, V4};
    let wire = |address: [u8; 4]| u32::from_ne_bytes(address);
    let number = |number: i32| number.cast_unsigned();
    let mut program = Assembly::default();
    program.then([
        instruction(MOVE, QUESTION, FIRST, 0, 0),
        instruction(LOAD_WORD, SECOND, QUESTION, PROTOCOL, 0),
    ]);
    program.jump(JUMP_UNLESS, SECOND, number(libc::IPPROTO_TCP), End);
    program.then([instruction(LOAD_WORD, SECOND, QUESTION, FAMILY, 0)]);
    program.jump(JUMP_IF, SECOND, number(libc::AF_INET), V4);
    program.jump(JUMP_UNLESS, SECOND, number(libc::AF_INET6), End);
    for (part, wanted) in LOCAL_V6.into_iter().zip([0, 0, 0, wire([0, 0, 0, 1])]) {
        program.then([instruction(LOAD_WORD, SECOND, QUESTION, part, 0)]);
        program.jump(JUMP_UNLESS_WORD, SECOND, wanted, End);
    }
    program.then([instruction(MOVE_NUMBER, THIRD, 0, 0, 1)]);
    program.jump(JUMP, 0, 0, Choice);
    program.place(V4);
    program.then([instruction(LOAD_WORD, SECOND, QUESTION, LOCAL_V4, 0)]);
    program.jump(JUMP_UNLESS_WORD, SECOND, wire([127, 0, 0, 1]), End);
    program.then([instruction(MOVE_NUMBER, THIRD, 0, 0, 0)]);
    program.place(Choice);
    program.then([
        instruction(STORE_WORD, STACK, THIRD, -4, 0),
        instruction(MOVE, SECOND, STACK, 0, 0),
        instruction(ADD_NUMBER, SECOND, 0, 0, number(-4)),
    ]);
    program.then(map_address(FIRST, choice));
    program.then([instruction(CALL, 0, 0, 0, MAP_LOOKUP)]);
    program.jump(JUMP_IF, ANSWER, 0, End);
    program.then([
        instruction(MOVE, SOCKET, ANSWER, 0, 0),
        instruction(MOVE, FIRST, QUESTION, 0, 0),
        instruction(MOVE, SECOND, SOCKET, 0, 0),
        instruction(MOVE_NUMBER, THIRD, 0, 0, 0),
        instruction(CALL, 0, 0, 0, ASSIGN),
        instruction(MOVE, FIRST, SOCKET, 0, 0),
        instruction(CALL, 0, 0, 0, RELEASE),
    ]);
    program.place(End);
    program.then([instruction(MOVE_NUMBER, ANSWER, 0, 0, 1), instruction(EXIT, 0, 0, 0, 0)]);
    program.finish()
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpStream as StdTcpStream};

    use super::*;

    /// None, where this process may not.
    fn namespace(lo: bool) -> Option<OwnedFd> {
        let namespace = rtnl::create_namespace().ok()?;
        let up = || rtnl::Netlink::open()?.set_up(1, true);
        if lo {
            rtnl::within(namespace.as_fd(), up).unwrap();
        }
        Some(namespace)
    }

    #[tokio::test]
    async fn connections_to_any_port_of_localhost_are_taken_and_no_others() {
        let Some(namespace) = namespace(true) else { return };
        let localhost = match Localhost::take(namespace.try_clone().unwrap()).await {
            // Not all of root's rights are everywhere root's.
            Err(error) if error.text.contains("not permitted") => return,
            taken => taken.unwrap().unwrap(),
        };
        let connect = |address: &str| {
            let address: SocketAddr = address.parse().unwrap();
            rtnl::within(namespace.as_fd(), || StdTcpStream::connect(address))
        };
        for (listener, address) in localhost.listeners.iter().zip(["127.0.0.1:80", "[::1]:65535"]) {
            let _client = connect(address).unwrap();
            let (stream, _) = listener.accept().await.unwrap();
            assert_eq!(stream.local_addr().unwrap().to_string(), address);
        }
        for other in ["127.0.0.2:80", "127.0.0.11:53"] {
            assert_eq!(connect(other).unwrap_err().kind(), io::ErrorKind::ConnectionRefused, "{other}");
        }
        drop(localhost);
        assert_eq!(connect("127.0.0.1:80").unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn localhost_may_come_later() {
        let Some(namespace) = namespace(false) else { return };
        let take = || Localhost::take(namespace.try_clone().unwrap());
        // Some kernels let nobody listen there before it is on.
        let early = match take().await {
            Err(error) if error.text.contains("not permitted") => return,
            taken => taken.unwrap(),
        };
        rtnl::within(namespace.as_fd(), || rtnl::Netlink::open()?.set_up(1, true)).unwrap();
        let localhost = match early {
            Some(localhost) => localhost,
            None => take().await.unwrap().unwrap(),
        };
        let connect = || StdTcpStream::connect((Ipv4Addr::LOCALHOST, 80));
        let _client = rtnl::within(namespace.as_fd(), connect).unwrap();
        localhost.listeners[0].accept().await.unwrap();
    }
}
