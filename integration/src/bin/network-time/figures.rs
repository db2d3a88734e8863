//! The figures of one side, taken from the host's end of its cable, by the host's clock alone.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use integration::network_time::{Answers, Network, Rate};

use crate::answer::give;
use crate::cost::Meter;
use crate::order::{CHUNK, DATAGRAM, DOOR, GUEST, Order, PATIENCE, PORT};

/// Of what is called many.
const STREAMS: usize = 8;
/// So long after the last datagram there comes none any more.
const QUIET: Duration = Duration::from_millis(500);
/// All figures of a side take no longer.
pub const LONGEST: Duration = Duration::from_mins(5);
/// Answers that do not count: both ends have just met.
const FIRST: usize = 20;

/// Takes all of them. Each takes `time`, and a little.
pub fn take(meter: &Meter, time: Duration) -> Result<Network> {
    let rate = |what: &str, measure: &dyn Fn() -> Result<f64>| -> Result<Rate> {
        let before = meter.read()?;
        let per_second = measure().with_context(|| what.to_owned())?;
        Ok(Rate { per_second, cost: meter.read()?.since(&before) })
    };
    let to_one = rate("a stream from the host", &|| to_guest(1, time))?;
    let to_eight = rate("streams from the host", &|| to_guest(STREAMS, time))?;
    let from_one = rate("a stream to the host", &|| from_guest(1, time))?;
    let from_eight = rate("streams to the host", &|| from_guest(STREAMS, time))?;
    let mut arrived = 0.0;
    let before = meter.read()?;
    let per_second = datagrams(time, &mut arrived).context("datagrams to the host")?;
    let datagrams = Rate { per_second, cost: meter.read()?.since(&before) };
    let before = meter.read()?;
    let mut answers = answers(time).context("one byte there and back")?;
    answers.cost = meter.read()?.since(&before);
    let connections = rate("connections", &|| connections(time))?;
    Ok(Network { to_one, to_eight, from_one, from_eight, datagrams, arrived, answers, connections })
}

fn connect(port: u16) -> Result<TcpStream> {
    let address = SocketAddr::from((GUEST, port));
    let stream =
        TcpStream::connect_timeout(&address, PATIENCE).with_context(|| format!("connecting to {address}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn streams(count: usize) -> Result<Vec<TcpStream>> {
    (0..count).map(|_| connect(PORT)).collect()
}

fn order(mut stream: &TcpStream, order: Order) -> Result<()> {
    stream.write_all(format!("{order}\n").as_bytes()).context("saying what is wanted")
}

fn number(mut from: &TcpStream) -> Result<u64> {
    let mut bytes = [0; 8];
    from.read_exact(&mut bytes).context("reading how much came")?;
    Ok(u64::from_le_bytes(bytes))
}

/// Has a thread for each stream do `work`, which returns how many bytes went through it, and says how many
/// that is in a second, counted until the last one is done.
fn at_once(streams: &[TcpStream], work: impl Fn(&TcpStream) -> Result<u64> + Sync) -> Result<f64> {
    let begun = Instant::now();
    let bytes = thread::scope(|scope| {
        let threads: Vec<_> = streams.iter().map(|stream| scope.spawn(|| work(stream))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow!("a stream's thread panicked"))?)
            .sum::<Result<u64>>()
    })?;
    Ok(per_second(bytes, begun.elapsed()))
}

#[allow(clippy::cast_precision_loss, reason = "nothing is counted up to 2^52")]
fn per_second(count: u64, time: Duration) -> f64 {
    count as f64 / time.as_secs_f64()
}

/// Until the other end has it all, and has said so.
fn to_guest(count: usize, time: Duration) -> Result<f64> {
    let streams = streams(count)?;
    streams.iter().try_for_each(|stream| order(stream, Order::Take))?;
    at_once(&streams, |stream| {
        let given = give(stream, time)?;
        stream.shutdown(Shutdown::Write)?;
        let taken = number(stream)?;
        ensure!(taken == given, "of {given} bytes {taken} came");
        Ok(taken)
    })
}

fn from_guest(count: usize, time: Duration) -> Result<f64> {
    let streams = streams(count)?;
    at_once(&streams, |mut stream| {
        order(stream, Order::Give(time))?;
        let (mut chunk, mut taken) = (vec![0; CHUNK], 0);
        loop {
            match stream.read(&mut chunk)? {
                0 => return Ok(taken),
                bytes => taken += bytes as u64,
            }
        }
    })
}

/// Bytes of those that arrived, from the first to the last one.
fn datagrams(time: Duration, arrived: &mut f64) -> Result<f64> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(QUIET))?;
    let stream = connect(PORT)?;
    order(&stream, Order::Datagrams(socket.local_addr()?.port(), time))?;
    let begun = Instant::now();
    let (mut count, mut first, mut last) = (0u64, None, begun);
    let mut datagram = [0; DATAGRAM + 1];
    loop {
        match socket.recv(&mut datagram) {
            Ok(DATAGRAM) => {
                last = Instant::now();
                first.get_or_insert(last);
                count += 1;
            }
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if begun.elapsed() >= time + QUIET {
                    break;
                }
            }
            Err(error) => return Err(error).context("receiving"),
        }
        ensure!(begun.elapsed() < time + PATIENCE, "they come without end");
    }
    let sent = number(&stream)?;
    ensure!(sent >= count, "{count} came of {sent} that were sent");
    let first = first.filter(|_| count > 1).with_context(|| format!("of {sent} {count} came"))?;
    #[allow(clippy::cast_precision_loss, reason = "nothing is counted up to 2^52")]
    let share = count as f64 / sent as f64;
    *arrived = share;
    Ok(per_second((count - 1) * DATAGRAM as u64, last.duration_since(first)))
}

/// One after the other, on one stream.
fn answers(time: Duration) -> Result<Answers> {
    let mut stream = connect(PORT)?;
    stream.set_nodelay(true)?;
    order(&stream, Order::Echo)?;
    let mut ask = || -> Result<f64> {
        let (asked, mut byte) = (Instant::now(), [0x5a]);
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
        Ok(asked.elapsed().as_secs_f64())
    };
    for _ in 0..FIRST {
        ask()?;
    }
    let (begun, mut times) = (Instant::now(), Vec::new());
    while begun.elapsed() < time {
        times.push(ask()?);
    }
    times.sort_by(f64::total_cmp);
    let at = |hundredths: usize| times.get(times.len() * hundredths / 100).copied();
    let (median, p99) = at(50).zip(at(99)).context("there was none")?;
    Ok(Answers { median, p99, count: u32::try_from(times.len())?, ..Answers::default() })
}

/// One after the other. The other end ends them.
fn connections(time: Duration) -> Result<f64> {
    let (begun, mut count) = (Instant::now(), 0);
    while begun.elapsed() < time {
        let mut stream = connect(DOOR)?;
        ensure!(stream.read(&mut [0])? == 0, "something came by a connection that was to end");
        count += 1;
    }
    Ok(per_second(count, begun.elapsed()))
}
