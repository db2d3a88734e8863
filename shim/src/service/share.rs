//! A machine that several containers share without being a pod, as they are to have one network.
//!
//! It was made for the first of them, and grows for each of the others. It outlives the first, and is not written down any
//! more, as what would go on from there is one container.

use std::sync::atomic::Ordering;

use log::warn;
use runtime_spec::plan::Size;

use super::{Container, Shim, lock};
use crate::cgroup;
use crate::error::Result;
use crate::machine::Machine;

impl Shim {
    /// Another container comes into the machine, for which one of its own would have this size. Returns the memory by
    /// which it has grown.
    pub(super) async fn share_machine(&self, machine: &Machine, size: Size) -> Result<u64> {
        for container in lock(&self.containers).values() {
            if let Some(path) = &container.cgroup {
                cgroup::lift(path);
            }
        }
        machine.make_room(size).await
    }

    /// Another container has come into it, and is there from now on.
    pub(super) fn note_sharing(&self) {
        self.shared.store(true, Ordering::Relaxed);
    }

    /// Why no container of this machine can be written down, if so.
    pub(super) fn obstacle(&self) -> Option<&'static str> {
        let shared = self.shared.load(Ordering::Relaxed);
        shared.then_some("others have been in its machine, which have its network")
    }

    /// The monitor stays in a cgroup of whom it serves, when a container goes in whose cgroup it is.
    pub(super) fn resettle(&self, leaving: &Container, machine: &Machine) {
        let monitor = machine.monitor().pid;
        let Some(from) = leaving.cgroup.as_ref().filter(|path| cgroup::holds(path, monitor)) else { return };
        let others: Vec<_> = lock(&self.containers).values().cloned().collect();
        let mut others = others.iter().filter(|other| other.id != leaving.id);
        let Some(to) = others.find_map(|other| other.cgroup.as_ref().filter(|path| *path != from)) else {
            return;
        };
        cgroup::lift(to);
        if let Err(error) = cgroup::enter(to, monitor) {
            warn!("moving the monitor from the cgroup {} to {}: {error}", from.display(), to.display());
        }
    }
}
