//! Whose memory has run out: the kernel counts in a file of the cgroup, and says when it has changed.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use anyhow::{Context, Result};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

use crate::container::Container;
use crate::polled;

const FILE: &str = "memory.events";

/// Watches all containers. There may be few instances of what the kernel offers, so this is one.
#[derive(Clone)]
pub struct Watcher(Arc<Shared>);

struct Shared {
    inotify: Inotify,
    watched: Mutex<HashMap<WatchDescriptor, Weak<Container>>>,
}

impl Watcher {
    /// Begins to watch, in a task of its own.
    pub fn start() -> Result<Self> {
        let inotify =
            Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).context("making inotify")?;
        let shared = Arc::new(Shared { inotify, watched: Mutex::default() });
        let fd = polled(shared.inotify.as_fd().try_clone_to_owned()?).context("waiting for inotify")?;
        let also = Arc::clone(&shared);
        tokio::spawn(async move {
            while let Ok(mut ready) = fd.readable().await {
                match also.inotify.read_events() {
                    Ok(events) => events.iter().for_each(|event| also.look(event.wd)),
                    Err(_) => ready.clear_ready(),
                }
            }
        });
        Ok(Self(shared))
    }

    /// Watches one more, until its cgroup is removed.
    pub fn watch(&self, container: &Arc<Container>) -> Result<()> {
        let path = container.cgroup.path().join(FILE);
        let watch =
            self.0.inotify.add_watch(&path, AddWatchFlags::IN_MODIFY).context("watching memory.events")?;
        let mut watched = self.0.watched.lock().unwrap_or_else(PoisonError::into_inner);
        watched.retain(|_, container| container.strong_count() > 0);
        watched.insert(watch, Arc::downgrade(container));
        Ok(())
    }
}

impl Shared {
    fn look(&self, watch: WatchDescriptor) {
        let watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(container) = watched.get(&watch).and_then(Weak::upgrade) {
            drop(watched);
            container.look_at_memory();
        }
    }
}
