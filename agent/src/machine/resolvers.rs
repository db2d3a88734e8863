//! Resolvers that are on the host, in the namespace that the machine's network is of, as docker has one on 127.0.0.11.
//!
//! Whoever asks one in the guest asks the agent, which passes it on over vsock. The agent listens on another port than 53,
//! which belongs to containers; the kernel is told to take the one for the other, in what they send and in what they get.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use agent_api::RESOLVER_PORT;
use agent_api::resolver::{DNS_PORT, Header, Transport, read_message, write_message};
use anyhow::{Context, Result, ensure};
use bpf::code::{EXIT, JUMP_UNLESS_WORD, LOAD_WORD, MOVE_NUMBER, STORE_WORD};
use bpf::{Instruction, Kind, Program, instruction};
use tokio::io::{AsyncWriteExt, copy_bidirectional};
use tokio::net;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

use crate::cgroup;

/// More than any file with resolvers has.
const MOST: usize = 8;
/// Questions to one of them, by each transport; others wait.
const AT_ONCE: usize = 128;
/// An answer, after which the asker has asked again.
const ANSWER_DEADLINE: Duration = Duration::from_secs(15);
/// After a failure that is not about one question.
const PAUSE: Duration = Duration::from_millis(100);
/// Ports that are tried, as the one that is free for UDP need not be so for TCP.
const TRIES: u32 = 16;
const LONGEST: usize = 65535;

/// Those that are there.
#[derive(Default)]
pub struct Resolvers(Vec<Resolver>);

struct Resolver {
    address: Ipv4Addr,
    /// As long as these are open the kernel exchanges the ports.
    _links: Vec<OwnedFd>,
    /// Who listens; ends with this.
    _tasks: JoinSet<()>,
}

impl Resolvers {
    /// Makes them those that are wanted, and no others.
    pub fn set(&mut self, wanted: &[String]) -> Result<()> {
        ensure!(wanted.len() <= MOST, "{} resolvers are more than {MOST}", wanted.len());
        let parse = |text: &String| {
            let address: Ipv4Addr = text.parse().with_context(|| format!("{text:?} is no v4 address"))?;
            ensure!(address.is_loopback(), "the resolver {address} is not on a loopback address");
            Ok(address)
        };
        let wanted = wanted.iter().map(parse).collect::<Result<Vec<_>>>()?;
        self.0.retain(|resolver| wanted.contains(&resolver.address));
        for address in wanted {
            if !self.0.iter().any(|resolver| resolver.address == address) {
                let resolver = Resolver::start(address).with_context(|| format!("the resolver {address}"))?;
                self.0.push(resolver);
            }
        }
        Ok(())
    }
}

impl Resolver {
    fn start(address: Ipv4Addr) -> Result<Self> {
        let (udp, tcp, port) = listen(address).context("listening")?;
        let mut links = Vec::new();
        for kind in [Kind::Connect4, Kind::Send4] {
            links.push(exchange(kind, address, DNS_PORT, port)?);
        }
        for kind in [Kind::Receive4, Kind::PeerName4] {
            links.push(exchange(kind, address, port, DNS_PORT)?);
        }
        let mut tasks = JoinSet::new();
        tasks.spawn(questions(net::UdpSocket::from_std(udp)?, address));
        tasks.spawn(connections(net::TcpListener::from_std(tcp)?, address));
        Ok(Self { address, _links: links, _tasks: tasks })
    }
}

/// A port that is free for both.
fn listen(address: Ipv4Addr) -> Result<(UdpSocket, TcpListener, u16)> {
    let mut tries = 0;
    loop {
        let udp = UdpSocket::bind((address, 0))?;
        let port = udp.local_addr()?.port();
        tries += 1;
        match TcpListener::bind((address, port)) {
            Ok(tcp) => {
                udp.set_nonblocking(true)?;
                tcp.set_nonblocking(true)?;
                return Ok((udp, tcp, port));
            }
            Err(error) if tries == TRIES => return Err(error.into()),
            Err(_) => {}
        }
    }
}

/// Has the kernel take one port of `address` for another, for all processes.
fn exchange(kind: Kind, address: Ipv4Addr, from: u16, to: u16) -> Result<OwnedFd> {
    let program =
        Program::load(kind, &compile(address, from, to)).context("loading the program for ports")?;
    let all = File::open(cgroup::ROOT).context("opening the root of cgroups")?;
    program.link(all).context("laying it on all cgroups")
}

/// Of what the program is asked with (`struct bpf_sock_addr`): address and port, as they are on the wire.
const ADDRESS: i16 = 4;
const PORT: i16 = 24;
/// Registers: the verdict, the question, and room.
const VERDICT: u8 = 0;
const QUESTION: u8 = 1;
const ROOM: u8 = 2;

fn compile(address: Ipv4Addr, from: u16, to: u16) -> [Instruction; 8] {
    let wire = |port: u16| u32::from(port.to_be());
    let address = u32::from_ne_bytes(address.octets());
    [
        instruction(LOAD_WORD, ROOM, QUESTION, ADDRESS, 0),
        instruction(JUMP_UNLESS_WORD, ROOM, 0, 4, address),
        instruction(LOAD_WORD, ROOM, QUESTION, PORT, 0),
        instruction(JUMP_UNLESS_WORD, ROOM, 0, 2, wire(from)),
        instruction(MOVE_NUMBER, ROOM, 0, 0, wire(to)),
        instruction(STORE_WORD, QUESTION, ROOM, PORT, 0),
        instruction(MOVE_NUMBER, VERDICT, 0, 0, 1),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}

async fn questions(socket: net::UdpSocket, resolver: Ipv4Addr) {
    let (socket, room) = (Arc::new(socket), Arc::new(Semaphore::new(AT_ONCE)));
    // Tasks of questions end with this one.
    let mut asked = JoinSet::new();
    let mut question = vec![0; LONGEST];
    loop {
        let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
        while asked.try_join_next().is_some() {}
        let Ok((length, from)) = socket.recv_from(&mut question).await else {
            sleep(PAUSE).await;
            continue;
        };
        let (socket, question) = (Arc::clone(&socket), question[..length].to_vec());
        asked.spawn(async move {
            // Who gets no answer asks again.
            let _ = timeout(ANSWER_DEADLINE, answer(&socket, resolver, &question, from)).await;
            drop(place);
        });
    }
}

async fn answer(
    socket: &net::UdpSocket,
    resolver: Ipv4Addr,
    question: &[u8],
    from: SocketAddr,
) -> std::io::Result<()> {
    let mut host = dial(Header { transport: Transport::Udp, resolver }).await?;
    write_message(&mut host, question).await?;
    let answer = read_message(&mut host).await?;
    socket.send_to(&answer, from).await.map(drop)
}

async fn connections(listener: net::TcpListener, resolver: Ipv4Addr) {
    let room = Arc::new(Semaphore::new(AT_ONCE));
    let mut connections = JoinSet::new();
    loop {
        let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
        while connections.try_join_next().is_some() {}
        let Ok((mut stream, _)) = listener.accept().await else {
            sleep(PAUSE).await;
            continue;
        };
        connections.spawn(async move {
            if let Ok(mut host) = dial(Header { transport: Transport::Tcp, resolver }).await {
                let _ = copy_bidirectional(&mut stream, &mut host).await;
            }
            drop(place);
        });
    }
}

async fn dial(header: Header) -> std::io::Result<VsockStream> {
    let mut host = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, RESOLVER_PORT)).await?;
    host.write_all(&header.encode()).await?;
    Ok(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What becomes of an address and a port, as they are on the wire.
    fn run(program: &[Instruction], address: [u8; 4], port: u16) -> u16 {
        let mut question = [0u32; 8];
        question[1] = u32::from_ne_bytes(address);
        question[6] = u32::from(port.to_be());
        let (mut registers, mut at) = ([0u32; 3], 0);
        loop {
            let Instruction { code, registers: pair, offset, immediate } = program[at];
            let (to, from) = (usize::from(pair & 15), usize::from(pair >> 4));
            at += 1;
            match code {
                LOAD_WORD => registers[to] = question[usize::try_from(offset).unwrap() / 4],
                STORE_WORD => question[usize::try_from(offset).unwrap() / 4] = registers[from],
                MOVE_NUMBER => registers[to] = immediate.cast_unsigned(),
                JUMP_UNLESS_WORD if registers[to] == immediate.cast_unsigned() => {}
                JUMP_UNLESS_WORD => at += usize::try_from(offset).unwrap(),
                EXIT => {
                    assert_eq!(registers[0], 1, "the kernel goes on");
                    return u16::from_be(u16::try_from(question[6]).unwrap());
                }
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn only_the_ports_of_the_resolver_are_exchanged() {
        let address = [127, 0, 0, 200];
        let there = compile(address.into(), 53, 40001);
        let back = compile(address.into(), 40001, 53);
        for (program, address, port, becomes) in [
            (&there, address, 53, 40001),
            (&there, address, 54, 54),
            (&there, [127, 0, 0, 1], 53, 53),
            (&back, address, 40001, 53),
            (&back, address, 53, 53),
            (&back, [8, 8, 8, 8], 40001, 40001),
        ] {
            assert_eq!(run(program, address, port), becomes, "{address:?} {port}");
        }
    }

    #[tokio::test]
    async fn what_is_no_loopback_address_is_refused() {
        for (wrong, why) in [("8.8.8.8", "loopback"), ("::1", "v4"), ("", "v4")] {
            let error = Resolvers::default().set(&[wrong.to_owned()]).unwrap_err();
            assert!(format!("{error:#}").contains(why), "{error:#}");
        }
        assert!(Resolvers::default().set(&vec!["127.0.0.1".to_owned(); MOST + 1]).is_err());
        Resolvers::default().set(&[]).unwrap();
    }

    #[test]
    fn a_port_is_free_for_both() {
        let (udp, tcp, port) = listen(Ipv4Addr::LOCALHOST).unwrap();
        assert_eq!((udp.local_addr().unwrap().port(), tcp.local_addr().unwrap().port()), (port, port));
    }
}
