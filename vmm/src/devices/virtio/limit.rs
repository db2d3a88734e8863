//! Rate limits: token buckets for the bytes and the operations of a device.
//!
//! An operation may begin while there is a token left, and is charged when its size is known; a bucket
//! can so be in debt, and then nothing begins until the debt is paid. This keeps large requests whole
//! and the rate exact in the long run. Nobody sleeps here: whoever serves a queue asks how long its
//! requests have to stay in it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const NANOS: u128 = 1_000_000_000;

/// What one bucket holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Rate {
    /// Tokens that flow into it each second. None: the rate is not limited.
    pub per_second: u64,
    /// Tokens that it holds at most: what may be used at once after a pause.
    pub burst: u64,
    /// Tokens that it holds beside them at the start and that do not come back.
    pub once: u64,
}

/// The limits of one device in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Limits {
    /// Of bytes.
    pub bytes: Rate,
    /// Of operations: packets, requests.
    pub operations: Rate,
}

#[derive(Debug)]
struct Bucket {
    rate: Rate,
    once: u64,
    /// In debt when negative.
    level: i64,
    filled: Instant,
}

impl Bucket {
    fn new(rate: Rate, now: Instant) -> Option<Self> {
        let rate = Rate { burst: rate.burst.max(1), ..rate };
        let full = Self { rate, once: rate.once, level: tokens(rate.burst), filled: now };
        (rate.per_second > 0).then_some(full)
    }

    fn fill(&mut self, now: Instant) {
        let rate = u128::from(self.rate.per_second);
        let earned = now.saturating_duration_since(self.filled).as_nanos() * rate / NANOS;
        let full = tokens(self.rate.burst);
        let level = self.level.saturating_add(i64::try_from(earned).unwrap_or(i64::MAX));
        if level >= full {
            (self.level, self.filled) = (full, now);
        } else {
            // Only the time that has become whole tokens has been used.
            self.level = level;
            let used = u64::try_from(earned * NANOS / rate).unwrap_or(u64::MAX);
            self.filled += Duration::from_nanos(used);
        }
    }

    fn wait(&mut self, now: Instant) -> Option<Duration> {
        self.fill(now);
        if self.level > 0 || self.once > 0 {
            return None;
        }
        let missing = u128::from(self.level.unsigned_abs()) + 1;
        let nanos = (missing * NANOS).div_ceil(u128::from(self.rate.per_second));
        let since = now.saturating_duration_since(self.filled);
        let whole = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        Some(whole.saturating_sub(since).max(Duration::from_nanos(1)))
    }

    fn charge(&mut self, amount: u64) {
        let once = self.once.min(amount);
        self.once -= once;
        self.level = self.level.saturating_sub(tokens(amount - once));
    }
}

fn tokens(amount: u64) -> i64 {
    i64::try_from(amount).unwrap_or(i64::MAX)
}

#[derive(Debug, Default)]
struct Buckets {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

/// The buckets of one device in one direction, shared by its queues. They belong to the device and not
/// to its threads: a guest that resets its device gains nothing.
#[derive(Debug, Clone, Default)]
pub struct Limiter(Option<Arc<Mutex<Buckets>>>);

impl Limiter {
    /// With full buckets.
    pub fn new(limits: Limits) -> Self {
        let now = Instant::now();
        let buckets = Buckets {
            bytes: Bucket::new(limits.bytes, now),
            operations: Bucket::new(limits.operations, now),
        };
        let limited = buckets.bytes.is_some() || buckets.operations.is_some();
        Self(limited.then(|| Arc::new(Mutex::new(buckets))))
    }

    fn lock(&self) -> Option<MutexGuard<'_, Buckets>> {
        self.0.as_ref().map(|buckets| buckets.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether anything ever has to wait.
    pub fn is_limited(&self) -> bool {
        self.0.is_some()
    }

    /// How long the next operation has to wait, if it has to.
    pub fn wait(&self) -> Option<Duration> {
        let mut buckets = self.lock()?;
        let now = Instant::now();
        let Buckets { bytes, operations } = &mut *buckets;
        [bytes, operations].into_iter().flatten().filter_map(|bucket| bucket.wait(now)).max()
    }

    /// An operation of that many bytes was begun.
    pub fn charge(&self, bytes: u64) {
        if let Some(mut buckets) = self.lock() {
            let Buckets { bytes: first, operations } = &mut *buckets;
            for (bucket, amount) in [(first, bytes), (operations, 1)] {
                if let Some(bucket) = bucket {
                    bucket.charge(amount);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn bucket(per_second: u64, burst: u64, once: u64) -> (Bucket, Instant) {
        let now = Instant::now();
        (Bucket::new(Rate { per_second, burst, once }, now).unwrap(), now)
    }

    #[test]
    fn a_burst_then_the_rate() {
        let (mut bucket, start) = bucket(100, 10, 0);
        for _ in 0..10 {
            assert_eq!(bucket.wait(start), None);
            bucket.charge(1);
        }
        assert_eq!(bucket.wait(start), Some(Duration::from_millis(10)));
        assert_eq!(bucket.wait(start + Duration::from_millis(4)), Some(Duration::from_millis(6)));
        assert_eq!(bucket.wait(start + Duration::from_millis(10)), None);
        bucket.charge(1);
        assert!(bucket.wait(start + Duration::from_millis(10)).is_some());
        // A pause fills it again, but not beyond its size.
        let later = start + 100 * SECOND;
        assert_eq!(bucket.wait(later), None);
        assert_eq!(bucket.level, 10);
    }

    #[test]
    fn what_is_too_large_passes_and_is_paid_for_afterwards() {
        let (mut bucket, start) = bucket(1000, 10, 0);
        bucket.charge(1_000_010);
        assert_eq!(bucket.wait(start), Some(1000 * SECOND + Duration::from_millis(1)));
        assert_eq!(bucket.wait(start + 1001 * SECOND), None);
        bucket.charge(u64::MAX);
        bucket.charge(u64::MAX);
        assert!(bucket.wait(start + 1001 * SECOND).is_some());
    }

    #[test]
    fn what_comes_once_comes_once() {
        let (mut bucket, start) = bucket(1, 1, 5);
        bucket.charge(5);
        assert_eq!(bucket.wait(start), None);
        bucket.charge(1);
        assert_eq!(bucket.wait(start), Some(SECOND));
        assert_eq!(bucket.wait(start + 50 * SECOND), None);
        assert_eq!((bucket.level, bucket.once), (1, 0));
    }

    #[test]
    fn without_limits_nobody_waits() {
        let limiter = Limiter::new(Limits::default());
        limiter.charge(u64::MAX);
        assert_eq!(limiter.wait(), None);
        let one = Rate { per_second: 1, ..Rate::default() };
        for limits in
            [Limits { bytes: one, ..Limits::default() }, Limits { operations: one, ..Limits::default() }]
        {
            let limiter = Limiter::new(limits);
            assert_eq!(limiter.wait(), None);
            limiter.charge(1);
            assert!(limiter.clone().wait().is_some(), "a clone is the same buckets");
        }
    }

    proptest! {
        /// However the time is cut up, no more passes than the rate and the bursts allow, and a wait that
        /// was kept is enough.
        #[test]
        fn the_rate_holds(
            per_second in 1u64..2_000_000_000,
            burst in 0u64..1000,
            once in 0u64..1000,
            steps in proptest::collection::vec((0u64..5_000_000, 1u64..2000), 1..200),
        ) {
            let (mut bucket, start) = bucket(per_second, burst, once);
            let (mut now, mut passed, mut last) = (start, 0u128, 0);
            for (nanos, amount) in steps {
                now += Duration::from_nanos(nanos);
                if let Some(wait) = bucket.wait(now) {
                    now += wait;
                    prop_assert_eq!(bucket.wait(now), None);
                }
                bucket.charge(amount);
                passed += u128::from(amount);
                last = u128::from(amount);
            }
            let earned = (now - start).as_nanos() * u128::from(per_second) / NANOS;
            prop_assert!(passed - last <= earned + u128::from(burst.max(1) + once));
        }
    }
}
