//! What happened, in order, kept until the shim says that it knows.
//!
//! A shim asks for what comes after the last event that it has dealt with, so events survive a connection that
//! breaks between question and answer. The list is bounded by [`Events::is_full`], which stops new processes, as
//! each has one exit; and by telling of a container's memory at most once until that is known.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use agent_api::MOST_EVENTS;
use agent_api::agent::{Event, Exit, Oom, event::What};
use tokio::sync::Notify;
use tokio::time::timeout;

/// So many that nobody has asked for are a shim that is gone.
const MOST_KEPT: usize = 16384;

/// The list.
#[derive(Default)]
pub struct Events {
    list: Mutex<List>,
    grown: Notify,
}

#[derive(Default)]
struct List {
    kept: VecDeque<Event>,
    last: u64,
}

impl Events {
    /// A process has exited.
    pub fn exited(&self, id: &str, exec_id: &str, exit: Exit) {
        self.add(id, exec_id, What::Exit(exit));
    }

    /// The kernel has killed processes of a container, `kills` so far.
    pub fn out_of_memory(&self, id: &str, kills: u64) {
        {
            let mut list = self.lock();
            let told = list.kept.iter_mut().rfind(|event| event.id == id);
            if let Some(What::Oom(oom)) = told.and_then(|event| event.what.as_mut()) {
                oom.kills = kills;
                return;
            }
        }
        self.add(id, "", What::Oom(Oom { kills, ..Oom::default() }));
    }

    fn add(&self, id: &str, exec_id: &str, what: What) {
        let mut list = self.lock();
        list.last += 1;
        let event = Event {
            sequence: list.last,
            time: now(),
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            what: Some(what),
            ..Event::default()
        };
        list.kept.push_back(event);
        drop(list);
        self.grown.notify_waiters();
    }

    /// Whether so many are kept that no new process may be made.
    pub fn is_full(&self) -> bool {
        self.lock().kept.len() >= MOST_KEPT
    }

    /// The events after `after`, which are forgotten up to there; none, when there are none for `wait`.
    pub async fn after(&self, after: u64, wait: Duration) -> Vec<Event> {
        let found = timeout(wait, async {
            loop {
                let grown = self.grown.notified();
                let kept = self.kept_after(after);
                if !kept.is_empty() {
                    return kept;
                }
                grown.await;
            }
        });
        found.await.unwrap_or_default()
    }

    fn kept_after(&self, after: u64) -> Vec<Event> {
        let mut list = self.lock();
        while list.kept.front().is_some_and(|event| event.sequence <= after) {
            list.kept.pop_front();
        }
        list.kept.iter().take(MOST_EVENTS).cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Nanoseconds since the epoch.
pub fn now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit() -> Exit {
        Exit { status: 7, ..Exit::default() }
    }

    const SHORT: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn nothing_is_lost_until_it_is_known() {
        let events = Events::default();
        assert!(events.after(0, SHORT).await.is_empty());
        events.exited("a", "", exit());
        events.exited("a", "e", exit());
        for _ in 0..2 {
            let found = events.after(0, SHORT).await;
            let numbers: Vec<_> = found.iter().map(|event| event.sequence).collect();
            assert_eq!(numbers, [1, 2], "asked again after a lost answer");
        }
        assert_eq!(events.after(1, SHORT).await[0].exec_id, "e");
        assert!(events.after(2, SHORT).await.is_empty());
        events.exited("b", "", exit());
        assert_eq!(events.after(2, SHORT).await[0].sequence, 3);
    }

    #[tokio::test]
    async fn whoever_waits_is_woken() {
        let events = Events::default();
        let (found, ()) = tokio::join!(events.after(0, Duration::from_secs(5)), async {
            tokio::task::yield_now().await;
            events.exited("a", "", exit());
        });
        assert_eq!(found.len(), 1);
    }

    #[tokio::test]
    async fn memory_is_told_of_once_until_it_is_known() {
        let events = Events::default();
        for kills in 1..1000 {
            events.out_of_memory("a", kills);
        }
        events.out_of_memory("b", 1);
        let found = events.after(0, SHORT).await;
        assert_eq!(found.len(), 2);
        assert!(matches!(&found[0].what, Some(What::Oom(oom)) if oom.kills == 999));
        assert!(events.after(2, SHORT).await.is_empty());
        events.out_of_memory("a", 1000);
        assert_eq!(events.after(2, SHORT).await.len(), 1);
    }
}
