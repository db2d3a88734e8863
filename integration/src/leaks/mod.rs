//! What a test left behind: the host before and after it, compared by name.
//!
//! Much of what containerd and the kernel take down goes away a little after the call that asked for it has
//! returned, so the comparison is repeated until nothing differs or a deadline has passed.

mod sources;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

use crate::wait::{Attempt, until};

/// What is looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    /// containerd's socket: its objects are listed through it, and its process found by it.
    pub containerd: PathBuf,
    /// Directories in which files are made for containers.
    pub directories: Vec<PathBuf>,
    /// On a host that others use too, only what has one of these texts in its name counts (the name of a
    /// process is its pid, a space and its program). `None` means that everything does.
    pub only: Option<Vec<String>>,
}

/// The kinds of things that can be left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A process or a zombie.
    Process,
    /// A mount.
    Mount,
    /// A network namespace held by a process or a mount.
    NetworkNamespace,
    /// A network interface of the host.
    NetworkInterface,
    /// A listening unix socket.
    Socket,
    /// A control group.
    Cgroup,
    /// A file or directory.
    File,
    /// A loop device with a file behind it.
    LoopDevice,
    /// A virtual machine the kernel runs.
    VirtualMachine,
    /// What a file descriptor of containerd stands for.
    ContainerdFd,
    /// A container, task, snapshot or lease containerd knows.
    ContainerdObject,
}

impl Kind {
    /// Whether it is a defect too if one goes away that was there before the test. Descriptors are cached
    /// and virtual machines belong to processes, which are watched themselves.
    fn must_stay(self) -> bool {
        !matches!(self, Self::ContainerdFd | Self::VirtualMachine | Self::NetworkNamespace)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Mount => "mount",
            Self::NetworkNamespace => "network namespace",
            Self::NetworkInterface => "network interface",
            Self::Socket => "listening socket",
            Self::Cgroup => "control group",
            Self::File => "file",
            Self::LoopDevice => "loop device",
            Self::VirtualMachine => "virtual machine",
            Self::ContainerdFd => "descriptor of containerd",
            Self::ContainerdObject => "containerd",
        }
    }
}

/// One thing that exists: its kind and a name that stays the same as long as it does.
type Key = (Kind, String);

/// How many there are of a name, and words for a person.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Seen {
    count: u32,
    detail: String,
}

/// The host at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    seen: BTreeMap<Key, Seen>,
}

/// One thing that is there and was not, or was and is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    kind: Kind,
    name: String,
    detail: String,
    before: u32,
    after: u32,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.after > self.before { "left behind" } else { "gone" };
        write!(f, "{sign}: {} {}", self.kind.name(), self.name)?;
        if !self.detail.is_empty() {
            write!(f, " ({})", self.detail)?;
        }
        if self.before.max(self.after) > 1 {
            write!(f, ", {} before, {} now", self.before, self.after)?;
        }
        Ok(())
    }
}

impl Snapshot {
    /// Looks at everything in `scope`. An error means that the host cannot be judged, for example because
    /// containerd does not answer.
    pub fn take(scope: &Scope) -> Result<Self> {
        let mut snapshot = Self::default();
        sources::look(scope, &mut snapshot)?;
        Ok(snapshot)
    }

    /// Looks again until nothing differs from `self` or `deadline` has passed, and returns what differs.
    pub fn settle(&self, scope: &Scope, deadline: Duration) -> Result<Vec<Difference>> {
        let mut last = Vec::new();
        let settled = until("the host to be as before", deadline, || {
            match Self::take(scope).map(|now| self.differences(&now)) {
                Ok(differences) if !differences.is_empty() => {
                    last = differences;
                    Attempt::Pending(String::new())
                }
                equal_or_error => Attempt::Done(equal_or_error),
            }
        });
        settled.unwrap_or(Ok(last))
    }

    /// What `after` has more or less than `self`.
    pub fn differences(&self, after: &Self) -> Vec<Difference> {
        let mut found = Vec::new();
        let nothing = Seen::default();
        for (key, now) in &after.seen {
            let before = self.seen.get(key).unwrap_or(&nothing);
            if now.count > before.count {
                found.push(Difference::of(key, &now.detail, before.count, now.count));
            }
        }
        for (key, before) in self.seen.iter().filter(|((kind, _), _)| kind.must_stay()) {
            let now = after.seen.get(key).unwrap_or(&nothing);
            if now.count < before.count {
                found.push(Difference::of(key, &before.detail, before.count, now.count));
            }
        }
        found
    }

    fn add(&mut self, kind: Kind, name: impl Into<String>, detail: impl Into<String>) {
        let seen = self.seen.entry((kind, name.into())).or_default();
        seen.count += 1;
        seen.detail = detail.into();
    }

    /// Leaves only what has one of `texts` in its name. Details do not count: a command line may well mention
    /// what it is not.
    fn keep_only(&mut self, texts: &[String]) {
        self.seen.retain(|(kind, name), _| {
            // These are containerd's own, whoever else uses the host.
            matches!(kind, Kind::ContainerdFd | Kind::ContainerdObject)
                || texts.iter().any(|text| name.contains(text.as_str()))
        });
    }
}

impl Difference {
    fn of((kind, name): &Key, detail: &str, before: u32, after: u32) -> Self {
        Self { kind: *kind, name: name.clone(), detail: detail.to_owned(), before, after }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(things: &[(Kind, &str)]) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for (kind, name) in things {
            snapshot.add(*kind, *name, "detail");
        }
        snapshot
    }

    #[test]
    fn differences_are_named_in_both_directions() {
        let before = snapshot(&[(Kind::Process, "containerd"), (Kind::Mount, "/proc")]);
        let after = snapshot(&[(Kind::Mount, "/proc"), (Kind::Mount, "/run/rootfs")]);
        let told: Vec<String> = before.differences(&after).iter().map(ToString::to_string).collect();
        assert_eq!(told, ["left behind: mount /run/rootfs (detail)", "gone: process containerd (detail)"]);
        assert_eq!(before.differences(&before), []);
    }

    #[test]
    fn equal_names_are_counted() {
        let before = snapshot(&[(Kind::Mount, "/a")]);
        let after = snapshot(&[(Kind::Mount, "/a"), (Kind::Mount, "/a")]);
        let told = before.differences(&after)[0].to_string();
        assert_eq!(told, "left behind: mount /a (detail), 1 before, 2 now");
        assert_eq!(after.differences(&before).len(), 1);
    }

    #[test]
    fn a_descriptor_may_be_closed() {
        let before = snapshot(&[(Kind::ContainerdFd, "socket"), (Kind::ContainerdFd, "socket")]);
        let after = snapshot(&[(Kind::ContainerdFd, "socket")]);
        assert_eq!(before.differences(&after), []);
        assert_eq!(after.differences(&before).len(), 1);
    }

    #[test]
    fn a_shared_host_counts_only_what_is_ours() {
        let mut all = snapshot(&[
            (Kind::Process, "7 editor"),
            (Kind::Process, "8 containerd-shim"),
            (Kind::ContainerdObject, "lease x"),
        ]);
        all.keep_only(&["containerd-shim".into()]);
        assert_eq!(all.seen.len(), 2);
    }
}
