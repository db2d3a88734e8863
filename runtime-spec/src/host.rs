//! What planning knows of the host: the caller looks, this crate only thinks.

use std::path::{Path, PathBuf};

/// Facts of the host.
#[derive(Clone, Copy)]
pub struct Host<'a> {
    /// Processors that are online.
    pub cpus: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// Its name, which a container without a UTS namespace of its own sees.
    pub hostname: &'a str,
    /// How to look at a path.
    pub files: &'a dyn Files,
}

/// A way to look at the host's files.
pub trait Files {
    /// What is at an absolute path, symbolic links followed.
    fn look(&self, path: &Path) -> Found;

    /// The size in bytes of the tmpfs that is mounted right at `path`, if one is. A tmpfs without a limit
    /// has the size that the kernel reports for it.
    fn tmpfs_size(&self, path: &Path) -> Option<u64>;
}

/// What is at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Nothing, or nothing that can be reached.
    Missing,
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A unix socket.
    Socket(Owner),
    /// A named pipe.
    Fifo,
    /// A character device.
    Character {
        /// Its driver.
        major: i64,
        /// Which of the driver's.
        minor: i64,
    },
    /// A block device.
    Block {
        /// Its driver.
        major: i64,
        /// Which of the driver's.
        minor: i64,
    },
    /// A namespace (`/proc/PID/ns/net`, or such a file bound elsewhere).
    Namespace {
        /// Whether it is the one of the host's process 1.
        initial: bool,
        /// Its number, by which it is known whatever path leads to it.
        id: u64,
    },
}

/// Whose a file is and who may use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Its permission bits.
    pub mode: u32,
}

/// The pod whose machine runs already, for containers that join it. Containers without a pod that share a network
/// namespace share a machine as well, and are to it what those of a pod are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pod {
    /// The id of the sandbox.
    pub id: String,
    /// The processes that stand for its containers on the host, the sandbox's own among them.
    pub tasks: Vec<Task>,
    /// A path to the network namespace of the machine, if another than those of its tasks is taken for it.
    pub netns: Option<PathBuf>,
    /// Drives of the machine in which there is no disk.
    pub free_drives: usize,
}

/// A container of a pod, as the host sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// The container.
    pub container: String,
    /// The host process that stands for it.
    pub pid: u32,
}
