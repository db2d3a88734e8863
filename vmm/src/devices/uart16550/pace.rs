//! The time that sending takes.
//!
//! Our transmitter is empty as soon as it is full. Were that said at once, a guest that has always more
//! to send would stay in its interrupt handler, and the processor that runs it would do nothing else, with
//! no end if another one keeps writing. So each interrupt of an empty transmitter comes as much later as
//! the guest took to fill it, and until then is not in the identification register either: half of the
//! processor's time stays its own, on fast hosts and on slow ones. The line status says the truth, for
//! those who send by polling.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::hypervisor::IrqLine;

/// A transmitter that is filled faster is not a guest's.
const LEAST: Duration = Duration::from_micros(20);
/// Sixteen bytes at 115200 baud take 1.4 ms. What comes after a silence does not wait longer.
const MOST: Duration = Duration::from_millis(2);

/// In the interrupt identification register: there is nothing, or the transmitter is empty.
const IIR_NONE: u8 = 1;
const IIR_TRANSMITTER_EMPTY: u8 = 1 << 1;

/// The line to the interrupt controller, which is edge triggered.
#[derive(Clone)]
pub(super) struct Wire(pub(super) Arc<dyn IrqLine>);

impl Wire {
    pub(super) fn pulse(&self) {
        if let Err(error) = self.0.set(true).and_then(|()| self.0.set(false)) {
            log::error!("the console's interrupt: {error}");
        }
    }
}

/// What a snapshot must hold of it: the guest has yet to hear, or to look at, that its transmitter is empty.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Saved {
    due: bool,
    came: bool,
}

#[derive(Debug, Default)]
struct State {
    due: Option<Instant>,
    /// The guest was interrupted and has not looked yet.
    came: bool,
    /// When the guest was last interrupted.
    last: Option<Instant>,
    closed: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until the pace is dropped.
    fn run(&self, wire: &Wire) {
        let mut state = self.lock();
        while !state.closed {
            let Some(due) = state.due else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let now = Instant::now();
            if let Some(rest) = due.checked_duration_since(now).filter(|rest| !rest.is_zero()) {
                state = self.changed.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            state.due = None;
            state.came = true;
            state.last = Some(now);
            // With the lock: who looks at what came has been interrupted.
            wire.pulse();
        }
    }
}

/// Sends the interrupts that come later. Dropping it drops those.
#[derive(Debug)]
pub(super) struct Pace(Arc<Shared>);

impl Pace {
    pub(super) fn new(wire: Wire) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let behind = Arc::clone(&shared);
        thread::Builder::new()
            .name("console-pace".into())
            .stack_size(128 * 1024)
            .spawn(move || behind.run(&wire))?;
        Ok(Self(shared))
    }

    /// For a snapshot. What is due may come meanwhile, as the guest would have it.
    pub(super) fn save(&self) -> Saved {
        let state = self.0.lock();
        Saved { due: state.due.is_some(), came: state.came }
    }

    /// Goes on from there. What has come comes again: a snapshot of the interrupt controller may be older.
    pub(super) fn restore(&self, saved: Saved, wire: &Wire) {
        let mut state = self.0.lock();
        state.came = saved.came;
        state.due = saved.due.then(|| Instant::now() + LEAST);
        if saved.came {
            wire.pulse();
        }
        self.0.changed.notify_one();
    }

    /// There is to be an interrupt, when the transmitter could have sent what it has.
    pub(super) fn later(&self) {
        let mut state = self.0.lock();
        if state.due.is_some() || state.came {
            return;
        }
        let now = Instant::now();
        state.due = Some(now + time_for(state.last.map(|last| now.saturating_duration_since(last))));
        self.0.changed.notify_one();
    }

    /// The guest is interrupted for another reason now.
    pub(super) fn now(&self) {
        self.0.lock().last = Some(Instant::now());
    }

    /// What the guest reads where the chip, which takes no time, has `iir` to say.
    pub(super) fn identify(&self, iir: u8) -> u8 {
        let mut state = self.0.lock();
        let empty = if state.due.is_some() {
            false
        } else {
            std::mem::take(&mut state.came) || iir & IIR_TRANSMITTER_EMPTY != 0
        };
        let others = iir & !(IIR_NONE | IIR_TRANSMITTER_EMPTY);
        match (empty, others & 0xf) {
            (true, _) => others | IIR_TRANSMITTER_EMPTY,
            (false, 0) => others | IIR_NONE,
            (false, _) => others,
        }
    }
}

/// How long it takes to send what was written in that time since the guest was last interrupted, if it was.
fn time_for(written: Option<Duration>) -> Duration {
    written.unwrap_or(LEAST).clamp(LEAST, MOST)
}

impl Drop for Pace {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::hypervisor::testing;

    fn pace() -> (Pace, Arc<testing::Wire>) {
        let wire = Arc::new(testing::Wire::default());
        (Pace::new(Wire(Arc::clone(&wire) as Arc<dyn IrqLine>)).unwrap(), wire)
    }

    fn pulses(wire: &testing::Wire) -> u32 {
        wire.0.load(Ordering::SeqCst)
    }

    #[test]
    fn one_interrupt_comes_for_all_that_was_sent_meanwhile() {
        let (pace, wire) = pace();
        for _ in 0..16 {
            pace.later();
        }
        let late = Instant::now() + Duration::from_secs(10);
        while pulses(&wire) == 0 && Instant::now() < late {
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(2 * MOST);
        assert!((1..=16).contains(&pulses(&wire)), "{}", pulses(&wire));
        let before = pulses(&wire);
        thread::sleep(2 * MOST);
        assert_eq!(pulses(&wire), before, "and no more without a cause");
    }

    #[test]
    fn what_the_guest_has_not_looked_at_comes_again() {
        for (saved, comes) in [
            (Saved { due: false, came: false }, 0),
            (Saved { due: true, came: false }, 1),
            (Saved { due: false, came: true }, 1),
        ] {
            let (pace, wire) = pace();
            pace.restore(saved, &Wire(Arc::clone(&wire) as Arc<dyn IrqLine>));
            let late = Instant::now() + Duration::from_secs(10);
            while pulses(&wire) < comes && Instant::now() < late {
                thread::sleep(Duration::from_millis(1));
            }
            thread::sleep(2 * MOST);
            assert_eq!(pulses(&wire), comes, "{saved:?}");
            assert_eq!(pace.save(), Saved { due: false, came: comes > 0 }, "{saved:?}");
            let expected = if comes > 0 { IIR_TRANSMITTER_EMPTY } else { IIR_NONE };
            assert_eq!(pace.identify(IIR_NONE), expected);
        }
    }

    #[test]
    fn sending_takes_as_long_as_writing_within_bounds() {
        let micros = Duration::from_micros;
        for (written, expected) in [
            (None, LEAST),
            (Some(micros(1)), LEAST),
            (Some(micros(700)), micros(700)),
            (Some(Duration::from_secs(3)), MOST),
        ] {
            assert_eq!(time_for(written), expected, "{written:?}");
        }
    }

    #[test]
    fn the_guest_reads_that_the_transmitter_is_empty_once_it_was_interrupted_and_once() {
        const FIFOS: u8 = 0xc0;
        let (pace, wire) = pace();
        assert_eq!(pace.identify(FIFOS | IIR_NONE), FIFOS | IIR_NONE);
        assert_eq!(pace.identify(FIFOS | IIR_TRANSMITTER_EMPTY), FIFOS | IIR_TRANSMITTER_EMPTY, "not paced");
        let mut state = pace.0.lock();
        state.due = Some(Instant::now() + Duration::from_secs(60));
        drop(state);
        assert_eq!(pace.identify(FIFOS | IIR_TRANSMITTER_EMPTY), FIFOS | IIR_NONE);
        assert_eq!(pace.identify(FIFOS | 4 | IIR_TRANSMITTER_EMPTY), FIFOS | 4, "there is input, too");
        pace.0.lock().due = Some(Instant::now());
        pace.0.changed.notify_one();
        let late = Instant::now() + Duration::from_secs(10);
        while pulses(&wire) == 0 && Instant::now() < late {
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(pace.identify(FIFOS | IIR_NONE), FIFOS | IIR_TRANSMITTER_EMPTY);
        assert_eq!(pace.identify(FIFOS | IIR_NONE), FIFOS | IIR_NONE);
    }
}
