//! One word that says what all threads of a machine do that touch the guest: its processors', and
//! those of its devices.
//!
//! The word holds a phase and a count of changes. A processor's thread reads it after it came out of
//! the guest because of a kick, a device's between two requests, and parks while it says pause; whoever
//! changes it kicks afterwards.
//! Every change makes a new word, so a thread that parked for one pause cannot mistake the next for
//! it, and nobody is woken for a word that is gone. There is one order of all changes and nothing
//! beside the word to get out of step with it.

#[cfg(loom)]
use loom::sync::{
    Arc, Condvar, Mutex, MutexGuard,
    atomic::{AtomicU64, Ordering},
};
use std::sync::PoisonError;
#[cfg(not(loom))]
use std::sync::{
    Arc, Condvar, Mutex, MutexGuard,
    atomic::{AtomicU64, Ordering},
};
use std::time::Duration;
#[cfg(not(loom))]
use std::time::Instant;

/// What the threads do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Run the guest, serve it.
    Run,
    /// Wait, between two instructions or two requests.
    Pause,
    /// Leave for good. No other phase follows.
    Stop,
}

impl Phase {
    const BITS: u32 = 2;

    fn of(word: u64) -> Self {
        match word & 3 {
            0 => Self::Run,
            1 => Self::Pause,
            _ => Self::Stop,
        }
    }

    fn after(self, word: u64) -> u64 {
        let phase = match self {
            Self::Run => 0,
            Self::Pause => 1,
            Self::Stop => 2,
        };
        ((word >> Self::BITS) + 1) << Self::BITS | phase
    }
}

/// What a thread does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Go {
    /// Into the guest, or to the next request.
    On,
    /// Home.
    Away,
}

/// Not all threads parked in time. They still run or park as the word says: the caller decides
/// what becomes of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{parked} of {members} threads of processors and devices had stopped when the time was up")]
pub struct Deadline {
    /// How many had parked.
    pub parked: usize,
    /// How many there are.
    pub members: usize,
}

#[derive(Debug, Default)]
struct Census {
    members: usize,
    parked: usize,
}

/// The word, and who follows it.
#[derive(Debug)]
pub struct Epoch {
    // Changed only with the census locked, so that a waiter cannot miss a change; read without.
    word: AtomicU64,
    census: Mutex<Census>,
    changed: Condvar,
}

impl Default for Epoch {
    fn default() -> Self {
        Self::new()
    }
}

impl Epoch {
    /// Paused, and nobody follows.
    pub fn new() -> Self {
        Self {
            word: AtomicU64::new(Phase::Pause.after(0)),
            census: Mutex::new(Census::default()),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Census> {
        self.census.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, census: MutexGuard<'a, Census>) -> MutexGuard<'a, Census> {
        self.changed.wait(census).unwrap_or_else(PoisonError::into_inner)
    }

    /// What the word says now.
    pub fn phase(&self) -> Phase {
        Phase::of(self.word.load(Ordering::SeqCst))
    }

    /// Changes the word; the caller kicks everybody after it. False when the word says stop,
    /// which stays.
    pub fn set(&self, phase: Phase) -> bool {
        let census = self.lock();
        let word = self.word.load(Ordering::SeqCst);
        let live = Phase::of(word) != Phase::Stop;
        if live {
            self.word.store(phase.after(word), Ordering::SeqCst);
        }
        drop(census);
        self.changed.notify_all();
        live
    }

    /// Waits until every member has parked. A machine without members is parked.
    #[cfg(not(loom))]
    pub fn wait_parked(&self, within: Duration) -> Result<(), Deadline> {
        let until = Instant::now() + within;
        let mut census = self.lock();
        while census.parked < census.members {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Deadline { parked: census.parked, members: census.members });
            }
            census = self.changed.wait_timeout(census, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// As above; the model has no time.
    #[cfg(loom)]
    pub fn wait_parked(&self, _within: Duration) -> Result<(), Deadline> {
        let mut census = self.lock();
        while census.parked < census.members {
            census = self.wait(census);
        }
        Ok(())
    }

    /// Makes members that wait look again at what they wait for.
    pub fn nudge(&self) {
        // Locked, so that a member is either before its look or already waiting.
        drop(self.lock());
        self.changed.notify_all();
    }

    /// Waits until all members have left.
    pub fn wait_empty(&self) {
        let mut census = self.lock();
        while census.members > 0 {
            census = self.wait(census);
        }
    }
}

/// A thread's share of the word.
#[derive(Debug)]
pub struct Member(Arc<Epoch>);

impl Member {
    /// One more thread follows the word, until the member is dropped.
    pub fn join(epoch: &Arc<Epoch>) -> Self {
        epoch.lock().members += 1;
        Self(Arc::clone(epoch))
    }

    /// Makes the others look again at what they wait for, as [`Epoch::nudge`] does.
    pub fn nudge(&self) {
        self.0.nudge();
    }

    /// Whether the word says run.
    pub fn is_running(&self) -> bool {
        self.0.phase() == Phase::Run
    }

    /// Does what the word says: returns at once while it says run, parks while it says pause. To be
    /// called between two instructions of the guest, before the first and after each kick.
    pub fn checkpoint(&self) -> Go {
        match self.0.phase() {
            Phase::Run => Go::On,
            Phase::Stop => Go::Away,
            Phase::Pause => self.wait(|| true, || false),
        }
    }

    /// Goes on when the word says run and `ready` says so too, and goes away when the word says stop or
    /// `leave` says so. Until then it waits, parked while the word says pause. Whoever changes what
    /// either looks at calls [`Epoch::nudge`] afterwards; both are called with the epoch locked.
    pub fn wait(&self, mut ready: impl FnMut() -> bool, leave: impl Fn() -> bool) -> Go {
        let epoch = &*self.0;
        let mut census = epoch.lock();
        loop {
            let seen = epoch.word.load(Ordering::SeqCst);
            match Phase::of(seen) {
                _ if leave() => return Go::Away,
                Phase::Stop => return Go::Away,
                Phase::Run if ready() => return Go::On,
                Phase::Run => census = epoch.wait(census),
                Phase::Pause => {
                    census.parked += 1;
                    epoch.changed.notify_all();
                    while epoch.word.load(Ordering::SeqCst) == seen && !leave() {
                        census = epoch.wait(census);
                    }
                    // A later pause counts us anew.
                    census.parked -= 1;
                }
            }
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.0.lock().members -= 1;
        self.0.changed.notify_all();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::thread;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);
    const SHORT: Duration = Duration::from_millis(20);

    #[test]
    fn a_word_is_never_the_same_again() {
        let mut word = 0;
        for phase in [Phase::Run, Phase::Pause, Phase::Pause, Phase::Run, Phase::Stop] {
            let next = phase.after(word);
            assert!(next > word);
            assert_eq!(Phase::of(next), phase);
            word = next;
        }
    }

    #[test]
    fn nobody_is_parked_at_once_and_one_who_does_not_come_is_a_deadline() {
        let epoch = Arc::new(Epoch::new());
        assert_eq!(epoch.wait_parked(SHORT), Ok(()));
        let member = Member::join(&epoch);
        assert_eq!(epoch.wait_parked(SHORT), Err(Deadline { parked: 0, members: 1 }));
        assert!(epoch.set(Phase::Run));
        assert_eq!(member.checkpoint(), Go::On);
        drop(member);
        assert_eq!(epoch.wait_parked(SHORT), Ok(()));
        epoch.wait_empty();
    }

    #[test]
    fn stop_is_the_last_word() {
        let epoch = Arc::new(Epoch::new());
        let member = Member::join(&epoch);
        assert!(epoch.set(Phase::Stop));
        assert!(!epoch.set(Phase::Run));
        assert!(!epoch.set(Phase::Pause));
        assert_eq!(epoch.phase(), Phase::Stop);
        assert_eq!(member.checkpoint(), Go::Away);
    }

    #[test]
    fn one_who_waits_for_something_else_parks_too_and_can_leave_a_pause() {
        use std::sync::atomic::AtomicBool;
        let epoch = Arc::new(Epoch::new());
        let (ready, leave) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let member = Member::join(&epoch);
        epoch.set(Phase::Run);
        let thread = {
            let (ready, leave) = (Arc::clone(&ready), Arc::clone(&leave));
            thread::spawn(move || {
                let wait =
                    || member.wait(|| ready.swap(false, Ordering::SeqCst), || leave.load(Ordering::SeqCst));
                (wait(), wait())
            })
        };
        for _ in 0..100 {
            epoch.set(Phase::Pause);
            assert_eq!(epoch.wait_parked(LONG), Ok(()));
            epoch.set(Phase::Run);
        }
        ready.store(true, Ordering::SeqCst);
        epoch.nudge();
        epoch.set(Phase::Pause);
        // It may park before it has seen that it may go on, or after it: both count.
        assert_eq!(epoch.wait_parked(LONG), Ok(()));
        epoch.set(Phase::Run);
        while ready.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        epoch.set(Phase::Pause);
        assert_eq!(epoch.wait_parked(LONG), Ok(()));
        leave.store(true, Ordering::SeqCst);
        epoch.nudge();
        assert_eq!(thread.join().unwrap(), (Go::On, Go::Away));
        epoch.wait_empty();
    }

    #[test]
    fn pausing_again_and_again_always_parks_everybody() {
        let epoch = Arc::new(Epoch::new());
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let member = Member::join(&epoch);
                thread::spawn(move || while member.checkpoint() == Go::On {})
            })
            .collect();
        for _ in 0..500 {
            assert_eq!(epoch.wait_parked(LONG), Ok(()));
            epoch.set(Phase::Run);
            epoch.set(Phase::Pause);
        }
        epoch.set(Phase::Stop);
        for thread in threads {
            thread.join().unwrap();
        }
        epoch.wait_empty();
    }
}

/// `RUSTFLAGS="--cfg loom" cargo test -p vmm --release --lib epoch` tries every interleaving.
#[cfg(all(test, loom))]
mod model {
    use loom::sync::atomic::AtomicBool;
    use loom::thread;

    use super::*;

    const FOREVER: Duration = Duration::MAX;

    /// A processor with the contract of `Vcpu` and `Kick`: it stays in the guest until it is kicked,
    /// kicks stick, and taking note of one comes before reading the word.
    struct Processor {
        kicked: Mutex<bool>,
        out: Condvar,
        // Whether guest instructions may be under way.
        inside: AtomicBool,
    }

    impl Processor {
        fn new() -> Arc<Self> {
            Arc::new(Self { kicked: Mutex::new(false), out: Condvar::new(), inside: AtomicBool::new(false) })
        }

        fn kick(&self) {
            *self.kicked.lock().unwrap() = true;
            self.out.notify_one();
        }

        fn run(&self, member: &Member) {
            while member.checkpoint() == Go::On {
                self.inside.store(true, Ordering::SeqCst);
                let mut kicked = self.kicked.lock().unwrap();
                while !*kicked {
                    kicked = self.out.wait(kicked).unwrap();
                }
                *kicked = false;
                drop(kicked);
                self.inside.store(false, Ordering::SeqCst);
            }
        }
    }

    fn set(epoch: &Epoch, processors: &[Arc<Processor>], phase: Phase) {
        epoch.set(phase);
        processors.iter().for_each(|processor| processor.kick());
    }

    fn start(epoch: &Arc<Epoch>, count: usize) -> (Vec<Arc<Processor>>, Vec<thread::JoinHandle<()>>) {
        let processors: Vec<_> = (0..count).map(|_| Processor::new()).collect();
        let threads = processors
            .iter()
            .map(|processor| {
                let (processor, member) = (Arc::clone(processor), Member::join(epoch));
                thread::spawn(move || processor.run(&member))
            })
            .collect();
        (processors, threads)
    }

    fn bounded(model: impl Fn() + Sync + Send + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(model);
    }

    #[test]
    fn epoch_pause_means_nobody_is_inside() {
        bounded(|| {
            let epoch = Arc::new(Epoch::new());
            let (processors, threads) = start(&epoch, 1);
            set(&epoch, &processors, Phase::Run);
            set(&epoch, &processors, Phase::Pause);
            epoch.wait_parked(FOREVER).unwrap();
            assert!(processors.iter().all(|p| !p.inside.load(Ordering::SeqCst)));
            set(&epoch, &processors, Phase::Run);
            set(&epoch, &processors, Phase::Stop);
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        });
    }

    #[test]
    fn epoch_stop_reaches_two_processors_wherever_they_are() {
        bounded(|| {
            let epoch = Arc::new(Epoch::new());
            let (processors, threads) = start(&epoch, 2);
            set(&epoch, &processors, Phase::Run);
            set(&epoch, &processors, Phase::Stop);
            epoch.wait_empty();
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        });
    }

    #[test]
    fn epoch_two_controllers_do_not_strand_a_processor() {
        bounded(|| {
            let epoch = Arc::new(Epoch::new());
            let (processors, threads) = start(&epoch, 1);
            let other = {
                let (epoch, processors) = (Arc::clone(&epoch), processors.clone());
                thread::spawn(move || set(&epoch, &processors, Phase::Stop))
            };
            set(&epoch, &processors, Phase::Run);
            other.join().unwrap();
            epoch.wait_empty();
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        });
    }

    #[test]
    fn epoch_a_nudge_and_a_pause_are_not_slept_through() {
        bounded(|| {
            let epoch = Arc::new(Epoch::new());
            let ready = Arc::new(AtomicBool::new(false));
            let waiting = {
                let (member, ready) = (Member::join(&epoch), Arc::clone(&ready));
                thread::spawn(move || member.wait(|| ready.load(Ordering::SeqCst), || false))
            };
            epoch.set(Phase::Run);
            epoch.set(Phase::Pause);
            epoch.wait_parked(FOREVER).unwrap();
            epoch.set(Phase::Run);
            ready.store(true, Ordering::SeqCst);
            epoch.nudge();
            assert_eq!(waiting.join().unwrap(), Go::On);
        });
    }
}
