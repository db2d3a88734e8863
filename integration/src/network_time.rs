//! What a network carries, and how fast it answers: what `network-time` measures in the emulated host and `bench`
//! reads.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Who is at the other end of the cable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// A container of the runtime under test.
    Ours,
    /// A container of runc.
    Runc,
    /// A machine of QEMU, whose packets it moves itself.
    Qemu,
    /// A machine of QEMU, whose packets the host's kernel moves.
    Vhost,
}

impl Side {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Ours, Self::Runc, Self::Qemu, Self::Vhost];

    /// For a person, and as a part of ids.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Runc => "runc",
            Self::Qemu => "qemu",
            Self::Vhost => "vhost",
        }
    }
}

/// What it took while something was measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Packets that went through the host's end of the cable, both ways. Large ones count once.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Processor time of each thread of the monitor, by its name, in seconds.
    pub threads: BTreeMap<String, f64>,
    /// What the hypervisor counts of the machine, in its words.
    pub machine: BTreeMap<String, u64>,
}

/// A figure that is a rate.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Rate {
    /// Bytes or connections.
    pub per_second: f64,
    /// What that took.
    pub cost: Cost,
}

/// How long answers took.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Answers {
    /// Half of them came within, in seconds.
    pub median: f64,
    /// All but one of a hundred came within, in seconds.
    pub p99: f64,
    /// How many there were.
    pub count: u32,
    /// What they took.
    pub cost: Cost,
}

/// One side, measured once.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Network {
    /// TCP from the host, one stream.
    pub to_one: Rate,
    /// Eight of them.
    pub to_eight: Rate,
    /// TCP to the host, one stream.
    pub from_one: Rate,
    /// Eight of them.
    pub from_eight: Rate,
    /// Datagrams that reached the host, sent as fast as they can be.
    pub datagrams: Rate,
    /// Which part of those sent that is, from 0 to 1.
    pub arrived: f64,
    /// One byte there and back over TCP.
    pub answers: Answers,
    /// Connections made and ended, one after the other.
    pub connections: Rate,
}

/// Each side once, one after the other.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Round {
    /// Ours.
    pub ours: Network,
    /// runc's.
    pub runc: Network,
    /// QEMU's.
    pub qemu: Network,
    /// QEMU's with the host's vhost-net, where the host has it and it went well.
    pub vhost: Option<Network>,
}

/// All rounds in the order in which they were made.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Samples {
    /// Those that went well.
    pub rounds: Vec<Round>,
    /// What went wrong, and does not count.
    pub failures: Vec<String>,
}
