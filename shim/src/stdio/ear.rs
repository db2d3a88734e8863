//! What a process has said so far, for others that start from where it is: their clients are told it, too.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use agent_api::stdio::Stream;
use regex::bytes::Regex;
use tokio::sync::Notify;

/// Of a service that starts there is less.
pub const MOST: usize = 256 << 10;

/// Hears what goes through a stream, from its beginning until that is told or no longer wanted.
#[derive(Debug, Clone, Default)]
pub struct Ear(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    heard: Mutex<Heard>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Heard {
    text: Vec<u8>,
    /// There was more than is kept.
    over: bool,
    deaf: bool,
}

impl Ear {
    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.0.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This came next.
    pub(super) fn hear(&self, text: &[u8]) {
        {
            let mut heard = self.heard();
            if heard.deaf || heard.over {
                return;
            }
            if heard.text.len() + text.len() > MOST {
                heard.over = true;
                heard.text = Vec::new();
            } else {
                heard.text.extend_from_slice(text);
            }
        }
        self.0.changed.notify_waiters();
    }

    /// All that has come, unless it was too much.
    pub fn told(&self) -> Option<Vec<u8>> {
        let heard = self.heard();
        (!heard.over).then(|| heard.text.clone())
    }

    /// Hears nothing more, and forgets what it has heard.
    pub fn close(&self) {
        let mut heard = self.heard();
        heard.deaf = true;
        heard.text = Vec::new();
    }

    /// Returns once a whole line is one that is waited for, or, with false, when too much came before.
    async fn line(&self, wanted: &Regex) -> bool {
        // Where the next line begins, and how far its end was looked for.
        let (mut begins, mut seen) = (0, 0);
        loop {
            let changed = self.0.changed.notified();
            {
                let heard = self.heard();
                if heard.over {
                    return false;
                }
                let fresh = heard.text.get(seen..).unwrap_or_default();
                if let Some(last) = fresh.iter().rposition(|byte| *byte == b'\n') {
                    let whole = seen + last + 1;
                    let mut lines = heard.text[begins..whole].split_inclusive(|byte| *byte == b'\n');
                    if lines.any(|line| wanted.is_match(line.trim_ascii_end())) {
                        return true;
                    }
                    begins = whole;
                }
                seen += fresh.len();
            }
            changed.await;
        }
    }
}

/// Those of a process's output.
#[derive(Debug, Clone, Default)]
pub struct Ears {
    /// Standard output.
    pub stdout: Ear,
    /// Standard error.
    pub stderr: Ear,
}

impl Ears {
    /// Returns once either has such a line, or, with false, when either has more than is kept.
    pub async fn line(&self, wanted: &Regex) -> bool {
        tokio::select! {
            found = self.stdout.line(wanted) => found,
            found = self.stderr.line(wanted) => found,
        }
    }

    /// The one that hears this stream.
    pub(super) fn of(&self, stream: Stream) -> &Ear {
        if stream == Stream::Stderr { &self.stderr } else { &self.stdout }
    }

    /// Neither hears any more.
    pub fn close(&self) {
        self.stdout.close();
        self.stderr.close();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    async fn has(ear: &Ear, wanted: &str) -> bool {
        let wanted = Regex::new(wanted).unwrap();
        timeout(Duration::from_millis(20), ear.line(&wanted)).await.is_ok_and(|found| found)
    }

    #[tokio::test]
    async fn a_line_is_found_once_it_is_whole() {
        let ear = Ear::default();
        ear.hear(b"starting\r\nready to ac");
        assert!(has(&ear, "^starting$").await);
        assert!(!has(&ear, "ready").await, "half a line");
        ear.hear(b"cept\n");
        assert!(has(&ear, "ready to accept$").await);
        assert!(!has(&ear, "startingready").await, "two lines are not one");
        assert!(!has(&ear, "^$").await, "there is no empty line");
        let (waiting, wanted) = (ear.clone(), Regex::new("late").unwrap());
        let waiting = tokio::spawn(async move { waiting.line(&wanted).await });
        tokio::time::sleep(Duration::from_millis(20)).await;
        ear.hear(b"too late\n");
        assert!(timeout(Duration::from_secs(20), waiting).await.unwrap().unwrap());
        assert_eq!(ear.told().unwrap(), b"starting\r\nready to accept\ntoo late\n");
    }

    #[tokio::test]
    async fn no_more_is_kept_than_there_is_room_for() {
        let ear = Ear::default();
        ear.hear(&vec![b'x'; MOST]);
        assert_eq!(ear.told().unwrap().len(), MOST);
        ear.hear(b"\n");
        assert_eq!(ear.told(), None);
        assert_eq!(ear.heard().text.capacity(), 0);
        let over = timeout(Duration::from_secs(20), ear.line(&Regex::new("x").unwrap())).await;
        assert!(!over.unwrap(), "it is waited for in vain");

        let ear = Ear::default();
        ear.hear(b"a\n");
        ear.close();
        ear.hear(b"b\n");
        assert!(ear.told().unwrap().is_empty() && !has(&ear, "[ab]").await);
    }
}
