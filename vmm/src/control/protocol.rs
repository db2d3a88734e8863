//! What the two sides say. Fields are only ever added, with a default; what changes the meaning of
//! anything is a new version.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The versions that this build speaks, the newest last.
pub const VERSIONS: &[u32] = &[1];

/// The first message, from the client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The versions it speaks.
    pub versions: Vec<u32>,
}

/// The answer to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The version of all that follows.
    pub version: u32,
    /// The monitor's own version, for people.
    pub monitor: String,
    /// The monitor's process.
    pub pid: u32,
    /// What the machine does.
    pub status: Status,
}

/// A request, with the client's number for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// Comes back with the answer.
    pub id: u64,
    /// What is wanted.
    pub request: Request,
}

/// What can be wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// What the machine does. Answered by [`Reply::State`].
    State,
    /// The guest stands still: all of it, or, when it takes longer than that, nothing of it.
    Pause {
        /// The deadline; more than a minute is a minute.
        within_ms: u64,
    },
    /// The guest goes on.
    Resume,
    /// Presses the power button; what the guest makes of it is its business.
    PowerButton,
    /// Ends the guest where it is; the monitor then ends as it always does.
    Stop,
    /// Ends the monitor, at once and without cleaning up.
    Kill,
    /// Gives the guest more, or less. The answer says that it has been asked; how far it has come is in
    /// [`Stats`].
    Resize {
        /// Bytes of RAM in all.
        #[serde(default)]
        memory: Option<u64>,
        /// Processors in all.
        #[serde(default)]
        vcpus: Option<u32>,
    },
    /// What has happened so far. Answered by [`Reply::Stats`].
    Stats,
    /// Puts a prepared tap into a network slot, instead of the one it may have had: at most as many
    /// descriptors with this frame as the slot has queue pairs. The guest sees its cable plugged in, and may use no more
    /// pairs than that; address and MTU are for the guest to set.
    AttachTap {
        /// The slot's name.
        slot: String,
        /// As many descriptors of `/dev/vhost-net` follow: the host's kernel is to move the packets, where it can.
        #[serde(default)]
        vhost: bool,
    },
    /// Puts a socket, the descriptor with this frame, into a network slot, instead of what it may have had: a unix socket
    /// that is connected with who has a network. On a stream each frame is behind its length, four bytes, the highest
    /// first; otherwise each is a datagram. The guest may use one queue pair.
    AttachSocket {
        /// The slot's name.
        slot: String,
    },
    /// Puts a disk, the descriptor with this frame, into a drive that has none: an image or a block device, open for what
    /// it is to be used for. The guest sees it when its driver begins.
    InsertDisk {
        /// The drive's name.
        drive: String,
        /// The disk's serial number, by which a guest finds it.
        serial: String,
        /// The guest may not write to it.
        #[serde(default)]
        read_only: bool,
    },
    /// Takes the disk out of a drive, whose driver must not be at work. One that has none is left as it is.
    EjectDisk {
        /// The drive's name.
        drive: String,
    },
    /// Writes the machine, which must be paused, into the two descriptors with this frame: empty files, open
    /// for writing, for its state and for its RAM. Naming and syncing them is the client's business. Answered
    /// by [`Reply::Snapshot`]. The machine stays paused.
    Snapshot {
        /// The RAM as one run of pages behind the other, for carrying, instead of with holes, for mapping.
        #[serde(default)]
        packed: bool,
        /// Of the RAM only what is not as it was when the machine was restored, for mapping over the RAM's file of the
        /// snapshot from which it was.
        #[serde(default)]
        over: bool,
    },
    /// Puts the machine, which must be paused, back to where the snapshot that it was restored from was taken. It stays
    /// paused.
    Reset,
    /// Writes down into the descriptor with this frame, an empty file, what the machine has used of its memory since it was restored, for those who are restored after it.
    RecordUse,
    /// Where the machine, which must be paused, stands: for people. Answered by [`Reply::Look`]. It stays paused.
    Look,
    /// The console's back-log. Answered by [`Reply::Log`].
    ConsoleLog,
    /// Joins the socket, the descriptor with this frame, to the console, in both directions. Whoever
    /// reads too slowly is let go.
    ConsoleAttach {
        /// Whether the back-log comes first.
        replay: bool,
    },
    /// Hear of events from now on.
    Events,
}

/// What the server sends after the welcome.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    /// To the hello.
    Welcome(Welcome),
    /// To the hello, or to something that is no frame; the server hangs up after it.
    Goodbye(Refusal),
    /// To a call.
    Reply(Answer),
    /// To nobody in particular.
    Event(Event),
}

/// How a call went.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// The call's number.
    pub id: u64,
    /// What came of it.
    pub result: Result<Reply, Refusal>,
}

/// A request was granted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// There is nothing to say.
    Done,
    /// What the machine does.
    State {
        /// That.
        status: Status,
        /// How it ended, once it has.
        #[serde(default)]
        outcome: Option<Outcome>,
    },
    /// What has happened so far.
    Stats(Box<Stats>),
    /// Where the machine stands.
    Look(Look),
    /// A snapshot was written.
    Snapshot {
        /// Length of the RAM's file.
        memory: u64,
        /// Bytes of its pages that are not all zeroes.
        data: u64,
    },
    /// What the console shows; bytes that are no UTF-8 are replaced.
    Log {
        /// The text.
        text: String,
        /// Bytes that the guest has written in all.
        written: u64,
    },
}

/// A request was not granted; nothing has changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{why}")]
pub struct Refusal {
    /// For programs.
    pub kind: RefusalKind,
    /// For people: what was attempted, on what, and what mends it.
    pub why: String,
}

/// Why not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalKind {
    /// This machine cannot do that.
    Unsupported,
    /// The machine's state does not allow it.
    State,
    /// It took too long, and has been undone.
    Deadline,
    /// The request makes no sense.
    Invalid,
    /// The host, or the hypervisor, failed.
    Failed,
    /// A kind that this side does not know.
    #[serde(other)]
    Unknown,
}

/// What a machine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Its guest runs.
    Running,
    /// Its guest stands still, also before its first instruction.
    Paused,
    /// It is over.
    Ended,
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The guest turned itself off.
    PowerOff,
    /// The guest wants to start again.
    Reset,
    /// The guest says that its kernel has crashed.
    GuestPanic,
    /// The guest drove a processor into a state without a way out.
    Crash(Crash),
    /// The host stopped it.
    Stopped,
    /// The hypervisor failed.
    Failed(String),
}

/// The state in which a processor was given up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Crash {
    /// Which processor.
    pub vcpu: u32,
    /// What the hypervisor said.
    pub reason: String,
    /// Its registers, as text, where they could still be read.
    pub registers: Option<String>,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The machine runs, or stands still.
    Status(Status),
    /// The guest printed a line with a marker in it. A hint: any process in the guest may print.
    Marker(u32),
    /// The machine is over. The last message.
    Ended(Outcome),
    /// Events were dropped, because this client did not read.
    Lost(u64),
}

/// What has happened so far.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Milliseconds since the server was started.
    pub uptime_ms: u64,
    /// Exits of each processor.
    pub vcpus: Vec<Exits>,
    /// Each virtio device.
    pub devices: Vec<Device>,
    /// The console.
    pub console: Console,
    /// The guest's RAM.
    #[serde(default)]
    pub ram: Ram,
    /// Memory of the host, where it can tell.
    pub memory: Option<Memory>,
}

/// How much RAM the guest has, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ram {
    /// What it booted with, which is the least.
    pub boot: u64,
    /// What it can be asked to use at most.
    pub max: u64,
    /// What it was asked to use.
    pub requested: u64,
    /// What it uses.
    pub actual: u64,
}

/// Exits of a processor to the monitor, by kind. Those that the hypervisor serves are not among them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exits {
    /// Loads and stores that are not to RAM.
    pub memory: u64,
    /// `in` and `out`.
    pub ports: u64,
    /// Calls of the firmware.
    #[serde(default)]
    pub calls: u64,
    /// Kicks.
    pub kicks: u64,
    /// Of the accesses, those that no device answered.
    pub unclaimed: u64,
}

/// A virtio device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its name.
    pub id: String,
    /// Its device id, as virtio counts them.
    pub kind: u32,
    /// Requests that were given back.
    pub requests: u64,
    /// Bytes written to guest RAM by them.
    pub written: u64,
    /// Interrupts.
    pub interrupts: u64,
    /// Resets by the driver, of which the first comes before its first use.
    pub resets: u64,
}

/// The console.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Console {
    /// Bytes the guest wrote.
    pub bytes: u64,
    /// Bytes of these that its sink did not take.
    pub dropped: u64,
}

/// Memory of the host, in bytes. Shares divide what is shared with other processes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// The guest's RAM, with all that it can be given.
    pub guest: u64,
    /// Of it, what the host keeps in memory.
    pub guest_resident: u64,
    /// Of it, this machine's share.
    pub guest_share: u64,
    /// What the host keeps in memory of the monitor itself.
    pub monitor_resident: u64,
    /// The monitor's share.
    pub monitor_share: u64,
    /// Of the monitor's, what nobody else has.
    pub monitor_private: u64,
}

/// Where a machine stands that is paused.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Look {
    /// The registers of each processor, in words.
    pub processors: Vec<String>,
    /// Each virtio device.
    pub devices: Vec<Sight>,
}

/// How far a virtio device and its driver have come.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sight {
    /// Its name.
    pub id: String,
    /// Its status register.
    pub status: u32,
    /// What the driver was interrupted for and may not have heard of.
    pub unheard: u32,
    /// The queues that the driver uses.
    pub queues: Vec<QueueSight>,
}

/// How far a queue is, in counts that run on around 65,536.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueSight {
    /// Which one.
    pub index: usize,
    /// Requests that the driver has offered, where that can be read.
    #[serde(default)]
    pub offered: Option<u16>,
    /// Of them, those that the device has taken.
    pub taken: u16,
    /// Of them, those that it has given back.
    pub given: u16,
}

impl fmt::Display for Sight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} status {:#x}, unheard {:#x}", self.id, self.status, self.unheard)?;
        for QueueSight { index, offered, taken, given } in &self.queues {
            match offered {
                Some(offered) => write!(f, ", queue {index} {offered}/{taken}/{given}")?,
                None => write!(f, ", queue {index} ?/{taken}/{given}")?,
            }
        }
        Ok(())
    }
}

/// A line for each processor and device; of queues what was offered, taken and given back.
impl fmt::Display for Look {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (id, registers) in self.processors.iter().enumerate() {
            writeln!(f, "vcpu {id} {registers}")?;
        }
        for device in &self.devices {
            writeln!(f, "{device}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_on_the_wire_are_these() {
        let call = |text: &str| serde_json::from_str::<Call>(text).map(|call| call.request).ok();
        for (text, request) in [
            (r#"{"id":1,"request":"state"}"#, Some(Request::State)),
            (r#"{"id":1,"request":{"pause":{"within_ms":5}}}"#, Some(Request::Pause { within_ms: 5 })),
            (
                r#"{"id":1,"request":{"resize":{"memory":5}}}"#,
                Some(Request::Resize { memory: Some(5), vcpus: None }),
            ),
            (r#"{"id":1,"request":"power_button","new":"field"}"#, Some(Request::PowerButton)),
            (r#"{"id":1,"request":"fly"}"#, None),
            (r#"{"id":-1,"request":"state"}"#, None),
            (r#"{"request":"state"}"#, None),
            ("", None),
            ("null", None),
        ] {
            assert_eq!(call(text), request, "{text}");
        }
        let reply = Message::Reply(Answer {
            id: 7,
            result: Err(Refusal { kind: RefusalKind::State, why: "no".into() }),
        });
        assert_eq!(
            serde_json::to_string(&reply).unwrap(),
            r#"{"reply":{"id":7,"result":{"Err":{"kind":"state","why":"no"}}}}"#
        );
        let newer: Refusal = serde_json::from_str(r#"{"kind":"moon_phase","why":"x"}"#).unwrap();
        assert_eq!(newer.kind, RefusalKind::Unknown);
    }
}
