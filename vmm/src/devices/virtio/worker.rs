//! A thread that serves the queues of one device, for devices that need nothing but queues; and a queue that needs no
//! thread.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::queue::Chain;
use super::{Activation, Broken, Signals, VirtQueue};
use crate::event::{wait_readable, wait_readable_for};
use crate::standstill::{Follower, Leash};
use crate::vcpu::Go;

const STACK: usize = 256 * 1024;

/// What a device does with a request.
pub trait Serve: Send + 'static {
    /// Readies the thread that will serve.
    fn begin(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// How long requests have to stay in their queues, for a rate limit; without one, or when it has
    /// something left, they need not.
    fn wait(&mut self) -> Option<Duration> {
        None
    }

    /// Serves one request of queue `index` and says how many bytes it wrote into it. Must come to an
    /// end by itself: a reset of the device, and a pause of the machine, wait for it.
    fn serve(&mut self, index: usize, chain: Chain) -> Result<u32, Broken>;
}

/// Serves one queue where its driver rings, on that processor: requests that are rare, and done soon, are worth no thread.
#[derive(Debug)]
pub struct AtOnce<S> {
    server: S,
    queue: VirtQueue,
    signals: Arc<Signals>,
    broken: bool,
}

impl<S: Serve> AtOnce<S> {
    /// Serves when it [rings](Self::rung).
    pub fn new(server: S, queue: VirtQueue, signals: Arc<Signals>) -> Self {
        Self { server, queue, signals, broken: false }
    }

    /// Serves what is there.
    pub fn rung(&mut self) {
        if self.broken {
            return;
        }
        if let Err(error) = self.serve() {
            log::warn!("a queue that is served at once: {error}");
            self.signals.needs_reset();
            // It is not looked at again; the driver's reset is what comes next.
            self.broken = true;
        }
    }

    fn serve(&mut self) -> Result<(), Broken> {
        // The second turn finds that there was no more than the queue holds.
        for _ in 0..2 {
            if !serve_all(&mut self.server, 0, &mut self.queue, &self.signals)? {
                return Ok(());
            }
        }
        Err(Broken("requests without an end".into()))
    }
}

/// The thread. Dropping it stops it.
#[derive(Debug)]
pub struct Worker<S> {
    leash: Arc<Leash>,
    thread: Option<JoinHandle<S>>,
}

impl<S: Serve> Worker<S> {
    /// Starts serving. Requests that are there already are served at once.
    pub fn spawn(name: &str, server: S, activation: Activation) -> io::Result<Self> {
        let leash = Leash::new(&activation.standstill)?;
        let follower = leash.follow();
        let thread = thread::Builder::new()
            .name(name.into())
            .stack_size(STACK)
            .spawn(move || work(server, activation, &follower))?;
        Ok(Self { leash, thread: Some(thread) })
    }

    /// Ends after the request that is under way and gives the server back, unless it panicked.
    pub fn stop(mut self) -> Option<S> {
        self.join()
    }
}

impl<S> Worker<S> {
    fn join(&mut self) -> Option<S> {
        self.leash.stop();
        self.thread.take().and_then(|thread| thread.join().ok())
    }
}

impl<S> Drop for Worker<S> {
    fn drop(&mut self) {
        self.join();
    }
}

fn work<S: Serve>(mut server: S, activation: Activation, follower: &Follower) -> S {
    let Activation { mut queues, signals, .. } = activation;
    let begun = server.begin().map_err(|error| Broken(format!("its thread could not be readied: {error}")));
    if let Err(error) = begun.and_then(|()| serve_until(&mut server, &mut queues, &signals, follower)) {
        log::warn!("{}: {error}", thread::current().name().unwrap_or("virtio"));
        signals.needs_reset();
        // The queues are not looked at again; the driver's reset is what comes next.
        follower.idle();
    }
    server
}

fn serve_until<S: Serve>(
    server: &mut S,
    queues: &mut [VirtQueue],
    signals: &Signals,
    follower: &Follower,
) -> Result<(), Broken> {
    let mut due: Vec<bool> = vec![true; queues.len()];
    while follower.checkpoint() == Go::On {
        if let Some(wait) = server.wait() {
            wait_readable_for(&follower.fds(), Some(wait))
                .map_err(|error| Broken(format!("its deadline: {error}")))?;
            continue;
        }
        for (index, queue) in queues.iter_mut().enumerate() {
            if due[index] && queue.is_ready() {
                queue.doorbell().take();
                if serve_all(server, index, queue, signals)? {
                    // More than a queue full: the others, and the stop, get a turn first.
                    queue.doorbell().set();
                }
            }
        }
        let fds: Vec<BorrowedFd<'_>> =
            queues.iter().map(|queue| queue.doorbell().as_fd()).chain(follower.fds()).collect();
        due = wait_readable(&fds).map_err(|error| Broken(format!("its doorbells: {error}")))?;
    }
    Ok(())
}

/// Serves what is there, up to a queue full. True when there may be more.
fn serve_all<S: Serve>(
    server: &mut S,
    index: usize,
    queue: &mut VirtQueue,
    signals: &Signals,
) -> Result<bool, Broken> {
    let mut left = queue.size();
    queue.disable_doorbell()?;
    let more = loop {
        if left == 0 || server.wait().is_some() {
            break true;
        }
        if let Some(chain) = queue.pop()? {
            let head = chain.head_index();
            let len = server.serve(index, chain)?;
            queue.push(head, len)?;
            left -= 1;
        } else if !queue.enable_doorbell()? {
            break false;
        }
    };
    queue.notify(signals)?;
    Ok(more)
}
