//! How the threads of devices stand still with the processors.
//!
//! They follow the same [epoch](crate::vcpu::Epoch), so that a pause is one rendezvous of everybody who
//! touches the guest. A processor is kicked out of the guest; a device's thread, which sleeps in poll,
//! polls one more descriptor, which can be read while the word does not say run. It comes to its
//! checkpoint between two requests, with nothing under way: what it took from a queue, it has given back.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::event::{Event, wait_readable};
use crate::vcpu::{Epoch, Go, Member, Phase};

#[cfg(loom)]
use loom::sync::Arc as EpochArc;
#[cfg(not(loom))]
use std::sync::Arc as EpochArc;

/// The epoch, for those who poll.
#[derive(Debug)]
pub struct Standstill {
    epoch: EpochArc<Epoch>,
    /// Set while the word does not say run.
    due: Event,
    /// Word and event change together.
    changing: Mutex<()>,
}

impl Standstill {
    /// Paused, and nobody follows.
    pub fn new() -> io::Result<Self> {
        let due = Event::new()?;
        due.set();
        Ok(Self { epoch: EpochArc::new(Epoch::new()), due, changing: Mutex::new(()) })
    }

    /// The word, for processors and those who wait.
    pub fn epoch(&self) -> &EpochArc<Epoch> {
        &self.epoch
    }

    /// Changes the word; the caller kicks processors after it. False when the word says stop, which
    /// stays.
    pub fn set(&self, phase: Phase) -> bool {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let live = self.epoch.set(phase);
        if self.epoch.phase() == Phase::Run {
            self.due.take();
        } else {
            self.due.set();
        }
        live
    }
}

/// What holds one thread of a device: its device ends it, the machine pauses it.
#[derive(Debug)]
pub struct Leash {
    still: Arc<Standstill>,
    stop: Event,
    stopped: AtomicBool,
}

impl Leash {
    /// For a thread that is yet to be started.
    pub fn new(still: &Arc<Standstill>) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self { still: Arc::clone(still), stop: Event::new()?, stopped: AtomicBool::new(false) }))
    }

    /// Tells the thread to end, also when it is parked. Whoever calls joins it afterwards.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.stop.set();
        self.still.epoch.nudge();
    }

    /// What the thread takes along. To be called before the thread is started, by the thread that
    /// starts it: a pause counts the new one from here on.
    pub fn follow(self: &Arc<Self>) -> Follower {
        Follower { member: Member::join(&self.still.epoch), leash: Arc::clone(self) }
    }
}

/// A device's thread's end of the [`Leash`].
#[derive(Debug)]
pub struct Follower {
    leash: Arc<Leash>,
    member: Member,
}

impl Follower {
    /// To be polled with whatever else the thread waits for. When one of them can be read, a
    /// [checkpoint](Self::checkpoint) is due.
    pub fn fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.leash.stop.as_fd(), self.leash.still.due.as_fd()]
    }

    /// Parks while the machine is paused. To be called when no request is under way, before the first
    /// one too. [`Go::Away`] when the device, or the machine, has come to its end.
    pub fn checkpoint(&self) -> Go {
        let stopped = || self.leash.stopped.load(Ordering::SeqCst);
        if !stopped() && self.leash.still.epoch.phase() == Phase::Run {
            return Go::On;
        }
        self.member.wait(|| true, stopped)
    }

    /// Follows until the end, for a thread that has nothing else to do any more.
    pub fn idle(&self) {
        while self.checkpoint() == Go::On {
            if let Err(error) = wait_readable(&self.fds()) {
                log::error!("a device's thread cannot wait: {error}");
                return;
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::atomic::AtomicU64;
    use std::thread;
    use std::time::Duration;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    /// A thread that serves a doorbell and counts.
    fn worker(still: &Arc<Standstill>) -> (Arc<Leash>, Arc<Event>, Arc<AtomicU64>, thread::JoinHandle<()>) {
        let leash = Leash::new(still).expect("an eventfd");
        let follower = leash.follow();
        let (doorbell, served) = (Arc::new(Event::new().expect("an eventfd")), Arc::new(AtomicU64::new(0)));
        let thread = {
            let (doorbell, served) = (Arc::clone(&doorbell), Arc::clone(&served));
            thread::spawn(move || {
                while follower.checkpoint() == Go::On {
                    let [stop, due] = follower.fds();
                    if wait_readable(&[stop, due, doorbell.as_fd()]).expect("poll")[2] {
                        // The bell goes on ringing.
                        served.fetch_add(1, Ordering::SeqCst);
                    }
                }
            })
        };
        (leash, doorbell, served, thread)
    }

    #[test]
    fn nothing_is_served_in_a_pause_and_everything_after_it() {
        let still = Arc::new(Standstill::new().unwrap());
        let (leash, doorbell, served, thread) = worker(&still);
        doorbell.set();
        for _ in 0..200 {
            still.epoch().wait_parked(LONG).unwrap();
            let before = served.load(Ordering::SeqCst);
            thread::yield_now();
            assert_eq!(served.load(Ordering::SeqCst), before);
            still.set(Phase::Run);
            while served.load(Ordering::SeqCst) == before {
                thread::yield_now();
            }
            still.set(Phase::Pause);
        }
        // A device is reset while the machine is paused: its thread leaves, and is not waited for.
        leash.stop();
        thread.join().unwrap();
        still.epoch().wait_parked(LONG).unwrap();
    }

    #[test]
    fn the_end_of_the_machine_ends_the_thread_wherever_it_is() {
        for phase in [Phase::Pause, Phase::Run] {
            let still = Arc::new(Standstill::new().unwrap());
            let (_leash, _doorbell, _served, thread) = worker(&still);
            still.set(phase);
            still.set(Phase::Stop);
            thread.join().unwrap();
            assert!(!still.set(Phase::Run));
        }
    }
}
