//! Programs that watch files of binds (inotify) hear of what others than this machine do there.
//!
//! The protocol of the share has no message for that. So the shim watches on the host what is watched here (`trace` says when a
//! process begins to, `scan` finds what), and what happens there is done here once more, in a way that the share takes for what
//! it is (`tell`): then the kernel tells of it as of anything else.

mod scan;
mod tell;
mod trace;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_api::agent::News;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use scan::Watched;
pub use scan::leave;
pub use trace::Trace;

/// From a line of the trace until what it is about is there, in most cases, and in all.
const SOON: Duration = Duration::from_millis(50);
const SURELY: Duration = Duration::from_secs(1);
/// What is watched no more is found out after so long.
const NOW_AND_THEN: Duration = Duration::from_secs(30);

/// What is watched.
#[derive(Default)]
pub struct Watches {
    found: Mutex<Found>,
    changed: Notify,
}

#[derive(Default)]
struct Found {
    version: u64,
    places: BTreeMap<PathBuf, Watched>,
}

impl Watches {
    /// Looks after what is watched, for ever.
    pub async fn follow(self: Arc<Self>, trace: Trace) {
        let trace = match crate::polled(trace.into()) {
            Ok(trace) => trace,
            Err(error) => {
                eprintln!("changes of files by the host are not told to who watches them: {error}");
                return;
            }
        };
        let mut wait = None;
        loop {
            let called = match wait {
                None => trace.readable().await.map(Some),
                Some(wait) => timeout(wait, trace.readable()).await.ok().transpose(),
            };
            match called {
                Err(_) => return,
                Ok(Some(mut ready)) => {
                    sleep(SOON).await;
                    if trace::drain(trace.get_ref()) {
                        ready.clear_ready();
                    }
                    wait = Some(SURELY);
                }
                Ok(None) => wait = Some(NOW_AND_THEN),
            }
            match tokio::task::spawn_blocking(scan::watched).await {
                Ok(Ok(places)) => {
                    if places.is_empty() && wait == Some(NOW_AND_THEN) {
                        wait = None;
                    }
                    self.publish(places);
                }
                Ok(Err(error)) => eprintln!("looking for what is watched: {error:#}"),
                Err(_) => return,
            }
        }
    }

    fn publish(&self, places: BTreeMap<PathBuf, Watched>) {
        let mut found = self.lock();
        if found.places != places {
            *found = Found { version: found.version + 1, places };
            drop(found);
            self.changed.notify_waiters();
        }
    }

    /// Tells whoever watches of what has happened.
    pub fn tell(&self, news: &[News]) -> anyhow::Result<()> {
        let places = self.lock().places.clone();
        tell::tell(news, &places)
    }

    /// What is watched and its version, as soon as that is not `known`, or after `wait`.
    pub async fn after(&self, known: u64, wait: Duration) -> (u64, Vec<PathBuf>) {
        let other = async {
            loop {
                let changed = self.changed.notified();
                if self.lock().version != known {
                    return;
                }
                changed.await;
            }
        };
        let _ = timeout(wait, other).await;
        let found = self.lock();
        (found.version, found.places.keys().cloned().collect())
    }

    fn lock(&self) -> MutexGuard<'_, Found> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_waits_hears_of_what_is_another() {
        let watches = Watches::default();
        let places =
            |names: &[&str]| names.iter().map(|name| (PathBuf::from(name), Watched::default())).collect();
        assert_eq!(watches.after(0, SOON).await, (0, vec![]));
        let (found, ()) = tokio::join!(watches.after(0, SURELY), async {
            tokio::task::yield_now().await;
            watches.publish(places(&["a"]));
        });
        assert_eq!(found, (1, vec![PathBuf::from("a")]));
        watches.publish(places(&["a"]));
        assert_eq!(watches.after(0, SURELY).await.0, 1, "nothing is another");
        assert_eq!(watches.after(1, SOON).await.0, 1);
        watches.publish(places(&[]));
        assert_eq!(watches.after(1, SURELY).await, (2, vec![]));
    }
}
