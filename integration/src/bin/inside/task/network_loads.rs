//! Much through the network of a container.

use std::io::Write;
use std::net::{IpAddr, Shutdown, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration::containerd::Api;
use integration::streams::{Ask, PIECE, ask, taken};
use integration::{Ctx, Outcome, Rounds, Test, pattern};
use serde_json::Value;

use super::files::{add, bind};
use super::network::{Cable, Cabled, PORT, enter, hung, plug};
use super::{A_WHILE, OURS, Piped, new_id, test};
use crate::world::{Inside, RUNC};

pub fn tests() -> Vec<Test<Inside>> {
    vec![Test {
        deadline: Duration::from_mins(60),
        rounds: Rounds::once_or(1),
        ..test(
            "task.network-loads",
            "by five interfaces with MTUs from 1280 to 9000, TCP and UDP, v4 and v6, a container gets and sends what it does with \
             runc, unharmed: 2 GiB (16 MiB for every change) each way in large and in small writes, 20,000 (200) \
             connections in a row, and 500 (50) at once",
            loads,
        )
    }]
}

const MIB: u64 = 1 << 20;
/// On which they answer datagrams.
pub const UDP: u16 = PORT + 1;
/// Longer than any packet of these networks.
const DATAGRAM: usize = 9500;
/// Headers of v6 and of UDP.
const HEADERS: usize = 48;

const CABLES: [Cable; 5] = [
    Cable { number: 0, mac: "02:77:00:00:00:01", mtu: 1280 },
    Cable { number: 1, mac: "02:77:00:00:00:02", mtu: 1400 },
    Cable { number: 2, mac: "02:77:00:00:00:03", mtu: 1500 },
    Cable { number: 3, mac: "02:77:00:00:00:04", mtu: 4000 },
    Cable { number: 4, mac: "02:77:00:00:00:05", mtu: 9000 },
];

fn loads(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    for runtime in [RUNC, OURS] {
        let cabled = Cabled::new(ctx)?;
        let cables = CABLES.iter().map(|cable| plug(ctx, &cabled.path, cable)).collect::<Result<Vec<_>>>()?;
        let before = hung(&cabled)?;
        let (task, _) = serving(ctx, &api, runtime, "", |spec| enter(spec, &cabled.path))?;
        // With runc only whether the test is right.
        let long = |few, many| if runtime == OURS { ctx.either(few, many) } else { few };
        for cable in &CABLES {
            for address in cable.inside() {
                let about = || format!("{runtime}: {address}, MTU {}", cable.mtu);
                let mtu = cable.mtu as usize;
                datagrams(address, &[1, mtu - HEADERS, mtu, DATAGRAM]).with_context(about)?;
                carry(address, MIB, false).with_context(about)?;
            }
        }
        let address = CABLES[0].inside()[0];
        for in_pieces in [false, true] {
            let length = long(16 * MIB, 2048 * MIB);
            carry(address, length, in_pieces).with_context(|| format!("{runtime}: {length} bytes"))?;
        }
        in_a_row(address, long(200, 20_000)).with_context(|| format!("{runtime}: connections in a row"))?;
        at_once(address, long(50, 500)).with_context(|| format!("{runtime}: connections at once"))?;
        task.container.kill(9)?;
        let code = task.container.wait(A_WHILE)?;
        task.end(code)?;
        let after = hung(&cabled)?;
        ensure!(after == before, "{runtime}: the namespace was {before}, and is {after}");
        drop(cables);
    }
    Ok(Outcome::Passed)
}

/// A container that serves TCP and UDP, and what it has said by then, to which the script `asked` may add.
pub fn serving<'a>(
    ctx: &Ctx<'_, Inside>,
    api: &'a Api,
    runtime: &str,
    asked: &str,
    edit: impl FnOnce(&mut Value),
) -> Result<(Piped<'a>, String)> {
    let edit = |spec: &mut Value| {
        edit(spec);
        add(spec, [bind(&ctx.world.guest_part, "/part", &["bind", "ro"])]);
    };
    // As the first process it would take itself for that of a machine.
    let script = format!("{asked}\n/part serve-udp {UDP} & /part serve-tcp {PORT} & wait");
    let id = new_id(ctx, runtime);
    let mut task = Piped::named(ctx, api, runtime, id, &["sh", "-c", &script], edit)?;
    task.container.start()?;
    let said = task.stdout.read_until("listening\nlistening\n", A_WHILE)?;
    Ok((task, String::from_utf8_lossy(&said).into_owned()))
}

/// Datagrams of these lengths, there and back.
pub fn datagrams(address: IpAddr, lengths: &[usize]) -> Result<()> {
    let any: IpAddr = if address.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let socket = UdpSocket::bind((any, 0)).context("binding")?;
    socket.set_read_timeout(Some(Duration::from_secs(10)))?;
    socket.connect((address, UDP)).context("connecting")?;
    let mut back = vec![0; DATAGRAM + 1];
    for (seed, length) in lengths.iter().copied().enumerate() {
        let sent = pattern::bytes(seed as u64, length);
        socket.send(&sent).with_context(|| format!("sending {length} bytes"))?;
        let got = socket.recv(&mut back).with_context(|| format!("a datagram of {length} bytes"))?;
        ensure!(back[..got] == sent, "of a datagram of {length} bytes {got} came back, or others");
    }
    Ok(())
}

/// So much in each direction.
pub fn carry(address: IpAddr, length: u64, in_pieces: bool) -> Result<()> {
    let (seed, what) = (7, if in_pieces { Ask::GivePieces } else { Ask::Give });
    let stream = connect(address)?;
    ask(&stream, Ask::Take, seed, length)?;
    if in_pieces {
        stream.set_nodelay(true)?;
        pattern::send_in_pieces(&stream, seed, length, pattern::sizes(seed, PIECE))?;
    } else {
        pattern::send(&stream, seed, length)?;
    }
    taken(&stream).context("what was sent there")?;
    let stream = connect(address)?;
    ask(&stream, what, seed, length)?;
    pattern::receive(&stream, seed, length).context("what was sent here")
}

/// Not tried again: there is somebody who listens.
fn connect(address: IpAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&(address, PORT).into(), A_WHILE).context("connecting")?;
    stream.set_read_timeout(Some(A_WHILE))?;
    Ok(stream)
}

fn in_a_row(address: IpAddr, count: u64) -> Result<()> {
    for number in 0..count {
        let stream = connect(address).with_context(|| format!("connection {number}"))?;
        ask(&stream, Ask::Give, number, 100)?;
        pattern::receive(&stream, number, 100).with_context(|| format!("connection {number}"))?;
    }
    Ok(())
}

/// So many connections, each of which is answered.
pub fn at_once(address: IpAddr, count: u64) -> Result<()> {
    let streams = (0..count).map(|_| connect(address)).collect::<Result<Vec<TcpStream>>>()?;
    for (mut stream, seed) in streams.iter().zip(0..) {
        ask(stream, Ask::Echo, 0, 0)?;
        stream.write_all(&pattern::bytes(seed, 1000))?;
        stream.shutdown(Shutdown::Write)?;
    }
    for (stream, seed) in streams.iter().zip(0..) {
        pattern::receive(stream, seed, 1000).with_context(|| format!("connection {seed}"))?;
    }
    Ok(())
}
