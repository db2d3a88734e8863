//! How long the steps of a container's life take: what `container-time` measures in the emulated host and `bench`
//! reads.

use serde::{Deserialize, Serialize};

/// Who runs the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The runtime under test.
    Ours,
    /// The same, with a machine that boots.
    Cold,
    /// runc, through containerd's shim for it.
    Runc,
    /// crun, through the same shim.
    Crun,
}

impl Side {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Ours, Self::Cold, Self::Runc, Self::Crun];

    /// For a person, and as a part of ids.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Cold => "cold",
            Self::Runc => "runc",
            Self::Crun => "crun",
        }
    }
}

/// The life of one container, and a shim that was started beside it and never got one. Times are in seconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Life {
    /// The shim's `start`, as containerd calls it, from its beginning to its end.
    pub shim_start: f64,
    /// The call `Create`, in which containerd starts a shim.
    pub create: f64,
    /// The call `Start`.
    pub start: f64,
    /// From before `Create` to the first output.
    pub first_output: f64,
    /// From before `Exec` to the first output of a process beside the container's own.
    pub exec: f64,
    /// From the answer to `Wait`, which tells of the end, to that of `Delete`.
    pub delete: f64,
    /// What the processes that serve the container take of the host's memory, the RAM of a guest left out.
    pub own_mib: f64,
    /// The same with a guest's RAM.
    pub all_mib: f64,
    /// What our shim says of the parts of the creation.
    pub phases: Vec<Phase>,
}

/// A part of a creation, as `supermachine timeline --json` has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// What it is called.
    pub name: String,
    /// When it began, after the first of all.
    pub from_ms: f64,
    /// How long it took.
    pub ms: f64,
}

/// A service that takes its time to start, from before `Create` to its first answer, in seconds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Service {
    /// Of ours, which starts from a warm one.
    pub ours: f64,
    /// Of runc's, which starts at its beginning.
    pub runc: f64,
}

/// A container that is written down and goes on, by how much memory it has changed. Times are in seconds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Saved {
    /// So much.
    pub mib: u32,
    /// The call `Checkpoint`, with what containerd makes of it.
    pub save: f64,
    /// From before `Create` to an answer.
    pub restore: f64,
}

/// Containers that were asked for at once.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Crowd {
    /// So many.
    pub count: u32,
    /// From the first call to the last one's first output, in seconds.
    pub seconds: f64,
    /// What each takes of the host's memory when all are idle, with its guest's RAM.
    pub mib_each: f64,
}

/// Each side once, one after the other.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Round {
    /// Ours.
    pub ours: Life,
    /// Ours, booted.
    pub cold: Life,
    /// runc's.
    pub runc: Life,
    /// crun's.
    pub crun: Life,
    /// A service.
    pub service: Service,
    /// Checkpoints of ours.
    pub saved: Vec<Saved>,
}

/// All rounds in the order in which they were made.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Samples {
    /// Those that went well.
    pub rounds: Vec<Round>,
    /// What went wrong in others, which do not count.
    pub failures: Vec<String>,
    /// After all of them.
    pub crowd: Option<Crowd>,
}
