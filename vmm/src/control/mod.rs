//! The socket on which the shim, or an operator, drives one machine.
//!
//! A stream of frames over a unix socket: `protocol` is what they say, `frame` how they are cut and how
//! file descriptors travel with them, [`Client`] the side of whoever drives, [`Server`] the machine's.
//! Types and client know nothing of hypervisors.
//!
//! The payload is JSON. It describes itself, so the two sides may differ in age by fields that one does
//! not know; a person can read it off the wire; and a machine's control carries a handful of requests,
//! whose microseconds nobody misses.
//!
//! A connection starts with the client naming the versions it speaks and the server choosing one. Then
//! each request gets one reply, in order, and events come whenever they happen. Every length has a cap,
//! every wait a deadline: one who sends half a frame, or does not read, is cut off, and the machine goes on.

mod client;
mod frame;
mod protocol;
#[cfg(not(loom))]
mod server;
#[cfg(not(loom))]
mod stats;
#[cfg(not(loom))]
mod work;

pub use client::{Client, Error as ClientError};
pub use frame::{Error as FrameError, FDS_MAX, FRAME_MAX, Received, Receiver, frame, send};
pub use protocol::{
    Answer, Call, Console, Crash, Device, Event, Exits, Hello, Look, Memory, Message, Outcome, QueueSight,
    Ram, Refusal, RefusalKind, Reply, Request, Sight, Stats, Status, VERSIONS, Welcome,
};
#[cfg(not(loom))]
pub use server::{Cable, Error as ServerError, OnCable, Options, Prepared, Server};
