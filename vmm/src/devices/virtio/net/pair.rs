//! One queue pair: a thread that moves packets between its two queues and its cable; between those and a tap, each
//! packet by one call, straight between the kernel and guest RAM.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags};

use super::super::limit::Limiter;
use super::super::scatter::{PARTS_MAX, Part, Scatter};
use super::super::{Broken, Signals, VirtQueue};
use super::cable::{Cable, Moved};
use super::port::Port;
use super::tap::{self, Tap};
use super::vhost::{self, Lent};
use super::{F_MRG_RXBUF, Shared};
use crate::event;
use crate::memory::GuestRam;
use crate::standstill::{Follower, Leash, Standstill};
use crate::vcpu::Go;

const STACK: usize = 256 * 1024;
/// Packets to the guest before those from it get their turn.
const BURST: usize = 64;
/// How often a tap that the kernel serves is asked whether it is still there. Whoever waits for it to say so by itself is
/// woken by each packet.
const TAP_IS_THERE: Duration = Duration::from_secs(2);
/// No packet is larger: what segmentation can handle, with Ethernet and VLAN headers.
const PACKET_MAX: u64 = HEADER + 18 + 65535;
/// Bytes before each packet.
const HEADER: u64 = tap::HEADER as u64;
/// Where `num_buffers` is in the header.
const NUM_BUFFERS: usize = 10;

/// What a pair works with.
pub struct Pair {
    /// The host's side.
    pub port: Arc<Port>,
    /// Guest RAM.
    pub ram: Arc<GuestRam>,
    /// Link and counters.
    pub shared: Arc<Shared>,
    /// The way to the driver.
    pub signals: Arc<Signals>,
    /// Limits of what goes to the guest.
    pub rx_limit: Limiter,
    /// Limits of what comes from the guest.
    pub tx_limit: Limiter,
    /// What both sides have agreed on.
    pub features: u64,
    /// The largest packet that a tap hands over, with its header.
    pub packet_max: u64,
    /// Of the thread.
    pub name: String,
}

/// The thread of a pair. Dropping it stops it.
#[derive(Debug)]
pub struct Running {
    leash: Arc<Leash>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.leash.stop();
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by itself; the thread is gone either way.
            let _ = thread.join();
        }
    }
}

impl Pair {
    /// A packet may fill several buffers.
    fn mergeable(&self) -> bool {
        self.features & F_MRG_RXBUF != 0
    }

    /// Starts moving packets; those to the guest come only when its port is on.
    pub fn spawn(self, rx: VirtQueue, tx: VirtQueue, standstill: &Arc<Standstill>) -> io::Result<Running> {
        let leash = Leash::new(standstill)?;
        let follower = leash.follow();
        let thread = thread::Builder::new()
            .name(self.name.clone())
            .stack_size(STACK)
            .spawn(move || Mover::new(self, rx, tx, follower).run())?;
        Ok(Running { leash, thread: Some(thread) })
    }
}

/// A buffer of the driver that waits for a packet.
#[derive(Debug, Clone, Copy)]
struct Buffer {
    head: u16,
    parts: usize,
    bytes: u64,
}

/// Why the kernel is to leave queues alone.
#[derive(Debug, Clone, Copy)]
enum Ended {
    /// A checkpoint is due.
    Due,
    /// Something of the port is different.
    Port,
    /// The tap is gone.
    Gone,
    /// The driver has broken the rules.
    Broken,
}

struct Mover {
    pair: Pair,
    rx: VirtQueue,
    tx: VirtQueue,
    follower: Follower,
    /// None while there is none, and when its other end is gone.
    cable: Option<Arc<Cable>>,
    /// Buffers taken from the ring for packets to come, and their memory, in the same order.
    buffers: VecDeque<Buffer>,
    room: Scatter,
    packet: Scatter,
    used: Vec<(u16, u32)>,
    /// The guest has no buffer for a packet: the cable is left alone until it rings.
    starved: bool,
    /// The cable takes no packet: the guest is left alone until it does.
    full: bool,
    /// The kernel does not serve the queues on this cable.
    unserved: bool,
}

impl Mover {
    fn new(pair: Pair, rx: VirtQueue, tx: VirtQueue, follower: Follower) -> Self {
        let (room, packet) = (Scatter::new(Arc::clone(&pair.ram)), Scatter::new(Arc::clone(&pair.ram)));
        let cable = pair.port.cable();
        Self {
            pair,
            rx,
            tx,
            follower,
            cable,
            buffers: VecDeque::new(),
            room,
            packet,
            used: Vec::new(),
            starved: false,
            full: false,
            unserved: false,
        }
    }

    fn run(mut self) {
        if let Err(error) = self.serve() {
            log::warn!("{}: {error}", self.pair.name);
            self.pair.signals.needs_reset();
            self.put_back();
            // The queues are not looked at again; the driver's reset is what comes next.
            self.follower.idle();
        }
    }

    fn serve(&mut self) -> Result<(), Broken> {
        while self.follower.checkpoint() == Go::On {
            if self.lend()? {
                continue;
            }
            loop {
                let tx_wait = self.transmit()?;
                let rx_wait = self.receive()?;
                if self.wait(rx_wait, tx_wait).map_err(|error| Broken(format!("poll: {error}")))? {
                    break;
                }
            }
            self.put_back();
        }
        Ok(())
    }

    /// The ring says again what it would say if nobody had looked ahead.
    fn put_back(&mut self) {
        for _ in self.buffers.drain(..) {
            self.rx.unpop();
        }
        self.room.clear();
        self.starved = false;
    }

    fn look_at_port(&mut self) {
        self.pair.port.changed().take();
        self.cable = self.pair.port.cable();
        self.full = false;
        self.unserved = false;
    }

    /// Lets the kernel serve the queues, if it can, until a checkpoint is due, or all is to be looked at again. False when
    /// they have to be served here.
    fn lend(&mut self) -> Result<bool, Broken> {
        let limited = self.pair.rx_limit.is_limited() || self.pair.tx_limit.is_limited();
        let here = self.unserved || limited || !self.pair.port.is_on() || !self.pair.shared.link();
        let Some(cable) = self.cable.clone().filter(|_| !here) else { return Ok(false) };
        let Cable::Tap(tap) = &*cable else { return Ok(false) };
        let Some(device) = tap.vhost() else { return Ok(false) };
        let queues = [&self.rx, &self.tx];
        let lent = Lent::new(device, &self.pair.ram, queues, self.pair.features, &self.pair.signals);
        let served = lent.and_then(|lent| {
            let started = lent.start(tap.as_fd());
            let waited = started.as_ref().ok().map(|()| self.wait_for_kernel(&lent, tap));
            Ok((started, waited, lent.end()?))
        });
        let (started, waited, [rx, tx]) = match served {
            Ok(served) => served,
            Err(error @ vhost::Error::Lost(_)) => return Err(Broken(error.to_string())),
            Err(error) => return Ok(self.serve_here(&error)),
        };
        self.rx.go_on_from(rx);
        self.tx.go_on_from(tx);
        if let Err(error) = started {
            return Ok(self.serve_here(&error));
        }
        match waited.transpose().map_err(|error| Broken(format!("poll: {error}")))? {
            Some(Ended::Broken) => return Err(Broken("what the kernel found in it".into())),
            Some(Ended::Port) => self.look_at_port(),
            Some(Ended::Gone) => self.lose(tap::GONE),
            Some(Ended::Due) | None => {}
        }
        Ok(true)
    }

    fn serve_here(&mut self, why: &vhost::Error) -> bool {
        log::info!("{}: its packets go through this process, not through vhost-net: {why}", self.pair.name);
        self.unserved = true;
        false
    }

    /// Waits until the kernel is to leave the queues alone.
    fn wait_for_kernel(&self, lent: &Lent<'_>, tap: &Tap) -> io::Result<Ended> {
        let [stop, pause] = self.follower.fds();
        let input = PollFlags::POLLIN;
        let polled = [
            (lent.trouble(), input, Ended::Broken),
            (stop, input, Ended::Due),
            (pause, input, Ended::Due),
            (self.pair.port.changed().as_fd(), input, Ended::Port),
            // It says only that it is gone, and that not before it is asked.
            (tap.as_fd(), PollFlags::empty(), Ended::Gone),
        ];
        let mut fds = polled.map(|(fd, flags, _)| PollFd::new(fd, flags));
        loop {
            event::wait(&mut fds, Some(TAP_IS_THERE))?;
            let happened = |fd: &PollFd<'_>| fd.revents().is_none_or(|flags| !flags.is_empty());
            if let Some(which) = fds.iter().position(happened) {
                return Ok(polled[which].2);
            }
        }
    }

    /// Waits for anything to do. True when a checkpoint is due, or all is to be looked at again.
    fn wait(&mut self, rx_wait: Option<Duration>, tx_wait: Option<Duration>) -> io::Result<bool> {
        let on = self.pair.port.is_on();
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::POLLIN, on && !self.starved && rx_wait.is_none());
        wanted.set(PollFlags::POLLOUT, on && self.full);
        let input = |event: &'static str| (event, PollFlags::POLLIN);
        let [stop, pause] = self.follower.fds();
        let mut names = vec![input("checkpoint"), input("checkpoint"), input("port")];
        let mut fds = vec![stop, pause, self.pair.port.changed().as_fd()];
        if self.starved {
            names.push(input("rx"));
            fds.push(self.rx.doorbell().as_fd());
        }
        if !self.full && tx_wait.is_none() {
            names.push(input("tx"));
            fds.push(self.tx.doorbell().as_fd());
        }
        // Without a wish it could still report an error, for ever.
        let cable = self.cable.as_ref().filter(|_| !wanted.is_empty());
        let mut until = rx_wait.into_iter().chain(tx_wait).min();
        if let Some(cable) = cable {
            names.push(("cable", wanted));
            fds.push(cable.as_fd());
            if wanted.contains(PollFlags::POLLIN) && cable.holds_packet() {
                until = Some(Duration::ZERO);
            }
        }
        let mut polled: Vec<_> =
            fds.into_iter().zip(&names).map(|(fd, (_, flags))| PollFd::new(fd, *flags)).collect();
        event::wait(&mut polled, until)?;
        let happened: Vec<PollFlags> =
            polled.iter().map(|fd| fd.revents().unwrap_or(PollFlags::POLLERR)).collect();
        drop(polled);
        for ((name, _), flags) in names.iter().zip(happened) {
            match *name {
                _ if flags.is_empty() => {}
                "checkpoint" => return Ok(true),
                "port" => {
                    self.look_at_port();
                    return Ok(true);
                }
                "rx" => {
                    self.rx.doorbell().take();
                    self.starved = false;
                }
                "tx" => drop(self.tx.doorbell().take()),
                _ => self.full = false,
            }
        }
        Ok(false)
    }

    /// Moves packets from the guest. Says how long the next has to wait for a rate limit.
    fn transmit(&mut self) -> Result<Option<Duration>, Broken> {
        self.full = self.full || !self.flush();
        if self.full {
            return Ok(None);
        }
        self.tx.disable_doorbell()?;
        let mut left = self.tx.size();
        let mut wait = None;
        loop {
            wait = wait.or_else(|| self.pair.tx_limit.wait());
            if wait.is_some() {
                self.pair.shared.counters.tx.throttled();
                break;
            }
            if left == 0 {
                // More than a queue full: the other direction, and the stop, get a turn first.
                self.tx.doorbell().set();
                break;
            }
            let Some(chain) = self.tx.pop()? else {
                if self.tx.enable_doorbell()? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            self.packet.clear();
            self.packet.add(chain, Part::Readable)?;
            if !self.send()? {
                self.tx.unpop();
                self.full = true;
                break;
            }
            self.tx.push(head, 0)?;
            left -= 1;
            if !self.flush() {
                self.full = true;
                break;
            }
        }
        self.packet.clear();
        self.tx.notify(&self.pair.signals)?;
        Ok(wait)
    }

    /// False when the cable is still busy with what it has taken.
    fn flush(&self) -> bool {
        self.cable.as_ref().is_none_or(|cable| cable.flush())
    }

    /// Sends the packet, or drops it. False when it has to be tried again.
    fn send(&mut self) -> Result<bool, Broken> {
        let bytes = self.packet.bytes();
        if bytes < HEADER {
            return Err(Broken(format!("a packet of {bytes} bytes, shorter than its header")));
        }
        let counters = &self.pair.shared.counters.tx;
        let cable = self.cable.as_ref().filter(|_| bytes <= PACKET_MAX && self.pair.shared.link());
        let Some(cable) = cable else {
            counters.dropped();
            return Ok(true);
        };
        match cable.send(&mut self.packet) {
            Moved::Bytes(_) => {
                counters.packet(bytes - HEADER);
                self.pair.tx_limit.charge(bytes);
            }
            Moved::NotNow => return Ok(false),
            Moved::Refused => counters.dropped(),
            Moved::Gone(why) => {
                counters.dropped();
                self.lose(&why);
            }
        }
        Ok(true)
    }

    /// Moves packets to the guest. Says how long the next has to wait for a rate limit.
    fn receive(&mut self) -> Result<Option<Duration>, Broken> {
        let mut wait = None;
        for _ in 0..BURST {
            if self.cable.is_none() || !self.pair.port.is_on() {
                break;
            }
            wait = self.pair.rx_limit.wait();
            if wait.is_some() {
                self.pair.shared.counters.rx.throttled();
                break;
            }
            self.starved = !self.stock_up()?;
            if self.starved {
                break;
            }
            let Some(cable) = &self.cable else { break };
            match cable.receive(&mut self.room) {
                Moved::Bytes(bytes) => self.deliver(bytes as u64)?,
                Moved::NotNow => break,
                Moved::Refused => self.pair.shared.counters.rx.dropped(),
                Moved::Gone(why) => self.lose(&why),
            }
        }
        self.rx.notify(&self.pair.signals)?;
        Ok(wait)
    }

    /// Takes buffers until the largest packet has room. False when the driver has to provide more.
    fn stock_up(&mut self) -> Result<bool, Broken> {
        let wanted = if self.pair.mergeable() { self.pair.packet_max } else { 1 };
        while self.room.bytes() < wanted && self.room.parts() < PARTS_MAX {
            let Some(chain) = self.rx.pop()? else {
                if self.rx.enable_doorbell()? {
                    continue;
                }
                // A driver that has no more than this gets what fits.
                return Ok(self.buffers.len() == usize::from(self.rx.size()));
            };
            let head = chain.head_index();
            let (parts, bytes) = self.room.add(chain, Part::Writable)?;
            if bytes < HEADER {
                return Err(Broken(format!("a buffer of {bytes} bytes, shorter than a packet's header")));
            }
            self.buffers.push_back(Buffer { head, parts, bytes });
        }
        self.rx.disable_doorbell()?;
        Ok(true)
    }

    /// Hands over the packet that is in the buffers.
    fn deliver(&mut self, bytes: u64) -> Result<(), Broken> {
        let counters = &self.pair.shared.counters.rx;
        if bytes < HEADER || !self.pair.shared.link() {
            counters.dropped();
            return Ok(());
        }
        counters.packet(bytes - HEADER);
        self.pair.rx_limit.charge(bytes);
        let (mut left, mut parts) = (bytes, 0);
        self.used.clear();
        while left > 0
            && let Some(buffer) = self.buffers.pop_front()
        {
            let len = buffer.bytes.min(left);
            left -= len;
            parts += buffer.parts;
            // No longer than a packet.
            self.used.push((buffer.head, len as u32));
        }
        // No more buffers than a ring has.
        let count = self.used.len() as u16;
        self.room.put(NUM_BUFFERS, &count.to_le_bytes());
        self.room.consume(parts);
        self.rx.push_together(&self.used)
    }

    fn lose(&mut self, why: &str) {
        log::warn!("{}: {why}; the link is down", self.pair.name);
        if let Some(cable) = self.cable.take() {
            self.pair.port.unplug(&cable);
        }
        self.pair.shared.set_link(false);
    }
}

#[cfg(test)]
mod tests;
