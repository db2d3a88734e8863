//! Requests by io_uring, where the host has it: many are under way at a time, and their data goes
//! straight between the image and guest RAM.
//!
//! Only what is in order and common goes this way: reads, writes and flushes. Everything else, and what
//! the kernel does halfway or refuses, is done, or done again, by [`Disk`] on the spot.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use io_uring::{IoUring, opcode, squeue, types};
use nix::errno::Errno;
use vm_memory::{Bytes, GuestAddress};

use super::super::queue::Chain;
use super::super::scatter::Scatter;
use super::super::{Activation, Broken, Serve, Signals, VirtQueue};
use super::QUEUES;
use super::request::{Disk, Kind, S_IOERR, S_OK, Transfer};
use crate::event;
use crate::memory::GuestRam;
use crate::standstill::{Follower, Leash};
use crate::vcpu::Go;

const STACK: usize = 256 * 1024;
/// Threads of the kernel that serve one disk, for requests that have to wait.
const KERNEL_THREADS: u32 = 4;

/// The rings that the process shares with the kernel.
pub struct Uring(IoUring);

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Uring")
    }
}

impl Uring {
    /// With room for all requests of a queue. An error where the kernel has none, or forbids it.
    pub fn new() -> io::Result<Self> {
        let ring = IoUring::new(QUEUES[0].into())?;
        // An older kernel starts as many threads as it likes, which is no reason to do without.
        let _ = ring.submitter().register_iowq_max_workers(&mut [KERNEL_THREADS, KERNEL_THREADS]);
        Ok(Self(ring))
    }
}

impl AsFd for Uring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring has its descriptor open for as long as it is borrowed here.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

/// The thread. Dropping it stops it, when all that is under way is done.
#[derive(Debug)]
pub struct Running {
    leash: Arc<Leash>,
    thread: Option<JoinHandle<Uring>>,
}

impl Running {
    /// Starts serving the first queue.
    pub fn spawn(disk: Disk, ring: Uring, activation: Activation) -> io::Result<Self> {
        let leash = Leash::new(&activation.standstill)?;
        let follower = leash.follow();
        let thread = thread::Builder::new()
            .name("block".into())
            .stack_size(STACK)
            .spawn(move || work(disk, ring, activation, &follower))?;
        Ok(Self { leash, thread: Some(thread) })
    }

    /// Ends it and gives the rings back, unless it panicked.
    pub fn stop(mut self) -> Option<Uring> {
        self.join()
    }

    fn join(&mut self) -> Option<Uring> {
        self.leash.stop();
        self.thread.take().and_then(|thread| thread.join().ok())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.join();
    }
}

fn work(disk: Disk, ring: Uring, activation: Activation, follower: &Follower) -> Uring {
    let Activation { ram, queues, signals, .. } = activation;
    let Some(queue) = queues.into_iter().next().filter(VirtQueue::is_ready) else {
        follower.idle();
        return ring;
    };
    let slots = (0..QUEUES[0]).map(|_| None).collect();
    let mut engine =
        Engine { ring, disk, queue, signals, slots, free: (0..QUEUES[0]).collect(), spare: Vec::new(), ram };
    let served = engine.serve(follower);
    // The kernel must be done with the guest's memory before anybody else may have it.
    engine.drain();
    if let Err(error) = served {
        log::warn!("block: {error}");
        engine.signals.needs_reset();
        // The queue is not looked at again; the driver's reset is what comes next.
        follower.idle();
    }
    engine.ring
}

/// A request that the kernel works on.
struct Pending {
    chain: Chain,
    transfer: Transfer,
}

struct Engine {
    ring: Uring,
    disk: Disk,
    queue: VirtQueue,
    signals: Arc<Signals>,
    /// By the number that the kernel knows it by.
    slots: Vec<Option<Pending>>,
    free: Vec<u16>,
    /// Lists of memory that are not in use, to be used again.
    spare: Vec<Scatter>,
    ram: Arc<GuestRam>,
}

impl Engine {
    fn serve(&mut self, follower: &Follower) -> Result<(), Broken> {
        while follower.checkpoint() == Go::On {
            loop {
                let wait = self.take()?;
                self.submit(0)?;
                self.reap()?;
                self.queue.notify(&self.signals)?;
                if self.wait(follower, wait).map_err(|error| Broken(format!("poll: {error}")))? {
                    break;
                }
                self.reap()?;
            }
            self.drain();
        }
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Waits for anything to do. True when a checkpoint is due.
    fn wait(&self, follower: &Follower, limit: Option<Duration>) -> io::Result<bool> {
        let mut fds = follower.fds().to_vec();
        if self.in_flight() > 0 {
            fds.push(self.ring.as_fd());
        }
        if limit.is_none() && !self.free.is_empty() {
            fds.push(self.queue.doorbell().as_fd());
        }
        Ok(event::wait_readable_for(&fds, limit)?[..2].contains(&true))
    }

    /// Takes what is in the queue, as far as there is room for it. Says how long the rest has to wait for
    /// a rate limit.
    fn take(&mut self) -> Result<Option<Duration>, Broken> {
        self.queue.doorbell().take();
        self.queue.disable_doorbell()?;
        for _ in 0..self.queue.size() {
            let wait = self.disk.wait();
            if wait.is_some() {
                return Ok(wait);
            }
            if self.free.is_empty() {
                break;
            }
            let Some(chain) = self.queue.pop()? else {
                if self.queue.enable_doorbell()? {
                    continue;
                }
                return Ok(None);
            };
            self.begin(chain)?;
        }
        // There may be more: the answers, and the stop, get a turn first.
        self.queue.doorbell().set();
        Ok(None)
    }

    fn begin(&mut self, chain: Chain) -> Result<(), Broken> {
        let scatter = self.spare.pop().unwrap_or_else(|| Scatter::new(Arc::clone(&self.ram)));
        let transfer = match self.disk.plan(&chain, scatter) {
            Ok(transfer) => transfer,
            Err(scatter) => {
                self.spare.push(scatter);
                return self.on_the_spot(chain);
            }
        };
        let Some(slot) = self.free.pop() else { return self.on_the_spot(chain) };
        let place = &mut self.slots[usize::from(slot)];
        let pending = place.insert(Pending { chain, transfer });
        let entry = entry(self.disk.fd(), &mut pending.transfer).user_data(slot.into());
        // SAFETY: the entry's pointers are to a list in `self.slots` and to guest RAM that the list keeps;
        // neither is touched before the entry's completion has been seen, and `drain` sees all of them
        // before the engine is gone. The file is open for as long, in `self.disk`.
        let pushed = unsafe { self.ring.0.submission().push(&entry) };
        self.disk.charge(&pending.transfer);
        // The ring has as many entries as there are slots.
        pushed.map_err(|_| Broken("io_uring has no room".into()))
    }

    fn on_the_spot(&mut self, chain: Chain) -> Result<(), Broken> {
        let head = chain.head_index();
        let len = self.disk.serve(0, chain)?;
        self.queue.push(head, len)
    }

    /// Tells the kernel about new requests, and waits for that many to be done.
    fn submit(&mut self, want: usize) -> Result<(), Broken> {
        while !self.ring.0.submission().is_empty() || want > 0 {
            match self.ring.0.submit_and_wait(want) {
                Ok(_) => return Ok(()),
                Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                    Some(Errno::EINTR) => {}
                    // The kernel is short of something: it has to finish others first.
                    Some(Errno::EAGAIN | Errno::EBUSY) => thread::sleep(Duration::from_millis(1)),
                    _ => return Err(Broken(format!("io_uring: {error}"))),
                },
            }
        }
        Ok(())
    }

    /// Answers what is done.
    fn reap(&mut self) -> Result<(), Broken> {
        loop {
            let completion = self.ring.0.completion().next();
            let Some(completion) = completion else { return Ok(()) };
            let slot = completion.user_data() as u16;
            let Some(pending) = self.slots.get_mut(usize::from(slot)).and_then(Option::take) else {
                continue;
            };
            self.free.push(slot);
            self.finish(pending, completion.result())?;
        }
    }

    fn finish(&mut self, pending: Pending, result: i32) -> Result<(), Broken> {
        let Pending { chain, transfer } = pending;
        let Transfer { kind, status, len, mut scatter, .. } = transfer;
        scatter.clear();
        self.spare.push(scatter);
        let done = i64::from(result) == i64::from(len);
        if !done && kind != Kind::Flush {
            // Doing it again is the same, and says what is wrong.
            return self.on_the_spot(chain);
        }
        // The kernel tells of data that it has lost once; a second flush would succeed.
        let code = if done { S_OK } else { S_IOERR };
        if done {
            self.disk.count(kind, len);
        } else {
            self.disk.count_failure();
        }
        self.ram.write_obj(code, GuestAddress(status))?;
        let written = if kind == Kind::Read { len } else { 0 };
        self.queue.push(chain.head_index(), written + 1)
    }

    /// Waits until the kernel is done with everything. Only answers that nobody broke are given.
    fn drain(&mut self) {
        while self.in_flight() > 0 {
            if let Err(error) = self.submit(1) {
                // What cannot be waited for cannot be given up either: the memory may be written to.
                log::error!("block: {error}");
                thread::sleep(Duration::from_secs(1));
            }
            // A slot is free again whether or not its answer could be given.
            while self.reap().is_err() {}
        }
        let _ = self.queue.notify(&self.signals);
    }
}

fn entry(fd: i32, transfer: &mut Transfer) -> squeue::Entry {
    let fd = types::Fd(fd);
    let at = transfer.at;
    let parts = transfer.scatter.call_parts();
    // At most PARTS_MAX.
    let (list, count) = (parts.as_ptr(), parts.len() as u32);
    match transfer.kind {
        Kind::Read => opcode::Readv::new(fd, list, count).offset(at).build(),
        Kind::Write => opcode::Writev::new(fd, list, count).offset(at).build(),
        Kind::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
    }
}

#[cfg(test)]
mod tests;
