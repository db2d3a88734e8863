//! How long is waited for what. Every wait of the shim has its deadline here, so that they can be compared.

use std::time::Duration;

/// The boot of a machine, from its monitor's start until its agent serves.
pub const BOOT: Duration = Duration::from_secs(60);
/// The monitor's greeting on its control socket.
pub const MONITOR_HELLO: Duration = Duration::from_secs(20);
/// A connection to the agent, once it serves.
pub const DIAL: Duration = Duration::from_secs(10);
/// A call of the agent that has little to do.
pub const AGENT_CALL: Duration = Duration::from_secs(30);
/// A call of the agent that removes something; a guest that does not answer is turned off.
pub const AGENT_DELETE: Duration = Duration::from_secs(20);
/// A call of the agent that makes or starts something.
pub const AGENT_WORK: Duration = Duration::from_secs(60);
/// A call of the agent on which an answer does not depend.
pub const AGENT_GLANCE: Duration = Duration::from_millis(500);
/// How long the agent holds a call for events open.
pub const AGENT_EVENTS: Duration = Duration::from_secs(30);
/// Before it is asked once more what processes of a guest watch, when it does not answer.
pub const WATCHED_AGAIN: Duration = Duration::from_secs(1);
/// Before a stream that came before its process was announced comes again; each time twice as long.
pub const ANNOUNCED_AGAIN: Duration = Duration::from_millis(10);
/// But no longer than this.
pub const ANNOUNCED_AGAIN_MOST: Duration = Duration::from_millis(160);
/// The end of a machine whose agent was asked to turn it off; then it is killed.
pub const POWER_OFF: Duration = Duration::from_secs(5);
/// The end of a process that was killed.
pub const KILLED: Duration = Duration::from_secs(5);
/// What a process has written is waited for this long after its exit, when its reader is slow.
pub const DRAIN: Duration = Duration::from_secs(10);
/// A stream that nobody ends and on which nothing has come for this long after its process's exit has been drained: a
/// grandchild may hold it for ever.
pub const IDLE: Duration = Duration::from_secs(1);
/// Exits of a container's other processes, after that of its first.
pub const LAST_EXITS: Duration = Duration::from_secs(5);
/// One event on its way to containerd.
pub const EVENT: Duration = Duration::from_secs(5);
/// The events that are left when the shim ends.
pub const FLUSH: Duration = Duration::from_secs(5);
/// A logging process's sign that it is ready.
pub const LOGGER_READY: Duration = Duration::from_secs(10);
/// A logging process's end, after that of what it logs; then it gets SIGTERM, and after as long again SIGKILL.
pub const LOGGER_END: Duration = Duration::from_secs(6);
/// A hook that has no timeout of its own.
pub const HOOK: Duration = Duration::from_secs(120);
/// A cgroup's removal, after the processes in it have ended.
pub const CGROUP: Duration = Duration::from_secs(2);
/// What a `start` asks of another shim, or of the containerd binary.
pub const ASK: Duration = Duration::from_secs(5);
/// For what a monitor that fails has to say, and its end.
pub const LAST_WORDS: Duration = Duration::from_secs(2);
/// A restored machine, from its monitor's start until its agent has answered.
pub const RESTORE: Duration = Duration::from_secs(30);
/// A template that somebody else makes; a machine boots without one then.
pub const TEMPLATE: Duration = Duration::from_secs(90);
/// A machine that is to be saved, until it stands still.
pub const STANDSTILL: Duration = Duration::from_secs(10);
/// The writing of a machine that is saved.
pub const SAVE: Duration = Duration::from_secs(60);
/// What is on its way on the streams of a container that is to be saved.
pub const HOLD: Duration = Duration::from_secs(20);
/// The writing of a machine with all that its containers have in memory.
pub const CHECKPOINT: Duration = Duration::from_secs(600);
/// A checkpoint that somebody else unpacks.
pub const UNPACK: Duration = Duration::from_secs(600);
/// The copying of what a container has written to its root file system.
pub const UPPER: Duration = Duration::from_secs(30);
/// A container that says when it is warm, from its start until then.
pub const WARM: Duration = Duration::from_secs(300);
/// A call of the monitor that has little to do.
pub const MONITOR_CALL: Duration = Duration::from_secs(10);
/// Memory that is plugged into a machine, until all of it is there.
pub const PLUG: Duration = Duration::from_secs(60);
/// Between two looks at a machine that does not go on.
pub const LOOK_AGAIN: Duration = Duration::from_millis(300);
/// Between two attempts to give a guest what its network has become.
pub const NETWORK_AGAIN: Duration = Duration::from_secs(5);
/// A connection to who has a network behind a socket.
pub const UPLINK: Duration = Duration::from_secs(5);
/// Between two looks whether there still is one.
pub const UPLINK_LOOK: Duration = Duration::from_secs(1);
/// The guest's answer to a connection to its localhost.
pub const FORWARD: Duration = Duration::from_secs(15);
/// A resolver's answer to a question for a name; who has asked asks again before.
pub const ANSWER: Duration = Duration::from_secs(15);
