//! Waiting for something to become true, never for ever.

use std::thread;
use std::time::{Duration, Instant};

/// The deadline passed and it never became true.
#[derive(Debug, thiserror::Error)]
#[error("waited {:.1} s for {what}{}", waited.as_secs_f64(), last.as_ref().map(|last| format!("; last seen: {last}")).unwrap_or_default())]
pub struct TimedOut {
    /// What was waited for.
    pub what: String,
    /// How long.
    pub waited: Duration,
    /// What the last attempt said.
    pub last: Option<String>,
}

/// What one attempt found.
pub enum Attempt<T> {
    /// It is true; this is the answer.
    Done(T),
    /// Not yet; this is how it looks, for the message should it stay so.
    Pending(String),
}

/// Tries `attempt` until it is done or `deadline` has passed; the last try is made at the deadline itself.
pub fn until<T>(
    what: &str,
    deadline: Duration,
    mut attempt: impl FnMut() -> Attempt<T>,
) -> Result<T, TimedOut> {
    let begun = Instant::now();
    let mut pause = Duration::from_millis(2);
    loop {
        let left = deadline.saturating_sub(begun.elapsed());
        match attempt() {
            Attempt::Done(value) => return Ok(value),
            Attempt::Pending(seen) if left.is_zero() => {
                let last = (!seen.is_empty()).then_some(seen);
                return Err(TimedOut { what: what.to_owned(), waited: begun.elapsed(), last });
            }
            Attempt::Pending(_) => {}
        }
        thread::sleep(pause.min(left));
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

/// [`until`] for a plain yes or no.
pub fn until_true(
    what: &str,
    deadline: Duration,
    mut condition: impl FnMut() -> bool,
) -> Result<(), TimedOut> {
    until(what, deadline, || if condition() { Attempt::Done(()) } else { Attempt::Pending(String::new()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn returns_what_the_last_attempt_found() {
        let mut tries = 0;
        let found = until("the third try", Duration::from_secs(5), || {
            tries += 1;
            if tries == 3 { Attempt::Done("here") } else { Attempt::Pending(String::new()) }
        });
        assert_eq!(found.unwrap(), "here");
    }

    #[test]
    fn gives_up_at_the_deadline_and_says_what_it_saw() {
        let begun = Instant::now();
        let error = until::<()>("rain", Duration::from_millis(50), || Attempt::Pending("sun".into()))
            .expect_err("it never rains");
        assert!(begun.elapsed() < Duration::from_secs(2));
        assert!(error.to_string().contains("for rain; last seen: sun"), "{error}");
    }

    #[test]
    fn a_zero_deadline_still_tries_once() {
        assert!(until_true("now", Duration::ZERO, || true).is_ok());
        assert!(until_true("never", Duration::ZERO, || false).is_err());
    }
}
