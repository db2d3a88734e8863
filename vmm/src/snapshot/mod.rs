//! Snapshots: a machine on disk, from which any number of machines can go on.
//!
//! A snapshot is a directory of two files, or three. [`STATE_FILE`] is small and read whole: a [`Header`], which says what
//! the snapshot is and where it can go on, and the [`MachineState`], what every part of the machine has to know.
//! [`MEMORY_FILE`] is the guest's RAM, region behind region, with holes where there is nothing but zeroes. It is
//! mapped privately by those who go on from it, so they share what none of them changes; for as long as one of them
//! lives it must not be written to, but it may be removed.
//!
//! One that is taken of a machine that was restored can do with what the machine has changed: then its memory lies over that of
//! the snapshot from which the machine came, which is in the directory as [`BASE_FILE`], a link to the same file. There is never
//! more than one below: who is saved like that again is saved over the same base.
//!
//! What is read is believed nowhere: lengths are compared with the file's before anything is made of them, both
//! parts of the state have a checksum, and there is no default for what is missing. A change of any type in the
//! state is a new [`EPOCH`], since a snapshot of another one is of no use: it can be made again.

mod ahead;
mod error;
mod file;
mod header;
mod layers;
mod make;
mod memory;
mod pack;
mod presence;
mod state;
#[cfg(test)]
mod tests;

pub(crate) use ahead::write_ahead;
pub use ahead::{AHEAD_FILE, Ahead, record as record_use};
pub use error::Error;
pub use file::{
    BASE_FILE, MEMORY_FILE, STATE_FILE, Snapshot, read_header, read_state, sealed, verify, write_state,
};
pub use header::{EPOCH, Header, Slot};
pub use layers::{Base, Extent, Layers};
pub use make::{is_aside, link, make, make_over};
pub(crate) use memory::in_regions;
pub use memory::{Form, Written, restored as restore_memory, rewind as rewind_memory, write as write_memory};
pub use pack::unpack;
pub use state::{MachineState, Shape};
