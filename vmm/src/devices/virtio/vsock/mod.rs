//! The socket device, section 5.10: streams between guest and host.
//!
//! `packet` is the wire, `connection` one stream with its credit, `muxer` all streams of a
//! guest; here they meet the queues. The host's end of each stream is a unix socket, so the same
//! device serves hosts without a vsock of their own.

mod connection;
mod gate;
mod muxer;
mod packet;

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use virtio_queue::{Reader, Writer};

use super::queue::Chain;
use super::state::{decode, encode};
use super::{ActivateError, Activation, Broken, Device, Signals, StateError, VirtQueue};
use crate::entropy;
use crate::memory::RamSlice;
use crate::standstill::{Follower, Leash};
use crate::vcpu::Go;

use gate::Gate;
use muxer::{FIRST_HOST_PORT, Muxer, Source};
use packet::{HEADER, Header, op};

const KIND: u32 = 19;
const QUEUES: [u16; 3] = [256, 256, 64];
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
/// The most data of one packet, in either direction.
const DATA_MAX: usize = 64 * 1024;
/// The socket in the directory to which hosts connect.
pub const SOCKET: &str = "vsock";
const STACK: usize = 512 * 1024;

/// The device.
#[derive(Debug)]
pub struct Vsock {
    cid: u64,
    directory: PathBuf,
    listener: Arc<UnixListener>,
    worker: Option<(Arc<Leash>, JoinHandle<()>)>,
    /// The driver that will be served has streams of another machine's.
    moved: bool,
}

/// Streams are not saved: their other ends are sockets of the host's, which are gone where the guest goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct State {
    /// A driver was at work, which may have had some.
    active: bool,
}

impl Vsock {
    /// For the guest with context id `cid`, whose host's side is in `directory`.
    pub fn new(cid: u64, directory: &Path) -> io::Result<Self> {
        let path = directory.join(SOCKET);
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            cid,
            directory: directory.to_owned(),
            listener: Arc::new(listener),
            worker: None,
            moved: false,
        })
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.reset();
        // Whoever removed it before us did no harm.
        let _ = fs::remove_file(self.directory.join(SOCKET));
    }
}

impl Device for Vsock {
    fn kind(&self) -> u32 {
        KIND
    }

    fn queues(&self) -> &[u16] {
        &QUEUES
    }

    fn configuration(&self) -> Vec<u8> {
        self.cid.to_le_bytes().to_vec()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let failed = |source| ActivateError { device: "vsock", source };
        let leash = Leash::new(&activation.standstill).map_err(failed)?;
        let mut random = [0; 4];
        entropy::fill(&mut random).map_err(failed)?;
        let first_port = FIRST_HOST_PORT + u32::from_ne_bytes(random) % FIRST_HOST_PORT;
        let work = Work {
            muxer: Muxer::new(self.cid, &self.directory, first_port),
            gate: Gate::new(std::mem::take(&mut self.moved)),
            listener: Arc::clone(&self.listener),
            follower: leash.follow(),
            buffer: vec![0; DATA_MAX],
            starved: false,
        };
        let thread = thread::Builder::new()
            .name("vsock".into())
            .stack_size(STACK)
            .spawn(move || work.run(activation))
            .map_err(failed)?;
        self.worker = Some((leash, thread));
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        encode(&State { active: self.worker.is_some() })
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        let State { active } = decode(state)?;
        self.moved = active;
        Ok(())
    }

    fn reset(&mut self) {
        self.moved = false;
        if let Some((leash, thread)) = self.worker.take() {
            leash.stop();
            // A panic has been reported by itself; the thread is gone either way.
            let _ = thread.join();
        }
    }
}

struct Work {
    muxer: Muxer,
    gate: Gate,
    listener: Arc<UnixListener>,
    follower: Follower,
    buffer: Vec<u8>,
    /// The guest has no buffer for us: nothing is read from hosts until it rings.
    starved: bool,
}

impl Work {
    fn run(mut self, activation: Activation) {
        let Activation { mut queues, signals, .. } = activation;
        if let Err(error) = self.serve(&mut queues, &signals) {
            log::warn!("vsock: {error}");
            signals.needs_reset();
            self.follower.idle();
        }
    }

    fn serve(&mut self, queues: &mut [VirtQueue], signals: &Signals) -> Result<(), Broken> {
        while self.follower.checkpoint() == Go::On {
            let [rx, tx, events] = &mut *queues else { return Err(Broken("it has three queues".into())) };
            if self.gate.pass(events, tx, signals)? {
                self.serve_tx(tx, signals)?;
                self.serve_rx(rx, signals)?;
            }
            let happened = self.wait(queues).map_err(|error| Broken(format!("poll: {error}")))?;
            for (source, flags) in happened {
                self.muxer.happened(source, flags);
            }
        }
        Ok(())
    }

    /// Waits for anything to do, and says what happened on hosts' sockets.
    fn wait(&mut self, queues: &[VirtQueue]) -> io::Result<Vec<(Source, PollFlags)>> {
        const FIXED: usize = 6;
        let (accepts, rings, happened) = {
            let open = self.gate.is_open();
            let watched = self.muxer.watched(!self.starved);
            let input = |fd| PollFd::new(fd, PollFlags::POLLIN);
            let only = |now, fd| PollFd::new(fd, if now { PollFlags::POLLIN } else { PollFlags::empty() });
            let mut fds = Vec::with_capacity(FIXED + watched.len());
            // Hosts wait in the listener's backlog meanwhile.
            fds.push(only(open, self.listener.as_fd()));
            fds.push(input(queues[RX].doorbell().as_fd()));
            fds.push(input(queues[TX].doorbell().as_fd()));
            fds.push(only(!open, queues[EVENT].doorbell().as_fd()));
            fds.extend(self.follower.fds().map(input));
            fds.extend(watched.iter().map(|(_, fd, flags)| PollFd::new(*fd, *flags)));
            while let Err(error) = poll(&mut fds, PollTimeout::NONE) {
                if error != Errno::EINTR {
                    return Err(error.into());
                }
            }
            let any = |index: usize| fds[index].any().unwrap_or(true);
            let happened = watched.iter().zip(&fds[FIXED..]).filter_map(|((source, ..), fd)| {
                let flags = fd.revents().unwrap_or(PollFlags::POLLERR);
                (!flags.is_empty()).then_some((*source, flags))
            });
            (any(0), (any(1), any(2), any(3)), happened.collect())
        };
        if rings.0 {
            queues[RX].doorbell().take();
            self.starved = false;
        }
        if rings.1 {
            queues[TX].doorbell().take();
        }
        if rings.2 {
            queues[EVENT].doorbell().take();
        }
        if accepts {
            // One at a time; the others make the next wait end at once.
            match self.listener.accept() {
                Ok((stream, _)) => self.muxer.welcome(stream),
                Err(error) => log::debug!("vsock: accept: {error}"),
            }
        }
        Ok(happened)
    }

    fn serve_tx(&mut self, queue: &mut VirtQueue, signals: &Signals) -> Result<(), Broken> {
        if !queue.is_ready() {
            return Ok(());
        }
        for _ in 0..queue.size() {
            if self.muxer.is_full() {
                break;
            }
            let Some(chain) = queue.pop()? else {
                if queue.enable_doorbell()? {
                    continue;
                }
                return queue.notify(signals);
            };
            let head = chain.head_index();
            let stale = self.gate.is_stale();
            self.packet(chain, stale)?;
            queue.push(head, 0)?;
        }
        // Hosts and the other queue get their turn before the rest.
        queue.doorbell().set();
        queue.notify(signals)
    }

    /// Takes a packet. A stale one is about streams that are no more, unless it asks for one.
    fn packet(&mut self, chain: Chain, stale: bool) -> Result<(), Broken> {
        let ram = chain.memory().clone();
        let mut reader: Reader<'_, RamSlice<'_>> = chain.reader(&ram)?;
        let mut header = [0; HEADER];
        reader.read_exact(&mut header).map_err(|error| Broken(format!("a packet's header: {error}")))?;
        let header = Header::from_bytes(&header);
        let len = header.len as usize;
        if len > DATA_MAX || len > reader.available_bytes() {
            return Err(Broken(format!("a packet of {len} bytes in a smaller buffer")));
        }
        let data = &mut self.buffer[..len];
        reader.read_exact(data).map_err(|error| Broken(format!("a packet's data: {error}")))?;
        if !stale || header.op == op::REQUEST {
            self.muxer.take(&header, data);
        }
        Ok(())
    }

    fn serve_rx(&mut self, queue: &mut VirtQueue, signals: &Signals) -> Result<(), Broken> {
        if !queue.is_ready() {
            return Ok(());
        }
        let mut left = queue.size();
        while self.muxer.has_output() && left > 0 {
            let Some(chain) = queue.pop()? else {
                if queue.enable_doorbell()? {
                    continue;
                }
                self.starved = true;
                break;
            };
            let head = chain.head_index();
            let ram = chain.memory().clone();
            let mut writer: Writer<'_, RamSlice<'_>> = chain.writer(&ram)?;
            let room = writer.available_bytes().checked_sub(HEADER);
            let room = room.ok_or_else(|| Broken("a buffer smaller than a packet's header".into()))?;
            // A read into no room would look like the end of a stream.
            if room == 0 {
                return Err(Broken("a buffer without room for data".into()));
            }
            let room = room.min(DATA_MAX);
            let Some((header, len)) = self.muxer.next(&mut self.buffer[..room]) else {
                queue.unpop();
                break;
            };
            writer
                .write_all(&header.to_bytes())
                .and_then(|()| writer.write_all(&self.buffer[..len]))
                .map_err(|error| Broken(format!("a packet for the guest: {error}")))?;
            // A header and at most DATA_MAX.
            queue.push(head, (HEADER + len) as u32)?;
            left -= 1;
        }
        if left == 0 {
            queue.doorbell().set();
        }
        queue.notify(signals)
    }
}

#[cfg(test)]
mod tests;
