//! Running processors: the loop that serves their exits, and the epoch word by which they are
//! paused, resumed and stopped together.

#[cfg(not(loom))]
mod desk;
mod epoch;
#[cfg(not(loom))]
mod run;

#[cfg(not(loom))]
pub use desk::Desk;
pub use epoch::{Deadline, Epoch, Go, Member, Phase};
#[cfg(not(loom))]
pub use run::{Buses, Counters, Counts, Ended, Power, run};
