//! As many streams to the host as there can be, and as much in them as they take.

use std::io::{ErrorKind, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};

/// The host, to a guest.
const HOST: u32 = 2;
/// Streams of a thread that are open at a time.
const OPEN: usize = 200;
/// For one connection, and for a stream that takes nothing.
const PATIENCE: Duration = Duration::from_millis(200);

/// So many threads connect to `ports` for so many seconds.
pub fn run(threads: u64, seconds: u64, ports: &[u32]) -> Result<()> {
    if ports.is_empty() {
        bail!("no port to flood");
    }
    let ends = Instant::now() + Duration::from_secs(seconds);
    let counts = thread::scope(|scope| {
        let flooding: Vec<_> = (0..threads).map(|_| scope.spawn(|| flood(ends, ports))).collect();
        flooding.into_iter().map(|thread| thread.join().unwrap_or_default()).collect::<Vec<_>>()
    });
    let sum = |of: fn(&Counts) -> u64| counts.iter().map(of).sum::<u64>();
    println!("{} streams, {} refused, {} bytes", sum(|c| c.streams), sum(|c| c.refused), sum(|c| c.bytes));
    Ok(())
}

#[derive(Default)]
struct Counts {
    streams: u64,
    refused: u64,
    bytes: u64,
}

fn flood(ends: Instant, ports: &[u32]) -> Counts {
    let (mut counts, mut open) = (Counts::default(), Vec::new());
    let bytes = [0x5a; 16 << 10];
    for port in ports.iter().cycle() {
        if Instant::now() >= ends {
            break;
        }
        match stream(*port) {
            Ok(stream) => {
                counts.streams += 1;
                while let Ok(count) = (&stream).write(&bytes) {
                    counts.bytes += count as u64;
                    if Instant::now() >= ends {
                        break;
                    }
                }
                open.push(stream);
            }
            Err(_) => counts.refused += 1,
        }
        if open.len() == OPEN {
            // All at once: a storm of shutdowns.
            open.clear();
        }
    }
    counts
}

fn stream(port: u32) -> std::io::Result<UnixStream> {
    let fd: OwnedFd = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let begun = Instant::now();
    connect(fd.as_raw_fd(), &VsockAddr::new(HOST, port))?;
    let stream = UnixStream::from(fd);
    stream.set_write_timeout(Some(PATIENCE))?;
    if begun.elapsed() > PATIENCE * 10 {
        return Err(ErrorKind::TimedOut.into());
    }
    Ok(stream)
}
