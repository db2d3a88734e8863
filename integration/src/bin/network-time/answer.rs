//! The end that answers: the same in a container of ours, in one of runc's and in a machine of QEMU's.
//!
//! The first line of a stream says what is wanted of it. Nothing is timed here: a guest's clock may go otherwise than
//! the host's.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::socket::{setsockopt, sockopt};

use crate::order::{CHUNK, DATAGRAM, DOOR, LONGEST, Order, PATIENCE, PORT, READY, UNDER_WAY};

/// Answers for ever.
pub fn serve() -> Result<()> {
    let listen = |port: u16| {
        TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).with_context(|| format!("listening on port {port}"))
    };
    let (orders, door) = (listen(PORT)?, listen(DOOR)?);
    // Whoever comes in by this door is sent away.
    thread::spawn(move || door.incoming().for_each(drop));
    println!("{READY}");
    io::stdout().flush()?;
    for stream in orders.incoming() {
        let stream = stream.context("accepting")?;
        thread::spawn(move || {
            if let Err(error) = answer(&stream) {
                eprintln!("network-time: answering: {error:#}");
            }
        });
    }
    Ok(())
}

fn answer(stream: &TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    let line = line(stream).context("reading what is wanted")?;
    match Order::parse(&line).with_context(|| format!("{line:?} is nothing that can be wanted"))? {
        Order::Take => take(stream)?,
        Order::Give(time) => {
            give(stream, time)?;
            stream.shutdown(Shutdown::Write)?;
        }
        Order::Echo => echo(stream)?,
        Order::Datagrams(port, time) => {
            let sent = datagrams(stream, port, time).context("sending datagrams")?;
            send_number(stream, sent)?;
        }
    }
    Ok(())
}

/// Without what comes after it.
fn line(mut from: &TcpStream) -> io::Result<String> {
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        from.read_exact(&mut byte)?;
        if byte == *b"\n" {
            return String::from_utf8(line).map_err(io::Error::other);
        }
        line.push(byte[0]);
        if line.len() > LONGEST {
            return Err(io::Error::other("it has no end"));
        }
    }
}

fn send_number(mut to: &TcpStream, number: u64) -> io::Result<()> {
    to.write_all(&number.to_le_bytes())
}

/// Takes all there is, and says how much that was.
fn take(stream: &TcpStream) -> io::Result<()> {
    let (mut from, mut chunk, mut taken) = (stream, vec![0; CHUNK], 0);
    loop {
        match from.read(&mut chunk)? {
            0 => return send_number(stream, taken),
            count => taken += count as u64,
        }
    }
}

/// Sends as much as goes into `time`, and returns how much that was.
pub fn give(mut to: &TcpStream, time: Duration) -> io::Result<u64> {
    setsockopt(to, sockopt::SndBuf, &UNDER_WAY)?;
    let (begun, chunk, mut given) = (Instant::now(), vec![0x5a; CHUNK], 0);
    while begun.elapsed() < time {
        to.write_all(&chunk)?;
        given += chunk.len() as u64;
    }
    Ok(given)
}

fn echo(stream: &TcpStream) -> io::Result<()> {
    let (mut from, mut to, mut byte) = (stream, stream, [0]);
    while from.read(&mut byte)? > 0 {
        to.write_all(&byte)?;
    }
    Ok(())
}

fn datagrams(stream: &TcpStream, port: u16, time: Duration) -> Result<u64> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect((stream.peer_addr()?.ip(), port))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    let (begun, datagram, mut sent) = (Instant::now(), [0x5a; DATAGRAM], 0);
    while begun.elapsed() < time {
        match socket.send(&datagram) {
            Ok(_) => sent += 1,
            // The interface's queue was full.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(sent)
}
